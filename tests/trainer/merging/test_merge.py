"""Merged models against peft's own merge, and against the adapter models that they stand for."""

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests.trainer.in_process import make_data, make_step
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config

from ftlaunch.errors import UserError
from ftlaunch.recipe.model import Model
from ftlaunch.recipe.stages import Merge
from ftlaunch.run.files import write_json
from ftlaunch.run.layout import StageDir
from fttrain.merging import merge as merging
from fttrain.merging.merge import Source, find_source, merge
from fttrain.merging.probes import TEXTS, probes
from fttrain.merging.verify import COARSEST
from fttrain.stages import merge as stage


def adapt(model_path: Path, folder: Path, *, dtype: torch.dtype = torch.float32, **options) -> Path:
    """A PEFT adapter whose B is not zero."""
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype)
    settings = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options
    model = get_peft_model(base, LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(folder)
    return folder


def source(model_path: Path, adapter: Path, dtype: str = "fp32", quantization: str = "none") -> Source:
    return Source(Model(path=str(model_path), dtype=dtype, quantization=quantization), adapter)


def logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(40)[None] + 40
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"use_dora": True, "target_modules": ["embed_tokens", "up_proj"]},
        {"alpha_pattern": {"q_proj": 3}, "rank_pattern": {"layers.1.self_attn.v_proj": 2}},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["embed_tokens", "up_proj"]},
    ],
    ids=["all-linear", "rslora", "dora", "dora embedding", "patterns", "tied head", "tied embedding"],
)
def test_merge_equals_the_adapter_model(options: dict, tiny_model: Path, tmp_path: Path):
    adapter = adapt(tiny_model, tmp_path / "adapter", **options)
    out = tmp_path / "out"
    merged = merge(source(tiny_model, adapter), out, Merge())

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = logits(base)
    expected = logits(PeftModel.from_pretrained(base, adapter))
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert torch.allclose(logits(loaded), expected, atol=1e-5)
    assert not torch.allclose(before, expected, atol=1e-3)
    assert merged.kl < 1e-9
    assert merged.top1_agreement == 1.0
    untied = "lm_head" in options.get("target_modules", []) or "embed_tokens" in options.get("target_modules", [])
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is not untied
    assert AutoTokenizer.from_pretrained(out).chat_template == AutoTokenizer.from_pretrained(tiny_model).chat_template
    assert not list(tmp_path.glob(".out*"))


def test_merged_weights_are_those_of_a_merge_in_fp64_rounded_once(tiny_model: Path, tmp_path: Path):
    adapter = adapt(tiny_model, tmp_path / "adapter")
    merge(source(tiny_model, adapter), tmp_path / "out", Merge())
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter).double()
    theirs = model.merge_and_unload().state_dict()
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor, theirs[name].float()) for name, tensor in ours.items())
    assert len(ours) == len(load_file(tiny_model / "model.safetensors"))


def test_gpt2_stores_its_weights_the_other_way_round(tiny_model: Path, tmp_path: Path):
    config = GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=4, bos_token_id=257, eos_token_id=257)
    base = tmp_path / "gpt2"
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    # Published GPT-2 weights lack the prefix that the module names have.
    weights = load_file(base / "model.safetensors")
    stripped = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    save_file(stripped, base / "model.safetensors", metadata={"format": "pt"})
    adapter = adapt(base, tmp_path / "adapter")
    merge(source(base, adapter), tmp_path / "out", Merge())
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected, atol=1e-5)


def test_shards_side_files_and_dtype(tiny_model: Path, tmp_path: Path):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    weights = AutoModelForCausalLM.from_pretrained(tiny_model)
    (base / "model.safetensors").unlink()
    weights.save_pretrained(base, max_shard_size="150KB")
    GenerationConfig(max_new_tokens=7).save_pretrained(base)
    adapter = adapt(base, tmp_path / "adapter")
    spec = Merge(dtype="bf16", max_shard_bytes=1_000_000, max_kl=1e-2)
    out = tmp_path / "out"
    merge(source(base, adapter), out, spec)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert GenerationConfig.from_pretrained(out).max_new_tokens == 7
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}


