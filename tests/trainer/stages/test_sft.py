"""Supervised fine-tuning against plain transformers and peft: what is evaluated, trained, kept and handed on."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from msgspec.structs import replace
from peft import AutoPeftModelForCausalLM
from tests.conftest import CHATML, RunStages
from tests.trainer.in_process import make_data, make_step, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from ftlaunch.recipe.adapter import Full
from ftlaunch.run.files import read_jsonl
from ftlaunch.run.layout import StageDir
from fttrain.checkpoint.manifest import verify
from fttrain.data.order import Order
from fttrain.data.templates import LLAMA2
from fttrain.distributed.stop_request import StoppedEarly
from fttrain.stages.sft import CrossEntropy

SEED = 7
RECIPE = """
name = "tiny"
seed = 7
[model]
path = "{model}"
dtype = "fp32"
[adapter]
kind = "lora"
rank = 4
alpha = 8
[data.some]
path = "{rows}"
prompt = "{{question}}"
completion = "{{answer}}"
limit = 47
test = 7
[[stage]]
kind = "sft"
data = "some"
epochs = 1
batch_size = 16
learning_rate = 1e-2
evaluate_every = 1
[parallel]
device = "cpu"
"""
SECOND_STAGE = """
[data.all]
path = "{rows}"
prompt = "{{question}}"
completion = "{{answer}}"
template = "llama2"
[[stage]]
kind = "sft"
data = "all"
steps = 2
batch_size = 48
learning_rate = 1e-2
label_smoothing = 0.1
"""


@dataclass(frozen=True)
class Told:
    """What plain transformers says of some rows; sums over their trained tokens."""

    nll: torch.Tensor
    smoothed: torch.Tensor
    correct: int
    count: int


def by_hand(model: Any, tokenizer: Any, rows: Iterable[dict[str, str]], write: Callable[..., tuple[str, str]]) -> Told:
    """One row after the other, its prompt and its answer tokenized apart; only the answer's tokens count."""
    nll, smoothed, correct, count = torch.zeros(()), torch.zeros(()), 0, 0
    for row in rows:
        prompt, answer = (tokenizer.encode(text, add_special_tokens=False) for text in write(**row))
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        target = torch.tensor(answer)
        nll = nll + F.cross_entropy(logits, target, reduction="sum")
        smoothed = smoothed + F.cross_entropy(logits, target, reduction="sum", label_smoothing=0.1)
        correct += int((logits.argmax(-1) == target).sum())
        count += len(answer)
    return Told(nll, smoothed, correct, count)


def chatml(question: str, answer: str) -> tuple[str, str]:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", f"{answer}<|im_end|>\n"


def llama2(question: str, answer: str) -> tuple[str, str]:
    return f"[INST] {question} [/INST]", f" {answer} <|im_end|>"


@pytest.fixture(scope="module")
def rows(rows_file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in rows_file.read_text().splitlines()]


