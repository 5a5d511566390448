"""Streaming clients of a server of OpenAI's interface, for `benchmarks serve`: when each piece of an answer came."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import http.client
import json
import time
from collections.abc import Iterable, Iterator
from typing import Any

PATIENCE = 600.0  # seconds


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer.

    Args:
        asked: when it was asked for, in seconds of `time.perf_counter`.
        pieces: when each piece of text came; none where the model ended its turn at once.
        tokens: as the server counts them; where it does not, the pieces.
        error: what went wrong; None if nothing did.
    """

    asked: float
    pieces: tuple[float, ...] = ()
    tokens: int = 0
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class _Received:
    asked: float
    chunks: tuple[tuple[float, bytes], ...] = ()  # when each came, and what
    error: str | None = None


def stream(address: tuple[str, int], body: dict[str, Any]) -> Answer:
    """Asks for one chat completion, and reads it as it comes."""
    return _understood(_received(address, body))


def together(address: tuple[str, int], bodies: Iterable[dict[str, Any]], clients: int) -> tuple[list[Answer], float]:
    """All answers, so many clients asking at a time, each one after the other; and the seconds that it took.

    What came is looked at afterwards: the clients are on the server's cores.
    """
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        received = list(pool.map(lambda body: _received(address, body), bodies))
    seconds = time.perf_counter() - start
    return [_understood(each) for each in received], seconds


def _received(address: tuple[str, int], body: dict[str, Any]) -> _Received:
    connection = http.client.HTTPConnection(*address, timeout=PATIENCE)
    asked, chunks = time.perf_counter(), []
    try:
        wanted = {**body, "stream": True, "stream_options": {"include_usage": True}}
        connection.request("POST", "/v1/chat/completions", json.dumps(wanted), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            return _Received(asked, error=f"{response.status} {response.read(300).decode('utf-8', 'replace')}")
        while chunk := response.read1(1 << 16):
            chunks.append((time.perf_counter(), chunk))
    except (OSError, http.client.HTTPException) as error:
        return _Received(asked, error=f"{type(error).__name__}: {error}")
    finally:
        connection.close()
    return _Received(asked, tuple(chunks))


def _understood(received: _Received) -> Answer:
    pieces, counted, ended = [], None, None
    if received.error is not None:
        return Answer(received.asked, error=received.error)
    try:
        for came, line in _lines(received.chunks):
            if not line.startswith(b"data:") or line.strip() == b"data: [DONE]":
                continue
            event = json.loads(line[5:])
            if "error" in event:
                return Answer(received.asked, error=str(event["error"]))
            counted = (event.get("usage") or {}).get("completion_tokens", counted)
            for choice in event.get("choices", ()):
                ended = choice.get("finish_reason") or ended
                if choice["delta"].get("content"):
                    pieces.append(came)
    except ValueError as error:
        return Answer(received.asked, error=f"{type(error).__name__}: {error}")
    if ended is None:
        return Answer(received.asked, error="an answer that was cut off")
    return Answer(received.asked, tuple(pieces), len(pieces) if counted is None else counted)


def _lines(chunks: Iterable[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """Each line, and when its end came."""
    rest = b""
    for came, chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from ((came, line) for line in whole)
    if rest:
        yield came, rest
