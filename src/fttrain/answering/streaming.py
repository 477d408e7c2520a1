"""Answers to several requests at once, each with its own sampling, streamed while they are generated."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from fttrain.answering.generation import padded

UNFINISHED = "\ufffd"
"""What a decoder writes for a character whose bytes are not all there yet."""


@dataclass
class Request:
    """One prompt to be answered."""

    ids: Sequence[int]
    max_new_tokens: int
    say: Callable[[str], None]
    """Called with each piece of the answer, from the thread that generates."""
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    """Texts that end the answer and do not belong to it."""
    deadline: float = float("inf")
    """Time by time.monotonic() at which the answer is cut off."""
    cancelled: threading.Event = field(default_factory=threading.Event)
    """Set by whoever does not want the answer any more."""
    tokens: int = 0
    finish: str = "length"
    """Why the answer ended: "stop" at its own end or a stop text, "length" at its limit or deadline."""


class Text:
    """Tokens as text that grows, without half characters, up to a stop text."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._ids: list[int] = []
        self._start = self._read = 0
        self._held = ""
        """Text that may be the beginning of a stop text."""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is new with this token."""
        self._ids.append(token)
        # A token's text depends on those before it, spaces above all. So the newest tokens are decoded with and without
        # the last one, and the difference is its text; the window is short, so the cost does not grow.
        before = self._decode(self._ids[self._start : self._read])
        now = self._decode(self._ids[self._start :])
        if now.endswith(UNFINISHED):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._up_to_stop(now[len(before) :])

    def rest(self) -> str:
        """What was held back, once nothing follows."""
        held, self._held = self._held, ""
        return "" if self.stopped else held

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _up_to_stop(self, piece: str) -> str:
        text = self._held + piece
        found = min((at for stop in self._stop if (at := text.find(stop)) >= 0), default=-1)
        if found >= 0:
            self.stopped, self._held = True, ""
            return text[:found]
        kept = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the text's end a stop text begins with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


class _Drawing(LogitsProcessor):
    """Chooses each row's token by its request, and leaves nothing else to choose from."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._requests = requests
        self._draws = [None if one.seed is None else torch.Generator().manual_seed(one.seed) for one in requests]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002 the protocol's
        chosen = [
            _choose(row.float().cpu(), request, draw)
            for row, request, draw in zip(scores, self._requests, self._draws, strict=True)
        ]
        only = torch.full_like(scores, -torch.inf)
        return only.scatter(1, torch.tensor(chosen, device=scores.device)[:, None], 0.0)


def _choose(scores_V: Tensor, request: Request, draw: torch.Generator | None) -> int:
    if not request.temperature:
        return int(scores_V.argmax())
    probabilities, order = (scores_V / request.temperature).softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities[before >= request.top_p] = 0.0
    return int(order[torch.multinomial(probabilities, 1, generator=draw)])


class _Telling(BaseStreamer):
    """Tells each request what is new of its answer."""

    def __init__(self, tokenizer: Any, requests: Sequence[Request], end_ids: frozenset[int]) -> None:
        self._requests = requests
        self._end_ids = end_ids
        self._texts = [Text(tokenizer, one.stop) for one in requests]
        self._is_prompt = True
        self.open = [True] * len(requests)

    def put(self, value: Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        for row, token in enumerate(value.tolist()):
            if self.open[row]:
                self._tell(row, token)

    def _tell(self, row: int, token: int) -> None:
        request, text = self._requests[row], self._texts[row]
        if token in self._end_ids:
            request.finish, self.open[row] = "stop", False
        else:
            request.tokens += 1
            if piece := text.add(token):
                request.say(piece)
            if text.stopped:
                request.finish, self.open[row] = "stop", False
            elif request.tokens >= request.max_new_tokens:
                self.open[row] = False
        if request.cancelled.is_set() or time.monotonic() > request.deadline:
            self.open[row] = False
        if not self.open[row] and (held := text.rest()):
            request.say(held)

    def end(self) -> None:
        """All rows are told as they end."""


class _Ending(StoppingCriteria):
    """A row ends where its request does."""

    def __init__(self, telling: _Telling) -> None:
        self._telling = telling

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002 the protocol's
        return torch.tensor([not is_open for is_open in self._telling.open], device=input_ids.device)


@torch.no_grad()
def answer_together(model: Any, tokenizer: Any, requests: Sequence[Request], end_ids: frozenset[int]) -> None:
    """Answer requests in one batch; each gets its own text piece by piece, and at the end why it ended."""
    # `generate` samples with one setting for all rows. So a processor chooses each row's token by its own request and
    # leaves it as the only one possible: whatever `generate` draws then, it is that token.
    pad = tokenizer.eos_token_id
    ids_BT, mask_BT = padded([one.ids for one in requests], pad)
    telling = _Telling(tokenizer, requests, end_ids)
    model.generate(
        input_ids=ids_BT.to(model.device),
        attention_mask=mask_BT.to(model.device),
        max_new_tokens=max(one.max_new_tokens for one in requests),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        logits_processor=LogitsProcessorList([_Drawing(requests)]),
        stopping_criteria=StoppingCriteriaList([_Ending(telling)]),
        eos_token_id=sorted(end_ids),
        pad_token_id=pad,
        streamer=telling,
    )
