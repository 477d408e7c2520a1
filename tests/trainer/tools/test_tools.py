"""The trainer's verbs other than `run`: import, merge, chat and preview, on a finished run and on folders."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from tests.conftest import CHATML, Launch
from tests.trainer.conftest import RECIPE
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ftlaunch.errors import BAD_INPUT, UserError
from ftlaunch.run.layout import RunDir
from ftlaunch.tools import MergeOptions
from fttrain.distributed.precision import computed_in
from fttrain.model.scorer import DTYPES
from fttrain.tools import chat, merge
from fttrain.tools.import_gguf import convert
from fttrain.tools.output import answer

PROMPT = "red kettle"
HEADS, KV_HEADS, LAYERS = 4, 2, 2
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rows_file: Path, launch: Launch) -> RunDir:
    """A finished run of one stage."""
    folder = tmp_path_factory.mktemp("tools")
    path = folder / "tiny.toml"
    path.write_text(RECIPE.format(model=tiny_model, rows=rows_file, dropout=0.0))
    launch("run", path, "--set", "stage.sft.learning_rate=0.1", "--run-dir", folder / "run")
    return RunDir(folder / "run")


@pytest.fixture(scope="module")
def merged(run: RunDir, launch: Launch) -> Path:
    """What `ftlaunch merge RUN OUT` makes of it."""
    out = run.path.parent / "merged"
    done = launch("merge", run.path, out)
    assert "base merge, max |Δlogit|" in done.stdout
    assert "same first choice at 100.0% of positions" in done.stdout
    return out


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(torch.arange(40)[None] + 40).logits


@torch.no_grad()
def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """The most probable tokens one after the other, without a cache, up to the model's end token."""
    for _ in range(count):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == model.config.eos_token_id:
            break
    return ids


def test_a_run_is_merged_as_its_adapter_folder_is(run: RunDir, merged: Path, tiny_model: Path, launch: Launch):
    artifact = run.stage_dir("01-sft").artifact
    plain = run.path.parent / "plain"
    plain.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(artifact / name, plain / name)  # as peft alone would have left it
    other = run.path.parent / "merged-bf16"
    launch("merge", plain, other, "--dtype", "bf16")

    expected = logits(AutoPeftModelForCausalLM.from_pretrained(artifact))
    whole, short = (AutoModelForCausalLM.from_pretrained(folder) for folder in (merged, other))
    assert torch.allclose(logits(whole), expected, atol=1e-5)
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tiny_model)), expected, atol=1e-2)
    assert short.dtype == torch.bfloat16
    assert torch.allclose(logits(short).float(), expected, atol=0.1)
    assert AutoTokenizer.from_pretrained(merged).chat_template == CHATML
    assert AutoTokenizer.from_pretrained(other).chat_template == CHATML


def test_a_merge_overwrites_nothing(run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "mine").touch()
    assert answer(merge.main, MergeOptions(source=str(run.path), out=str(tmp_path))) == BAD_INPUT
    assert "exists and is not empty\n  → name another folder" in capsys.readouterr().err


