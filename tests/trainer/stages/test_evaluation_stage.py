"""The evaluate stage: the scores that training itself would tell, shared by ranks, stopped, and kept as a table."""

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest
import torch
from tests.trainer.in_process import ALONE, StopAfter, make_data, make_step, train

from ftlaunch.errors import UserError
from ftlaunch.recipe.stages import Evaluate
from ftlaunch.run.files import read_jsonl
from ftlaunch.run.layout import StageDir
from ftlaunch.run.spec import StageSpec
from fttrain.answering.examination import set_exam
from fttrain.answering.likelihood import Row, likelihoods
from fttrain.distributed import precision
from fttrain.distributed.stop_request import StoppedEarly, StopRequest
from fttrain.distributed.world import World
from fttrain.stages import evaluate
from fttrain.tools.chat import load

NEVER = cast("StopRequest", StopAfter(None))
METRICS = ["bleu", "token_f1", "perplexity"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rows_file: Path) -> tuple[StageSpec, StageDir]:
    """An SFT stage with 16 rows held out, and its folder."""
    step = make_step(tiny_model, make_data(rows_file, test=16), steps=20, save_every=20)
    return step, train(step, tmp_path_factory.mktemp("run"))


def evaluation(trained: tuple[StageSpec, StageDir], **fields: Any) -> tuple[StageSpec, StageDir]:
    """The evaluate stage after it, and the folder where it is to be."""
    step, folder = trained
    stage = Evaluate(data="rows0", **{"metrics": METRICS, "max_new_tokens": 6, "batch_size": 3, **fields})
    made = StageDir(folder.path.parent / f"02-evaluate{len(list(folder.path.parent.glob('02-*')))}")
    made.path.mkdir()
    return msgspec.structs.replace(step, stage=stage, start="01-sft/artifact"), made


@pytest.fixture(autouse=True)
def _cache_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_the_loss_is_the_one_that_training_found_and_the_base_is_beside_it(trained: tuple[StageSpec, StageDir]) -> None:
    step, folder = evaluation(trained)
    result = evaluate.run(step, folder, ALONE, NEVER)
    (told,) = [line["eval/loss"] for line in read_jsonl(trained[1].metrics) if "eval/loss" in line]
    assert result.scores["loss"] == pytest.approx(told, abs=1e-6)
    assert result.base_scores["loss"] > told
    gap = result.differences["loss"]
    assert gap.mean == pytest.approx(told - result.base_scores["loss"], abs=1e-6)
    assert gap.interval[1] < 0
    low, high = result.intervals["loss"]
    assert low < result.scores["loss"] < high
    json.dumps(msgspec.to_builtins(result))

    lines = list(read_jsonl(folder.predictions))
    asked = [line for line in lines if "prompt" in line]
    assert len(asked) == result.examples or len(lines) > len(asked)
    assert {*asked[0]["answers"]} == {*asked[0]["scores"]} == {"trained", "base"}
    rows = [line for line in lines if line.get("of") == "references"]
    mean = sum(line["predictions"]["trained"] for line in rows) / sum(line["reference"] for line in rows)
    assert mean == pytest.approx(told, abs=1e-6)


@dataclass(frozen=True)
class Threads:
    """Two ranks that are threads, and gather what each has."""

    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(2))
    values: list[Any] = field(default_factory=lambda: [None, None])


@dataclass(frozen=True)
class RankInThread(World):
    threads: Threads = field(default_factory=Threads)

    def gather(self, value: Any) -> list[Any]:
        self.threads.values[self.rank] = value
        self.threads.barrier.wait(60)
        found = list(self.threads.values)
        self.threads.barrier.wait(60)
        return found

    def barrier(self) -> None:
        self.threads.barrier.wait(60)


@pytest.fixture
def _load_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads of one process cannot load models with transformers at once; two ranks can."""
    lock = threading.Lock()

    def load_alone(*arguments: Any) -> Any:
        with lock:
            return load(*arguments)

    monkeypatch.setattr(evaluate, "load", load_alone)


def in_two_ranks(spec: StageSpec, folders: Sequence[StageDir], stops: Sequence[StopAfter]) -> list[Any]:
    """What each rank's stage returned, or raised."""
    threads, found = Threads(), [None, None]

    def work(rank: int) -> None:
        world = RankInThread(rank, 2, rank, 2, torch.device("cpu"), (), threads)
        try:
            found[rank] = evaluate.run(spec, folders[rank], world, cast("StopRequest", stops[rank]))
        except StoppedEarly as stopped:
            found[rank] = stopped

    workers = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return found


