"""Prefill, one decode step, and the loop: three functions, shared by everything that generates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_gemma2.cache import PromptCache, StepCache, cache_size, slot_positions
from keras_gemma2.layers import attention_mask

Caches = list[tuple[Any, Any]]


def prefill(backbone: Any, token_ids: Any, lengths: Any, max_length: int) -> tuple[Any, Caches]:
    """Runs the prompts and fills the caches.

    Args:
        backbone: a `Gemma2Backbone`.
        token_ids: int32 `[B, T]`, padded on the right.
        lengths: int32 `[B]`, real tokens of each row, at least 1.
        max_length: tokens, prompt included, that the caches must have room for.

    Returns:
        Hidden state after the final norm of each row's last token, `[B, D]`, and one cache a layer.
    """
    batch, steps = ops.shape(token_ids)[0], ops.shape(token_ids)[1]
    positions = ops.broadcast_to(ops.arange(steps, dtype="int32")[None], (batch, steps))
    real = positions < lengths[:, None]
    config = backbone.config
    masks = {kind: attention_mask(positions, positions, real, config.window(kind)) for kind in backbone.masks}
    caches = [PromptCache(lengths, cache_size(max_length, config.window(kind))) for kind in config.layer_types]
    x = backbone.run_blocks(token_ids, positions, masks, caches)
    last = ops.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    return backbone.layer_norm(last)[:, 0], [cache.stored for cache in caches]


def decode_step(backbone: Any, caches: Caches, token_ids: Any, positions: Any) -> tuple[Any, Caches]:
    """Runs one token a row.

    Args:
        backbone: a `Gemma2Backbone`.
        caches: one a layer, from `prefill` or the step before; may be overwritten.
        token_ids: int32 `[B]`.
        positions: int32 `[B]`, each row's own.

    Returns:
        Hidden state after the final norm, `[B, D]`, and the caches.
    """
    config, queries = backbone.config, positions[:, None]
    sizes = {kind: cache[0].shape[2] for kind, cache in zip(config.layer_types, caches)}
    masks = {
        kind: attention_mask(queries, *slot_positions(positions, size), config.window(kind))
        for kind, size in sizes.items()
    }
    steps = [StepCache(cache, positions) for cache in caches]
    x = backbone.run_blocks(token_ids[:, None], queries, masks, steps)
    return backbone.layer_norm(x)[:, 0], [step.stored for step in steps]


def generate_loop(
    prefill_logits: Any,
    caches: Caches,
    step: Callable[[Caches, Any, Any], tuple[Any, Caches]],
    choose: Callable[[Any], np.ndarray],
    lengths: np.ndarray,
    max_lengths: np.ndarray,
    stop_token_ids: Sequence[int],
) -> list[list[int]]:
    """Chooses and runs tokens until each row has met a stop token or its length. Rows go on from their own lengths.

    Args:
        prefill_logits: `[B, V]`, for the first new token.
        caches: from `prefill`.
        step: `(caches, token_ids [B], positions [B]) -> (logits [B, V], caches)`.
        choose: `logits [B, V] -> int [B]`, numpy.
        lengths: int `[B]`, tokens of each prompt.
        max_lengths: int `[B]`, tokens each row may have at the end, prompt included.
        stop_token_ids: ids that end a row; the id itself is kept.

    Returns:
        The new ids of each row.
    """
    completions: list[list[int]] = [[] for _ in lengths]
    open_rows = lengths < max_lengths
    logits, positions = prefill_logits, lengths.astype("int32")
    while open_rows.any():
        tokens = choose(logits).astype("int32")
        for row in np.flatnonzero(open_rows):
            completions[row].append(int(tokens[row]))
        ended = np.isin(tokens, stop_token_ids) | (positions + 1 >= max_lengths)
        open_rows &= ~ended
        if open_rows.any():
            # Rows that have ended run along in place, at their last position: what they compute is not read.
            logits, caches = step(caches, ops.convert_to_tensor(tokens), ops.convert_to_tensor(positions))
            positions = positions + open_rows.astype("int32")
    return completions
