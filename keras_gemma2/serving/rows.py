"""The rows of a batch's caches: who has which, and what of a new prompt they hold already."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from keras_gemma2.serving.jobs import Job

LEAST_REUSED = 16  # tokens of another row that are worth copying it


@dataclasses.dataclass
class Row:
    """A row that nobody has: the tokens that it holds, and with which adapter they ran."""

    token_ids: Sequence[int] = ()
    adapter: Any = None
    used: int = 0  # when it was given back; the least goes first


class Place(NamedTuple):
    """Where a job goes.

    Args:
        row: its own from now on.
        source: the row whose contents it begins with; the same one, or one to copy.
        reused: how many of its tokens it holds.
        saved: the row that what the job's held until now is to be copied to first; None where it is not kept.
    """

    row: int
    source: int
    reused: int
    saved: int | None = None


class Rows:
    """All rows of the caches: those that jobs run in, and others behind them, which keep what ended jobs ran. Those that are free
    keep what they hold until its place is needed, the least recently used first.

    Args:
        size: rows that jobs run in.
        kept: rows beside them.
        ring: tokens that every layer's cache can hold at once. A row that has had more has lost keys that a shorter prefix of it
            would need.

    Attributes:
        jobs: those that have a row, by the row.
    """

    def __init__(self, size: int, kept: int, ring: int) -> None:
        self.size, self.ring = size, ring
        self.jobs: dict[int, Job] = {}
        self._free = {row: Row() for row in range(size + kept)}
        self._clock = 0

    def take(self, job: Job) -> Place:
        """Gives a job a row, of which one must be free.

        What a row holds from the prompt's beginning is reused, but for the prompt's last token, whose logits are needed. A free row
        that holds little else goes to the job; what any other holds is copied.
        """
        prompt = np.array(job.token_ids[:-1], "int32")
        best, reused = None, 0
        for row in (*self._free, *self.jobs):
            found = self._shared(prompt, row, job.adapter)
            if found > reused or (found == reused and best in self.jobs and row in self._free):
                best, reused = row, found
        given_up = best in self._free and 2 * reused >= len(self._free[best].token_ids)
        if given_up and best < self.size:
            place = Place(best, best, reused)
        else:
            row = self._oldest(row for row in self._free if row < self.size)
            place = Place(row, best, reused) if reused >= LEAST_REUSED else Place(row, row, 0)
            place = place._replace(saved=self._saved(row, place.source))
            if given_up and place.source == best != row:
                self._free[best] = Row()
        del self._free[place.row]
        job.row, job.cached, job.reused = place.row, place.reused, place.reused
        self.jobs[place.row] = job
        return place

    def _oldest(self, rows: Iterable[int]) -> int | None:
        """The free row, of some, that was given back first; one that holds nothing before all others."""
        return min(rows, key=lambda row: (len(self._free[row].token_ids) > 0, self._free[row].used), default=None)

    def _saved(self, row: int, source: int) -> int | None:
        """The row that keeps what another holds from now on, if anything, in the place of something older."""
        held = self._free[row]
        other = self._oldest(each for each in self._free if each >= self.size and each != source)
        if other is None or not held.token_ids or (self._free[other].token_ids and self._free[other].used > held.used):
            return None
        self._free[other] = held
        return other

    def give_back(self, job: Job) -> None:
        """Takes a job's row from it; what it holds stays."""
        self._clock += 1
        self._free[job.row] = Row(job.token_ids[: job.cached], job.adapter, self._clock)
        del self.jobs[job.row]
        job.row = None

    def forget(self) -> None:
        """Drops what the free rows hold."""
        self._free = {row: Row() for row in self._free}

    def _shared(self, prompt: np.ndarray, row: int, adapter: Any) -> int:
        """How many tokens of a prompt a row can give."""
        if row in self.jobs:
            held, with_adapter = self.jobs[row].token_ids[: self.jobs[row].cached], self.jobs[row].adapter
        else:
            held, with_adapter = self._free[row].token_ids, self._free[row].adapter
        length = min(len(prompt), len(held))
        if with_adapter != adapter or not length:
            return 0
        same = prompt[:length] == np.array(held[:length], "int32")
        found = length if same.all() else int(same.argmin())
        return found if found == len(held) or len(held) <= self.ring else 0
