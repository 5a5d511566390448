"""The thread that runs a batch: jobs wait in a queue, are told of as they go, and can be cancelled."""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from keras_gemma2 import backend
from keras_gemma2.serving.batch import Batch
from keras_gemma2.serving.jobs import Chosen, Job

_LOG = logging.getLogger(__name__)


class QueueFullError(RuntimeError):
    """The queue has no room for another job; try again in a while."""


class ClosedError(RuntimeError):
    """The engine takes no more jobs: it is about to end, or has ended."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """The end of a job.

    Args:
        job: which.
        reason: "stop" or "length" (it is complete), "cancelled", "timeout", or "error".
        message: of an error, what it was.
    """

    job: Job
    reason: str
    message: str = ""


Listener = Callable[[Chosen | Ended], None]
# (what, seconds since the job came or since its last token, whether it had none yet)
Observer = Callable[[Chosen | Ended, float, bool], None]


@dataclasses.dataclass(eq=False)
class _Ticket:
    job: Job
    listener: Listener
    deadline: float | None
    since: float
    group: object = None
    is_new: bool = True


class Engine:
    """Runs jobs, as many at a time as its batch takes, the others in the order in which they came.

    Args:
        make_batch: makes the batch; called again if a step fails, which leaves caches that cannot be used.
        queue_size: jobs that may wait.
        clock: what time it is, in seconds.

    Attributes:
        observe: called in the engine's thread with whatever a listener is told; None for nobody.
        has_failed: whether it has ended by itself, as no batch could be made after a step that failed.

    Example:
        >>> engine = Engine(lambda: Batch(lm.backbone, 8, 2048))
        >>> engine.start()
        >>> engine.submit(Job(token_ids, limit=200), print)
        >>> engine.close()
    """

    def __init__(self, make_batch: Callable[[], Batch], queue_size: int = 64, clock: Callable[[], float] = time.monotonic) -> None:
        if isinstance(queue_size, bool) or not isinstance(queue_size, int) or queue_size < 1:
            raise ValueError(f"`queue_size` must be an integer of at least 1. Received: {queue_size!r}.")
        self.batch, self.queue_size, self._make_batch, self._clock = make_batch(), queue_size, make_batch, clock
        self._waiting: collections.deque[_Ticket] = collections.deque()
        self._running: dict[Job, _Ticket] = {}
        self._cancelled: dict[Job, str] = {}  # and why
        self._news: list[tuple[_Ticket, Chosen | Ended]] = []  # that nobody has been told yet
        self._closing = False
        self.has_failed = False
        self.observe: Observer | None = None
        self._earlier = (0, 0)  # prompt tokens of batches that failed
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="keras_gemma2-engine", daemon=True)

    @property
    def waiting(self) -> int:
        """Jobs in the queue, without those that are cancelled and leave it with the next step."""
        with self._changed:
            return sum(ticket.job not in self._cancelled for ticket in self._waiting)

    @property
    def running(self) -> int:
        """Jobs in the batch."""
        return len(self._running)

    @property
    def prompt_tokens(self) -> tuple[int, int]:
        """Tokens of prompts so far that ran, and that were found in the caches."""
        return self._earlier[0] + self.batch.prefilled, self._earlier[1] + self.batch.reused

    @property
    def is_ready(self) -> bool:
        """Whether it takes jobs and its thread runs."""
        return self._thread.is_alive() and not self._closing

    def start(self) -> None:
        """Begins to run jobs."""
        self._thread.start()

    def submit(self, job: Job, listener: Listener, time_limit: float | None = None, group: object = None) -> None:
        """Puts a job into the queue.

        Args:
            job: a new one.
            listener: called in the engine's thread with each token, then once with the end. It must return soon.
            time_limit: seconds from now after which the job ends, whether it runs or waits; None for none.
            group: of jobs that belong together: where one runs, `close` lets all end. None for none.

        Raises:
            ValueError: for a job that the batch cannot run.
            QueueFullError: if the queue is full.
            ClosedError: if the engine is closing.
        """
        self.batch.check(job)
        now = self._clock()
        deadline = None if time_limit is None else now + time_limit
        with self._changed:
            if self._closing:
                raise ClosedError("The engine takes no more jobs: it is about to end.")
            if self.waiting >= self.queue_size:
                raise QueueFullError(f"{self.waiting} jobs wait already, as many as may. Try again in a while.")
            self._waiting.append(_Ticket(job, listener, deadline, now, group))
            self._changed.notify()

    def cancel(self, job: Job, reason: str = "cancelled") -> None:
        """Ends a job before its next token but one; nothing happens if it has ended.

        Args:
            job: which.
            reason: why, as `Ended` will say.
        """
        with self._changed:
            if job in self._running or any(ticket.job is job for ticket in self._waiting):
                self._cancelled.setdefault(job, reason)
                self._changed.notify()

    def close(self, time_limit: float | None = None) -> bool:
        """Lets the jobs that run end, and those of their groups; cancels the others that wait, and takes no new ones.

        Args:
            time_limit: seconds after which those that run are cancelled, too; None for as long as they take.

        Returns:
            Whether all that ran came to their ends.
        """
        with self._changed:
            self._closing = True
            groups = {ticket.group for ticket in self._running.values()} - {None}
            for ticket in self._waiting:
                if ticket.group not in groups:
                    self._cancelled.setdefault(ticket.job, "cancelled")
            self._changed.notify()
        if not self._thread.is_alive():
            return True
        self._thread.join(time_limit)
        complete = not self._thread.is_alive()
        with self._changed:
            for job in (*self._running, *(ticket.job for ticket in self._waiting)):
                self._cancelled.setdefault(job, "cancelled")
            self._changed.notify()
        self._thread.join()
        return complete

    # The thread -----------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            if not self._running:
                self._tell_all()
            with self._changed:
                while not (self._waiting or self._running or self._closing):
                    self._changed.wait()
                if self._closing and not self._waiting and not self._running:
                    return
                ended = self._take_out()
                failure = self._take_in()
            if ended:
                self._tell_all()
            for ticket, end in ended:
                self._tell(ticket, end)
            if failure is not None:
                self._give_up(failure)
            if self._running:
                self._step()

    def _take_out(self) -> list[tuple[_Ticket, Ended]]:
        """Removes what is cancelled or too late."""
        ended, now = [], self._clock()
        for ticket in [*self._waiting, *self._running.values()]:
            late = ticket.deadline is not None and now >= ticket.deadline
            if late or ticket.job in self._cancelled:
                ended.append((ticket, Ended(ticket.job, self._cancelled.get(ticket.job, "timeout"))))
                self.batch.remove(ticket.job)
                self._running.pop(ticket.job, None)
        out = {ticket.job for ticket, _ in ended}
        self._waiting = collections.deque(ticket for ticket in self._waiting if ticket.job not in out)
        self._cancelled.clear()
        return ended

    def _take_in(self) -> Exception | None:
        """Moves jobs from the queue to the batch; what went wrong, if anything."""
        while self._waiting and len(self._running) < self.batch.size:
            ticket = self._waiting.popleft()
            self._running[ticket.job] = ticket
            try:
                self.batch.add(ticket.job)
            except Exception as error:
                _LOG.exception("A job could not be taken in.")
                return error
        return None

    def _step(self) -> None:
        try:
            begun = self.batch.begin()
            if backend.is_asynchronous():
                self._tell_all()  # of the step before, while this one is computed
            chosen = self.batch.finish(begun)
        except Exception as error:
            _LOG.exception("A step failed; the jobs that ran are given up.")
            self._give_up(error)
            return
        for one in chosen:
            self._news.append((self._running[one.job], one))
            if one.token_id is None or one.job.finish_reason is not None:
                with self._changed:
                    ticket = self._running.pop(one.job)
                reason, message = one.job.finish_reason, ""
                if reason is None:
                    reason, message = "error", "The model's logits are not numbers (NaN or infinite)."
                self._news.append((ticket, Ended(one.job, reason, message)))
        if not backend.is_asynchronous():
            self._tell_all()

    def _tell_all(self) -> None:
        """Tells what the last step has brought."""
        news, self._news = self._news, []
        for ticket, what in news:
            self._tell(ticket, what)

    def _give_up(self, error: Exception) -> None:
        """Ends all that runs, and makes a new batch: the caches of this one may be half-written."""
        with self._changed:
            failed = list(self._running.values())
            self._running.clear()
        self._fail(failed, error)
        earlier = self.prompt_tokens
        self.batch.release()
        try:
            # It may take long: meanwhile jobs can be submitted and cancelled.
            self.batch, self._earlier = self._make_batch(), earlier
        except Exception as second:
            _LOG.exception("No other batch could be made; the engine ends.")
            with self._changed:
                self._closing = self.has_failed = True
                failed = list(self._waiting)
                self._waiting.clear()
            self._fail(failed, second)

    def _fail(self, tickets: list[_Ticket], error: Exception) -> None:
        self._tell_all()
        for ticket in tickets:
            self._tell(ticket, Ended(ticket.job, "error", f"{type(error).__name__}: {error}"))

    def _tell(self, ticket: _Ticket, what: Any) -> None:
        now = self._clock()
        try:
            ticket.listener(what)
            if self.observe is not None:
                self.observe(what, now - ticket.since, ticket.is_new)
        except Exception:
            _LOG.exception("A listener failed; its job is cancelled.")
            self.cancel(ticket.job)
        ticket.since, ticket.is_new = now, False
