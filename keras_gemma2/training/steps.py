"""Training and evaluation steps that never make the logits `[B, T, V]`."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops

from keras_gemma2 import backend
from keras_gemma2.training.cross_entropy import next_token_sums
from keras_gemma2.training.token_metrics import TokenMetrics

# Of the step under way: the model, its labels and their weights. Each thread has its own, as each replica runs in one.
_TARGETS: contextvars.ContextVar[tuple[Any, Any, Any] | None] = contextvars.ContextVar("targets", default=None)
_REDUCTIONS = ("sum_over_batch_size", "mean", "mean_with_sample_weight", "sum")


class _OneReplica:
    """Of backends whose steps see the whole batch."""

    def over_replicas(self, sums: dict[str, Any]) -> dict[str, Any]:
        """Sums over this replica's part of a batch, such that losses and metrics made of them are those of the whole batch."""
        return sums


class TrainsInChunks(backend.CompilesSteps, _OneReplica):
    """The part of a language model that `fit`, `evaluate`, `train_on_batch` and `test_on_batch` go through.

    With the default loss (or a plain `SparseCategoricalCrossentropy(from_logits=True)`) and the default metrics, a step calls the
    backbone and takes loss, metrics and gradients from its hidden states, a chunk of tokens at a time. With any other loss or
    metric the model gives its logits, as Keras's models do.
    """

    _is_chunked = False
    _token_metrics: TokenMetrics | None = None

    def compile(self, optimizer: Any = "auto", loss: Any = "auto", *, weighted_metrics: Any = "auto", **kwargs: Any) -> None:
        """As `keras.Model.compile`; see `Gemma2CausalLM.compile`."""
        is_auto = isinstance(weighted_metrics, str) and weighted_metrics == "auto"
        others = kwargs.get("metrics") or (weighted_metrics and not is_auto) or kwargs.get("loss_weights")
        self._is_chunked = _is_cross_entropy(loss) and not others
        self._token_metrics = TokenMetrics() if self._is_chunked and is_auto else None
        super().compile(optimizer, loss, weighted_metrics=None if self._token_metrics else weighted_metrics, **kwargs)

    def get_compile_config(self) -> dict[str, Any] | None:
        """What `.keras` files keep of `compile`."""
        config = super().get_compile_config()
        if config is not None and self._token_metrics:
            config["weighted_metrics"] = "auto"
        return config

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        """Those of `compile`."""
        return [*super().metrics, *(self._token_metrics.metrics if self._token_metrics else ())]

    def train_step(self, *args: Any) -> Any:
        """One step of training; Keras calls it, on JAX with the state before the data."""
        with self._targets(args[-1]):
            return super().train_step(*args)

    def test_step(self, *args: Any) -> Any:
        """One step of evaluation."""
        with self._targets(args[-1]):
            return super().test_step(*args)

    def _symbolic_build(self, *args: Any, **kwargs: Any) -> None:
        """Keras builds losses and metrics from what the model gives for symbols, before its first step.

        The sums have none that want building. On PyTorch, where a model can fail on symbols, Keras would compute the logits
        `[B, T, V]` instead.
        """
        if not self._is_chunked:
            super()._symbolic_build(*args, **kwargs)
            return
        if self.optimizer is not None and not self.optimizer.built:
            self.optimizer.build(self.trainable_variables)
        self._post_build()

    @contextlib.contextmanager
    def _targets(self, data: Any) -> Iterator[None]:
        """A context in which calling the model gives sums of the loss, where the data is of the usual form."""
        x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
        fits = self._is_chunked and isinstance(x, dict) and _fits(y, weights, x["token_ids"])
        token = _TARGETS.set((self, y, weights) if fits else None)
        try:
            yield
        finally:
            _TARGETS.reset(token)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Logits; within a training or evaluation step the sums of `_token_sums`."""
        sums = self._sums_of_step(inputs, bool(training))
        return super().call(inputs, training=training, mask=mask) if sums is None else sums

    def _sums_of_step(self, inputs: Any, training: bool) -> dict[str, Any] | None:
        """Sums of the step under way, over all replicas; None outside of one, or where it works on logits."""
        targets = _TARGETS.get()
        if targets is None or targets[0] is not self:
            return None
        _, labels, weights = targets
        token = _TARGETS.set(None)
        try:
            sums = self._token_sums(inputs, labels, _weights(labels, weights), training)
            return self.over_replicas({**sums, "positions": ops.cast(ops.prod(ops.shape(labels)), "float32")})
        finally:
            _TARGETS.reset(token)

    def _token_sums(self, inputs: Any, labels: Any, weights: Any, training: bool) -> dict[str, Any]:
        """Sums over tokens, as `next_token_sums` gives them: "loss", which is trained on, and those of the metrics."""
        hidden = self.backbone(inputs, training=training)
        return next_token_sums(self.backbone.token_embedding, hidden, labels, weights, training)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """The loss, from logits or from the sums that `call` gives within a step; reduced as `compile`'s loss says."""
        if not _is_sums(y_pred):
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        loss = _reduced(y_pred, getattr(self.loss, "reduction", "sum_over_batch_size"))
        losses = [loss, *[self._aggregate_additional_loss(more) for more in self.losses]]
        return ops.sum(ops.stack(losses)) if len(losses) > 1 else loss

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """Updates the metrics and gives their values."""
        if not _is_sums(y_pred):
            return super().compute_metrics(x, y, y_pred, sample_weight)
        if self._token_metrics:
            self._token_metrics.update(y_pred)
        return self.get_metrics_result()


class _Total(keras.losses.Loss):
    """What is given as the prediction, divided as Keras divides a replica's share of a loss."""

    def call(self, y_true: Any, y_pred: Any) -> Any:
        return y_pred


def _reduced(sums: dict[str, Any], reduction: str) -> Any:
    loss = sums["loss"]
    if reduction == "mean_with_sample_weight":
        loss = ops.divide_no_nan(loss, sums["weight"])
    elif reduction == "sum":
        return loss
    else:
        loss = loss / sums["positions"]
    loss = ops.reshape(loss, (1,))
    return _Total(name="total", dtype="float32")(loss, loss)


def _is_sums(y_pred: Any) -> bool:
    return isinstance(y_pred, dict) and "nll" in y_pred and "loss" in y_pred


def _is_cross_entropy(loss: Any) -> bool:
    if isinstance(loss, str):
        return loss == "auto"
    plain = type(loss) is keras.losses.SparseCategoricalCrossentropy
    return (
        plain
        and loss.get_config()["from_logits"]
        and loss.get_config().get("ignore_class") is None
        and (loss.reduction in _REDUCTIONS and keras.backend.standardize_dtype(loss.dtype) == "float32")
    )


def _fits(labels: Any, weights: Any, token_ids: Any) -> bool:
    """Whether labels are `[B, T]`, with weights `[B, T]`, `[B]` or none; all else is Keras's to make sense of."""
    shapes = [getattr(labels, "shape", None), getattr(weights, "shape", ())]
    ranks = [None if shape is None else len(shape) for shape in shapes]
    return ranks[0] == len(token_ids.shape) == 2 and (weights is None or ranks[1] in (1, 2))


def _weights(labels: Any, weights: Any) -> Any:
    if weights is None:
        return ops.ones(ops.shape(labels), "float32")
    weights = ops.cast(weights, "float32")
    if len(weights.shape) == 1:
        weights = weights[:, None]
    return ops.broadcast_to(weights, ops.shape(labels))
