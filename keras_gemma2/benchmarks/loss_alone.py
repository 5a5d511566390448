"""The loss of random hidden states and its gradient, without a model around it, for `benchmarks train --loss`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_gemma2 import backend
from keras_gemma2.layers import TiedEmbedding
from keras_gemma2.training.cross_entropy import next_token_sums


class HiddenStates(backend.CompilesSteps, keras.Model):
    """A model whose only trainable weight is the hidden states, and whose output is their loss.

    Args:
        embedding: a built `TiedEmbedding`, which is frozen.
        shape: `[B, T, D]`, of the hidden states.
    """

    def __init__(self, embedding: TiedEmbedding, shape: tuple[int, int, int]) -> None:
        super().__init__()
        embedding.trainable = False
        self.embedding = embedding
        self.hidden = self.add_weight(shape=shape, initializer=keras.initializers.RandomNormal(seed=0), name="hidden")

    def _symbolic_build(self, *args: Any, **kwargs: Any) -> None:
        """Keras's own computes the loss once more on PyTorch, where the sums cannot be computed of symbols."""
        if not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)
        self.built = True
        self._post_build()

    def call(self, labels: Any) -> Any:
        weights = keras.ops.ones(labels.shape, "float32")
        return next_token_sums(self.embedding, self.hidden.value, labels, weights, True)["nll"][None]


def loss_and_gradient(vocabulary_size: int, hidden_dim: int, batch: int, length: int) -> Callable[[], float]:
    """A function that computes the loss of `batch * length` tokens and its gradient with respect to their hidden states."""
    embedding = TiedEmbedding(vocabulary_size, hidden_dim)
    embedding.build()
    model = HiddenStates(embedding, (batch, length, hidden_dim))
    model.compile(optimizer=keras.optimizers.SGD(0.0), loss=lambda y_true, y_pred: y_pred)
    labels = np.random.default_rng(0).integers(0, vocabulary_size, (batch, length)).astype("int32")
    return lambda: float(model.train_on_batch(labels, labels, return_dict=True)["loss"])
