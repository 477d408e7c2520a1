"""A base in 4 bits (QLoRA) and an optimizer in 8: trained, evaluated, resumed, shared out and merged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from safetensors.torch import load_file
from tests.conftest import Launch, RunStages
from tests.trainer.in_process import make_data, make_step, train
from tests.zoo.families import build
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ftlaunch.recipe.adapter import Lora
from ftlaunch.recipe.stages import Optimizer
from ftlaunch.run.files import read_jsonl
from ftlaunch.run.layout import RunDir, StageDir
from ftlaunch.run.spec import StageSpec
from fttrain.distributed.stop_request import StoppedEarly
from fttrain.training import session

NF4 = {"quantization": "nf4"}
RECIPE = """
name = "nf4"
seed = 7
[model]
path = "{model}"
dtype = "{dtype}"
quantization = "nf4"
[adapter]
kind = "lora"
rank = 4
alpha = 8
[data.rows]
path = "{rows}"
prompt = "{{question}}"
completion = "{{answer}}"
test = 8
[[stage]]
kind = "sft"
data = "rows"
steps = 6
batch_size = 8
learning_rate = 1e-2
save_every = 2
evaluate_every = 3
[parallel]
device = "cpu"
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model with all widths multiples of 64, the block of NF4."""
    folder = tmp_path_factory.mktemp("models") / "blocks"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["mamba", "gemma3n"])
def test_layers_whose_weights_the_models_code_computes_with_stay_whole(
    family: str, rows_file: Path, tmp_path: Path
) -> None:
    step = make_step(build(family, tmp_path / "model"), make_data(rows_file), model_fields=NF4, steps=1)
    (said,) = (line for line in read_jsonl(train(step, tmp_path).metrics) if "loss" in line)
    assert 0 < said["loss"] < 20


def told(stage_dir: StageDir) -> list[tuple[float, ...]]:
    """(loss, gradient norm) or (evaluation loss,) line by line."""
    keys = ("loss", "grad_norm", "eval/loss")
    return [tuple(line[key] for key in keys if key in line) for line in read_jsonl(stage_dir.metrics)]


def tensors(stage_dir: StageDir) -> dict[str, torch.Tensor]:
    return load_file(stage_dir.artifact / "adapter_model.safetensors")


def assert_same_end(stage_dir: StageDir, calm: StageDir) -> None:
    assert told(stage_dir) == told(calm)
    ours, theirs = tensors(stage_dir), tensors(calm)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def stop_and_go_on(spec: StageSpec, folder: Path, stop_after: int) -> StageDir:
    with pytest.raises(StoppedEarly):
        train(spec, folder, stop_after=stop_after)
    return train(spec, folder)


def test_the_command_line_trains_evaluates_and_merges(tmp_path: Path, model: Path, rows_file: Path, launch: Launch):
    path = tmp_path / "nf4.toml"
    path.write_text(RECIPE.format(model=model, rows=rows_file, dtype="bf16") + '[[stage]]\nkind = "merge"\n')
    launch("run", path, "--run-dir", tmp_path / "run")
    run = RunDir(tmp_path / "run")
    step, merge = run.stage_dirs()
    losses = [line["eval/loss"] for line in read_jsonl(step.metrics) if "eval/loss" in line]
    assert len(losses) == 2
    assert losses[1] < losses[0] < 5.7
    assert {tensor.dtype for tensor in tensors(step).values()} == {torch.float32}

    result = json.loads(merge.result.read_text())
    assert set(result["tried"]) == {"base", "dequantized"}
    kept, other = (result["tried"][way]["kl"] for way in ("dequantized", "base"))
    assert result["method"] == "dequantized"
    assert result["kl"] == kept < other
    merged = AutoModelForCausalLM.from_pretrained(merge.model)
    assert merged.dtype == torch.float32  # as the base on disk is
    assert not hasattr(merged.config, "quantization_config")


def test_two_processes_with_zero2_train_as_one_does(
    tmp_path: Path, model: Path, rows_file: Path, run_stages: RunStages
):
    path = tmp_path / "nf4.toml"
    path.write_text(RECIPE.format(model=model, rows=rows_file, dtype="fp32"))
    zero = ["parallel.strategy=zero2", "parallel.procs_per_node=2", "stage.sft.micro_batch_size=2"]
    stage_dir = run_stages(path, tmp_path / "run", *zero).stage_dir("01-sft")
    alone = train(make_step(model, make_data(rows_file, test=8), model_fields=NF4, evaluate_every=3), tmp_path)
    assert [len(line) for line in told(stage_dir)] == [2, 2, 2, 1, 2, 2, 2, 1]
    for ours, theirs in zip(told(stage_dir), told(alone), strict=True):
        assert ours == pytest.approx(theirs, abs=2e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_resumed_run_is_the_unbroken_one(dtype: str, tmp_path: Path, model: Path, rows_file: Path):
    data = make_data(rows_file, test=8)
    adapter = Lora(rank=4, alpha=8, dropout=0.1)
    spec = make_step(model, data, adapter=adapter, model_fields={**NF4, "dtype": dtype}, evaluate_every=2)
    calm = train(spec, tmp_path / "calm")
    assert_same_end(stop_and_go_on(spec, tmp_path / "stopped", 3), calm)


def test_evaluation_in_the_middle_leaves_no_trace(tmp_path: Path, model: Path, rows_file: Path):
    data = make_data(rows_file, test=8)
    often, never = (
        train(make_step(model, data, model_fields={**NF4, "dtype": "bf16"}, evaluate_every=every), tmp_path / name)
        for name, every in {"often": 1, "never": None}.items()
    )
    assert [line for line in told(often) if len(line) == 2] == [line for line in told(never) if len(line) == 2]


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Engines of the stages that are run."""
    built: list[Any] = []
    build = session.build

    def keep(*arguments: Any) -> Any:
        built.append(build(*arguments))
        return built[-1]

    monkeypatch.setattr(session, "build", keep)
    return built


