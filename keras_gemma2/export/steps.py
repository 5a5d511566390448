"""The one function of a model that programs without loops need: tokens on top of caches, whatever their number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
from keras import ops

from keras_gemma2.cache import Tokens
from keras_gemma2.generation.decode import extend
from keras_gemma2.layers.numerics import soft_cap


def step(backbone: Any, token_ids: Any, starts: Any, counts: Any, caches: Sequence[Any]) -> tuple[Any, ...]:
    """Runs some tokens of each row: a prompt, a piece of one, or the one that was chosen last.

    Args:
        backbone: a `Gemma2Backbone`.
        token_ids: int32 `[B, T]`, padded on the right.
        starts: int32 `[B]`, tokens of each row that the caches hold.
        counts: int32 `[B]`, tokens of each row that are real.
        caches: keys and values of each layer by turns, `keys_0`, `values_0`, ...; may be overwritten.

    Returns:
        Float32 logits `[B, V]` of what follows each row's last real token, and the caches as they came.
    """
    batch, length = ops.shape(token_ids)
    pairs = list(zip(caches[::2], caches[1::2]))
    x, pairs = extend(backbone, pairs, token_ids, Tokens(None, starts, counts, length, whole=True))
    # One row of all of them: `take_along_axis` would fix the sizes in PyTorch's exporter.
    rows = ops.arange(batch, dtype="int32") * length + ops.maximum(counts - 1, 0)
    last = ops.take(ops.reshape(x, (-1, backbone.config.hidden_dim)), rows, axis=0)
    return _logits(backbone, backbone.layer_norm(last)), *(cache for pair in pairs for cache in pair)


def _logits(backbone: Any, hidden: Any) -> Any:
    """Between limits that no number passes: else LiteRT's converter multiplies the norm's scale and the cap into the embedding, of
    which there are two copies then."""
    hidden = ops.maximum(hidden, ml_dtypes.finfo(backbone.compute_dtype).min)
    logits = backbone.token_embedding.uncapped_logits(hidden)
    return soft_cap(ops.maximum(logits, ml_dtypes.finfo("float32").min), backbone.config.final_logit_soft_cap)
