"""What a request must be before the app sees it: from whom, from where, how large, how fast."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from keras_gemma2.serving.bodies import error_body
from keras_gemma2.serving.page import NAMES

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
DRAINED_BYTES, DRAINED_SECONDS = 256_000_000, 0.5  # of a refused body: in all, and until its next part
# For those who watch over a server, who have no key, and for the page that asks for one.
OPEN_PATHS = ("/health", "/ready", "/metrics", *NAMES)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the guard lets through.

    Args:
        api_key: that all but `OPEN_PATHS` wants as a bearer token; None for none.
        body_bytes: of a body, at most.
        body_seconds: that a body may take to arrive.
        send_seconds: that a client may take to accept the next part of its answer; after them the connection is closed.
        hosts: names that the `Host` header may have, without ports; None for any. Keeps out pages whose name was made to lead here
            (DNS rebinding).
    """

    api_key: str | None = None
    body_bytes: int = 4_000_000
    body_seconds: float = 30.0
    send_seconds: float = 30.0
    hosts: frozenset[str] | None = None


class _Refused(Exception):
    """A request that is answered with an error.

    Attributes:
        has_all: whether the whole body has arrived.
    """

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.has_all = status, code, False


class Guard:
    """An ASGI application around another.

    Args:
        app: the other.
        limits: what comes through.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], limits: Limits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check(scope, headers)
            body = await asyncio.wait_for(self._body(headers, receive), self._limits.body_seconds)
        except TimeoutError:
            await _answer(send, _Refused(408, f"The request's body did not arrive within {self._limits.body_seconds:g} seconds."))
        except _Refused as refused:
            if not refused.has_all:
                await self._drain(headers, receive)
            await _answer(send, refused)
        else:
            if body is not None:
                await self._app(scope, _replayed(body, receive), _patient(send, self._limits.send_seconds))

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        limits, host = self._limits, headers.get("host", "")
        name = urlsplit(f"//{host}").hostname if _is_readable(host) else None
        if limits.hosts is not None and name not in limits.hosts:
            raise _Refused(403, f"This server is not called {host[:200]!r}. It is one of: {', '.join(sorted(limits.hosts))}.")
        origin = headers.get("origin")
        if origin is not None and (not _is_readable(origin) or urlsplit(origin).netloc != host):
            raise _Refused(403, "Pages of other origins may not use this server.")
        if limits.api_key is not None and scope["path"] not in OPEN_PATHS:
            given = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, f"Bearer {limits.api_key}".encode()):
                raise _Refused(401, "The API key is missing or wrong: send it as `Authorization: Bearer KEY`.", "invalid_api_key")
        media = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and media != "application/json":
            raise _Refused(415, f"The body must be JSON, with `Content-Type: application/json`. Received: {media[:200]!r}.")

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes | None:
        """The whole body; None if the client goes away."""
        most = self._limits.body_bytes
        too_large = _Refused(413, f"The request's body has more than {most} bytes, as many as this server takes.")
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or int(length[:20]) > most:
            raise too_large
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > most:
                too_large.has_all = not more
                raise too_large
        return bytes(body)

    async def _drain(self, headers: dict[str, str], receive: Receive) -> None:
        """Takes the rest of a body that is refused, while it comes: a client that still sends would see its connection reset, and
        not the answer. One that asks before it sends is told at once."""
        if "100-continue" in headers.get("expect", "").lower():
            return
        taken = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.body_seconds):
                while taken <= DRAINED_BYTES:
                    message = await asyncio.wait_for(receive(), DRAINED_SECONDS)
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return
                    taken += len(message.get("body", b""))


def _is_readable(address: str) -> bool:
    try:
        return urlsplit(address if "//" in address else f"//{address}").hostname is not None
    except ValueError:
        return False


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` of an application, with a body that has arrived already."""
    given = False

    async def replay() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _patient(send: Send, seconds: float) -> Send:
    """`send` of an application; for a client that reads nothing more it raises what it raises for one that has gone."""

    async def sent(message: Any) -> None:
        try:
            async with asyncio.timeout(seconds):
                await send(message)
        except TimeoutError as error:
            raise ConnectionResetError(f"The client accepted nothing for {seconds:g} seconds.") from error

    return sent


async def _answer(send: Send, refused: _Refused) -> None:
    body = json.dumps(error_body(str(refused), "invalid_request_error", code=refused.code)).encode("utf-8")
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