@pytest.mark.usefixtures("_load_one_at_a_time")
def test_the_base_is_computed_in_the_format_that_the_trained_model_is(
    trained: tuple[StageSpec, StageDir], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the device would take another one by itself; else the difference would be that of the formats."""
    monkeypatch.setattr(precision, "native", lambda _: precision.Choice("bf16", "it says so"))
    evaluate.run(*evaluation(trained, metrics=["perplexity"]), ALONE, NEVER)
    formats = [line.rpartition(" ")[2] for line in capsys.readouterr().err.splitlines() if "is computed in" in line]
    assert formats == ["fp32", "fp32"]


def test_two_ranks_find_what_one_finds(trained: tuple[StageSpec, StageDir]) -> None:
    step, folder = evaluation(trained, compare=False)
    alone = evaluate.run(step, folder, ALONE, NEVER)
    again = evaluation(trained)[1]
    first, second = in_two_ranks(step, [again, again], [StopAfter(None), StopAfter(None)])
    assert first == second
    assert first.scores == pytest.approx(alone.scores)
    lines, others = (
        [line["answers"] for line in read_jsonl(one.predictions) if "answers" in line] for one in (folder, again)
    )
    assert lines == others


@pytest.mark.usefixtures("_load_one_at_a_time")
def test_all_ranks_leave_once_one_is_asked_to(trained: tuple[StageSpec, StageDir]) -> None:
    step, folder = evaluation(trained, compare=False)
    found = in_two_ranks(step, [folder, folder], [StopAfter(None), StopAfter(2)])
    assert [str(one) for one in found] == ["stopped after step 0: the test"] * 2
    assert not folder.predictions.exists()


def test_answers_are_drawn_with_the_recipes_seed(trained: tuple[StageSpec, StageDir]) -> None:
    answers = []
    for seed in (1, 1, 2):
        step, folder = evaluation(trained, compare=False, metrics=["bleu"], temperature=5.0, resamples=0)
        result = evaluate.run(msgspec.structs.replace(step, seed=seed), folder, ALONE, NEVER)
        assert result.intervals == {}
        answers.append([line["answers"]["trained"] for line in read_jsonl(folder.predictions)])
    assert answers[0] == answers[1] != answers[2]


def test_likelihoods_side_by_side_are_those_one_by_one(tiny_model: Path) -> None:
    model, _ = load(str(tiny_model))
    draw = np.random.default_rng(0)
    rows = [Row(draw.integers(0, 256, n).astype(np.int32), draw.random(n) < 0.5) for n in (3, 17, 1500, 9, 2)]
    found = {place: one for part in likelihoods(model, rows) for place, one in part.items()}
    for place, row in enumerate(rows):
        ids = torch.from_numpy(row.ids_T.astype(np.int64))[None]
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        asked = torch.from_numpy(row.asked_T[1:])
        assert found[place].logp == pytest.approx(float(logps[asked].double().sum()), abs=1e-4)
        assert found[place].tokens == int(asked.sum())


def test_multiple_choice_is_by_the_likelihood_of_each_choice(
    trained: tuple[StageSpec, StageDir], tmp_path: Path
) -> None:
    rows = tmp_path / "choices.jsonl"
    texts = [{"ask": f"q{at}", "options": {"text": ["red lamp", "x"]}, "label": "AB"[at % 2]} for at in range(6)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in texts))
    data = make_data(rows, prompt="{ask}", completion=None, test=2)
    fields = {"metrics": ["multiple_choice"], "choices_field": "options[text]", "label_field": "label"}
    step, folder = evaluation(trained, compare=False, **fields)
    result = evaluate.run(msgspec.structs.replace(step, data={"rows0": data}), folder, ALONE, NEVER)
    model, tokenizer = load(str(trained[1].artifact))
    lines = list(read_jsonl(folder.predictions))
    assert len(lines) == result.examples == 2
    exam = set_exam(data, tokenizer, step.seed, {"choices"}, choices_field="options[text]", label_field="label")
    (first, *_) = exam.choices
    assert tokenizer.decode(first.rows[0].ids_T).endswith("assistant\nred lamp")
    assert first.lengths == [8, 1]
    expected = next(iter(likelihoods(model, first.rows)))
    told = lines[0]["predictions"]["trained"]
    assert [logp for logp, _ in told] == pytest.approx([expected[at].logp for at in (0, 1)], abs=1e-4)
    assert [length for _, length in told] == first.lengths


def test_pairs_are_judged_by_likelihood(trained: tuple[StageSpec, StageDir], pairs: Any) -> None:
    data = msgspec.structs.replace(pairs, test=5)
    step, folder = evaluation(trained, metrics=["preference_accuracy"])
    result = evaluate.run(msgspec.structs.replace(step, data={"rows0": data}), folder, ALONE, NEVER)
    assert result.examples == 5
    lines = list(read_jsonl(folder.predictions))
    right = [line["predictions"]["trained"][0][0] > line["predictions"]["trained"][1][0] for line in lines]
    assert result.scores["preference_accuracy"] == pytest.approx(20 * sum(right))


def test_rows_without_pairs_have_no_preference(trained: tuple[StageSpec, StageDir]) -> None:
    step, folder = evaluation(trained, metrics=["preference_accuracy"])
    with pytest.raises(UserError, match="needs pairs of answers"):
        evaluate.run(step, folder, ALONE, NEVER)
