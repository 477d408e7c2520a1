"""Reports of runs in any state: what they tell, that they need nothing else, and what several of them say together."""

import json
import math
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Literal

import msgspec
import pytest
from playwright.sync_api import Browser

from ftlaunch import rules
from ftlaunch.backend import backends
from ftlaunch.backend.prepare import prepare
from ftlaunch.backend.slurm import paths
from ftlaunch.cli import main
from ftlaunch.plan.plan import make_plan
from ftlaunch.report import facts, markup, plots, svg
from ftlaunch.report.curves import Chart, Series, of_stage
from ftlaunch.report.facts import changed_keys, read_run
from ftlaunch.report.overlay_page import overlay_page, unique_names
from ftlaunch.report.run_page import run_page
from ftlaunch.report.trace import trace
from ftlaunch.report.write import write_report
from ftlaunch.run.layout import RunDir, StageDir

RECIPE = """\
name = "{name}"
model.path = "owner/model"
adapter.kind = "lora"
adapter.rank = {rank}
[data.qa]
path = "owner/rows"
prompt = "{{question}}"
completion = "{{answer}}"
[[stage]]
kind = "sft"
data = "qa"
steps = 4
[[stage]]
kind = "merge"
"""
MERGED = {"method": "base", "kl": 1e-6, "max_logit_difference": 0.01, "top1_agreement": 1.0}


def make_run(folder: Path, rank: int = 4) -> RunDir:
    """A run with an SFT and a merge stage, not started."""
    source = folder.parent / f"{folder.name}.toml"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(RECIPE.format(name=folder.name, rank=rank))
    loaded = rules.load_and_check(source, [])
    return prepare(make_plan(loaded.recipe, folder), loaded, backends.on(None))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path / "runs/r")


def first(run: RunDir) -> StageDir:
    return run.stage_dir("01-sft")


def line(step: int, loss: float | None, **more: object) -> dict[str, object]:
    costs = {"tokens": 100 * step, "tokens_per_second": 50.0, "peak_memory_bytes": 2e9, "time": 1000.0 + step}
    return {"step": step, "steps": 4, "loss": loss, "learning_rate": 1e-4, "grad_norm": 1.0, **costs, **more}


def evaluation(step: int, loss: float) -> dict[str, object]:
    scores = {"eval/rouge1": 30 * loss, "eval/rouge2": 20 * loss}
    return {"step": step, "eval/loss": loss, "eval/perplexity": math.exp(loss), **scores, "time": 1000.0 + step}


def measure(run: RunDir, *lines: dict[str, object]) -> None:
    first(run).metrics.write_text("".join(json.dumps(one) + "\n" for one in lines))


def finish(run: RunDir) -> None:
    measure(run, line(1, 3.0), line(2, 2.0), evaluation(2, 2.5), line(3, 1.5), line(4, 1.0), evaluation(4, 1.25))
    attempt = first(run).new_attempt()
    attempt.process.write_text('{"host": "h", "pid": 1, "start_time": 1, "boot_id": "b"}')
    counts = {"rows": 50, "kept": 47, "tokens": 900, "unfit": {"field a is missing": 2}, "dropped_untrained": 1}
    counts |= {"longest": 40, "lengths": [30, 12, 4, 1]}
    result = {
        "steps": 4,
        "tokens": 400,
        "artifact": "artifact",
        "trained_parameters": 1234,
        "data": {"qa": {**counts, "examples": ["f.jsonl:7: a is missing"]}},
    }
    first(run).result.write_text(json.dumps(result))
    run.stage_dir("02-merge").new_attempt()
    run.stage_dir("02-merge").result.write_text(json.dumps(MERGED))


