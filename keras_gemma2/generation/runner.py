"""The compiled functions of one model, kept from call to call: caches are made, extended by prompts, and decoded from."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_gemma2 import backend
from keras_gemma2.cache import Cache, Tokens, copied_caches, empty_caches
from keras_gemma2.generation.decode import Choosing, choose_next, decode_loop, extend_prompts, next_logits, score_prompts

CHUNK = 512  # tokens of a prompt that run at a time: enough to keep the products busy, few enough to keep what they hold small
TOKENS_A_CALL = 1024  # of several rows' prompts together
TOKENS_A_SPREAD_CALL = 8192  # of all rows, which lie on several devices


def prompt_bucket(length: int) -> int:
    """The padded length that a piece of a prompt is compiled for: a power of two from 16 to `CHUNK`.

    Example:
        >>> prompt_bucket(5), prompt_bucket(17), prompt_bucket(4000)
        (16, 32, 512)
    """
    return min(CHUNK, _power_of_two(max(16, length)))


def cache_bucket(length: int, max_sequence_length: int) -> int:
    """The room that caches are made with: a power of two from 256, or the model's context.

    Example:
        >>> cache_bucket(20, 8192), cache_bucket(1025, 8192), cache_bucket(20, 64)
        (256, 2048, 64)
    """
    return min(_power_of_two(max(256, length)), max(length, max_sequence_length))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


class Piece(NamedTuple):
    """What one call runs of some rows' prompts; all rows have the same padded length."""

    steps: int
    rows: list[int]
    firsts: list[int]
    counts: list[int]


