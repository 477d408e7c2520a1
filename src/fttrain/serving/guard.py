"""Who may ask: a page of another site may not, by the browser of somebody who may; and without the token nobody.

A request is judged by its Host (a name that another site has pointed here is refused: DNS rebinding), its Origin, its
token and its size, before anything of it is read.
"""

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

MOST_BYTES = 1_000_000
"""Of a request's body."""
TOO_LARGE = f"a request may have {MOST_BYTES:,} bytes"

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Guard:
    """ASGI middleware; refusals are JSON, as OpenAI's clients read them."""

    def __init__(self, app: App, *, hosts: frozenset[str], token: str | None) -> None:
        """`hosts` are the names, without a port, that this server may be called by."""
        self._app = app
        self._hosts = hosts
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send) if scope["type"] == "lifespan" else None
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            return await _refuse(send, *refusal)
        body = await _body(receive)
        if body is None:
            return await _refuse(send, 413, TOO_LARGE)
        await self._app(scope, _replayed(body, receive), send)
        return None

    def _refusal(self, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if _without_port(host) not in self._hosts:
            return 403, "this server is not called by that name; see --allow-host"
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return 403, "pages of other sites may not use this server"
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return 403, "pages of other sites may not use this server"
        if self._token is not None and path.startswith("/v1/") and not self._is_ours(headers.get("authorization", "")):
            return 401, "the token is missing or wrong: send Authorization: Bearer TOKEN"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > MOST_BYTES:
            return 413, TOO_LARGE
        return None

    def _is_ours(self, authorization: str) -> bool:
        assert self._token is not None
        return hmac.compare_digest(authorization.encode(), f"Bearer {self._token}".encode())


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).lower()


async def _body(receive: Receive) -> bytes | None:
    """The whole body; None once it is larger than it may be, which a request need not say beforehand."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if sum(map(len, parts)) > MOST_BYTES:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A body that was read before, and then whatever else comes, such as that the client has gone."""
    told = False

    async def read() -> MutableMapping[str, Any]:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return read


async def _refuse(send: Send, status: int, message: str) -> None:
    body = json.dumps({"error": {"message": message, "type": "invalid_request_error", "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
