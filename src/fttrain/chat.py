"""`python -m fttrain.chat MODEL… --prompt TEXT`: what models answer, side by side, greedily."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from ftlaunch.errors import BAD_INPUT, DONE, UserError
from ftlaunch.rundir import REWARD_HEAD
from fttrain.model import load_tokenizer


def load(path: str) -> tuple[Any, Any]:
    """A model and its tokenizer: a hub id, a model folder, an artifact, or a plain PEFT adapter's folder."""
    from transformers import AutoModelForCausalLM

    if (Path(path) / REWARD_HEAD).exists():
        raise UserError(f"{path} is a reward model: it rates answers and gives none", "name a model that answers")
    is_adapter = (Path(path) / "adapter_config.json").exists()
    try:
        if is_adapter:
            from peft import AutoPeftModelForCausalLM

            model: Any = AutoPeftModelForCausalLM.from_pretrained(path)
        else:
            model = AutoModelForCausalLM.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"no model could be loaded from {path}: {error}", "name a model folder or a hub id") from error
    beside = not is_adapter or (Path(path) / "tokenizer_config.json").exists()
    source = path if beside else model.peft_config["default"].base_model_name_or_path
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), load_tokenizer(source)


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
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
    try:
        print(f"prompt: {options.prompt}")
        for path in options.models:
            model, tokenizer = load(path)
            print(f"\n{path}:\n  {answer(model, tokenizer, options.prompt, options.max_new_tokens)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    return DONE


if __name__ == "__main__":
    sys.exit(main())