class Parsed(HTMLParser):
    """A page taken apart: its text, and whatever it would ask a network for."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.asked: list[str] = []
        self.tags: set[str] = set()
        self.feed(page.replace("<wbr>", ""))  # it divides no word
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.asked += [value or "" for key, value in attrs if key in ("src", "href") and value != "data:,"]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_a_finished_run_tells_all_that_it_knows(run: RunDir) -> None:
    finish(run)
    page = run_page(read_run(run))
    told = Parsed(page)
    for words in (
        "r done",
        "4 of 4 optimizer steps",
        "1 loss in the last step",
        "1.25 loss held out",
        "2.00 GB peak memory",
        "400 tokens trained on",
        "Loss trained 1 held out 1.25",
        "ROUGE rouge1 37.5 rouge2 25",
        "Length of rows, rows qa longest 40",
        "Learning rate",
        "Gradient norm",
        "Throughput, tokens/s",
        "KL 1e-06 nats per token",
        "trained_parameters 1,234",
        "adapter.rank 4 8",
        "stage.0.steps 4 –",
        "qa 50 47 900 0 0 2: field a is missing; 1: nothing in them is trained",
        "f.jsonl:7: a is missing",
    ):
        assert words in told.text, words
    assert not told.asked
    assert "script" not in told.tags
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(("width", "colours"), [(390, "dark"), (1280, "light")])
def test_a_browser_shows_it_whole_and_asks_nobody(
    width: int, colours: Literal["dark", "light"], run: RunDir, browser: Browser, tmp_path: Path
) -> None:
    finish(run)
    write_report(run, with_plots=False)
    asked: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=colours)
    page.on("request", lambda sent: asked.append(sent.url))
    page.goto((run.path / "report/index.html").as_uri())
    page.screenshot(path=tmp_path / "report.png", full_page=True)
    assert page.locator("svg").first.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()
    assert all(url.startswith(("file:", "data:")) for url in asked)


def test_the_pictures_are_whole_xml(run: RunDir) -> None:
    finish(run)
    for chart in of_stage(read_run(run).stages[0]):
        figure = ElementTree.fromstring(svg.draw(chart))
        assert figure.find("svg") is not None


def test_a_run_that_has_not_started_has_a_page_too(run: RunDir) -> None:
    told = Parsed(run_page(read_run(run)))
    assert "r waiting" in told.text
    assert "LoRA of rank 4" in told.text
    assert trace(read_run(run)) is None


def test_attempts_are_told_with_their_causes_and_nothing_in_them_is_markup(run: RunDir) -> None:
    measure(run, line(1, 3.0), line(2, None, skipped=1, rewound_to=1))
    for name, content in (
        ("stopped.json", {"reason": "SIGUSR2", "step": 1}),
        ("none", {}),
        ("error.json", {"rank": 1, "type": "E", "message": "<script>alert(1)</script>", "remedy": "less", "log": "l"}),
    ):
        attempt = first(run).new_attempt()
        attempt.process.write_text('{"host": "h", "pid": 1, "start_time": 1, "boot_id": "b"}')
        (attempt.path / name).write_text(json.dumps(content))
    found = read_run(run)
    assert found.state == "failed"
    assert [(one.outcome, one.cause) for one in found.stages[0].attempts] == [
        ("stopped", "SIGUSR2, saved at step 1"),
        ("interrupted", "its processes have gone without a word"),
        ("failed", "rank 1: <script>alert(1)</script> → less"),
    ]
    page = run_page(found)
    assert "<script" not in page
    assert "<script>alert(1)</script> → less" in Parsed(page).text
    assert "Steps left out step went back to the checkpoint of step 2 1" in Parsed(page).text


def test_an_attempt_that_was_preempted_is_over_while_its_stage_waits_in_the_queue(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempt = first(run).new_attempt()
    record = {"job": "7", "restart": 0, "nodes": ["n1"], "step": 3, "checkpoint": None, "lost": [], "restarted": True}
    paths.ended(attempt).write_text(json.dumps({**record, "cause": "preempted", "reason": "put back into the queue"}))
    status = facts.read_status(run)
    queued = msgspec.structs.replace(status.stages[0], state="queued")
    waiting = msgspec.structs.replace(status, stages=[queued, *status.stages[1:]])
    monkeypatch.setattr(facts, "read_status", lambda _: waiting)
    (told,) = read_run(run).stages[0].attempts
    assert (told.outcome, told.cause) == ("preempted", "put back into the queue")


def test_no_secret_is_shown(run: RunDir) -> None:
    attempt = first(run).new_attempt()
    secret = "hf_" + "a1B2" * 8
    attempt.error.write_text(json.dumps({"rank": 0, "type": "E", "message": f"401 for {secret}", "log": "l"}))
    page = run_page(read_run(run))
    assert secret not in page
    assert "401 for [secret]" in page


def test_a_step_that_is_there_twice_counts_once_and_torn_lines_do_not(run: RunDir) -> None:
    measure(run, line(1, 3.0), line(2, 2.0), evaluation(2, 9.0))
    with first(run).metrics.open("a") as file:
        file.write('{"step": 3, "lo\n' + json.dumps(line(2, 1.5)) + "\n" + json.dumps(evaluation(2, 1.0)) + '\n{"st')
    stage = read_run(run).stages[0]
    assert [(one["step"], one["loss"]) for one in stage.trained] == [(1, 3.0), (2, 1.5)]
    assert [one["eval/loss"] for one in stage.evaluated] == [1.0]


def test_metrics_that_nobody_knew_of_have_a_chart_of_their_own(run: RunDir) -> None:
    measure(run, line(1, 1.0, **{"router/load": 0.5}), evaluation(1, 1.0) | {"eval/router/load": 0.25})
    chart = of_stage(read_run(run).stages[0])[-1]
    assert chart == Chart(title="router/load", series=[Series("trained", [(1, 0.5)]), Series("held out", [(1, 0.25)])])


def test_a_long_curve_is_thinned_and_keeps_its_spikes() -> None:
    points = [(float(step), 1.0) for step in range(10_000)]
    points[7777] = (7777.0, 99.0)
    points[3333] = (3333.0, -5.0)
    thinned = svg.thinned(points)
    assert len(thinned) <= svg.MOST_POINTS + 1
    assert {(7777.0, 99.0), (3333.0, -5.0), (9999.0, 1.0)} <= set(thinned)
    assert thinned == sorted(thinned)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (5, 60, [20, 40, 60]), (-3e-5, 1e-5, [-3e-5, -2e-5, -1e-5, 0, 1e-5])],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert svg.ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("values", [[2.0, 2.0], [0.0], [-1e-9, 1e12], [5.0]])
def test_flat_single_and_vast_curves_are_drawn(values: list[float]) -> None:
    drawn = svg.draw(Chart(title="x", series=[Series("y", [(1.0, value) for value in values])]))
    assert "nan" not in drawn
    ElementTree.fromstring(drawn)


def test_the_trace_has_a_point_an_evaluation(run: RunDir) -> None:
    finish(run)
    told = trace(read_run(run))
    assert told is not None
    assert (told["steps_or_epochs"], told["train_loss"], told["test_loss"]) == ([2, 4], [2.0, 1.0], [2.5, 1.25])
    assert told["train_perplexity"] == pytest.approx([math.exp(2), math.exp(1)])
    assert told["post_train_rouge_1"] is None
    assert not [key for key in told if "rogue" in key]


def test_keys_at_their_default_are_no_difference(run: RunDir) -> None:
    found = changed_keys(read_run(run).recipe)
    assert found["adapter.rank"] == (4, 8)
    assert found["adapter.kind"] == ("lora", None)
    assert found["stage.1.kind"] == ("merge", None)
    assert found["data.qa.prompt"] == ("{question}", None)
    assert "seed" not in found


def test_runs_are_set_side_by_side_by_the_last_training_that_all_have_begun(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a/r"), make_run(tmp_path / "b/r", rank=16), make_run(tmp_path / "c")]
    finish(runs[0])
    measure(runs[1], line(1, 2.0), evaluation(1, 2.0))
    facts = [read_run(run) for run in runs[:2]]
    assert unique_names(facts) == ["a/r", "b/r"]
    page = overlay_page(facts)
    told = Parsed(page)
    assert "adapter.rank 4 16" in told.text
    assert "eval/loss against seconds a step a/r 1.25 b/r 2" in told.text
    assert "Of 01-sft" in told.text
    assert "Loss, held out a/r 1.25 b/r 2" in told.text
    assert not told.asked
    everything = Parsed(overlay_page([*facts, read_run(runs[2])])).text
    assert "against" not in everything
    assert "c waiting" in everything


def test_files_are_written_beside_the_page(run: RunDir) -> None:
    finish(run)
    page = write_report(run, with_plots=True)
    assert page == run.path / "report/index.html"
    assert json.loads((run.report / "opt_trace.json").read_text())["test_loss"] == [2.5, 1.25]
    if plots.can_plot():
        head = (run.report / "plots/01-sft-loss.png").read_bytes()[:8]
        assert head == b"\x89PNG\r\n\x1a\n"


def test_an_evaluation_is_shown_with_intervals_and_answers(tmp_path: Path) -> None:
    source = tmp_path / "e.toml"
    stage = '[[stage]]\nkind = "evaluate"\ndata = "qa"\n'
    source.write_text(RECIPE.format(name="e", rank=4).replace('[[stage]]\nkind = "merge"\n', stage))
    loaded = rules.load_and_check(source, [])
    run = prepare(make_plan(loaded.recipe, tmp_path / "e"), loaded, backends.on(None))
    folder = run.stage_dir("02-evaluate")
    folder.new_attempt()
    scores = {"scores": {"bleu": 12.5, "rouge1": 50.0}, "base_scores": {"bleu": 2.5}, "intervals": {"bleu": [10, 15]}}
    gap = {"differences": {"bleu": {"mean": 10.0, "interval": [8.0, 12.0]}}, "answer_words": 7.5}
    asked = {"data": "qa", "examples": 1, "references": 2, "prompts_trained_on": 0}
    folder.result.write_text(json.dumps(asked | scores | gap))
    said = {"prompt": "Who?", "references": ["<b>I</b>", "me"], "answers": {"trained": "I", "base": "?"}, "scores": {}}
    folder.predictions.write_text(json.dumps(said) + "\n")
    told = Parsed(run_page(read_run(run))).text
    assert "bleu 12.5 [10, 15] 2.5 10 [8, 12]" in told
    assert "prompt Who? reference <b>I</b> | me answer, trained I answer, base ?" in told
    measure(run, line(1, 3.0))
    made = trace(read_run(run))
    assert made is not None
    assert (made["post_train_rouge_1"], made["post_train_answer_words"]) == (50.0, 7.5)
    folder.result.write_text(json.dumps(asked | scores | {"answer_words": 0.0}))
    silent = trace(read_run(run))
    assert silent is not None
    assert silent["post_train_answer_words"] == 0.0


def test_the_first_and_the_newest_answers_of_rollouts_are_shown(run: RunDir) -> None:
    drawn = [{"step": step, "prompt": f"<i>{step}</i>", "answer": f"a{step}", "reward": 0.5} for step in range(1, 20)]
    first(run).samples.write_text("".join(json.dumps(one) + "\n" for one in drawn) + '{"step": 20, "pro')
    told = Parsed(run_page(read_run(run))).text
    assert "What was answered step prompt answer reward 1 <i>1</i> a1 0.5" in told
    assert [step for step in range(1, 20) if f" a{step} " in told] == [1, 2, 3, 4, 5, 15, 16, 17, 18, 19]


def test_the_verb_prints_where_the_page_is(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finish(run)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "can_plot", lambda: False)
    for words, expected in (
        (["r"], run.report / "index.html"),
        (["r", "--out", "mine"], Path("mine/index.html")),
        (["r", "r"], tmp_path / "report/index.html"),
    ):
        monkeypatch.setattr("sys.argv", ["ftlaunch", "report", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        assert capsys.readouterr().out.strip() == str(expected)
        assert expected.read_text().startswith("<!doctype html>")


def test_only_what_is_longer_than_a_word_may_be_broken() -> None:
    """Dates stay whole too, and what is long breaks at its joints first: names and paths read well on a phone."""
    rows = [("2026-11-30 12:45:59", "its processes have gone without a word"), ("-", "stage.0.evaluate_every_so_often")]
    drawn = markup.table(("began", "because"), rows)
    assert '<td><span class="whole">2026-11-30</span> 12:45:59</td>' in drawn
    assert drawn.count('<td class="long">') == 1
    assert '<td class="long">stage.<wbr>0.<wbr>evaluate_<wbr>every_<wbr>so_<wbr>often</td>' in drawn
