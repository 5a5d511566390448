"""Jobs that come and go between steps, over one set of caches: continuous batching.

Every call of compiled code runs some tokens of some rows: a piece of one prompt, a few short prompts, or the last token of several
rows. Its sizes are few, and all are known: `Batch.warm_up` compiles them. Prompts run in caches of their own, taken out and put
back: XLA copies caches that a program reads before it writes to them, and of all rows that takes longer than the
piece. Where most rows have a token to run, all rows run, for none has to be taken out then.

Source: Yu et al., "Orca: A Distributed Serving System for Transformer-Based Generative Models" (OSDI 2022), section 3.2, whose
iteration-level scheduling this is; Agrawal et al., "Sarathi" (arXiv 2308.16369), for prompts in pieces between decoding steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_gemma2 import backend
from keras_gemma2.cache import Cache, Tokens, cache_slots, empty_caches
from keras_gemma2.generation.decode import extend
from keras_gemma2.generation.drawing import log_probability, uniforms
from keras_gemma2.generation.requests import GREEDY
from keras_gemma2.generation.runner import Runner, cache_bucket
from keras_gemma2.generation.sampler import PlanKey, Sampler, choose, plan
from keras_gemma2.serving.jobs import MOST_TOP, Chosen, Job, check_job
from keras_gemma2.serving.rows import Rows

PIECE = 256  # tokens of a prompt that run between two steps of the other rows, at most
SHORTEST_PIECE = 16
SHORT_PIECES = 2  # of several prompts, at most, that run between two steps each by itself
TOGETHER, SHORT_PROMPT = 4, 64  # prompts that run in one call, which reads the weights once; tokens of each, at most


class Begun(NamedTuple):
    """One call: its jobs, the rows `where` of its logits `[b, V]` they have, and what is chosen and found from those."""

    jobs: list[Job]
    where: Sequence[int]
    logits: Any
    found: tuple = ()


class Batch:
    """Up to so many jobs at a time.

    Args:
        backbone: a `Gemma2Backbone`, whose weights must not change meanwhile.
        size: jobs at a time.
        length: tokens that each has room for.
        kept: rows beside those, which hold what ended jobs ran, for others that begin alike.
        adapters: names of the adapters that jobs may ask for.
        jit: as `Runner` takes it.

    Attributes:
        shapes: the sizes of compiled code that have been used; more than after `warm_up` is a compilation.
        prefilled, reused: tokens of prompts so far that ran, and that were found in the caches.
    """

    def __init__(
        self, backbone: Any, size: int, length: int, kept: int = 0, adapters: Sequence[str] = (), jit: bool | None = None
    ) -> None:
        config = backbone.config
        self.backbone, self.size, self.length = backbone, size, length
        self._room = room = cache_bucket(length, config.max_sequence_length)
        ring = min(cache_slots(room, config.window(kind)) for kind in config.layer_types)
        self.rows = Rows(size, kept, ring)
        self.shapes: set[tuple] = set()
        self.prefilled = self.reused = 0
        self._caches = [empty_caches(config, count, room, backbone.compute_dtype) for count in (size, kept) if count]
        self._runners = {}
        for adapter in (None, *adapters):
            with backbone.adapter_set.only(adapter):
                self._runners[adapter] = Runner(backbone, jit)

    @property
    def jobs(self) -> list[Job]:
        """Those that have not ended, the oldest first."""
        return list(self.rows.jobs.values())

    def check(self, job: Job) -> None:
        """Raises a ValueError for a job that cannot run here."""
        check_job(job, self.length, self.backbone.config.vocabulary_size, list(self._runners))

    def add(self, job: Job) -> None:
        """Gives a job a row.

        Raises:
            ValueError: for a job that cannot run here, or one more than `size`.
        """
        self.check(job)
        if len(self.rows.jobs) >= self.size:
            raise ValueError(f"The batch has {self.size} jobs already, its `size`. Wait for one to end.")
        place = self.rows.take(job)
        self.reused += place.reused
        if place.saved is not None:
            self._put([place.saved], self._taken_out(place.row))
        if place.source != place.row:
            self._put([place.row], self._taken_out(place.source))

    def remove(self, job: Job) -> None:
        """Ends a job here; one that has ended already is left alone."""
        if job.row is not None:
            self.rows.give_back(job)

    def release(self) -> None:
        """Gives the caches' memory up; nothing can be run after."""
        self._caches.clear()

    def step(self) -> list[Chosen]:
        """`begin` and `finish`."""
        return self.finish(self.begin())

    def begin(self) -> list[Begun]:
        """Begins to run a piece of a prompt, or of several short ones, and to choose a token for every job whose prompt has run.

        Where the backend computes by itself, this returns before it has. Jobs may be removed meanwhile, but not added.
        """
        with backend.no_gradients():
            ready = [job for job in self.jobs if job.waiting == 1]
            begun = [self._piece(jobs) for jobs in self._next_prompts([job for job in self.jobs if job.waiting > 1])]
            for adapter in dict.fromkeys(job.adapter for job in ready):
                begun.append(self._tokens([job for job in ready if job.adapter == adapter]))
            return [self._choosing(each) for each in begun if each.jobs]

    def finish(self, begun: list[Begun]) -> list[Chosen]:
        """The tokens of what was begun. Jobs that end give their rows back."""
        chosen = [one for each in begun for one in self._chosen(each)]
        for one in chosen:
            if one.token_id is None or one.job.finish_reason is not None:
                self.remove(one.job)
        return chosen

    def warm_up(self) -> None:
        """Compiles everything that steps may need, by running it on rows that keep nothing of it."""
        with backend.no_gradients():
            for adapter in self._runners:
                pieces = [(1, start, steps) for start in (0, 1) for steps in self._piece_sizes(start == 0)]
                if self.size >= TOGETHER:
                    pieces += [(TOGETHER, 0, steps) for steps in self._piece_sizes(True) if steps <= SHORT_PROMPT]
                logits = []
                for count, start, steps in pieces:
                    where = np.array([[start], [0]], "int32").repeat(count, axis=1)
                    logits.append(self._prompt_logits(adapter, [0] * count, np.zeros((count, steps), "int32"), *where))
                logits += [self._step_logits(adapter, *np.zeros((4, count), "int32")) for count in self._step_sizes()]
            for each in {each.shape[0]: each for each in logits}.values():
                nothing = np.zeros(each.shape[0], "int32")
                for sampler in (GREEDY, Sampler()):
                    self._choose(each, [sampler] * len(nothing), nothing, nothing)
                self._top(each)
            for row in (0, self.size)[: len(self._caches)]:
                self._put([row], self._taken_out(row))

    def _piece_sizes(self, first: bool) -> Iterator[int]:
        """Tokens of a prompt that may run at once; for its first piece, which most prompts have no more than, in finer steps.
        None is longer than the longest prompt needs."""
        for size in (1 << power for power in range(SHORTEST_PIECE.bit_length() - 1, PIECE.bit_length())):
            if first and size > 2 * SHORTEST_PIECE:
                yield size * 3 // 4
            yield size
            if size >= self.length:
                return

    def _step_sizes(self) -> Iterator[int]:
        """Rows of which a token each may run at once."""
        yield from (count for count in (1 << power for power in range(self.size.bit_length())) if count < self.size)
        yield self.size

    # One step -------------------------------------------------------------------------------------------------------------

    def _next_prompts(self, jobs: list[Job]) -> list[list[Job]]:
        """Those of which a piece runs now, in as many calls: the first, and others as long as all together are no longer than one
        piece may be."""
        short = [job for job in jobs if not job.cached and job.waiting <= SHORT_PROMPT and job.adapter == jobs[0].adapter]
        if jobs[:1] == short[:1] and len(short) > SHORT_PIECES and self.size >= TOGETHER:
            return [short[:TOGETHER]]
        costs = itertools.accumulate(max(min(job.waiting, PIECE), PIECE // SHORT_PIECES) for job in jobs)
        return [[job] for place, (job, cost) in enumerate(zip(jobs, costs)) if not place or cost <= PIECE]

    def _piece(self, jobs: list[Job]) -> Begun:
        """A piece of a prompt, or several that are short."""
        filled = jobs if len(jobs) == 1 else [*jobs, *jobs[:1] * (TOGETHER - len(jobs))]  # one that runs twice is the same twice
        starts, counts = np.array([(job.cached, min(job.waiting, PIECE)) for job in filled], "int32").T
        size = next(size for size in self._piece_sizes(not starts.any()) if size >= counts.max())
        token_ids = np.zeros((len(filled), size), "int32")
        for ids, job, start, count in zip(token_ids, filled, starts, counts):
            ids[:count] = job.token_ids[start : start + count]
        logits = self._prompt_logits(jobs[0].adapter, [job.row for job in filled], token_ids, starts, counts)
        for job, count in zip(jobs, counts):
            job.cached += int(count)
            self.prefilled += int(count)
        return Begun([job for job in jobs if not job.waiting], range(len(jobs)), logits)

    def _tokens(self, jobs: list[Job]) -> Begun:
        """The next token of jobs with one adapter."""
        count = next(size for size in self._step_sizes() if size >= len(jobs))
        where = [job.row for job in jobs] if count == self.size else range(len(jobs))
        token_ids, rows, starts, counts = np.zeros((4, count), "int32")
        for i, job in zip(where, jobs):
            token_ids[i], rows[i], starts[i], counts[i] = job.token_ids[-1], job.row, job.cached, 1
        logits = self._step_logits(jobs[0].adapter, token_ids, rows, starts, counts)
        for job in jobs:
            self.prefilled += job.cached < len(job.prompt)
            job.cached += 1
        return Begun(jobs, where, logits)

    def _choosing(self, begun: Begun) -> Begun:
        """What was begun with a token chosen for each of its jobs."""
        rows = begun.logits.shape[0]
        samplers, seeds, positions = [GREEDY] * rows, [0] * rows, np.zeros(rows, "int32")
        for i, job in zip(begun.where, begun.jobs):
            samplers[i], seeds[i], positions[i] = job.sampler, job.seed, len(job.token_ids)
        found = self._choose(begun.logits, samplers, seeds, positions)
        return begun._replace(found=(*found, *(self._top(begun.logits) if any(job.top for job in begun.jobs) else ())))

    def _chosen(self, begun: Begun) -> Iterator[Chosen]:
        """Waits for it, and gives the tokens to its jobs."""
        tokens, logprobs, *tops = (ops.convert_to_numpy(found) for found in begun.found)
        for i, job in zip(begun.where, begun.jobs):
            if tokens[i] < 0:
                yield Chosen(job, None, float("nan"))
                continue
            job.take(int(tokens[i]))
            top = tuple((int(a), float(b)) for a, b in zip(tops[0][i][: job.top], tops[1][i][: job.top])) if tops else ()
            yield Chosen(job, int(tokens[i]), float(logprobs[i]), top)

    def _prompt_logits(
        self, adapter: str | None, rows: list[int], token_ids: np.ndarray, starts: np.ndarray, counts: np.ndarray
    ) -> Any:
        """Runs tokens `[b, T]` of some rows, the first `counts [b]` of which are real; gives the logits `[b, V]` after the last.
        Of rows that hold something already, one at a time."""
        if starts.any():
            caches = self._taken_out(rows[0])
            caches, logits = self._run("piece", adapter, _run_rows, None, caches, token_ids, starts, counts)
        else:
            caches, logits = self._run("first piece", adapter, _run_first, self._room, (), token_ids, counts)
        self._put(rows, caches)
        return logits

    def _step_logits(self, adapter: str | None, token_ids: np.ndarray, rows: np.ndarray, *where: np.ndarray) -> Any:
        """Runs a token each of some rows, or of all in order; gives the logits `[b, V]` after them."""
        some = (rows,) if len(rows) < self.size else ()
        self._caches[0], logits = self._run("step", adapter, _run_rows, None, self._caches[0], token_ids[:, None], *where, *some)
        return logits

    def _taken_out(self, row: int) -> list[Cache]:
        part, row = self._part(row)
        return self._run(f"take out of {part}", None, _take_out, None, (), self._caches[part], np.int32(row))

    def _put(self, rows: list[int], caches: list[Cache]) -> None:
        """Writes caches of some rows, all in the same part, to their places."""
        part = self._part(rows[0])[0]
        places = np.array([self._part(row)[1] for row in rows], "int32")
        self._caches[part] = self._run(f"put into {part}", None, _put_back, None, self._caches[part], caches, places)

    def _part(self, row: int) -> tuple[int, int]:
        """In which of the caches a row is, and where."""
        return (0, row) if row < self.size else (1, row - self.size)

    def _choose(self, logits: Any, samplers: list[Sampler], seeds: Any, positions: np.ndarray) -> tuple[Any, Any]:
        planned = plan(samplers, logits.shape[1])
        # One program for all that draw: greedy rows take their own way in it.
        key = PlanKey(sampled=planned.key.sampled, greedy=True, penalized=False, biased=False)
        draws = uniforms([int(seed) for seed in seeds], positions) if key.sampled else np.zeros(len(samplers), "float32")
        arrays = {name: ops.convert_to_tensor(array) for name, array in planned.arrays.items()}
        return self._run("choose", None, _choose_tokens, key, (), arrays, logits, draws)

    def _top(self, logits: Any) -> tuple[Any, Any]:
        """The likeliest tokens of each row and their log-probabilities, `[b, 20]`."""
        most = min(MOST_TOP, logits.shape[1])
        return self._run("top", None, _likeliest, most, (), logits)

    def _run(self, name: str, adapter: str | None, function: Any, key: Any, given_up: Any, *arguments: Any) -> Any:
        sizes = tuple(tuple(argument.shape) for argument in arguments if hasattr(argument, "shape"))
        self.shapes.add((name, adapter, key, sizes))
        tensors = [ops.convert_to_tensor(each) if isinstance(each, (np.ndarray, np.generic)) else each for each in arguments]
        return self._runners[adapter].compiled(function, key)(given_up, *tensors)


# What is compiled -------------------------------------------------------------------------------------------------------


def _run_first(backbone: Any, room: int, unused: tuple, token_ids: Any, counts: Any) -> tuple[Any, Any]:
    caches = empty_caches(backbone.config, token_ids.shape[0], room, backbone.compute_dtype)
    return _run(backbone, caches, token_ids, Tokens(None, ops.zeros_like(counts), counts, token_ids.shape[1], fresh=True))


def _run_rows(backbone: Any, key: None, caches: Any, token_ids: Any, starts: Any, counts: Any, rows: Any = None) -> tuple[Any, Any]:
    return _run(backbone, caches, token_ids, Tokens(rows, starts, counts, token_ids.shape[1]))


def _run(backbone: Any, caches: Any, token_ids: Any, tokens: Tokens) -> tuple[Any, Any]:
    x, caches = extend(backbone, caches, token_ids, tokens)
    last = ops.take_along_axis(x, ops.maximum(tokens.counts - 1, 0)[:, None, None], axis=1)[:, 0]
    return caches, backbone.token_embedding(backbone.layer_norm(last), reverse=True)


def _choose_tokens(backbone: Any, key: PlanKey, unused: tuple, arrays: Any, logits: Any, draws: Any) -> tuple[Any, Any]:
    no_marks = ops.zeros((logits.shape[0], 1), "int8")
    tokens, _ = choose(key, arrays, no_marks, logits, draws)
    return tokens, log_probability(logits, ops.maximum(tokens, 0))


def _likeliest(backbone: Any, count: int, unused: tuple, logits: Any) -> tuple[Any, Any]:
    values, index = ops.top_k(ops.log_softmax(logits, axis=-1), count)
    return index, values


def _take_out(backbone: Any, key: None, unused: tuple, caches: Any, row: Any) -> Any:
    return [tuple(ops.take(cache, ops.reshape(row, (1,)), axis=0) for cache in pair) for pair in caches]


def _put_back(backbone: Any, key: None, caches: Any, some: Any, rows: Any) -> Any:
    return [tuple(backend.write_rows(cache, new, rows) for cache, new in zip(*pairs)) for pairs in zip(caches, some)]
