"""What stages will cost, against figures that were computed by hand or published."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ftlaunch.load import load_recipe
from ftlaunch.plan.cost import calibration, costs, devices, disk, memory, shape, speed, trained, words
from ftlaunch.plan.cost.devices import Device
from ftlaunch.plan.cost.memory import Memory
from ftlaunch.plan.plan import make_plan
from ftlaunch.recipe.adapter import Full, Lora
from ftlaunch.run.spec import StageSpec

GB = 10**9
GIB = 1 << 30
RECIPE = """
name = "cost"
[model]
path = "{model}"
dtype = "bf16"
[data.rows]
path = "owner/rows"
prompt = "{{q}}"
completion = "{{a}}"
[[stage]]
kind = "sft"
data = "rows"
steps = 500
"""
LLAMA_8B, LLAMA_70B = "meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-70B"


def spec(tmp_path: Path, model: str, *settings: str) -> StageSpec:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(model=model))
    return make_plan(load_recipe(path, settings).recipe, tmp_path).stages[0].spec


def parts(told: Memory) -> dict[str, int]:
    return {part.name: part.bytes for part in told.parts}


@pytest.mark.parametrize(
    ("model", "millions"),
    [
        (LLAMA_8B, 8030.3),
        (LLAMA_70B, 70553.7),
        ("meta-llama/Llama-2-7b-chat-hf", 6738.4),
        ("mistralai/Mistral-7B-Instruct-v0.1", 7241.7),
        ("Qwen/Qwen2.5-0.5B-Instruct", 494.0),
        ("Qwen/Qwen3-8B", 8190.7),
        ("google/gemma-2b", 2506.2),
        ("google/gemma-2-9b-it", 9241.7),
        ("mistralai/Mixtral-8x7B-v0.1", 46702.8),
        ("microsoft/Phi-3-mini-4k-instruct", 3821.1),
        ("openai-community/gpt2", 124.4),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134.5),
    ],
)
def test_parameters_are_those_that_models_are_published_with(model: str, millions: float) -> None:
    found = shape.read(model)
    assert found is not None
    assert found.parameters / 1e6 == pytest.approx(millions, abs=0.06)


def test_lora_on_llama_8b_has_the_parameters_that_peft_counts() -> None:
    """Rank 16 on all linear layers is 41,943,040 trained parameters, as PEFT prints for it."""
    found = shape.read(LLAMA_8B)
    assert found is not None
    assert trained.of(Lora(rank=16), found).parameters == 41_943_040
    top = trained.of(Lora(rank=16, layers="top:8", targets=["q_proj"]), found)
    assert (top.parameters, top.layers_backward) == (8 * 16 * (4096 + 4096), 8)


@pytest.mark.parametrize(("settings", "bytes_each"), [((), 18), (("parallel.strategy=zero1",), 16)])
def test_full_training_takes_16_to_18_bytes_a_parameter(
    tmp_path: Path, settings: tuple[str, ...], bytes_each: float
) -> None:
    """16 under ZeRO, as its paper counts (2 + 2 + 12: arXiv 1910.02054, section 3.1); 18 with fp32 weights and their
    copies in 16 bits, as "GPU memory usage" in transformers' documentation counts (6 + 8 + 4)."""
    told = memory.of_stage(spec(tmp_path, LLAMA_8B, "adapter.kind=full", *settings), _shape(LLAMA_8B), 2, cuda=True)
    held = sum(size for name, size in parts(told).items() if name in HELD)
    assert held / _shape(LLAMA_8B).parameters == pytest.approx(bytes_each, abs=0.01)


HELD = {"weights", "gradients", "fp32 masters", "optimizer", "16-bit copies of weights"}


def _shape(model: str) -> shape.Shape:
    found = shape.read(model)
    assert found is not None
    return found


def test_zero_shares_out_what_its_paper_says(tmp_path: Path) -> None:
    """Figure 1 of arXiv 1910.02054: of 16 bytes, 4 + 12/N, 2 + 14/N and 16/N remain on each of N ranks."""
    for strategy, bytes_each in (("zero1", 4 + 12 / 8), ("zero2", 2 + 14 / 8), ("zero3", 16 / 8)):
        told = memory.of_stage(
            spec(
                tmp_path,
                LLAMA_8B,
                "adapter.kind=full",
                f"parallel.strategy={strategy}",
                "parallel.procs_per_node=8",
            ),
            _shape(LLAMA_8B),
            2,
            cuda=True,
        )
        held = sum(size for name, size in parts(told).items() if name in HELD)
        assert held / _shape(LLAMA_8B).parameters == pytest.approx(bytes_each, abs=0.01)


