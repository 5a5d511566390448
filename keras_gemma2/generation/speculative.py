"""Speculative decoding: a draft proposes tokens, and the model judges several in one run.

Leviathan, Kalman and Matias, "Fast inference from transformers via speculative decoding", arXiv 2211.17192: a token d that was
drawn from q is accepted with probability min(1, p(d) / q(d)), and else a token drawn from max(p - q, 0) takes its place; what comes
out is distributed as p. For greedy rows p is 1 at one token, and the text is the one that the model would write alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from keras import ops

from keras_gemma2.cache import Cache
from keras_gemma2.generation.decode import CLOSED, NOT_A_NUMBER, following_logits
from keras_gemma2.generation.decoding import Decoding
from keras_gemma2.generation.drafts import PROPOSED, DraftModel, PromptLookup, Proposals
from keras_gemma2.generation.drawing import draw, log_probability, most_likely, uniforms
from keras_gemma2.generation.filters import penalized
from keras_gemma2.generation.sampler import probabilities

ACCEPTING, CHOOSING = 1, 2  # streams of draws; 0 is that of proposals


@dataclasses.dataclass(frozen=True)
class SpeculationStats:
    """What a draft was good for in one call.

    Args:
        proposed: tokens that the draft proposed, in all rows.
        accepted: those of them that the model took over.
        rounds: runs of the model after the prompts; without a draft, one for each new token of the longest row but its first.

    Example:
        >>> SpeculationStats(proposed=40, accepted=30, rounds=10).acceptance_rate
        0.75
    """

    proposed: int = 0
    accepted: int = 0
    rounds: int = 0

    @property
    def acceptance_rate(self) -> float:
        """`accepted / proposed`; 0.0 where nothing was proposed."""
        return self.accepted / self.proposed if self.proposed else 0.0

    def __str__(self) -> str:
        share = f"{self.accepted} of {self.proposed} proposed tokens accepted ({self.acceptance_rate:.0%})"
        return f"{share}, in {self.rounds} runs of the model"

    def __add__(self, other: SpeculationStats) -> SpeculationStats:
        return SpeculationStats(self.proposed + other.proposed, self.accepted + other.accepted, self.rounds + other.rounds)


class SpeculativeDecoding(Decoding):
    """As `Decoding`, but several tokens a run where the draft proposes well.

    `advance` may give up to `PROPOSED` tokens more than it is asked for. Which tokens come out does not depend on how many that is.

    Args:
        draft: what proposes.
        *args, **kwargs: as `Decoding`; the caches have `PROPOSED` slots of slack, and the plan neither penalties nor processors.

    Attributes:
        stats: what the draft was good for so far.
    """

    def __init__(self, *args: Any, draft: DraftModel | PromptLookup, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._draft = draft
        self.stats = SpeculationStats()

    def _choose(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        if self._hidden is not None:
            return super()._choose(steps)
        lengths = np.array([len(row) for row in self.rows], "int32")
        # The last place is proposed for too, though a run gives one token more than it accepts: no token depends on the limit.
        most = np.where(self.open_rows, np.clip(self._choosing.limits - lengths, 0, PROPOSED), 0)
        proposals = self._draft.propose(self.rows, most, self.seeds)
        if not proposals.counts.any():
            self.stats += SpeculationStats(rounds=1)
            return super()._choose(1)
        tokens, logprobs, accepted = self._verify(lengths, proposals)
        self._draft.learn(accepted)
        tokens = self._until_end(tokens, lengths)
        used = np.minimum(accepted, (tokens != CLOSED).sum(axis=1))  # none after a row's end
        self.stats += SpeculationStats(int(proposals.counts.sum()), int(used.sum()), 1)
        return tokens, logprobs

    def _uniforms(self, positions: np.ndarray) -> np.ndarray:
        # A row that had no proposal must not notice whether another one had.
        return uniforms(self.seeds, positions, CHOOSING)

    def _verify(self, lengths: np.ndarray, proposals: Proposals) -> list[np.ndarray]:
        """The run of the model: tokens and log-probabilities `[B, PROPOSED + 1]`, and how many proposals were accepted `[B]`."""
        last = np.array([row[-1] for row in self.rows], "int32")
        counts = np.where(self.open_rows, proposals.counts + 1, 0).astype("int32")
        places = lengths[:, None] + np.arange(PROPOSED + 1)
        draws = (uniforms(self.seeds, places[:, :-1], ACCEPTING), uniforms(self.seeds, places, CHOOSING))
        arrays = {name: ops.convert_to_tensor(array) for name, array in self._choosing.arrays.items()}
        before = map(ops.convert_to_tensor, (last, proposals.tokens, lengths - 1, counts))
        run = self.runner.compiled(verify, self.plan.key)
        self.caches, *outputs = run(self.caches, arrays, *before, proposals.probabilities, *map(ops.convert_to_tensor, draws))
        self._check_draft(ops.convert_to_numpy(proposals.tokens), proposals.counts)
        return [ops.convert_to_numpy(output) for output in outputs]

    def _check_draft(self, tokens: np.ndarray, counts: np.ndarray) -> None:
        unusable = (tokens < 0) & (np.arange(PROPOSED)[None] < counts[:, None])
        if unusable.any():
            raise FloatingPointError(
                f"The draft's logits for row {int(np.argwhere(unusable)[0][0])} of the inputs are not numbers (NaN or infinite). "
                "Its weights hold such numbers, or its activations overflowed: check its checkpoint with `keras-gemma2 verify`, or "
                "leave `draft` out."
            )

    def _until_end(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The tokens, none after a row's first stop token or its limit; updates which rows are open."""
        places = lengths[:, None] + np.arange(tokens.shape[1])
        tokens = np.where(places < self._choosing.limits[:, None], tokens, CLOSED)
        stops = (tokens[:, :, None] == self._choosing.stop_token_ids[:, None, :]).any(axis=-1) & (tokens != CLOSED)
        tokens = np.where(np.cumsum(stops, axis=1) - stops > 0, CLOSED, tokens)
        full = lengths + (tokens != CLOSED).sum(axis=1) >= self._choosing.limits
        self.open_rows = self.open_rows & ~stops.any(axis=1) & ~full & ~(tokens == NOT_A_NUMBER).any(axis=1)
        return tokens


