"""A batch of rows being continued, some tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_gemma2.cache import Cache
from keras_gemma2.generation.decode import CLOSED, NOT_A_NUMBER, STEPS, Choosing
from keras_gemma2.generation.drawing import log_probability, uniforms
from keras_gemma2.generation.runner import Runner
from keras_gemma2.generation.sampler import Plan, choose_on_host, initial_marks


class Decoding:
    """Rows whose prompts have run, continued token by token; tokens are chosen in the compiled loop.

    Args:
        runner: of the model.
        caches, hidden: from `Runner.prefill`; given up.
        rows: all token ids of each row so far; the caches hold them.
        limits: tokens that each row may have, prompt included.
        plan: how tokens are chosen.
        seeds: one a row.
        stop_token_ids: ids that end a row, of each row; the id itself is kept.

    Attributes:
        rows: the token ids so far, the chosen ones included. The last chosen one has not run.
        logprobs: of each row, the log-probability of each chosen token.
        open_rows: bool `[B]`, rows that have not ended.
        caches: of the model; they hold all of a row but its last token, at least.
    """

    def __init__(
        self,
        runner: Runner,
        caches: list[Cache],
        hidden: Any,
        rows: Sequence[Sequence[int]],
        limits: Sequence[int],
        plan: Plan,
        seeds: Sequence[int],
        stop_token_ids: Sequence[Sequence[int]],
    ) -> None:
        self.runner, self.caches, self.plan, self.seeds = runner, caches, plan, list(seeds)
        self.rows: list[list[int]] = [list(row) for row in rows]
        self.logprobs: list[list[float]] = [[] for _ in rows]
        self.open_rows = np.array([len(row) < limit for row, limit in zip(rows, limits)])
        self._hidden: Any = hidden
        arrays = {name: ops.convert_to_tensor(array) for name, array in plan.arrays.items()}
        self._choosing = Choosing(plan.key, arrays, _padded(stop_token_ids), np.array(limits, "int32"))
        self._marks = ops.convert_to_tensor(initial_marks(plan, self.rows, runner.backbone.config.vocabulary_size))

    def advance(self, steps: int) -> list[list[int]]:
        """Chooses up to `steps` tokens for each open row.

        Returns:
            The new tokens of each row: none if it had ended.

        Raises:
            FloatingPointError: if the logits of a row hold no numbers.
        """
        new: list[list[int]] = [[] for _ in self.rows]
        while steps > 0 and self.open_rows.any():
            tokens, logprobs = self._choose(steps)
            self._take(tokens, logprobs, new)
            steps -= tokens.shape[1]
        return new

    def close(self, row: int) -> None:
        """Ends a row here."""
        self.open_rows[row] = False

    def _choose(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and log-probabilities `[B, n]`, n at most `steps`; updates which rows are open."""
        positions = np.array([len(row) for row in self.rows], "int32")  # of the tokens to choose
        if self._hidden is not None:
            hidden, self._hidden = self._hidden, None
            tokens, logprobs, self._marks, is_open = self.runner.first(
                self._choosing, self._marks, hidden, positions, self.open_rows, self._uniforms(positions)
            )
            tokens, logprobs = tokens[:, None], logprobs[:, None]
        else:
            steps = min(steps, STEPS)
            draws = np.zeros((STEPS, len(positions)), "float32")
            if self.plan.key.sampled:
                draws[:steps] = self._uniforms(positions[:, None] + np.arange(steps, dtype="int32")).T
            last = np.array([row[-1] for row in self.rows], "int32")
            state, tokens, logprobs, is_open = self.runner.loop(
                self._choosing, (self.caches, self._marks), last, positions - 1, self.open_rows, draws, steps
            )
            self.caches, self._marks = state
        self.open_rows = ops.convert_to_numpy(is_open).copy()
        columns = slice(0, steps)
        return ops.convert_to_numpy(tokens)[:, columns], ops.convert_to_numpy(logprobs)[:, columns]

    def _uniforms(self, positions: np.ndarray) -> np.ndarray:
        return uniforms(self.seeds, positions)

    def _take(self, tokens: np.ndarray, logprobs: np.ndarray, new: list[list[int]]) -> None:
        if (tokens == NOT_A_NUMBER).any():
            row = int(np.argwhere(tokens == NOT_A_NUMBER)[0][0])
            raise not_numbers(row, len(self.rows[row]))
        for row, (chosen, logprob) in enumerate(zip(tokens, logprobs)):
            kept = chosen != CLOSED
            new[row] += chosen[kept].tolist()
            self.rows[row] += chosen[kept].tolist()
            self.logprobs[row] += logprob[kept].tolist()


class HostDecoding(Decoding):
    """As `Decoding`, but a function on the host chooses each token: for keras-hub's samplers and for users' logits processors.

    Args:
        choose: `(logits [B, V], decoding) -> int [B]`; None for the plan's own choice with its logits processors.
    """

    def __init__(self, *args: Any, choose: Callable[[Any, HostDecoding], np.ndarray] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._choose_tokens = choose or _by_plan

    def _choose(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        positions = np.array([len(row) for row in self.rows], "int32")
        if self._hidden is not None:
            logits, self._hidden = self.runner.logits(self._hidden), None
        else:
            last = np.array([row[-1] for row in self.rows], "int32")
            logits, self.caches = self.runner.step(self.caches, last, positions - 1)
        # A sum shows NaN and infinities, which samplers of others draw from or fail on in words of their own.
        broken = np.flatnonzero(~np.isfinite(ops.convert_to_numpy(ops.sum(logits, axis=-1))) & self.open_rows)
        if broken.size:
            raise not_numbers(int(broken[0]), len(self.rows[broken[0]]))
        tokens = self._choose_tokens(logits, self).astype("int32")
        logprobs = ops.convert_to_numpy(log_probability(logits, ops.convert_to_tensor(np.maximum(tokens, 0))))
        finite = np.isfinite(logprobs) & (tokens >= 0)
        tokens = np.where(self.open_rows, np.where(finite, tokens, NOT_A_NUMBER), CLOSED)
        stopped = (tokens[:, None] == self._choosing.stop_token_ids).any(axis=1)
        self.open_rows = self.open_rows & ~stopped & (positions + 1 < self._choosing.limits)
        return tokens[:, None], logprobs[:, None]


def not_numbers(row: int, count: int) -> FloatingPointError:
    """The error of a row whose logits, after `count` tokens or a few more, hold no numbers."""
    return FloatingPointError(
        f"The model's logits for row {row} of the inputs, after {count} tokens or a few more, are not numbers (NaN or infinite). "
        "Its weights hold such numbers, or its activations overflowed: check the checkpoint with `keras-gemma2 verify`, and use "
        "dtype='bfloat16' or 'float32' rather than 'float16'."
    )


def _by_plan(logits: Any, decoding: HostDecoding) -> np.ndarray:
    positions = np.array([len(row) for row in decoding.rows], "int32")
    tokens, decoding._marks = choose_on_host(
        decoding.plan, decoding.rows, decoding._marks, logits, decoding._uniforms(positions), decoding.open_rows
    )
    return tokens


def _padded(stop_token_ids: Sequence[Sequence[int]]) -> np.ndarray:
    """Rows of ids as int32 `[B, n]` with -1 after them; n in steps of 8, so that another id does not compile anew."""
    width = -(-max(1, max(len(ids) for ids in stop_token_ids)) // 8) * 8
    return np.array([[*ids, *[-1] * (width - len(ids))] for ids in stop_token_ids], "int32")
