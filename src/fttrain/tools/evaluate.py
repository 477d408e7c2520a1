"""`ftlaunch eval`, as `python -m fttrain.tools.evaluate RESOLVED.json MODEL…`.

What models answer to a recipe's held-out prompts, and how well.

Each prompt is asked once. What every row with that prompt has for an answer is a reference.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from ftlaunch.errors import UserError
from ftlaunch.recipe import Data
from fttrain.data.chat import Encoder
from fttrain.data.tokens import cache_root, tokenize
from fttrain.evaluation.prompts import Asked, asked_of, data_of, text_of
from fttrain.evaluation.text_metrics import Scores, score
from fttrain.tools.chat import load
from fttrain.tools.output import answer
from fttrain.tools.preview import read_recipe

BATCH = 16
"""Answers that are generated side by side."""


@dataclass(frozen=True)
class Evaluated:
    """One model's answers."""

    model: str
    asked: list[Asked]
    answers: list[str]
    scores: Scores


def main(argv: Sequence[str] | None = None) -> int:
    """Print the scores to stdout and return the exit code; what is wrong goes to stderr."""
    parser = argparse.ArgumentParser(prog="ftlaunch eval")
    parser.add_argument("recipe", type=Path, help="resolved.json of a run")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--data")
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--answers", type=Path)
    parser.add_argument("--json", action="store_true")
    return answer(_told(parser.parse_args(argv)))


def _told(options: argparse.Namespace) -> Iterator[str]:
    recipe = read_recipe(options.recipe)
    name, data = data_of(recipe, options.data)
    every: list[Evaluated] = []
    width = max(map(len, [*options.models, "model"]))
    for path in options.models:
        every.append(evaluate(path, data, recipe.seed, options.prompts, options.max_new_tokens))
        _require_same_rows(every[0], every[-1])
        if options.json:
            continue
        if len(every) == 1:
            yield f"{_about(name, data, every[0].asked)}\n\n{_line('model', width, 'BLEU', 'NIST', 'ROUGE-L', 'words')}"
        yield _line(path, width, *_cells(every[-1]))
    if options.answers is not None:
        _write(options.answers, every)
    if options.json:
        yield json.dumps(_as_json(name, every), indent=2)


def evaluate(path: str, data: Data, seed: int, prompts: int | None, max_new_tokens: int) -> Evaluated:
    """What the model says to the rows held out, or to all where none is; at most `prompts` of them.

    Raises UserError where the model or the rows cannot be had.
    """
    model, tokenizer = load(path)
    asked = asked_of(tokenize(data, tokenizer, seed, cache_root()), tokenizer)[:prompts]
    end_ids = Encoder(tokenizer, data).end_ids
    answers = reply(model, tokenizer, [one.ids_T for one in asked], end_ids, max_new_tokens)
    return Evaluated(path, asked, answers, score(answers, [one.references for one in asked]))


@torch.no_grad()
def reply(
    model: Any, tokenizer: Any, prompts: Sequence[tuple[int, ...]], end_ids: frozenset[int], max_new_tokens: int
) -> list[str]:
    """The greedy answer to each prompt, up to one of `end_ids` or to `max_new_tokens`."""
    answers: dict[int, str] = {}
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        ids_BT, mask_BT = _padded([prompts[place] for place in places], tokenizer.eos_token_id)
        made_BT = model.generate(
            input_ids=ids_BT.to(model.device),
            attention_mask=mask_BT.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(end_ids),
            pad_token_id=tokenizer.eos_token_id,
        )
        for place, ids in zip(places, made_BT[:, ids_BT.shape[1] :].tolist(), strict=True):
            ended = next((at for at, token in enumerate(ids) if token in end_ids), len(ids))
            answers[place] = text_of(tokenizer, ids[:ended])
        print(f"{len(answers)} of {len(prompts)} prompts answered", file=sys.stderr)
    return [answers[place] for place in range(len(prompts))]


def _padded(prompts: Sequence[tuple[int, ...]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [B, T], the padding on the left."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def _require_same_rows(first: Evaluated, other: Evaluated) -> None:
    if [one.references for one in first.asked] != [one.references for one in other.asked]:
        message = f"the tokenizer of {other.model} leaves other rows than that of {first.model}"
        raise UserError(message, "raise max_length of the data, or evaluate them apart")


def _about(name: str, data: Data, asked: list[Asked]) -> str:
    prompts = f"{len(asked)} prompt{'s' * (len(asked) > 1)}{' held out' * bool(data.test)}"
    references = sum(len(one.references) for one in asked)
    seen = sum(one.is_trained for one in asked)
    known = f"\n{seen} of the prompts are trained on, too, in other rows" if seen else ""
    return f"{name}: {prompts}, {references} reference{'s' * (references > 1)}{known}"


def _cells(evaluated: Evaluated) -> list[str]:
    scores = evaluated.scores
    return [f"{scores.bleu:.1f}", f"{scores.nist:.2f}", f"{scores.rouge_l:.1f}", f"{_mean_words(evaluated):.1f}"]


def _mean_words(evaluated: Evaluated) -> float:
    return sum(len(text.split()) for text in evaluated.answers) / len(evaluated.answers)


def _line(model: str, width: int, *cells: str) -> str:
    return "  ".join([f"{model:<{width}}", *(f"{cell:>7}" for cell in cells)])


def _as_json(name: str, every: list[Evaluated]) -> dict[str, Any]:
    asked = every[0].asked
    return {
        "data": name,
        "prompts": len(asked),
        "references": sum(len(one.references) for one in asked),
        "prompts_trained_on": sum(one.is_trained for one in asked),
        "models": {one.model: asdict(one.scores) | {"words": _mean_words(one)} for one in every},
    }


def _write(path: Path, every: list[Evaluated]) -> None:
    """A line a prompt: the prompt, its references and each model's answer."""
    with path.open("wb") as file:
        for place, asked in enumerate(every[0].asked):
            answers = {one.model: one.answers[place] for one in every}
            line = {"prompt": asked.prompt, "references": asked.references, "answers": answers}
            file.write(msgspec.json.encode(line) + b"\n")


if __name__ == "__main__":
    sys.exit(main())