LONG = ("stage.0.batch_size=2", "data.rows.max_length=2048", "stage.0.activation_checkpointing=true")
SHORT = ("stage.0.batch_size=1", "data.rows.max_length=512", "stage.0.activation_checkpointing=true")
LORA = ("adapter.kind=lora", "adapter.rank=16")
EIGHT = ("parallel.strategy=zero3", "parallel.procs_per_node=8", "data.rows.max_length=2048", "stage.0.batch_size=16")
LLAMA_2_7B = "meta-llama/Llama-2-7b-hf"


@pytest.mark.parametrize(
    ("model", "settings", "gibibytes", "within"),
    [
        (LLAMA_8B, (*LORA, *LONG), 16.2, 0.12),
        (LLAMA_8B, (*LORA, "model.quantization=nf4", *LONG), 7.4, 0.12),
        (LLAMA_70B, (*LORA, *EIGHT, "stage.0.activation_checkpointing=true"), 27.6, 0.05),
    ],
)
def test_memory_agrees_with_what_torchtune_measured(
    tmp_path: Path, model: str, settings: tuple[str, ...], gibibytes: float, within: float
) -> None:
    """torchtune's README, "Memory and training speed": Llama 3.1, rows packed to 2,048 tokens, two a batch, peaks of
    torch's allocator: LoRA of 8B on one RTX 4090, QLoRA of 8B on one, LoRA of 70B on each of eight A100. They train
    adapters in 16 bits; what the CUDA context takes is no part of such a peak."""
    told = memory.of_stage(spec(tmp_path, model, *settings), _shape(model), 2, cuda=True)
    assert (told.peak - parts(told)["libraries"]) / GIB == pytest.approx(gibibytes, rel=within)


@pytest.mark.parametrize(
    ("model", "settings", "gigabytes"),
    [
        (LLAMA_2_7B, ("adapter.kind=full", *SHORT), 18 * 6.74),
        (LLAMA_8B, ("adapter.kind=full", *SHORT), 18 * 8.03),
        (LLAMA_70B, ("adapter.kind=full", *SHORT), 18 * 70.55),
        (LLAMA_2_7B, (*LORA, *SHORT), 16),
        (LLAMA_8B, (*LORA, *SHORT), 16),
        (LLAMA_70B, (*LORA, *SHORT), 160),
        (LLAMA_2_7B, (*LORA, "model.quantization=int8", *SHORT), 10),
        (LLAMA_70B, (*LORA, "model.quantization=int8", *SHORT), 80),
        (LLAMA_2_7B, (*LORA, "model.quantization=nf4", *SHORT), 6),
        (LLAMA_70B, (*LORA, "model.quantization=nf4", *SHORT), 48),
    ],
)
def test_memory_agrees_with_published_tables(
    tmp_path: Path, model: str, settings: tuple[str, ...], gigabytes: float
) -> None:
    """LLaMA-Factory's README, "Hardware Requirement": full tuning 18 bytes a parameter, LoRA 16 GB for 7B and 160 GB
    for 70B, QLoRA 10 and 80 GB in 8 bits, 6 and 48 GB in 4. Hugging Face's "Llama 3.1" (huggingface.co/blog/llama31)
    has the same for LoRA of 8B and 70B and QLoRA of 70B. Both tell round, estimated numbers."""
    told = memory.of_stage(spec(tmp_path, model, *settings), _shape(model), 2, cuda=True)
    assert told.peak / GB == pytest.approx(gigabytes, rel=0.15)


def test_qlora_of_70b_fits_in_48_gb_as_its_paper_says_of_65b(tmp_path: Path) -> None:
    """QLoRA's abstract (arXiv 2305.14314): 65B trained on one GPU of 48 GB."""
    asked = (*LORA, "model.quantization=nf4", *SHORT)
    told = memory.of_stage(spec(tmp_path, LLAMA_70B, *asked), _shape(LLAMA_70B), 2, cuda=True)
    assert told.peak < 48 * GB
    assert parts(told)["weights"] / GB == pytest.approx(39.6, abs=0.3)  # 68.5e9 · 0.516 + 2.1e9 · 2


