"""Streaming clients of a server of OpenAI's interface, for `benchmarks serve`: when each piece of an answer came."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import http.client
import json
import time
from collections.abc import Iterable
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


def stream(address: tuple[str, int], body: dict[str, Any]) -> Answer:
    """Asks for one chat completion, and reads it as it comes."""
    connection = http.client.HTTPConnection(*address, timeout=PATIENCE)
    asked, pieces, counted, ended = time.perf_counter(), [], None, None
    try:
        wanted = {**body, "stream": True, "stream_options": {"include_usage": True}}
        connection.request("POST", "/v1/chat/completions", json.dumps(wanted), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            return Answer(asked, error=f"{response.status} {response.read(300).decode('utf-8', 'replace')}")
        for line in response:
            if not line.startswith(b"data:") or line.strip() == b"data: [DONE]":
                continue
            event = json.loads(line[5:])
            if "error" in event:
                return Answer(asked, error=str(event["error"]))
            counted = (event.get("usage") or {}).get("completion_tokens", counted)
            for choice in event.get("choices", ()):
                ended = choice.get("finish_reason") or ended
                if choice["delta"].get("content"):
                    pieces.append(time.perf_counter())
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Answer(asked, error=f"{type(error).__name__}: {error}")
    finally:
        connection.close()
    if ended is None:
        return Answer(asked, error="an answer that was cut off")
    return Answer(asked, tuple(pieces), len(pieces) if counted is None else counted)


def together(address: tuple[str, int], bodies: Iterable[dict[str, Any]], clients: int) -> tuple[list[Answer], float]:
    """All answers, so many clients asking at a time, each one after the other; and the seconds that it took."""
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda body: stream(address, body), bodies))
    return answers, time.perf_counter() - start
