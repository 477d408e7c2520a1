"""The server: a page, `/v1/models`, `/v1/chat/completions` and `/v1/completions`, streamed or whole."""

import asyncio
import json
import queue
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from ftlaunch.errors import UserError
from fttrain.answering.conversation import prompt_ids, text_ids
from fttrain.answering.streaming import Request
from fttrain.serving.guard import Guard, error_response
from fttrain.serving.schema import Body, ChatBody, TextBody
from fttrain.serving.worker import Worker

PAGE = Path(__file__).with_name("page.html")
LOOK_SECONDS = 0.5
"""Seconds between two checks whether the client of an answer that is not streamed is still connected."""


@dataclass(frozen=True)
class Limits:
    """Limits of one request: tokens of its answer, and seconds."""

    max_new_tokens: int
    seconds: float


class Refused(Exception):
    """A request that is refused, with its HTTP status and the reason in plain words."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def make_app(workers: Mapping[str, Worker], limits: Limits, hosts: frozenset[str], token: str | None) -> Guard:
    """Return the server's ASGI application."""
    app = FastAPI(title="ftlaunch serve", docs_url=None, redoc_url=None, openapi_url=None)
    _tell_errors(app)

    @app.get("/")
    async def page() -> Response:
        # Only the page's own script and style run: a model's answer that holds HTML cannot load or execute anything.
        nonce = secrets.token_urlsafe(16)
        policy = f"default-src 'none'; connect-src 'self'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'"
        headers = {"content-security-policy": f"{policy}; base-uri 'none'; frame-ancestors 'none'"}
        return HTMLResponse(PAGE.read_text().replace("NONCE", nonce), headers=headers | {"cache-control": "no-store"})

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        listed = [{"id": name, "object": "model", "created": 0, "owned_by": "ftlaunch"} for name in workers]
        return {"object": "list", "data": listed}

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, http: HttpRequest) -> Response:
        worker = _worker(workers, body.model)
        ids = prompt_ids(worker.tokenizer, [message.plain() for message in body.messages])
        return await _answer(worker, body, ids, limits, http, is_chat=True)

    @app.post("/v1/completions")
    async def complete(body: TextBody, http: HttpRequest) -> Response:
        worker = _worker(workers, body.model)
        return await _answer(worker, body, text_ids(worker.tokenizer, body.prompt), limits, http, is_chat=False)

    return Guard(app, hosts=hosts, token=token)


def _worker(workers: Mapping[str, Worker], name: str) -> Worker:
    if name not in workers:
        raise Refused(404, f"there is no model {name!r} here; there are: {', '.join(workers)}")
    return workers[name]