def test_no_output_shard_is_larger_than_asked(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    adapter = adapt(tiny_model, tmp_path / "adapter")
    written: list[int] = []
    save = merging.save_file
    monkeypatch.setattr(
        merging,
        "save_file",
        lambda tensors, path, **rest: (
            written.append(sum(t.nbytes for t in tensors.values())),
            save(tensors, path, **rest),
        ),
    )
    limit = 100_000
    spec = SimpleNamespace(dtype=None, max_shard_bytes=limit, max_kl=None)
    merge(source(tiny_model, adapter), tmp_path / "out", spec)  # type: ignore[arg-type] below the recipe's least
    assert len(written) > 2
    assert max(written) <= limit
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == len(written)


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_from_a_quantized_base_the_closer_way_is_kept(quantization: str, tiny_model: Path, tmp_path: Path):
    adapter = adapt(tiny_model, tmp_path / "adapter")
    merged = merge(source(tiny_model, adapter, quantization=quantization), tmp_path / "out", Merge())
    assert set(merged.tried) == {"base", "dequantized"}
    assert merged.method == "dequantized"  # random weights: what training saw is the rounded base
    assert merged.tried["dequantized"].kl < merged.tried["base"].kl
    assert merged.kl < (1e-5 if quantization == "int8" else 1e-8)  # int8 rounds the inputs, too
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_merge_that_changes_the_model_fails_and_leaves_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    adapter = adapt(tiny_model, tmp_path / "adapter")
    without_the_adapter(monkeypatch)
    with pytest.raises(UserError, match="differs from the adapter model"):
        merge(source(tiny_model, adapter), tmp_path / "out", Merge())
    assert not (tmp_path / "out").exists()


STORED = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("stored", STORED)
def test_rounding_on_disk_is_allowed_for_and_a_missing_adapter_is_not(
    stored: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=STORED[stored]).save_pretrained(base)
    adapter = adapt(base, tmp_path / "adapter")
    found = merge(source(base, adapter), tmp_path / "out", Merge())
    assert found.base_kl is not None
    assert found.kl < 0.1 * found.base_kl
    assert found.effect == pytest.approx(1, abs=0.05)

    without_the_adapter(monkeypatch)
    with pytest.raises(UserError, match=r"differs from the adapter model.*, effect 0,"):
        merge(source(base, adapter), tmp_path / "missing", Merge())


def test_a_quantized_base_alone_is_no_merge(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    adapter = adapt(tiny_model, tmp_path / "adapter")
    without_the_adapter(monkeypatch)
    with pytest.raises(UserError, match="so the adapter is not in it") as caught:
        merge(source(tiny_model, adapter, quantization="nf4"), tmp_path / "out", Merge(), "accept {}".format)
    kl = float(re.findall(r"KL ([0-9.e-]+) nats", caught.value.message)[0])
    assert kl < COARSEST, "the absolute bound alone would have let it pass"
    accepted = float(caught.value.remedy.rpartition("accept ")[2])
    merge(source(tiny_model, adapter, quantization="nf4"), tmp_path / "out", Merge(max_kl=accepted))


def without_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a merge write the base as it is."""
    finished = merging.Rounded.finished
    monkeypatch.setattr(merging.Rounded, "finished", lambda self, name, _, *rest: finished(self, name, None, *rest))


def test_rows_that_a_run_holds_out_are_asked_about_too(tiny_model: Path, rows_file: Path, tmp_path: Path):
    step = make_step(tiny_model, make_data(rows_file, test=3))
    folder = StageDir(tmp_path / "01-sft")
    folder.artifact.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert len(probes(tokenizer, folder.artifact)) == len(TEXTS)
    write_json(folder.step, step)
    asked = [tokenizer.decode(ids[0]) for ids in probes(tokenizer, folder.artifact)]
    assert len(asked) == len(TEXTS) + 3
    questions = [json.loads(line)["question"] for line in rows_file.read_text().splitlines()]
    assert all(any(question[:40] in text for question in questions) for text in asked[len(TEXTS) :])


def test_a_merge_that_differs_names_the_command_that_goes_on(tmp_path: Path):
    kinds = ("sft", "merge", "dpo", "merge")  # the first merge is no stage of the recipe
    steps = [{"name": f"{n:02d}-{kind}", "step": {}} for n, kind in enumerate(kinds, start=1)]
    plan = {"recipe": {"stage": [{"kind": kind} for kind in ("sft", "dpo", "merge")]}, "steps": steps}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    last = stage._go_on(StageDir(tmp_path / "04-merge"), "0.03")
    assert last == f"ftlaunch resume {tmp_path} --set stage.2.max_kl=0.03"
    assert stage._go_on(StageDir(tmp_path / "02-merge"), "0.03").endswith("ftlaunch run RECIPE --from 02-merge")


def test_what_cannot_be_merged_is_said(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    adapter = adapt(tiny_model, tmp_path / "adapter", target_modules=["q_proj"])
    with pytest.raises(UserError, match="neither a run, nor an artifact, nor a PEFT adapter"):
        find_source(tiny_model)
    assert find_source(adapter).base.path == str(tiny_model)

    other = tmp_path / "other"
    shutil.copytree(adapter, other)
    tensors = load_file(other / "adapter_model.safetensors")
    save_file(
        {name.replace("layers.1", "layers.9"): t for name, t in tensors.items()}, other / "adapter_model.safetensors"
    )
    with pytest.raises(UserError, match=r"weights of the adapter and of this model do not match, such as .*layers\.9"):
        merge(source(tiny_model, other), tmp_path / "o", Merge())

    monkeypatch.setattr(merging.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="1,000 bytes free and the model needs"):
        merge(source(tiny_model, adapter), tmp_path / "out", Merge())
    assert not (tmp_path / "out").exists()


def test_a_merge_that_was_killed_before_its_result_is_done_again(tiny_model: Path, tmp_path: Path):
    adapt(tiny_model, tmp_path / "adapter")
    folder = StageDir(tmp_path / "02-merge")
    folder.model.mkdir(parents=True)
    (folder.model / "config.json").write_text("{}")
    step = SimpleNamespace(stage=Merge(), start="adapter")
    result = stage.run(step, folder, None, None)  # type: ignore[arg-type] it asks for no more
    assert result.kl < 1e-5
    assert AutoModelForCausalLM.from_pretrained(folder.model)


def test_memory_stays_within_about_a_shard(tmp_path: Path):
    """A 480 MB base in shards of 20 MB is written by a process that grows by far less than the model."""
    base = tmp_path / "base"
    base.mkdir()
    for number in range(12):
        tensors = {f"model.layers.{number}.mlp.up_proj.weight": torch.zeros(2000, 5000)}
        save_file(tensors, base / f"part{number}.safetensors")
    weight_map = {f"model.layers.{number}.mlp.up_proj.weight": f"part{number}.safetensors" for number in range(12)}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    script = f"""
import resource
from pathlib import Path
from types import SimpleNamespace
from fttrain.merging.merge import Output, Rounded, _write_weights
from fttrain.merging.weight_map import stored
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
base, out = Path({str(base)!r}), Path({str(tmp_path / "out")!r})
out.mkdir()
none = SimpleNamespace(map=SimpleNamespace(by_key={{}}), tied=None)
_write_weights(list(stored(base)), Output(none, Rounded({{}}, {{}}), None), out, 20_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    grown = int(done.stdout.split()[-1]) * 1024
    assert len(list((tmp_path / "out").glob("model-*"))) == 12
    assert grown < 160_000_000, f"{grown:,} bytes for shards of 40 MB; {resource.getpagesize()}"
