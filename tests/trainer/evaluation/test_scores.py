"""Every metric against an independent implementation or numbers worked by hand, and the intervals of scores."""

import csv
import math
import re
import socket
from collections import Counter
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import evaluate
import numpy as np
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from ftlaunch.errors import UserError
from ftlaunch.recipe.stages import METRICS
from fttrain.answering.choices import right_ones
from fttrain.evaluation import metrics as shipped
from fttrain.evaluation.scoring import Inputs, Scored, gaps, load_metric, need_of, score
from fttrain.evaluation.words import last_number, normalized

E2E = Path(__file__).parents[4] / "shared" / "data" / "e2e_dev.csv"
ANSWERS = [
    "The Lantern is a cheap Thai place by the harbour.",
    "The old mill serves breakfast, and children are welcome there.",
    "Nobody eats at the Crown any more: the Crown is empty",
]
REFERENCES = [
    [
        "The Lantern is a Thai place near the harbour, and it is cheap.",
        "By the harbour, the Lantern sells cheap Thai food.",
    ],
    ["The Old Mill serves breakfast; children are welcome."],
    ["At the Crown nobody eats any more, they say.", "Nobody eats at the Crown now.", "The Crown is empty."],
]


def scores(metric: str, answers: list[str] = ANSWERS, references: list[list[str]] = REFERENCES) -> dict[str, float]:
    return load_metric(metric).compute(predictions=answers, references=references)


def scored(metrics: list[str], answers: list[str], references: list[list[str]] = REFERENCES) -> Scored:
    return score(metrics, {"answers": Inputs(answers, references)}, 500, seed=1)


@pytest.fixture(scope="module")
def _modules_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where `evaluate` copies the modules that it loads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.mark.usefixtures("_modules_here")
def test_the_evaluate_library_loads_each_by_its_path_and_no_network_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in METRICS:
        metric = evaluate.load(str(Path(shipped.__file__).with_name(f"{name}.py")), keep_in_memory=True)
        assert isinstance(metric, evaluate.Metric)
        assert type(metric).__name__ == type(load_metric(name)).__name__
        assert metric.description


def test_with_one_reference_nist_is_that_of_nltk() -> None:
    found = scores("nist", ANSWERS, [references[:1] for references in REFERENCES])
    assert found["nist"] == pytest.approx(3.7614468869211146)  # nltk 3.10.4, corpus_nist


def test_bleu_and_nist_with_several_are_those_of_the_e2e_challenge() -> None:
    told = (47.156632089063606, 4.707946293668453)  # by e2e-metrics, measure_scores.py -p
    assert (scores("bleu")["bleu"], scores("nist")["nist"]) == pytest.approx(told)


def test_people_score_each_other_as_the_e2e_challenges_scorer_has_it() -> None:
    if not E2E.exists():
        pytest.skip(f"{E2E} is not there")
    references: dict[str, list[str]] = {}
    with E2E.open() as file:
        for row in csv.DictReader(file):
            references.setdefault(row["mr"], []).append(row["ref"])
    people = [texts[0] for texts in references.values()]
    others = [texts[1:] for texts in references.values()]
    first = [texts[:1] for texts in others]
    assert (len(people), sum(map(len, others))) == (547, 4125)
    assert scores("bleu", people, others)["bleu"] == pytest.approx(59.95345944253415)
    assert scores("nist", people, others)["nist"] == pytest.approx(8.578516297666646)
    assert scores("bleu", people, first)["bleu"] == pytest.approx(28.4918002687153)
    assert scores("nist", people, first)["nist"] == pytest.approx(4.84153676385676)


def test_bleu_and_chrf_are_sacrebleus() -> None:
    answers, references = [*ANSWERS, "", "Ünïcode — “quoted”"], [*REFERENCES, ["x"], ['Ünïcode - "quoted"', "no"]]
    streams = [list(stream) for stream in zip_longest(*references)]
    bleu = sacrebleu.corpus_bleu(answers, streams, lowercase=True, smooth_method="none").score
    assert scores("bleu", answers, references)["bleu"] == pytest.approx(bleu)
    assert scores("chrf", answers, references)["chrf"] == pytest.approx(sacrebleu.corpus_chrf(answers, streams).score)


def test_cider_is_that_of_the_coco_challenge() -> None:
    assert scores("cider")["cider"] == pytest.approx(3.5105115600299217)  # pycocoevalcap 1.2, on the same words