def pieces(lengths: Sequence[int]) -> Iterator[Piece]:
    """Cuts prompts of some lengths into pieces, of `CHUNK` tokens but for the last, and puts like pieces of several rows together.

    Example:
        >>> [(piece.steps, piece.rows, piece.counts) for piece in pieces([20, 600, 30])]
        [(32, [0, 2], [20, 30]), (512, [1], [512]), (128, [1], [88])]
    """
    for first in range(0, max(lengths), CHUNK):
        counts = {row: min(CHUNK, length - first) for row, length in enumerate(lengths) if length > first}
        for steps in sorted({prompt_bucket(count) for count in counts.values()}):
            rows = [row for row, count in counts.items() if prompt_bucket(count) == steps]
            together = max(1, TOKENS_A_CALL // steps)
            for start in range(0, len(rows), together):
                some = rows[start : start + together]
                yield Piece(steps, some, [first] * len(some), [counts[row] for row in some])


def spread_pieces(lengths: Sequence[int]) -> Iterator[Piece]:
    """Cuts prompts into pieces that all rows have a part in, in order, so that each row stays on the devices that it is on.

    A row that has ended has no tokens in later pieces.

    Example:
        >>> [(piece.steps, piece.rows, piece.counts) for piece in spread_pieces([20, 600, 30])]
        [(512, [0, 1, 2], [20, 512, 30]), (128, [0, 1, 2], [0, 88, 0])]
    """
    size = max(16, min(CHUNK, _power_of_two(TOKENS_A_SPREAD_CALL // len(lengths) + 1) // 2))
    for first in range(0, max(lengths), size):
        counts = [max(0, min(size, length - first)) for length in lengths]
        firsts = [first if count else 0 for count in counts]
        yield Piece(prompt_bucket(max(counts)), list(range(len(lengths))), firsts, counts)


class Runner:
    """Compiles what generation runs, once for each bucket of shapes.

    Args:
        backbone: a `Gemma2Backbone`. Its variables are read at each call, so training in between is seen. The adapter that is
            active now stays the one that runs.
        jit: as `backend.compile_function` takes it.
    """

    def __init__(self, backbone: Any, jit: bool | None = None) -> None:
        self.backbone, self._jit = backbone, jit
        self._adapter = backbone.adapter_set.active
        self._extend = {fresh: self._compiled(self._extend_function(fresh)) for fresh in (True, False)}
        self._first: dict[Any, Any] = {}
        self._loops: dict[Any, Any] = {}
        self._others: dict[Any, Any] = {}
        self._scores = self._compiled(self._scores_function)
        self._step = self._compiled(functools.partial(next_logits, backbone))
        self._logits = self._compiled(lambda unused, hidden: self._head(hidden))
        self._copy = self._compiled(lambda empty, caches, count: copied_caches(caches, count, empty))

    def _compiled(self, function: Any) -> Any:
        def with_adapter(*args: Any) -> Any:  # also where another one was switched to in the midst of a text
            with self.backbone.adapter_set.only(self._adapter):
                return function(*args)

        return backend.compile_function(with_adapter, self.backbone.variables, self._jit)

    def compiled(self, function: Any, key: Any) -> Any:
        """`function(backbone, key, ...)` as a compiled function of the arguments left, the first of which is given up."""
        if (function, key) not in self._others:
            self._others[function, key] = self._compiled(functools.partial(function, self.backbone, key))
        return self._others[function, key]

    # Caches ---------------------------------------------------------------------------------------------------------------

    def new_caches(self, batch: int, length: int, slack: int = 0) -> list[Cache]:
        """Empty caches for `batch` rows of at most `length` tokens."""
        config = self.backbone.config
        room = cache_bucket(length, config.max_sequence_length)
        return empty_caches(config, batch, room, self.backbone.compute_dtype, slack)

    def copied_caches(self, caches: list[Cache], count: int, batch: int, length: int, slack: int = 0) -> list[Cache]:
        """Caches for `batch` rows of at most `length` tokens, each with the `count` tokens of a cache of one row."""
        return self._copy(self.new_caches(batch, length, slack), caches, *_tensors(np.int32(count)))

    # Prompts --------------------------------------------------------------------------------------------------------------

    def prefill(
        self, caches: list[Cache], prompts: Sequence[Sequence[int]], starts: Sequence[int] | None = None
    ) -> tuple[list[Cache], Any]:
        """Runs prompts on top of what the caches hold.

        Args:
            caches: from `new_caches`, of as many rows; given up.
            prompts: token ids of each row; none for a row that stays as it is.
            starts: tokens that stand before them, of each row; None for none.

        Returns:
            The caches, and the hidden state `[B, D]` of each row's last token, after the final norm.
        """
        starts = np.zeros(len(prompts), "int32") if starts is None else np.asarray(starts, "int32")
        shape = (len(prompts), self.backbone.config.hidden_dim)
        hidden = ops.zeros(shape, self.backbone.compute_dtype)
        for piece in self._pieces([len(prompt) for prompt in prompts]):
            caches, hidden = self._run_piece(caches, hidden, prompts, starts, piece)
        return caches, hidden

    def _run_piece(self, caches: Any, hidden: Any, prompts: Any, starts: np.ndarray, piece: Piece) -> tuple[Any, Any]:
        token_ids, rows, first, counts = _piece_arrays(piece, prompts, starts)
        sources = np.full(len(prompts), -1, "int32")
        sources[piece.rows] = np.where(piece.counts, np.arange(len(piece.rows)), -1)
        run = self._extend[not first.any()]
        return run((caches, hidden), *_tensors(token_ids, rows, first, counts, sources))

    def _extend_function(self, fresh: bool) -> Any:
        def run(state: Any, token_ids: Any, rows: Any, starts: Any, counts: Any, sources: Any) -> Any:
            tokens = Tokens(self._rows_of(rows), starts, counts, token_ids.shape[1], fresh)
            return extend_prompts(self.backbone, *state, token_ids, tokens, sources)

        return run

    def scores(
        self, caches: list[Cache], prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], starts: Sequence[int]
    ) -> list[np.ndarray]:
        """Float32 log-probabilities of the token that follows each token.

        Args:
            caches: as `prefill` takes them.
            prompts: token ids of each row.
            targets: of each of them the token that follows.
            starts: tokens that stand before them, of each row.
        """
        scores: list[list[float]] = [[] for _ in prompts]
        for piece in self._pieces([len(prompt) for prompt in prompts]):
            token_ids, rows, first, counts = _piece_arrays(piece, prompts, np.asarray(starts, "int32"))
            followers = _piece_arrays(piece, targets, np.asarray(starts, "int32"))[0]
            caches, found = self._scores(caches, *_tensors(token_ids, followers, rows, first, counts))
            for row, count, logprobs in zip(piece.rows, piece.counts, ops.convert_to_numpy(found)):
                scores[row] += logprobs[:count].tolist()
        return [np.array(row, "float32") for row in scores]

    def _scores_function(self, caches: Any, token_ids: Any, targets: Any, rows: Any, starts: Any, counts: Any) -> Any:
        tokens = Tokens(self._rows_of(rows), starts, counts, token_ids.shape[1])
        return score_prompts(self.backbone, caches, token_ids, targets, tokens)

    def _pieces(self, lengths: Sequence[int]) -> Iterator[Piece]:
        return spread_pieces(lengths) if backend.is_spread() else pieces(lengths)

    def _rows_of(self, rows: Any) -> Any:
        return None if backend.is_spread() else rows

    # Tokens ---------------------------------------------------------------------------------------------------------------

    def first(self, choosing: Choosing, marks: Any, hidden: Any, positions: Any, open_rows: Any, uniforms: Any) -> Any:
        """The compiled `decode.choose_next`: the token that follows each prompt."""
        key = choosing.key
        if key not in self._first:

            def run(marks: Any, arrays: Any, stops: Any, limits: Any, hidden: Any, *rest: Any) -> Any:
                return choose_next(Choosing(key, arrays, stops, limits), self._head(hidden), marks, *rest)

            self._first[key] = self._compiled(run)
        arguments = _tensors(positions, open_rows, uniforms)
        return self._first[key](marks, *_of(choosing), hidden, *arguments)

    def loop(
        self, choosing: Choosing, state: Any, token_ids: Any, positions: Any, open_rows: Any, uniforms: Any, steps: int
    ) -> Any:
        """The compiled `decode.decode_loop`."""
        key = choosing.key
        if key not in self._loops:

            def run(state: Any, arrays: Any, stops: Any, limits: Any, *rest: Any) -> Any:
                return decode_loop(self.backbone, Choosing(key, arrays, stops, limits), state, *rest)

            self._loops[key] = self._compiled(run)
        arguments = _tensors(token_ids, positions, open_rows, uniforms, np.int32(steps))
        return self._loops[key](state, *_of(choosing), *arguments)

    def logits(self, hidden: Any) -> Any:
        """Float32 logits `[..., V]` of hidden states `[..., D]` after the final norm."""
        return self._logits((), hidden)

    def step(self, caches: list[Cache], token_ids: np.ndarray, positions: np.ndarray) -> tuple[Any, list[Cache]]:
        """One token a row, `[B]`: the logits `[B, V]` of the next, and the caches."""
        return self._step(caches, *_tensors(token_ids, positions))

    def _head(self, hidden: Any) -> Any:
        return self.backbone.token_embedding(hidden, reverse=True)


def _piece_arrays(piece: Piece, prompts: Any, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A piece's token ids `[b, T]` and the rows, starts and counts `[b]` of `Tokens`, all int32.

    Rows that fill up the bucket have no real token: they store nothing, and nothing of theirs is read.
    """
    batch = len(piece.rows) if backend.is_spread() else _power_of_two(len(piece.rows))
    token_ids = np.zeros((batch, piece.steps), "int32")
    rows, first, counts = (np.zeros(batch, "int32") for _ in range(3))
    for i, (row, begin, count) in enumerate(zip(piece.rows, piece.firsts, piece.counts)):
        token_ids[i, :count] = prompts[row][begin : begin + count]
        rows[i], first[i], counts[i] = row, starts[row] + begin, count
    return token_ids, rows, first, counts


def _tensors(*arrays: Any) -> list[Any]:
    return [ops.convert_to_tensor(array) for array in arrays]


def _of(choosing: Choosing) -> list[Any]:
    arrays = {name: ops.convert_to_tensor(array) for name, array in choosing.arrays.items()}
    return [arrays, *_tensors(choosing.stop_token_ids, choosing.limits)]
