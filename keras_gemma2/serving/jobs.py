"""What a batch runs for a request."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from keras_gemma2.generation.requests import GREEDY
from keras_gemma2.generation.sampler import Sampler

MOST_TOP = 20  # likeliest tokens that may be told of, as in OpenAI's interface


@dataclasses.dataclass(eq=False)
class Job:
    """One text being continued.

    Args:
        prompt: its token ids, at least one.
        limit: tokens that it may have, the prompt included.
        sampler: how tokens are chosen; no penalties, biases or processors.
        seed: of the draws.
        stop_token_ids: ids that end it; the id itself is given.
        adapter: the name of the adapter that runs; None for none.
        top: how many of the likeliest tokens to tell of at each step, at most 20.

    Attributes:
        token_ids: prompt and chosen tokens.
        row: of the caches; None when it is not in a batch.
        cached: tokens, from the first, that the caches hold.
        reused: tokens of the prompt that were found in the caches.
        finish_reason: "stop" or "length" once it has ended.
    """

    prompt: Sequence[int]
    limit: int
    sampler: Sampler = GREEDY
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    adapter: str | None = None
    top: int = 0
    token_ids: list[int] = dataclasses.field(init=False)
    row: int | None = dataclasses.field(default=None, init=False)
    cached: int = dataclasses.field(default=0, init=False)
    reused: int = dataclasses.field(default=0, init=False)
    finish_reason: str | None = dataclasses.field(default=None, init=False)

    def __post_init__(self) -> None:
        self.token_ids = [int(token_id) for token_id in self.prompt]

    @property
    def waiting(self) -> int:
        """Tokens that have not run."""
        return len(self.token_ids) - self.cached

    def take(self, token_id: int) -> None:
        """Adds a chosen token, which may end it."""
        self.token_ids.append(token_id)
        if token_id in self.stop_token_ids:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.limit:
            self.finish_reason = "length"


@dataclasses.dataclass(frozen=True)
class Chosen:
    """One token of a job.

    Args:
        job: whose.
        token_id: the token; None if the logits were no numbers, which ends the job.
        logprob: its natural log-probability under the model, before any filter.
        top: the likeliest `(token id, log-probability)`, the likeliest first, as many as the job asks for.
    """

    job: Job
    token_id: int | None
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def check_job(job: Job, room: int, vocabulary_size: int, adapters: Sequence[Any]) -> None:
    """Raises a ValueError for a job that a batch cannot run.

    Args:
        job: to check.
        room: tokens that a row of the batch has room for.
        vocabulary_size: of the model.
        adapters: names of those the batch knows, None among them.
    """
    sampler = job.sampler
    if not job.token_ids or not len(job.token_ids) < job.limit <= room:
        raise ValueError(
            f"`prompt` must have at least one token, and `limit` more than it, up to {room}. "
            f"Received: {len(job.token_ids)} tokens, limit={job.limit!r}."
        )
    outside = [token_id for token_id in job.token_ids if not 0 <= token_id < vocabulary_size]
    if outside:
        raise ValueError(f"`prompt` must hold ids in [0, {vocabulary_size}), the vocabulary. Received the id {outside[0]}.")
    if sampler.repetition_penalty != 1 or sampler.presence_penalty != 0 or sampler.logit_bias or sampler.logits_processor:
        raise ValueError(
            f"`sampler` must be without penalties, `logit_bias` and `logits_processor` in a batch. Received: {sampler!r}."
        )
    if job.adapter not in adapters:
        raise ValueError(f"`adapter` must be one of {list(adapters)}. Received: {job.adapter!r}.")
    if not 0 <= job.top <= MOST_TOP:
        raise ValueError(f"`top` must be from 0 to {MOST_TOP}. Received: {job.top!r}.")