def test_meteor_goes_by_words_and_stems() -> None:
    """By the paper's formulas: F with recall nine times as heavy, less half the cubed share of chunks."""
    answer, references = "cats were running fast today", ["a cat runs fast", "dogs bark"]
    precision, recall, penalty = 3 / 5, 3 / 4, 0.5 * (2 / 3) ** 3  # "cat", and "run fast" in one chunk
    expected = precision * recall / (0.9 * precision + 0.1 * recall) * (1 - penalty)
    assert scores("meteor_stem", [answer], [references])["meteor_stem"] == pytest.approx(100 * expected)
    assert scores("meteor_stem", ["b c a"], [["a b c"]])["meteor_stem"] == pytest.approx(100 * (1 - 0.5 * (2 / 3) ** 3))


def lcs(first: list[str], second: list[str]) -> int:
    if not first or not second:
        return 0
    if first[-1] == second[-1]:
        return 1 + lcs(first[:-1], second[:-1])
    return max(lcs(first[:-1], second), lcs(first, second[:-1]))


def test_rouge_is_counted_with_every_reference_and_stemmed() -> None:
    answer, references = "cats are running fast", ["the cat ran", "a cat runs fast"]
    found = scores("rouge", [answer], [references])
    said, told = ["cat", "are", "run", "fast"], ["a", "cat", "run", "fast"]  # by Porter's stemmer
    assert found["rouge1"] == pytest.approx(100 * 2 * 3 / 8)
    assert found["rouge2"] == pytest.approx(100 * 2 * 1 / 6)
    assert found["rougeL"] == pytest.approx(100 * 2 * lcs(said, told) / 8)


def test_rouge_lsum_goes_by_sentence() -> None:
    answer, reference = "B is here. A is there.", "A is there. B is here."
    found = scores("rouge", [answer], [[reference]])
    lines = RougeScorer(["rougeLsum"]).score(reference.replace(". ", ".\n"), answer.replace(". ", ".\n"))
    assert found["rougeLsum"] == pytest.approx(100 * lines["rougeLsum"].fmeasure)
    assert found["rougeLsum"] > found["rougeL"]


def test_coco_rouge_l_takes_the_best_precision_and_the_best_recall_of_any_reference() -> None:
    found = scores("coco_rouge_l", ["a b c d"], [["a x c d e f g h", "b c"]])
    precision, recall, weight = 3 / 4, 2 / 2, 1.2**2  # "a c d" of the answer; "b c" of the second reference
    expected = 100 * (1 + weight) * precision * recall / (recall + weight * precision)
    assert found["rouge_l"] == pytest.approx(expected)
    assert scores("coco_rouge_l", ["x"], [["a b"]])["rouge_l"] == 0


@pytest.mark.parametrize("name", [name for name in METRICS if need_of(name) == "answers"])
def test_an_empty_answer_scores_nothing_and_breaks_nothing(name: str) -> None:
    found = scores(name, ["", "q"], [["a b"], ["b"]])
    assert set(found.values()) == {0.0}


def squad_f1(said: str, told: str) -> float:
    def bag(text: str) -> Counter[str]:
        return Counter(word for word in re.findall(r"\w+", text.lower()) if word not in ("a", "an", "the"))

    common = (bag(said) & bag(told)).total()
    precision, recall = common / max(bag(said).total(), 1), common / max(bag(told).total(), 1)
    return 2 * precision * recall / (precision + recall) if common else 0.0


def test_token_f1_and_exact_match_are_squads() -> None:
    expected = [max(squad_f1(said, one) for one in told) for said, told in zip(ANSWERS, REFERENCES, strict=True)]
    assert scores("token_f1")["token_f1"] == pytest.approx(100 * sum(expected) / 3)
    answers, references = ["The Eiffel-Tower!", "Rome", "a"], [["x", "eiffeltower"], ["Paris"], ["the"]]
    assert normalized("The Eiffel-Tower!") == "eiffeltower"
    assert scores("exact_match", answers, references)["exact_match"] == pytest.approx(100 * 2 / 3)


def test_token_position_match_is_by_place_and_over_all_words() -> None:
    found = scores("token_position_match", ["a b c", "x a b"], [["a q c d"], ["a b"]])
    assert found["token_position_match"] == pytest.approx(100 * (2 + 0) / (4 + 2))
    two = scores("token_position_match", ["a b"], [["z z z", "a c"]])
    assert two["token_position_match"] == pytest.approx(50)


@pytest.mark.parametrize(
    ("text", "number"), [("so 1,234.50 in all.", 1234.5), ("-3", -3), ("7 then #### 8", 8), ("none", None)]
)
def test_the_final_number_of_an_answer(text: str, number: float | None) -> None:
    assert last_number(text) == number
    found = scores("final_number", [text, "8"], [["it is 8"], ["2 * 4 = 8\n#### 8"]])
    assert found["final_number"] == (100 if number == 8 else 50)


