"""Extending caches by prompts and by single tokens, and the loop around it: what everything that generates is made of."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from keras import ops

from keras_gemma2 import backend
from keras_gemma2.cache import Cache, LayerCache, Tokens
from keras_gemma2.generation.drawing import log_probability
from keras_gemma2.generation.sampler import choose

STEPS = 32  # of the loop, at most, before it gives back what it chose
SCORED = 64  # tokens whose logits are in memory at once when a text is scored
CLOSED, NOT_A_NUMBER = -1, -2  # what stands in place of a token where a row has ended, or where its logits hold no number


def extend(backbone: Any, caches: list[Cache], token_ids: Any, tokens: Tokens) -> tuple[Any, list[Cache]]:
    """Runs tokens on top of what the caches hold.

    Args:
        backbone: a `Gemma2Backbone`.
        caches: one a layer; may be overwritten.
        token_ids: int32 `[b, T]`, padded on the right.
        tokens: where they stand.

    Returns:
        The residual stream `[b, T, D]`, before the final norm, and the caches.
    """
    config = backbone.config
    layers = [LayerCache(cache, tokens, config.window(kind)) for cache, kind in zip(caches, config.layer_types)]
    x = backbone.run_blocks(token_ids, tokens.positions, None, layers)
    return x, [layer.stored for layer in layers]


def extend_prompts(
    backbone: Any, caches: list[Cache], hidden: Any, token_ids: Any, tokens: Tokens, sources: Any
) -> tuple[list[Cache], Any]:
    """Runs a piece of some rows' prompts.

    Args:
        backbone, caches, token_ids, tokens: as `extend` takes them.
        hidden: `[B, D]`: each row's last hidden state so far, after the final norm.
        sources: int32 `[B]`: for each row of the caches its row in `token_ids`, or -1.

    Returns:
        The caches, and `hidden` with the rows that ran replaced.
    """
    x, caches = extend(backbone, caches, token_ids, tokens)
    last = ops.take_along_axis(x, ops.maximum(tokens.counts - 1, 0)[:, None, None], axis=1)
    last = ops.take(backbone.layer_norm(last)[:, 0], ops.maximum(sources, 0), axis=0)
    return caches, ops.where(sources[:, None] >= 0, last, hidden)


def score_prompts(backbone: Any, caches: list[Cache], token_ids: Any, targets: Any, tokens: Tokens) -> tuple[list[Cache], Any]:
    """Runs a piece of some rows' texts; gives the log-probability of the token that follows each token.

    Args:
        backbone, caches, token_ids, tokens: as `extend` takes them.
        targets: int32 `[b, T]`, the tokens that follow.

    Returns:
        The caches, and float32 `[b, T]`. Logits are made for `SCORED` tokens at a time: those of a whole piece would be the largest
        thing in memory.
    """
    x, caches = extend(backbone, caches, token_ids, tokens)
    shape = ops.shape(token_ids)
    hidden, targets = ops.reshape(backbone.layer_norm(x), (-1, x.shape[-1])), ops.reshape(targets, (-1,))
    size = min(SCORED, hidden.shape[0])

    def score(i: Any, scores: Any) -> tuple[Any, Any]:
        index = i * size + ops.arange(size, dtype="int32")
        logits = backbone.token_embedding(ops.take(hidden, index, axis=0), reverse=True)
        found = log_probability(logits, ops.take(targets, index, axis=0))
        here = ops.arange(scores.shape[0], dtype="int32")[:, None] == i
        return i + 1, ops.where(here, found[None, :], scores)

    blocks = hidden.shape[0] // size
    start = (ops.zeros((), "int32"), ops.zeros((blocks, size), "float32"))
    scores = ops.while_loop(lambda i, _: i < blocks, score, start)[1]
    return caches, ops.reshape(scores, shape)


def decode_step(backbone: Any, caches: list[Cache], token_ids: Any, positions: Any) -> tuple[Any, list[Cache]]:
    """Runs one token a row.

    Args:
        backbone: a `Gemma2Backbone`.
        caches: one a layer; may be overwritten.
        token_ids: int32 `[B]`.
        positions: int32 `[B]`, each row's own.

    Returns:
        Hidden state after the final norm, `[B, D]`, and the caches.
    """
    tokens = Tokens(None, positions, ops.ones_like(positions), steps=1)
    x, caches = extend(backbone, caches, token_ids[:, None], tokens)
    return backbone.layer_norm(x)[:, 0], caches


def next_logits(backbone: Any, caches: list[Cache], token_ids: Any, positions: Any) -> tuple[Any, list[Cache]]:
    """As `decode_step`, but gives the float32 logits `[B, V]` of the tokens that follow; fast where it runs again and again."""

    def step(caches: list[Cache], token_ids: Any, positions: Any) -> tuple[Any, list[Cache]]:
        hidden, caches = decode_step(backbone, caches, token_ids, positions)
        return backbone.token_embedding(hidden, reverse=True), caches

    return backend.repeated(step, "next_logits")(caches, token_ids, positions)


def following_logits(
    backbone: Any, caches: list[Cache], token_ids: Any, starts: Any, counts: Any, last_only: bool = False
) -> tuple[Any, list[Cache]]:
    """Runs a few tokens a row; fast where it runs again and again.

    Args:
        backbone: a `Gemma2Backbone`.
        caches: one a layer, with slack for these tokens: they may be stored twice. May be overwritten.
        token_ids: int32 `[B, T]`.
        starts: int32 `[B]`, where each row's first stands.
        counts: int32 `[B]`, how many of them are stored.
        last_only: whether to give those after the last column alone.

    Returns:
        The float32 logits `[B, T, V]`, or `[B, 1, V]`, of the tokens that follow each, and the caches.
    """

    def run(caches: list[Cache], token_ids: Any, starts: Any, counts: Any) -> tuple[Any, list[Cache]]:
        x, caches = extend(backbone, caches, token_ids, Tokens(None, starts, counts, token_ids.shape[1]))
        hidden = backbone.layer_norm(x[:, -1:] if last_only else x)
        return backbone.token_embedding(hidden, reverse=True), caches

    name = "last_following_logits" if last_only else "following_logits"
    return backend.repeated(run, name)(caches, token_ids, starts, counts)


@dataclasses.dataclass(frozen=True)
class Choosing:
    """How tokens are chosen and when rows end; all but `key` are arguments of the compiled functions.

    Args:
        key, arrays: of a sampler's `Plan`.
        stop_token_ids: int32 `[B, n]`, each row's, padded with -1.
        limits: int32 `[B]`, tokens that each row may have, prompt included.
    """

    key: Any
    arrays: dict[str, Any]
    stop_token_ids: Any
    limits: Any


def choose_next(
    choosing: Choosing, logits: Any, marks: Any, positions: Any, open_rows: Any, uniforms: Any
) -> tuple[Any, Any, Any, Any]:
    """Each open row's next token.

    Args:
        choosing: how.
        logits: float32 `[B, V]`.
        marks: of the sampler: which tokens each row has had.
        positions: int32 `[B]`, where the next tokens will stand.
        open_rows: bool `[B]`.
        uniforms: float32 `[B]`, one draw a row.

    Returns:
        int32 tokens `[B]` (`CLOSED` or `NOT_A_NUMBER` where there is none), their float32 log-probabilities, the marks, and which
        rows are still open.
    """
    chosen, marks = choose(choosing.key, choosing.arrays, marks, logits, uniforms)
    known = chosen >= 0
    logprobs = log_probability(logits, ops.maximum(chosen, 0))
    tokens = ops.where(open_rows, ops.where(known, chosen, NOT_A_NUMBER), CLOSED)
    stopped = ops.any(ops.equal(chosen[:, None], choosing.stop_token_ids), axis=1)
    ended = ops.logical_or(stopped, ops.logical_or(positions + 1 >= choosing.limits, ops.logical_not(known)))
    return tokens, logprobs, marks, ops.logical_and(open_rows, ops.logical_not(ended))


def decode_loop(
    backbone: Any,
    choosing: Choosing,
    state: tuple[list[Cache], Any],
    token_ids: Any,
    positions: Any,
    open_rows: Any,
    uniforms: Any,
    steps: Any,
) -> tuple[tuple[list[Cache], Any], Any, Any, Any]:
    """Runs and chooses tokens until all rows have ended, or for a number of steps.

    Args:
        backbone: a `Gemma2Backbone`.
        choosing: how.
        state: the caches and the sampler's marks; may be overwritten.
        token_ids: int32 `[B]`, the last token of each row, which has not run yet.
        positions: int32 `[B]`, where they stand.
        open_rows: bool `[B]`.
        uniforms: float32 `[STEPS, B]`.
        steps: int32 scalar, at most `STEPS`.

    Returns:
        The state, tokens int32 `[B, STEPS]` (`CLOSED` where none was chosen), log-probabilities float32 `[B, STEPS]`, and the rows
        still open.
    """
    arrays, stop_token_ids, limits = choosing.arrays, choosing.stop_token_ids, choosing.limits

    def step(i: Any, *variables: Any) -> tuple:
        return run(arrays, stop_token_ids, limits, uniforms, i, *variables)

    def goes_on(i: Any, *variables: Any) -> Any:
        return ops.logical_and(i < steps, ops.any(variables[3]))

    run = functools.partial(_run_and_choose, backbone, choosing.key)
    if not choosing.key.sampled:  # filters look at values that differ from token to token
        run = backend.repeated(run, "step")
    nothing = ops.full((ops.shape(token_ids)[0], STEPS), CLOSED, "int32")
    no_logprobs = ops.zeros_like(nothing, dtype="float32")
    start = (ops.zeros((), "int32"), state, token_ids, positions, open_rows, nothing, no_logprobs)
    _, state, _, _, open_rows, chosen, logprobs = ops.while_loop(goes_on, step, start)
    return state, chosen, logprobs, open_rows


def _run_and_choose(
    backbone: Any,
    key: Any,
    arrays: Any,
    stop_token_ids: Any,
    limits: Any,
    uniforms: Any,
    i: Any,
    state: Any,
    token_ids: Any,
    positions: Any,
    open_rows: Any,
    chosen: Any,
    logprobs: Any,
) -> tuple:
    """Step `i` of `decode_loop`: what changes in it, after what does not."""
    caches, marks = state
    logits, caches = next_logits(backbone, caches, token_ids, positions)
    positions = ops.where(open_rows, positions + 1, positions)
    choosing = Choosing(key, arrays, stop_token_ids, limits)
    tokens, logprob, marks, open_rows = choose_next(choosing, logits, marks, positions, open_rows, ops.take(uniforms, i, axis=0))
    # Rows that have ended run along in place, on their last token: what they compute is not read.
    token_ids = ops.where(tokens >= 0, tokens, token_ids)
    here = ops.arange(STEPS, dtype="int32")[None, :] == i
    chosen, logprobs = ops.where(here, tokens[:, None], chosen), ops.where(here, logprob[:, None], logprobs)
    return i + 1, (caches, marks), token_ids, positions, open_rows, chosen, logprobs