def test_what_is_frozen_stays_in_four_bits(tmp_path: Path, model: Path, rows_file: Path, engines: list[Any]):
    train(make_step(model, make_data(rows_file, test=8), model_fields={**NF4, "dtype": "bf16"}, steps=2), tmp_path)
    (engine,) = engines
    weights: dict[str, Any] = {
        name: module.weight for name, module in engine.scorer.model.named_modules() if isinstance(module, Linear4bit)
    }
    assert len(weights) == 2 * 7
    for name, weight in weights.items():
        assert weight.quant_state.quant_type == "nf4"
        assert weight.nbytes == (64 if "attn" in name else 128) * 64 / 2
        assert not weight.requires_grad
    trained = dict(engine.trained_parameters())
    assert len(trained) == 2 * 7 * 2
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}


@pytest.mark.parametrize("quantized", [False, True])
def test_eight_bit_moments_are_resumed_to_the_last_bit(
    quantized: bool, tmp_path: Path, model: Path, rows_file: Path, engines: list[Any]
):
    """Adapters of rank 64 have 4096 elements and more: only such tensors have their moments in 8 bits."""
    spec = make_step(
        model,
        make_data(rows_file, test=8),
        adapter=Lora(rank=64, alpha=64, dropout=0.1),
        optimizer=Optimizer(name="adamw_8bit", weight_decay=0.01),
        model_fields=NF4 if quantized else None,
        learning_rate=1e-3,
    )
    calm = train(spec, tmp_path / "calm")
    moments = {state["state1"].dtype for state in engines[0].optimizer.state.values()}
    assert moments == {torch.uint8}
    stopped = stop_and_go_on(spec, tmp_path / "stopped", 3)
    assert_same_end(stopped, calm)
    losses = [line[0] for line in told(calm) if len(line) == 2]
    assert losses[-1] < losses[0]
