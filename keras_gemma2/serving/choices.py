"""The answers to one request: jobs of the engine whose tokens become text on the event loop."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from typing import Any

from keras_gemma2.generation.text_stream import TextStream
from keras_gemma2.serving.engine import ClosedError, Ended, Engine
from keras_gemma2.serving.jobs import Chosen, Job
from keras_gemma2.serving.mailbox import Mailbox


class EngineError(RuntimeError):
    """A job ended with an error; the message says which."""


class TimeLimitError(RuntimeError):
    """A request took longer than it may."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """What comes next of one answer.

    Args:
        index: of the answer.
        text: may be empty.
        chosen: the tokens since the last piece.
        finish_reason: "stop" or "length" with the last piece.
    """

    index: int
    text: str
    chosen: tuple[Chosen, ...]
    finish_reason: str | None = None


class Choices:
    """Runs jobs and gives their text as it is decided.

    Args:
        engine: that runs them.
        tokenizer: a `Gemma2Tokenizer`.
        jobs: one an answer.
        stop_strings: texts that end an answer, and are not part of it.
        time_limit: seconds for all of them; None for none.

    Attributes:
        tokens: how many were generated so far.
    """

    def __init__(
        self, engine: Engine, tokenizer: Any, jobs: Sequence[Job], stop_strings: Sequence[str], time_limit: float | None
    ) -> None:
        self.engine, self.jobs, self.tokens = engine, list(jobs), 0
        hidden = tokenizer.special_token_ids
        self._texts = [TextStream(tokenizer, stop_strings, hidden_token_ids=hidden) for _ in jobs]
        self._held: list[list[Chosen]] = [[] for _ in jobs]
        self._open = set(range(len(self.jobs)))
        self._events: asyncio.Queue[tuple[int, Chosen | Ended]] = asyncio.Queue()
        self._mailbox = Mailbox.of(asyncio.get_running_loop())
        self._time_limit = time_limit

    def submit(self) -> None:
        """Puts the jobs into the engine's queue: all of them, or none.

        Raises:
            QueueFullError, ClosedError: as `Engine.submit`.
        """
        try:
            for index, job in enumerate(self.jobs):
                self.engine.submit(job, lambda event, index=index: self._put(index, event), self._time_limit, self)
        except Exception:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Ends what has not ended."""
        for job in self.jobs:
            self.engine.cancel(job)

    async def pieces(self) -> AsyncIterator[Piece]:
        """All pieces of all answers, as they come. Closing it early cancels the jobs.

        Raises:
            EngineError: if a job fails.
            ClosedError: if the engine ends before a job.
            TimeLimitError: if the time is over.
        """
        try:
            while self._open:
                index, event = await self._events.get()
                if index in self._open and (piece := self._read(index, event)) is not None:
                    yield piece
        finally:
            self.cancel()

    def _read(self, index: int, event: Chosen | Ended) -> Piece | None:
        if isinstance(event, Ended):
            self._open.discard(index)
            if event.reason in ("stop", "length"):
                return self._piece(index, self._texts[index].finish(), event.reason)
            if event.reason == "timeout":
                raise TimeLimitError("The request took longer than this server allows. Ask for fewer tokens, or try again later.")
            if event.reason == "cancelled":
                raise ClosedError("The server is about to end; the request was not completed.")
            raise EngineError(event.message)
        if event.token_id is None:
            return None
        self.tokens += 1
        self._held[index].append(event)
        ends = event.token_id in event.job.stop_token_ids
        text = "" if ends else self._texts[index].push([event.token_id])
        if self._texts[index].stopped:
            self._open.discard(index)
            self.engine.cancel(event.job, "stop")
            return self._piece(index, text, "stop")
        return self._piece(index, text) if text else None

    def _piece(self, index: int, text: str, finish_reason: str | None = None) -> Piece:
        held, self._held[index] = self._held[index], []
        return Piece(index, text, tuple(held), finish_reason)

    def _put(self, index: int, event: Chosen | Ended) -> None:
        """In the engine's thread."""
        self._mailbox.post(self._events, (index, event))
