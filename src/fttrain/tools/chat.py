"""`python -m fttrain.tools.chat MODEL… --prompt TEXT`: what models answer, side by side, greedily."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ftlaunch.errors import UserError
from ftlaunch.recipe import Model
from ftlaunch.run.layout import CARD, REWARD_HEAD
from ftlaunch.safety.model_files import ADAPTER_CONFIG
from fttrain import adapters, artifact, hub
from fttrain.distributed.precision import computed_in
from fttrain.merging.merge import find_source
from fttrain.model.scorer import DTYPES, load_tokenizer
from fttrain.noise import replace_activations
from fttrain.quant import qat
from fttrain.tools.output import answer


def load(path: str, device: torch.device | None = None) -> tuple[Any, Any]:
    """A model and its tokenizer: ID or ID@REVISION of the hub, a model folder, an artifact, or a PEFT adapter's folder.

    It goes to the GPU, where there is one, unless a device is named. Raises UserError where they cannot be had or
    trusted.
    """
    from transformers import AutoModelForCausalLM

    if (Path(path) / REWARD_HEAD).exists():
        raise UserError(f"{path} is a reward model: it rates answers and gives none", "name a model that answers")
    base = _base(path)
    try:
        folder = hub.model_folder(base.path, base.revision)
        replace_activations.make_known()
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[computed_in(base.dtype, device)], use_safetensors=True, trust_remote_code=False
        )
        replace_activations.wear(model, replace_activations.read(Path(path)))
        beside = (Path(path) / "tokenizer_config.json").exists()
        tokenizer = load_tokenizer(path) if beside else load_tokenizer(base.path, base.revision)
        if artifact.is_plain(Path(path)):
            tokenizer.chat_template = None
        qat.follow_card(model, folder)
        if (Path(path) / ADAPTER_CONFIG).exists():
            model = _with_adapter(model, Path(path), len(tokenizer))
    except (OSError, ValueError) as error:
        raise UserError(f"no model could be loaded from {path}: {error}", "name a model folder or a hub id") from error
    return model.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer


def _base(path: str) -> Model:
    """An adapter's base, at the revision that it was trained on; else the model itself."""
    if (Path(path) / ADAPTER_CONFIG).exists():
        return find_source(Path(path)).base
    if Path(path).exists():
        return Model(path=path)
    name, _, revision = path.partition("@")
    return Model(path=name, revision=revision or None)


def _with_adapter(model: Any, adapter: Path, vocabulary: int) -> Any:
    if vocabulary > model.get_input_embeddings().weight.shape[0]:  # the adapter was trained with tokens of its own
        model.resize_token_embeddings(vocabulary)
    wrapped: Any = adapters.with_saved(model, adapter)
    if (adapter / CARD).exists() and (rounding := artifact.read(adapter)[0].rounding):
        qat.install(wrapped, rounding, adapter)
    return wrapped


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    """The model's greedy answer to one user turn, through the chat template if there is one."""
    text = prompt
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).to(model.device)
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main() -> int:
    parser = argparse.ArgumentParser(prog="ftlaunch chat")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args()
    return answer(_replies(options))


def _replies(options: argparse.Namespace) -> Iterator[str]:
    yield f"prompt: {options.prompt}"
    for path in options.models:
        model, tokenizer = load(path)
        yield f"\n{path}:\n  {generate(model, tokenizer, options.prompt, options.max_new_tokens)}"


if __name__ == "__main__":
    sys.exit(main())