@pytest.mark.parametrize(("model", "gibibytes"), [(LLAMA_8B, (0.125, 15.62)), (LLAMA_70B, (0.313, 39.06))])
def test_keys_and_values_take_what_is_published(model: str, gibibytes: tuple[float, float]) -> None:
    """Hugging Face's "Llama 3.1" (huggingface.co/blog/llama31): cache in 16 bits for 1,000 and for 128,000 tokens."""
    for tokens, published in zip((1024, 128_000), gibibytes, strict=True):
        assert shape.cache_bytes(_shape(model), 1, tokens, 2) / GIB == pytest.approx(published, abs=0.01)


def test_what_does_not_fit_is_named_with_ways_that_do(tmp_path: Path) -> None:
    device = Device("NVIDIA A10", True, 24 * GB, 64 * GB, 125)
    told = costs.of_spec(spec(tmp_path, LLAMA_8B, "adapter.kind=lora", "stage.0.batch_size=16"), device, 2)
    assert isinstance(told, costs.Cost)
    assert told.misfit is not None
    assert told.misfit.part == "activations"
    assert len(told.misfit.ways) == 3
    assert all(way.fits and way.needed <= 24 * GB for way in told.misfit.ways)
    said = words.of_stage(told)
    assert "does not fit: there is no room for the activations" in said
    assert "activation_checkpointing = true" in said


def test_time_is_operations_over_the_published_peak(tmp_path: Path) -> None:
    """Full training is 6 operations a weight and token: 8 rows of 1,024 tokens on 7.5e9 weights at 40 % of 989."""
    device = Device("NVIDIA H100", True, 80 * GB, None, 989)
    told = costs.of_spec(spec(tmp_path, LLAMA_8B, "adapter.kind=full"), device, 2)
    assert isinstance(told, costs.Cost)
    assert told.time is not None
    by_hand = 8 * 1024 * 6 * 7.505e9 / (0.4 * 989e12)
    assert told.time.step == pytest.approx(by_hand, rel=0.03)
    assert told.time.total == pytest.approx(500 * told.time.step)


def test_time_is_also_told_for_rows_as_long_as_the_first_ones(tmp_path: Path) -> None:
    """256 of 1,024 tokens, at four bytes each: a quarter of the time. Padded rows take that of the longest."""
    device = Device("NVIDIA H100", True, 80 * GB, None, 989)
    rows = [{"q": "x" * 24, "a": "y" * 1000}] * 300 + [{"q": "later", "a": "rows do not count"}] * 99
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = spec(tmp_path, LLAMA_8B, f"data.rows.path={tmp_path}/rows.jsonl", "data.rows.test=90")
    told = costs.of_spec(own, device, 2)
    assert isinstance(told, costs.Cost)
    assert told.time is not None
    assert told.time.typical is not None
    assert told.time.typical.tokens == 256
    assert told.time.typical.step == pytest.approx(told.time.step / 4)
    assert told.time.total is not None
    assert told.time.typical.total == pytest.approx(told.time.total / 4)
    assert "with rows as long as the first ones, about 256 tokens at 4 bytes each: " in words.of_stage(told)
    padded = costs.of_spec(spec(tmp_path, LLAMA_8B, "stage.0.packing=false"), device, 2)
    assert isinstance(padded, costs.Cost)
    assert padded.time is not None
    assert padded.time.typical is None


def test_a_calibration_is_kept_for_this_machine_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one = spec(tmp_path, "HuggingFaceTB/SmolLM2-135M-Instruct", "parallel.device=cpu", "model.dtype=fp32")
    before = costs.here({"01-sft": one})["01-sft"]
    said = {"machine": "m", "device": "the CPU", "operations_per_second": {"fp32": 1e11}}
    calibration.keep(msgspec.json.encode(said))
    (after, other) = (costs.here({"01-sft": each})["01-sft"] for each in (one, _checkpointing(one)))
    assert isinstance(before, costs.Cost)
    assert isinstance(after, costs.Cost)
    assert isinstance(other, costs.Cost)
    assert before.time is None
    assert after.time is not None
    found = _shape(one.model.path)
    assert after.time.step == pytest.approx(8 * 1024 * speed.operations(one, found) / (0.7 * 1e11))
    assert "GPU-hours" not in words.of_stage(after)
    # What each of the two plans says of the other way to train.
    kept, again = (parts(told.memory)["activations"] for told in (after, other))
    assert (after.with_checkpointing, other.without_checkpointing) == (again, kept)
    assert again < kept / 3
    calibration.keep(msgspec.json.encode(said | {"device": "another"}))
    told = costs.here({"01-sft": one})["01-sft"]
    assert isinstance(told, costs.Cost)
    assert told.time is None


