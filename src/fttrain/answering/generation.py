"""Answers to prompts, generated in batches: greedy, sampled, or by beam search."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fttrain.evaluation.prompts import text_of


@dataclass(frozen=True)
class Decoding:
    """How answers are generated."""

    max_new_tokens: int
    batch_size: int = 16
    """Answers that are generated at the same time."""
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    top_p: float = 1.0
    beams: int = 1

    def arguments(self) -> dict[str, Any]:
        """Return the arguments for transformers' `generate`."""
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0} if self.temperature else {}
        lengths = {"max_new_tokens": self.max_new_tokens, "num_beams": self.beams}
        return {"do_sample": bool(self.temperature), **drawn, **lengths}


def reply(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], end_ids: frozenset[int], decoding: Decoding
) -> Iterator[dict[int, str]]:
    """The answer to each prompt by its place, up to one of `end_ids` or the longest: a batch at a time, long first."""
    # Prompts of a batch are of like length, so there is little padding; the longest come first, so that running out of
    # memory shows at once.
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    for start in range(0, len(order), decoding.batch_size):
        places = order[start : start + decoding.batch_size]
        texts = _reply_to_batch(model, tokenizer, [prompts[place] for place in places], end_ids, decoding)
        yield dict(zip(places, texts, strict=True))


@torch.no_grad()
def _reply_to_batch(
    model: Any, tokenizer: Any, prompts: list[Sequence[int]], end_ids: frozenset[int], decoding: Decoding
) -> list[str]:
    ids_BT, mask_BT = padded(prompts, tokenizer.eos_token_id)
    made_BT = model.generate(
        input_ids=ids_BT.to(model.device),
        attention_mask=mask_BT.to(model.device),
        eos_token_id=sorted(end_ids),
        pad_token_id=tokenizer.eos_token_id,
        **decoding.arguments(),
    )
    texts: list[str] = []
    for ids in made_BT[:, ids_BT.shape[1] :].tolist():
        ended = next((at for at, token in enumerate(ids) if token in end_ids), len(ids))
        texts.append(text_of(tokenizer, ids[:ended]))
    return texts


def padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [B, T], the padding on the left."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)