@pytest.fixture(scope="module")
def split(rows: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(40 rows to train on, 7 held out) of the first 47, as the seed draws them."""
    order = np.random.Generator(np.random.PCG64(SEED)).permutation(47)
    return [rows[index] for index in sorted(order[7:])], [rows[index] for index in order[:7]]


@pytest.fixture(scope="module")
def recipe_text(tiny_model: Path, rows_file: Path) -> Callable[[str], str]:
    return lambda text: text.format(model=tiny_model, rows=rows_file)


@pytest.fixture(scope="module")
def two_stages(
    tmp_path_factory: pytest.TempPathFactory, recipe_text: Callable[[str], str], run_stages: RunStages
) -> tuple[StageDir, StageDir]:
    """A finished run of both stages in one process, with deterministic kernels."""
    folder = tmp_path_factory.mktemp("two")
    path = folder / "two.toml"
    path.write_text(recipe_text("deterministic = true" + RECIPE + SECOND_STAGE))
    run = run_stages(path, folder / "run")
    return run.stage_dir("01-sft"), run.stage_dir("02-sft")


def lines_with(stage_dir: StageDir, key: str) -> list[dict[str, Any]]:
    return [line for line in read_jsonl(stage_dir.metrics) if key in line]


def load(artifact: Path) -> tuple[Any, Any]:
    return AutoPeftModelForCausalLM.from_pretrained(artifact).eval(), AutoTokenizer.from_pretrained(artifact)


def test_evaluation_is_what_plain_transformers_says(
    two_stages: tuple[StageDir, StageDir], split: tuple[list[dict[str, str]], list[dict[str, str]]]
):
    step, _ = two_stages
    evaluated = lines_with(step, "eval/loss")
    assert [line["step"] for line in evaluated] == [1, 2, 3]
    told = by_hand(*load(step.artifact), split[1], chatml)
    assert evaluated[-1]["eval/loss"] == pytest.approx(told.nll.item() / told.count, abs=1e-5)
    assert evaluated[-1]["eval/perplexity"] == pytest.approx((told.nll / told.count).exp().item(), rel=1e-5)
    assert evaluated[-1]["eval/token_accuracy"] == pytest.approx(told.correct / told.count, abs=1e-9)
    assert len({line["eval/loss"] for line in evaluated}) == 3


def test_the_lengths_of_rows_are_told(two_stages: tuple[StageDir, StageDir], rows: list[dict[str, str]]):
    (counts,) = json.loads(two_stages[0].result.read_text())["data"].values()
    tokenizer = load(two_stages[0].artifact)[1]
    lengths = [len(tokenizer.encode("".join(chatml(**row)))) for row in rows[:47]]
    assert counts["longest"] == max(lengths)
    assert counts["lengths"] == np.histogram(lengths, bins=32, range=(0, max(lengths)))[0].tolist()


def test_two_processes_evaluate_and_train_the_same(
    tmp_path: Path, two_stages: tuple[StageDir, StageDir], recipe_text: Callable[[str], str], run_stages: RunStages
):
    """The last step has 8 rows where a full one has 16, and one process has a row of the 7 held out less."""
    path = tmp_path / "ddp.toml"
    path.write_text(recipe_text(RECIPE))
    ddp = ["parallel.strategy=ddp", "parallel.procs_per_node=2", "stage.sft.micro_batch_size=4"]
    stage_dir = run_stages(path, tmp_path / "run", *ddp).stage_dir("01-sft")
    for key in ("loss", "grad_norm", "eval/loss", "eval/perplexity", "eval/token_accuracy"):
        ours, alone = ([line[key] for line in lines_with(one, key)] for one in (stage_dir, two_stages[0]))
        assert ours == pytest.approx(alone, rel=1e-5), key
        assert len(ours) == 3


def test_a_second_stage_goes_on_with_the_firsts_adapter(
    two_stages: tuple[StageDir, StageDir], rows: list[dict[str, str]], adapter: Callable[[StageDir], dict]
):
    first, second = two_stages
    told = by_hand(*load(first.artifact), rows, llama2)
    losses = [line["loss"] for line in lines_with(second, "loss")]
    assert losses[0] == pytest.approx(told.smoothed.item() / told.count, abs=1e-5)
    assert losses[1] < losses[0]
    before, after = adapter(first), adapter(second)
    assert before.keys() == after.keys()
    assert not any(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not lines_with(second, "eval/loss")


def test_an_artifact_carries_the_template_of_its_training(two_stages: tuple[StageDir, StageDir]):
    own, llamas = (AutoTokenizer.from_pretrained(step.artifact) for step in two_stages)
    assert own.chat_template == CHATML
    assert llamas.chat_template == LLAMA2
    asked = llamas.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert asked == llama2("Hi", "")[0]


def test_deterministic_kernels_change_nothing_here(
    tmp_path: Path, two_stages: tuple[StageDir, StageDir], tiny_model: Path, rows_file: Path
):
    """The run of the command line asked for them; here is the same without."""
    data = make_data(rows_file, limit=47, test=7)
    step = train(make_step(tiny_model, data, epochs=1.0, batch_size=16, evaluate_every=1), tmp_path)
    assert two_stages[0].read_spec().deterministic
    assert not torch.are_deterministic_algorithms_enabled()
    for key in ("loss", "grad_norm", "eval/loss"):
        ours, theirs = ([line[key] for line in lines_with(one, key)] for one in (step, two_stages[0]))
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_each_step_of_an_epoch_is_divided_by_its_own_tokens(
    tmp_path: Path, tiny_model: Path, rows_file: Path, split: tuple[list[dict[str, str]], list[dict[str, str]]]
):
    """40 rows are steps of 16, 16 and 8; with weights that hardly move each one's loss and gradient are known."""
    data = make_data(rows_file, limit=47, test=7)
    spec = make_step(tiny_model, data, epochs=1.0, batch_size=16, micro_batch_size=4, learning_rate=1e-12)
    step = train(spec, tmp_path)
    lines = lines_with(step, "loss")
    assert [line["epoch"] for line in lines] == pytest.approx([1 / 3, 2 / 3, 1])
    model = AutoPeftModelForCausalLM.from_pretrained(step.artifact, is_trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    order = Order([40], [1.0], batch_size=16, seed=SEED)
    for number, line in enumerate(lines, start=1):
        told = by_hand(model, tokenizer, [split[0][row] for _, row in order.step(number)], chatml)
        model.zero_grad()
        (told.nll / told.count).backward()
        norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        assert line["loss"] == pytest.approx(told.nll.item() / told.count, abs=1e-5)
        assert line["grad_norm"] == pytest.approx(float(torch.stack(norms).norm()), rel=1e-4)
    assert lines[-1]["tokens"] == sum(len(tokenizer.encode("".join(chatml(**row)))) for row in split[0])


def test_the_newest_and_the_best_checkpoints_are_kept(
    tmp_path: Path, tiny_model: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
):
    told = iter([5.0, 3.0, 4.0, 3.0, 6.0, 2.9, 3.5, 3.1])
    monkeypatch.setattr(CrossEntropy, "evaluate", lambda *_: {"eval/loss": next(told)})
    data = make_data(rows_file, test=8)
    spec = make_step(tiny_model, data, steps=8, save_every=3, evaluate_every=1, keep=1)
    stage_dir = StageDir(tmp_path / "01-sft")

    with pytest.raises(StoppedEarly):
        train(spec, tmp_path, stop_after=5)
    assert checkpoints(stage_dir) == [2, 5]
    train(spec, tmp_path)
    assert checkpoints(stage_dir) == [6, 8]


def checkpoints(stage_dir: StageDir) -> list[int]:
    """Steps of the checkpoints on disk, which must all be good."""
    found = sorted(stage_dir.checkpoints.iterdir())
    assert all(verify(path) is None for path in found)
    return [int(path.name.removeprefix("step-")) for path in found]


def test_neftune_is_felt_in_training_only(tmp_path: Path, tiny_model: Path, rows_file: Path):
    found = {}
    for alpha in (0.0, 30.0):
        spec = make_step(
            tiny_model,
            make_data(rows_file, test=8),
            steps=2,
            learning_rate=1e-12,
            evaluate_every=1,
            neftune_alpha=alpha,
        )
        step = train(spec, tmp_path / str(alpha))
        found[alpha] = [[line[key] for line in lines_with(step, key)] for key in ("loss", "eval/loss")]
    (calm, calm_eval), (noisy, noisy_eval) = found[0.0], found[30.0]
    assert all(abs(loss - other) > 1e-3 for loss, other in zip(calm, noisy, strict=True))
    assert noisy_eval == pytest.approx(calm_eval, abs=1e-6)


def test_a_second_stage_trains_the_whole_model_of_the_first(tmp_path: Path, tiny_model: Path, rows_file: Path):
    """Without an adapter the artifact is the model, and the next stage's base."""
    spec = make_step(
        tiny_model, make_data(rows_file), adapter=Full(), steps=1, batch_size=48, learning_rate=1e-3, save_every=9
    )
    first = train(spec, tmp_path)
    first.path.rename(tmp_path / "00-sft")
    second = train(replace(spec, start="00-sft/artifact"), tmp_path)
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    artifact = tmp_path / "00-sft" / "artifact"
    model = AutoModelForCausalLM.from_pretrained(artifact).eval()
    told = by_hand(model, AutoTokenizer.from_pretrained(artifact), rows, chatml)
    assert lines_with(second, "loss")[0]["loss"] == pytest.approx(told.nll.item() / told.count, abs=1e-5)