def _checkpointing(one: StageSpec) -> StageSpec:
    return msgspec.structs.replace(one, stage=msgspec.structs.replace(one.stage, activation_checkpointing=True))


def test_gpu_hours_are_of_all_processes(tmp_path: Path) -> None:
    eight = ("parallel.strategy=zero2", "parallel.procs_per_node=8")
    told = costs.of_spec(spec(tmp_path, LLAMA_8B, *eight), Device("NVIDIA H100", True, 80 * GB, None, 989), 2)
    assert isinstance(told, costs.Cost)
    assert told.time is not None
    assert told.time.total is not None
    assert told.time.device_hours == pytest.approx(8 * told.time.total / 3600)
    assert "GPU-hours" in words.of_stage(told)


def test_disk_holds_three_numbers_a_trained_weight(tmp_path: Path) -> None:
    told = disk.of_stage(spec(tmp_path, LLAMA_8B, "adapter.kind=lora", "adapter.rank=16"), _shape(LLAMA_8B), 2)
    assert told.checkpoint == 12 * 41_943_040
    assert told.checkpoints == 4 * told.checkpoint
    assert disk.of_stage(spec(tmp_path, LLAMA_8B), _shape(LLAMA_8B), 2).result == 2 * _shape(LLAMA_8B).parameters


def test_a_model_that_nothing_is_known_of_is_said(tmp_path: Path) -> None:
    told = costs.of_spec(spec(tmp_path, "owner/model"), Device("the CPU", False, GIB), 4)
    assert told == "not estimated: no config.json of owner/model is here, and it is not among the bases known"


def test_a_foreign_family_is_taken_for_llama_and_it_is_said(tmp_path: Path) -> None:
    config: dict[str, Any] = {"model_type": "novel", "hidden_size": 64, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "vocab_size": 100, "intermediate_size": 96}
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_bytes(msgspec.json.encode(config))
    told = costs.of_spec(spec(tmp_path, str(tmp_path / "model")), Device("the CPU", False, GIB), 4)
    assert isinstance(told, costs.Cost)
    assert told.remarks[0] == "novel models are not known here: they are taken for one like Llama of the same sizes"


@pytest.mark.parametrize(
    ("name", "gigabytes", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 80, 312),
        ("a100", 40, 312),
        ("a100_80gb", 80, 312),
        ("NVIDIA H100 80GB HBM3", 80, 989),
        ("NVIDIA H100 PCIe", 80, 756),
        ("NVIDIA L40", 48, 181),
        ("NVIDIA L40S", 48, 362),
        ("NVIDIA GeForce RTX 4090", 24, 165),
        ("rtx4090", 24, 165),
        ("Tesla V100-SXM2-32GB", 32, 125),
        ("AMD Instinct MI300X OAM", 192, 1307),
    ],
)
def test_gpus_are_known_by_their_makers_names_and_by_slurms(name: str, gigabytes: int, teraflops: float) -> None:
    assert devices.known_gpu(name) == (gigabytes * GB, teraflops)


@pytest.mark.parametrize(
    "name",
    [
        *("mi300", "NVIDIA RTX A4000", "NVIDIA A10G", "NVIDIA GeForce RTX 4090 Laptop GPU", "a100_1g.5gb", "gpu"),
        *("NVIDIA GeForce RTX 4090 D", "NVIDIA GH200 480GB", "GRID A40-48Q", "NVIDIA T400 4GB"),
    ],
)
def test_a_card_without_a_data_sheet_of_its_own_is_not_taken_for_another(tmp_path: Path, name: str) -> None:
    assert devices.known_gpu(name) is None
    told = costs.of_spec(spec(tmp_path, LLAMA_8B, "adapter.kind=lora"), Device(name, True), 2)
    assert isinstance(told, costs.Cost)
    assert told.time is None
    assert f"tells the speed of {name}; `ftlaunch plan --calibrate` measures it" in words.of_stage(told)


def test_training_in_full_leaves_a_model_and_an_adapter_none() -> None:
    found = _shape(LLAMA_8B)
    assert trained.of(Full(), found).parameters == found.parameters
