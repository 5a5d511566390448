"""A small model and batches for it, for tests that train one model in several places."""

import keras
import numpy as np
from conftest import TINY

from keras_gemma2 import Gemma2Backbone, Gemma2CausalLM

SIZES = {**TINY, "num_layers": 2}
REDUCTIONS = ("sum_over_batch_size", "mean_with_sample_weight", "sum")
TOLERANCE = 1e-5


def model(lora=False, reduction="sum_over_batch_size", seed=3, **overrides):
    """A compiled model, a function of its arguments."""
    keras.utils.set_random_seed(seed)
    lm = Gemma2CausalLM(Gemma2Backbone(**{**SIZES, **overrides}))
    if lora:
        lm.enable_lora(rank=3, targets="all")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
    lm.compile(optimizer=keras.optimizers.SGD(0.01 if reduction == "sum" else 0.5, momentum=0.9), loss=loss)
    return lm


def batches(count=3, rows=4, length=9):
    """Batches of tokens, labels and uneven weights, some of them 0."""
    draw = np.random.default_rng(2)
    for _ in range(count):
        ids = draw.integers(1, TINY["vocabulary_size"], (rows, length + 1))
        weights = draw.integers(0, 3, (rows, length)).astype("float32")
        yield {"token_ids": ids[:, :-1], "padding_mask": np.ones((rows, length), "int32")}, ids[:, 1:], weights


def part(batch, rows):
    """Some rows of a batch."""
    x, y, weights = batch
    return {name: array[rows] for name, array in x.items()}, y[rows], weights[rows]


def assert_near(found, expected):
    """To `TOLERANCE`, of the range of what is expected where that is more than 1."""
    found, expected = (np.asarray(keras.ops.convert_to_numpy(value)) for value in (found, expected))
    assert np.abs(found - expected).max() <= TOLERANCE * max(1.0, np.abs(expected).max())


def assert_same_weights(found, expected):
    for a, b in zip(found.weights, expected.weights, strict=True):
        assert_near(a.value, b.value)
