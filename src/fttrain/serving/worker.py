"""A thread for each model that answers what waits for it, in order of arrival, several requests at a time."""

import logging
import queue
import threading
from collections.abc import Callable
from typing import Any

from fttrain.answering.conversation import longest_context
from fttrain.answering.streaming import Request, answer_together
from fttrain.data.chat import end_ids

log = logging.getLogger(__name__)


class Worker:
    """One model, and the requests that wait for it."""

    def __init__(self, name: str, model: Any, tokenizer: Any, *, batch_size: int, most_waiting: int) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.context = longest_context(model)
        self._model = model
        self._batch_size = batch_size
        self._end_ids = end_ids(tokenizer)
        self._waiting: queue.Queue[tuple[Request, Callable[[bool], None]]] = queue.Queue(most_waiting)
        threading.Thread(target=self._work, name=f"answers of {name}", daemon=True).start()

    def submit(self, request: Request, done: Callable[[bool], None]) -> None:
        """Have a request answered; `done` is called, from the worker's thread, with whether that went well.

        Raises queue.Full where too many wait.
        """
        self._waiting.put_nowait((request, done))

    def _work(self) -> None:
        while True:
            # Whatever waits when the model is free is answered as one batch; a lone request waits for no other.
            batch = [self._waiting.get()]
            while len(batch) < self._batch_size and not self._waiting.empty():
                batch.append(self._waiting.get())
            wanted = [(request, done) for request, done in batch if not request.cancelled.is_set()]
            went_well = self._answer([request for request, _ in wanted])
            for _, done in batch:
                done(went_well)

    def _answer(self, requests: list[Request]) -> bool:
        if not requests:
            return True
        try:
            answer_together(self._model, self.tokenizer, requests, self._end_ids)
        # Whatever one batch fails of, out of memory included, the thread has to answer the next.
        except Exception:
            log.exception("%s could not answer %d requests", self.name, len(requests))
            return False
        return True