def test_choices_are_counted_whole_and_by_length() -> None:
    predictions = [[[-4.0, 8], [-3.0, 1]], [[-1.0, 2], [-2.0, 2]], [[-1.0, 1], [-1.0, 1]]]
    found = load_metric("multiple_choice").compute(predictions=predictions, references=[0, 0, 0])
    assert found["choice_accuracy"] == pytest.approx(100 * (0 + 1 + 0.5) / 3)
    assert found["choice_accuracy_by_length"] == pytest.approx(100 * (1 + 1 + 0.5) / 3)
    pairs = load_metric("preference_accuracy").compute(predictions=predictions, references=[0, 0, 0])
    assert list(pairs.values()) == list(found.values())


def test_perplexity_weighs_tokens_and_not_rows() -> None:
    found = load_metric("perplexity").compute(predictions=[3.0, 1.0], references=[1, 9])
    assert found == pytest.approx({"loss": 0.4, "perplexity": math.exp(0.4)})


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([1, 0], [1, 0]),
        (["B", "a"], [1, 0]),
        (["red", "green"], [0, 1]),
        (["0", "1"], [0, 1]),
    ],
)
def test_the_right_choice_is_told_by_index_letter_or_text(labels: list[object], expected: list[int]) -> None:
    assert right_ones(labels, [["red", "green"]] * 2, ["f:1", "f:2"]) == expected


@pytest.mark.parametrize("labels", [["1", "2"], ["1", "A"], [2, 0], [None, 0], [True, 0], ["blue", "A"]])
def test_a_label_that_could_mean_two_things_is_refused(labels: list[object]) -> None:
    with pytest.raises(UserError, match="it cannot be told which choice"):
        right_ones(labels, [["red", "green"]] * 2, ["f:1", "f:2"])


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    draw = np.random.default_rng(0)
    right = draw.random(400) < 0.3
    answers = ["yes" if one else "no" for one in right]
    found = scored(["exact_match"], answers, [["yes"]] * 400).scores["exact_match"]
    half = 196 * math.sqrt(right.mean() * (1 - right.mean()) / 400)
    assert found.value == pytest.approx(100 * right.mean())
    assert found.interval == pytest.approx((found.value - half, found.value + half), abs=0.8)


def test_a_resample_of_a_corpus_score_is_the_score_of_the_resample() -> None:
    metric = load_metric("bleu")
    statistics = metric.statistics(ANSWERS, REFERENCES)
    drawn = [0, 0, 2]
    weights = np.bincount(drawn, minlength=3)[None]
    again = scores("bleu", [ANSWERS[at] for at in drawn], [REFERENCES[at] for at in drawn])
    assert metric.combine(weights @ statistics)["bleu"][0] == pytest.approx(again["bleu"])


def test_two_models_are_compared_over_the_same_resamples() -> None:
    """One that is better at every prompt is better for sure, though the prompts themselves differ a lot."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, 30, 60)
    references = [[" ".join(["w"] * int(length))] for length in lengths]
    worse = scored(["token_f1"], [" ".join(["w"] * max(int(length) // 2, 1)) for length in lengths], references)
    better = scored(["token_f1"], [told[0] for told in references], references)
    gap = gaps(better, worse)["token_f1"]
    assert gap.mean == pytest.approx(better.scores["token_f1"].value - worse.scores["token_f1"].value)
    assert gap.interval[0] > 0
    same = gaps(better, better)["token_f1"]
    assert (same.mean, same.interval) == (0, (0, 0))


FOREIGN = """
import datasets
import evaluate
class Shouting(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description="d", citation="", inputs_description="", features=features)
    def _compute(self, predictions, references):
        return {"loud": sum(text.isupper() for text in predictions) / len(predictions), "seen": references}
"""


@pytest.mark.usefixtures("_modules_here")
def test_a_metric_from_elsewhere_is_named_by_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "shouting"
    folder.mkdir(mode=0o755)
    (folder / "shouting.py").write_text(FOREIGN)
    found = scored([str(folder), "exact_match"], ["AH", "oh"], [["AH", "ah"], ["no"]])
    assert found.scores["loud"].value == 0.5
    assert found.scores["loud"].interval is None
    assert found.scores["exact_match"].interval is not None
    (folder / "shouting.py").chmod(0o666)
    with pytest.raises(UserError, match=r"shouting\.py"):
        load_metric(str(folder))


@pytest.mark.parametrize("name", ["belu", "owner/metric", "owner/metric@main", "./nowhere"])
def test_a_metric_that_is_not_there_or_not_pinned_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="there is no metric") as caught:
        load_metric(name)
    assert "ID@COMMIT" in str(caught.value.remedy)