def verify(
    backbone: Any,
    key: Any,
    caches: list[Cache],
    arrays: Any,
    last: Any,
    proposed: Any,
    starts: Any,
    counts: Any,
    chances: Any,
    accepting: Any,
    choosing: Any,
) -> tuple[list[Cache], Any, Any, Any]:
    """Runs the last token of each row and what is proposed after it, and judges, in compiled code.

    Args:
        backbone: a `Gemma2Backbone`.
        key, arrays: of the samplers' plan.
        caches: of the model, with slack for the proposals; may be overwritten.
        last: int32 `[B]`.
        proposed: int32 `[B, n]`.
        starts: int32 `[B]`, where the last tokens stand.
        counts: int32 `[B]`, how many tokens are real in each row, the last one included; 0 for a row that has ended.
        chances: float32 `[B, n, V]`, what the proposals were drawn from; None where they are certain.
        accepting: float32 `[B, n]`, draws that accept.
        choosing: float32 `[B, n + 1]`, draws of the token after the accepted ones.

    Returns:
        The caches; tokens int32 `[B, n + 1]`: those accepted, one that the model chose itself (`NOT_A_NUMBER` if it could not), and
        `CLOSED` after that; their float32 log-probabilities; and the number of those accepted, int32 `[B]`.
    """
    batch, steps = proposed.shape[0], proposed.shape[1] + 1
    proposed = ops.maximum(proposed, 0)
    token_ids = ops.concatenate([last[:, None], proposed], axis=1)
    logits, caches = following_logits(backbone, caches, token_ids, starts, counts)
    flat = ops.reshape(logits, (batch * steps, logits.shape[-1]))
    arrays = {name: ops.repeat(array, steps, axis=0) for name, array in arrays.items()}
    column = ops.arange(steps, dtype="int32")[None, :]
    is_real = column[:, :-1] < counts[:, None] - 1
    if key.sampled:
        shares = ops.reshape(probabilities(key, arrays, None, flat), logits.shape)
        accepted = _count(ops.logical_and(is_real, _is_accepted(shares, proposed, chances, accepting)))
        replaced = accepted < counts - 1
        at = ops.minimum(accepted, steps - 2)
        rest = _rest(_row_at(shares, accepted), _row_at(proposed, at), None if chances is None else _row_at(chances, at), replaced)
        own = draw(rest, _row_at(choosing, accepted))
    else:
        choices = ops.reshape(most_likely(penalized(key, arrays, None, flat)), (batch, steps))
        accepted = _count(ops.logical_and(is_real, proposed == choices[:, :-1]))
        own = _row_at(choices, accepted)
    own = ops.where(own >= 0, own, NOT_A_NUMBER)[:, None]
    taken = ops.concatenate([proposed, proposed[:, :1]], axis=1)
    tokens = ops.where(column < accepted[:, None], taken, ops.where(column == accepted[:, None], own, CLOSED))
    tokens = ops.where(counts[:, None] > 0, tokens, CLOSED)
    logprobs = log_probability(flat, ops.reshape(ops.maximum(tokens, 0), (-1,)))
    return caches, tokens, ops.reshape(logprobs, (batch, steps)), accepted


def _count(is_accepted: Any) -> Any:
    """How many come before the first that is not accepted: bool `[B, n]` -> int32 `[B]`."""
    return ops.cast(ops.sum(ops.cumprod(ops.cast(is_accepted, "int32"), axis=1), axis=1), "int32")


def _is_accepted(shares: Any, proposed: Any, chances: Any, accepting: Any) -> Any:
    """Bool `[B, n]`: with probability min(1, p / q) true; of NaN never."""
    p = ops.take_along_axis(shares[:, :-1], proposed[:, :, None], axis=2)[:, :, 0]
    q = 1.0 if chances is None else ops.take_along_axis(chances, proposed[:, :, None], axis=2)[:, :, 0]
    return accepting * q < p


def _rest(shares: Any, token: Any, chances: Any, is_replaced: Any) -> Any:
    """Weights `[B, V]` of the token after the accepted ones: p, or max(p - q, 0) in place of a proposal."""
    if chances is None:
        chances = ops.cast(ops.arange(shares.shape[-1], dtype="int32")[None] == token[:, None], "float32")
    rest = ops.where(is_replaced[:, None], ops.maximum(shares - chances, 0.0), shares)
    # Nothing is left where p and q differ by rounding alone.
    return ops.where(ops.sum(rest, axis=-1, keepdims=True) > 0, rest, shares)


def _row_at(rows: Any, index: Any) -> Any:
    """Of `[B, n, ...]` the entry at `index [B]` of each row: `[B, ...]`."""
    index = ops.reshape(index, (-1, *[1] * (len(rows.shape) - 1)))
    return ops.take_along_axis(rows, index, axis=1)[:, 0]
