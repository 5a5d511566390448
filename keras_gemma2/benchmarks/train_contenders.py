"""A training step with LoRA of rank 8 on queries and values: ours and keras-hub's; `train_transformers.py` has another.

Each function builds a model of random weights and gives a function that takes one step on the same tokens and returns the
loss, which is there by then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

RANK, LEARNING_RATE = 8, 1e-4


def tokens(vocabulary_size: int, batch: int, length: int) -> np.ndarray:
    """Random token ids int32 `[B, T]`."""
    return np.random.default_rng(0).integers(3, vocabulary_size, (batch, length)).astype("int32")


def ours(numbers: dict[str, Any], dtype: str, batch: int, length: int, checkpointing: bool = False) -> Callable[[], float]:
    """This package's `train_on_batch`, with its default loss."""
    import keras

    from keras_gemma2 import Gemma2Backbone, Gemma2CausalLM

    lm = Gemma2CausalLM(Gemma2Backbone(**numbers, dtype=dtype))
    lm.enable_lora(RANK, targets=["query", "value"])
    if checkpointing:
        lm.enable_gradient_checkpointing()
    lm.compile(optimizer=keras.optimizers.Adam(LEARNING_RATE))
    return _keras_step(lm, tokens(numbers["vocabulary_size"], batch, length))


def keras_hub(numbers: dict[str, Any], dtype: str, batch: int, length: int) -> Callable[[], float]:
    """keras-hub's `GemmaCausalLM`, compiled with its defaults."""
    import keras
    import keras_hub

    numbers = {**numbers, "intermediate_dim": 2 * numbers["intermediate_dim"]}
    backbone = keras_hub.models.GemmaBackbone(
        **numbers,
        query_head_dim_normalize=True,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        attention_logit_soft_cap=50.0,
        final_logit_soft_cap=30.0,
        use_sliding_window_attention=True,
        sliding_window_size=4096,
        dtype=dtype,
    )
    backbone.enable_lora(RANK)
    lm = keras_hub.models.GemmaCausalLM(backbone=backbone, preprocessor=None)
    lm.compile(
        optimizer=keras.optimizers.Adam(LEARNING_RATE),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy()],
    )
    return _keras_step(lm, tokens(numbers["vocabulary_size"], batch, length))


def _keras_step(lm: Any, token_ids: np.ndarray) -> Callable[[], float]:
    x = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    labels, weights = np.roll(token_ids, -1, axis=1), np.ones(token_ids.shape, "float32")
    weights[:, -1] = 0
    return lambda: float(lm.train_on_batch(x, labels, weights, return_dict=True)["loss"])