def _tell_errors(app: FastAPI) -> None:
    """Answer every refusal in plain words, as OpenAI's errors look; internal errors go to the log only."""

    @app.exception_handler(Refused)
    async def refused(_: HttpRequest, error: Refused) -> JSONResponse:
        return error_response(error.status, str(error))

    @app.exception_handler(UserError)
    async def mistaken(_: HttpRequest, error: UserError) -> JSONResponse:
        return error_response(400, error.message)

    @app.exception_handler(HTTPException)
    async def unknown(_: HttpRequest, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def malformed(_: HttpRequest, error: RequestValidationError) -> JSONResponse:
        told = [
            f"{'.'.join(str(part) for part in one['loc'][1:]) or 'the body'}: {one['msg']}" for one in error.errors()
        ]
        return error_response(400, "; ".join(told[:5]))

    @app.exception_handler(Exception)
    async def failed(_: HttpRequest, error: Exception) -> JSONResponse:  # noqa: ARG001 starlette logs it
        return error_response(500, "something went wrong here; the server's log says what")


class _Pieces:
    """A queue of pieces of an answer, from the worker's thread to the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[str | bool] = asyncio.Queue()

    def put(self, piece: str | bool) -> None:
        """Take the next piece or, at the end, whether all went well."""
        self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)

    async def next(self, wait: float) -> str | bool | None:
        """Return a piece; True (all went well) or False at the end; None if nothing comes in time."""
        try:
            return await asyncio.wait_for(self._queue.get(), wait)
        except TimeoutError:
            return None


async def _answer(
    worker: Worker, body: Body, ids: Sequence[int], limits: Limits, http: HttpRequest, *, is_chat: bool
) -> Response:
    pieces = _Pieces()
    request = _request(worker, body, ids, limits, pieces)
    try:
        worker.submit(request, pieces.put)
    except queue.Full:
        raise Refused(429, "too many requests wait already; try again in a moment") from None
    head = {"id": f"cmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": worker.name}
    if body.stream:
        told = _stream(request, pieces, head, body, is_chat=is_chat)
        return StreamingResponse(told, media_type="text/event-stream", headers={"cache-control": "no-store"})
    text = await _whole(request, pieces, http)
    choice: dict[str, Any] = {"index": 0, "finish_reason": request.finish, "logprobs": None}
    choice |= {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
    kind = "chat.completion" if is_chat else "text_completion"
    return JSONResponse({**head, "object": kind, "choices": [choice], "usage": _usage(request)})


def _request(worker: Worker, body: Body, ids: Sequence[int], limits: Limits, pieces: _Pieces) -> Request:
    room = worker.context - len(ids)
    if room < 1:
        message = f"the prompt has {len(ids):,} tokens, and prompt and answer may have {worker.context:,}"
        raise Refused(400, message)
    wanted = body.max_completion_tokens or body.max_tokens or limits.max_new_tokens
    if wanted > limits.max_new_tokens:
        raise Refused(400, f"max_tokens may be {limits.max_new_tokens:,} at most here")
    return Request(
        ids=ids,
        max_new_tokens=min(wanted, room),
        say=pieces.put,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=body.top_p or 1.0,
        seed=body.seed,
        stop=body.stops,
        deadline=time.monotonic() + limits.seconds,
    )


async def _whole(request: Request, pieces: _Pieces, http: HttpRequest) -> str:
    told: list[str] = []
    while True:
        piece = await pieces.next(LOOK_SECONDS)
        if piece is True:
            return "".join(told)
        if piece is False:
            raise Refused(500, "the model could not answer; the server's log says why")
        if piece is None and await http.is_disconnected():
            # Otherwise the model would go on for somebody who has left, while others wait.
            request.cancelled.set()
            raise Refused(499, "nobody waits for this answer any more")
        told += [piece] if isinstance(piece, str) else []


async def _stream(
    request: Request, pieces: _Pieces, head: dict[str, Any], body: Body, *, is_chat: bool
) -> AsyncIterator[str]:
    """Yield server-sent events, one per piece; a client that disconnects cancels the request."""
    kind = "chat.completion.chunk" if is_chat else "text_completion"

    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        return f"data: {json.dumps({**head, 'object': kind, 'choices': choices, **more})}\n\n"

    def chunk(text: str | None, finish: str | None = None) -> dict[str, Any]:
        delta = {} if text is None else {"content": text}
        part = {"delta": delta} if is_chat else {"text": text or ""}
        return {"index": 0, **part, "finish_reason": finish, "logprobs": None}

    try:
        if is_chat:
            yield event([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
        while not isinstance(piece := await pieces.next(3600), bool):
            if piece is not None:
                yield event([chunk(piece)])
        if not piece:  # the status line is long sent, so the error has to come as an event
            error = {"message": "the model could not answer; the server's log says why", "type": "server_error"}
            yield f"data: {json.dumps({'error': error})}\n\n"
            return
        yield event([chunk(None, request.finish)])
        if body.stream_options and body.stream_options.include_usage:
            yield event([], usage=_usage(request))
        yield "data: [DONE]\n\n"
    finally:
        request.cancelled.set()


def _usage(request: Request) -> dict[str, int]:
    prompt, answer = len(request.ids), request.tokens
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
