"""Access control: no page of another site can use the server through a user's browser, and nobody without the token.

A request is checked by its Host (against DNS rebinding, where another site's name points here), its Origin, its token
and its size, before its body is read.
"""

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.responses import JSONResponse

MOST_BYTES = 1_000_000
"""Bytes of a request's body at most."""
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
            return await error_response(*refusal)(scope, receive, send)
        body = await _body(receive)
        if body is None:
            return await error_response(413, TOO_LARGE)(scope, receive, send)
        await self._app(scope, _replayed(body, receive), send)
        return None

    def _refusal(self, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if _without_port(host) not in self._hosts:
            return 403, "this server is not called by that name; see --allow-host"
        origin = headers.get("origin")
        # Browsers send Origin with every POST of a script; programs such as curl send none and need no protection.
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
        # In constant time, so that nobody can guess the token letter by letter.
        return hmac.compare_digest(authorization.encode(), f"Bearer {self._token}".encode())


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).lower()


async def _body(receive: Receive) -> bytes | None:
    """Return the whole body; None once it is too large, which a request without Content-Length does not announce."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if sum(map(len, parts)) > MOST_BYTES:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body, read already, and then whatever comes, such as a disconnection."""
    replayed = False

    async def read() -> MutableMapping[str, Any]:
        nonlocal replayed
        if replayed:
            return await receive()
        replayed = True
        return {"type": "http.request", "body": body, "more_body": False}

    return read


def error_response(status: int, message: str) -> JSONResponse:
    """Return an error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": status}}, status)
