"""TensorFlow: Keras's own steps, on one device or on the replicas of a `tf.distribute` strategy.

`fit` of Keras 3.15 fails under `MultiWorkerMirroredStrategy` in two places of `keras/src/backend/tensorflow/trainer.py`: line 731
reduces a batch that is spread over workers, which TensorFlow cannot, to build the model for it; and line 841 takes the mean of
metrics along their first axis, where they have none.
"""

from __future__ import annotations

import contextlib
from typing import Any

import keras
import tensorflow as tf

_DIVISORS = ("positions", "weight")  # of a loss


class CompilesSteps:
    """Mixed in before `keras.Model`: a loss is divided by what the whole batch has, not by what a replica's part has."""

    def keeping_values(self) -> contextlib.AbstractContextManager[None]:
        """A context in which an exception leaves variables their values, as it does here anyway."""
        return contextlib.nullcontext()

    def train_step(self, *args: Any) -> Any:
        """One step of training."""
        return self._as_reduced(super().train_step(*args))

    def test_step(self, *args: Any) -> Any:
        """One step of evaluation."""
        return self._as_reduced(super().test_step(*args))

    def over_replicas(self, sums: dict[str, Any]) -> dict[str, Any]:
        """Sums over a replica's part of a batch, with divisors that are the mean of all replicas'.

        Keras divides a replica's loss by their number, and adds gradients: what is left is the sum over all tokens by the whole
        batch's divisor. Metrics weigh a quotient by its divisor, so that theirs come out as before.
        """
        replica = tf.distribute.get_replica_context()
        if replica is None or replica.num_replicas_in_sync == 1:
            return sums
        means = replica.all_reduce(tf.distribute.ReduceOp.MEAN, [tf.convert_to_tensor(sums[name]) for name in _DIVISORS])
        return {**sums, **dict(zip(_DIVISORS, means))}

    def _as_reduced(self, logs: dict[str, Any]) -> dict[str, Any]:
        """Metrics of a step with the axis that Keras reduces over workers."""
        return {name: tf.reshape(value, (1,)) for name, value in logs.items()} if self._is_over_workers() else logs

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        """Builds what a first batch builds; over workers from this worker's part of it."""
        if not self._is_over_workers() or iterator is None:
            super()._maybe_symbolic_build(iterator, data_batch)
            return
        strategy = self.distribute_strategy
        for _, _, batches in iterator:
            data_batch = keras.tree.map_structure(lambda part: strategy.experimental_local_results(part)[0], next(batches))
            break
        with strategy.scope():
            self._symbolic_build(data_batch=data_batch)

    def _is_over_workers(self) -> bool:
        strategy = self.distribute_strategy
        is_multi = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
        return is_multi and strategy.extended._in_multi_worker_mode()