def test_chat_answers_greedily_with_each_model(run: RunDir, merged: Path, tiny_model: Path, launch: Launch):
    artifact = run.stage_dir("01-sft").artifact
    asked = [str(tiny_model), str(run.path), str(merged)]
    done = launch("chat", *asked, "--prompt", PROMPT, "--max-new-tokens", "12")
    said = done.stdout
    told = [line.rpartition(" is computed in ") for line in done.stderr.splitlines()]  # no library's warnings, no bars
    assert [model for model, _, _ in told] == [str(tiny_model), str(artifact), str(merged)]
    assert {dtype for _, _, dtype in told} <= {"bf16", "fp16", "fp32"}
    first, *answers = said.rstrip("\n").split("\n\n")
    assert first == f"prompt: {PROMPT}"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer.encode(f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n")
    models = [AutoModelForCausalLM.from_pretrained(tiny_model), AutoPeftModelForCausalLM.from_pretrained(artifact)]
    expected = [tokenizer.decode(greedy(m.eval(), ids, 12)[len(ids) :], skip_special_tokens=True) for m in models]
    assert answers == [
        f"{name}:\n  {text.strip()}"
        for name, text in zip([tiny_model, artifact, merged], [*expected, expected[1]], strict=True)
    ]
    assert expected[0] != expected[1]


def test_a_run_is_evaluated_beside_its_base(run: RunDir, tiny_model: Path, launch: Launch):
    told = json.loads(launch("eval", run.path, "--max-new-tokens", "8", "--json").stdout)
    assert (told["data"], told["prompts"], told["references"]) == ("rows", 8, 8)
    assert list(told["models"]) == [str(tiny_model), str(run.stage_dir("01-sft").artifact)]


def test_a_model_is_asked_in_its_template(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    model, tokenizer = chat.load(str(tiny_model))
    asked: list[str] = []
    generate = model.generate

    def listen(**inputs: Any) -> torch.Tensor:
        asked.append(tokenizer.decode(inputs["input_ids"][0]))
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", listen)
    chat.say(model, tokenizer, [{"role": "user", "content": PROMPT}], 1)
    tokenizer.chat_template = None
    chat.say(model, tokenizer, [{"role": "user", "content": PROMPT}], 1)
    assert asked == [f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n", PROMPT]


def test_a_folder_without_a_model_is_a_users_mistake(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no model could be loaded from"):
        chat.load(str(tmp_path))


PINNED, MAIN = "1" * 40, "2" * 40


@pytest.fixture
def hub(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Logits of the two revisions of owner/model in a hub cache, offline: the pinned one, and main."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(MAIN)
    for revision in (PINNED, MAIN):
        shutil.copytree(tiny_model, repository / "snapshots" / revision)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=DTYPES[computed_in("auto")])
    pinned = logits(model)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(3)
    model.save_pretrained(repository / "snapshots" / MAIN)
    return {PINNED: pinned, MAIN: logits(model)}


def test_a_model_of_the_hub_is_asked_at_its_revision(hub: dict[str, torch.Tensor], run: RunDir, tmp_path: Path):
    assert torch.equal(logits(chat.load("owner/model")[0]), hub[MAIN])
    assert torch.equal(logits(chat.load(f"owner/model@{PINNED}")[0]), hub[PINNED])
    plain = tmp_path / "plain"  # an adapter of peft's own, and one of a run: both know the base's revision
    shutil.copytree(run.stage_dir("01-sft").artifact, plain)
    (plain / "artifact.json").unlink()
    config = json.loads((plain / "adapter_config.json").read_text())
    there = {"base_model_name_or_path": "owner/model"}
    (plain / "adapter_config.json").write_text(json.dumps(config | there | {"revision": PINNED}))
    ours = tmp_path / "ours"
    shutil.copytree(run.stage_dir("01-sft").artifact, ours)
    (ours / "adapter_config.json").write_text(json.dumps(config | there))
    card = json.loads((ours / "artifact.json").read_text())
    card["base"] |= {"path": "owner/model", "revision": PINNED}
    (ours / "artifact.json").write_text(json.dumps(card))
    expected = logits(chat.load(str(run.stage_dir("01-sft").artifact))[0])
    # It does not say in which format it was trained; main's base is far from this.
    assert torch.allclose(logits(chat.load(str(plain))[0]).float(), expected, atol=0.1)
    assert torch.equal(logits(chat.load(str(ours))[0]), expected)


def test_preview_shows_what_is_trained(run: RunDir, rows_file: Path, launch: Launch):
    recipe = run.path.parent / "tiny.toml"
    said = launch("preview", recipe, "--rows", "3").stdout
    assert said.startswith("rows: 48 of 48 rows, 8 held out\n")
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    written = [
        f"<|im_start|>user\n{row['question']}<|im_end|>\n<|im_start|>assistant\n⟦{row['answer']}<|im_end|>\n⟧"
        for row in rows
    ]
    assert sum(text in said for text in written) == 3


def gguf_tensors(model: LlamaForCausalLM) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors by the names, and with the order of rotary dimensions, that llama.cpp gives them."""
    for key, tensor in model.state_dict().items():
        if key in ("model.embed_tokens.weight", "model.norm.weight"):
            yield ("token_embd" if "embed" in key else "output_norm") + ".weight", tensor.numpy()
        elif key != "lm_head.weight":
            _, _, layer, name = key.removesuffix(".weight").split(".", 3)
            yield f"blk.{layer}.{GGUF_NAMES[name]}.weight", paired(tensor, name).numpy()


def paired(weight: torch.Tensor, name: str) -> torch.Tensor:
    heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(name)
    if heads is None:
        return weight
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape).contiguous()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Path, LlamaForCausalLM]:
    """A GGUF file in fp32, and the model that is in it."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    vocabulary = AutoTokenizer.from_pretrained(tiny_model).get_vocab()
    letters = sorted(vocabulary, key=lambda token: vocabulary[token])[:256]
    tokens = [*letters, "ab", "<|im_start|>", "<|im_end|>"]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=258,
    )
    model = LlamaForCausalLM(config)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL] * 2)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(258)
    writer.add_chat_template(CHATML)
    for name, tensor in gguf_tensors(model):
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


def test_a_gguf_file_becomes_a_model_folder(written: tuple[Path, LlamaForCausalLM], tmp_path: Path):
    path, model = written
    out = tmp_path / "out"
    out.mkdir()
    convert(path, out, torch.float32)
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert torch.allclose(logits(loaded), logits(model), atol=1e-5)
    assert loaded.config.tie_word_embeddings
    assert not hasattr(loaded.config, "quantization_config")
    assert tokenizer.encode("ab a<|im_end|>") == [256, tokenizer.encode(" ")[0], tokenizer.encode("a")[0], 258]
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("<|im_end|>", CHATML)
    assert not list(tmp_path.glob(".out*"))
    with pytest.raises(UserError, match="exists and is not empty"):
        convert(path, out, torch.float32)


def test_a_gguf_file_that_cannot_be_read_is_a_users_mistake(written: tuple[Path, LlamaForCausalLM], tmp_path: Path):
    whole = written[0].read_bytes()
    damaged = {"empty": b"", "other": b"hello" * 99, "head": whole[:20], "keys": whole[:2000], "half": whole[:200_000]}
    for name, content in damaged.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as GGUF"):
            convert(path, tmp_path / name, torch.float32)
        assert not (tmp_path / name).exists()
    with pytest.raises(UserError, match="does not exist"):
        convert(tmp_path / "none.gguf", tmp_path / "none", torch.float32)


def test_deepspeed_and_bitsandbytes_say_nothing_of_their_own_when_they_are_imported():
    script = "import fttrain, deepspeed, bitsandbytes.backends.cpu.ops"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
