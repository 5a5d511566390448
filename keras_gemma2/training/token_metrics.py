"""Token accuracy and perplexity, from the sums that the loss has made anyway."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops


class Perplexity(keras.metrics.Mean):
    """`exp` of the mean negative log-likelihood of the tokens seen, each with its weight."""

    def result(self) -> Any:
        return ops.exp(super().result())


class TokenMetrics:
    """The two metrics of a language model.

    Attributes:
        metrics: a mean under the name "sparse_categorical_accuracy", which keras-hub's tasks use for it, and "perplexity".
    """

    _sums: tuple[str, ...] = ("correct", "nll")

    def __init__(self) -> None:
        self.metrics = [keras.metrics.Mean(name="sparse_categorical_accuracy"), Perplexity(name="perplexity")]

    def update(self, sums: dict[str, Any]) -> None:
        """Takes in the sums over the tokens of a batch."""
        for metric, name in zip(self.metrics, self._sums, strict=True):
            metric.update_state(ops.divide_no_nan(sums[name], sums["weight"]), sample_weight=sums["weight"])


class DistillationMetrics(TokenMetrics):
    """Those, and "kl": the mean divergence from the teacher's distribution, at the distiller's temperature, in nats."""

    _sums = (*TokenMetrics._sums, "kl")

    def __init__(self) -> None:
        super().__init__()
        self.metrics.append(keras.metrics.Mean(name="kl"))
