"""The words of bfloat16 weights on XLA's CPU backend. JAX only (see conftest.py)."""

import gc

import keras
import numpy as np
from keras import ops

from keras_gemma2.backend import jax_words


def test_words_are_made_once_and_go_with_the_array():
    kernel = keras.Variable(np.ones((5, 3)), dtype="bfloat16")
    words = jax_words.as_words(kernel.value)
    assert jax_words.as_words(kernel.value) is words
    assert words.unsafe_buffer_pointer() == kernel.value.unsafe_buffer_pointer()
    before = len(jax_words._ALIASES)
    kernel.assign(ops.zeros((5, 3), "bfloat16"))
    gc.collect()
    assert len(jax_words._ALIASES) == before - 1
