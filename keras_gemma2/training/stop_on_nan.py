"""Ends training when the loss is no longer a number, and puts the weights back."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_gemma2 import backend

KEPT_BYTES = 512 << 20
LONGEST_WAIT = 1.0  # seconds, where training has failed, for losses that are not read yet


class StopOnNaN(keras.callbacks.Callback):
    """Raises where the loss is NaN or infinite; `lm.fit` uses one by default.

    Where what is trained is small, as with LoRA, a copy of it and of the optimizer's values is kept in the host's memory, taken
    every `every` steps and believed once a step from it has given a finite loss. When training is stopped, it is put back: the
    model and its optimizer are then as they were before some step with a finite loss, at most about `every` steps back. Otherwise
    nothing is put back, and the error says so.

    Keras's loss in the logs is a mean over the epoch's steps, so one step that is not finite shows in all that follow. The loss is
    read in Keras's own threads for callbacks: training does not wait for it, and can be a few steps further when it stops.
    `keras.callbacks.TerminateOnNaN` waits, and keeps nothing.

    Args:
        every: steps between copies.
        kept_bytes: the size up to which copies are made; 0 for none.

    Raises:
        FloatingPointError: in training; names epoch and batch.

    Example:
        >>> lm.fit(texts)  # or, with other settings:
        >>> lm.fit(texts, stop_on_nan=StopOnNaN(every=200))
    """

    async_safe = True  # a step need not wait for `on_train_batch_end`

    def __init__(self, every: int = 50, kept_bytes: int = KEPT_BYTES) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"`every` must be a positive number of steps. Received: {every}.")
        self.every, self.kept_bytes = every, kept_bytes
        self._lock = threading.Condition()
        self._forget()

    def on_train_begin(self, logs: Any = None) -> None:
        self._forget()
        if not self.model.optimizer.built:
            self.model.optimizer.build(self.model.trainable_variables)
        self._keeps = sum(variable_bytes(v) for v in self._variables()) <= self.kept_bytes
        self._copy_values(step=0)
        self._good, self._candidate = self._candidate, None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch, self._first = epoch, self._steps

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        step = self._first + batch
        self._begun += 1
        if self._keeps and step >= self._copied + self.every:
            self._copy_values(step)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        loss = (logs or {}).get("loss")
        step = self._first + batch
        with self._lock:
            self._ended += 1
            self._lock.notify_all()
            if loss is not None and not np.isfinite(loss):
                if self._failed is None or step < self._failed[1]:
                    self._failed = batch, step, float(loss)
                raise FloatingPointError(self._message())
            self._steps = max(self._steps, step + 1)
            if self._candidate is not None and step >= self._candidate[0]:
                self._good, self._candidate = self._candidate, None

    @contextlib.contextmanager
    def restoring(self) -> Iterator[None]:
        """A context for `fit`: the weights are put back after Keras has ended its work on them."""
        try:
            yield
        except FloatingPointError as error:
            if self._failed is None:
                raise
            with self._lock:  # Keras has several threads for callbacks: an earlier step's loss may be read after a later one's
                self._lock.wait_for(lambda: self._ended >= self._begun, LONGEST_WAIT)
                first = FloatingPointError(self._message())
            if self._good is not None:
                for variable, value in zip(self._variables(), self._good[1]):
                    variable.assign(ops.convert_to_tensor(value, variable.dtype))
            raise first from error
        finally:
            self._good = self._candidate = None

    def _forget(self) -> None:
        self._keeps = False
        self._failed: tuple[int, int, float] | None = None  # batch, step and loss of the first that is known not to be finite
        self._epoch = self._first = self._steps = self._copied = self._begun = self._ended = 0
        self._good: tuple[int, list[np.ndarray]] | None = None
        self._candidate: tuple[int, list[np.ndarray]] | None = None

    def _variables(self) -> list[Any]:
        model = self.model  # on JAX this brings the values of the step under way into the variables
        return [*model.trainable_variables, *model.optimizer.variables]

    def _copy_values(self, step: int) -> None:
        if self._keeps:
            # On the devices where several hold them between them: no process may have all of one.
            copied = ops.copy if backend.is_spread() else lambda value: np.array(ops.convert_to_numpy(value))
            values = [copied(v.value) for v in self._variables()]
            with self._lock:
                self._candidate, self._copied = (step, values), step

    def _message(self) -> str:
        batch, step, loss = self._failed
        said = f"The loss is {loss} at batch {batch} of epoch {self._epoch} (both from 0), step {step} of this training. "
        if self._good is not None:
            said += f"The weights and the optimizer are as they were before step {self._good[0]}. "
        else:
            ended = f"the last epoch ended {batch + 1} steps ago" if step > batch else "no epoch has ended yet"
            said += (
                f"What is trained takes more than {self.kept_bytes} bytes, so no copy was kept, and the weights may hold NaN: load "
                f"your last checkpoint ({ended}). "
            )
        return said + "Lower the learning rate, clip gradients (`clipnorm` of the optimizer), or look at the data of that batch."


def variable_bytes(variable: Any) -> int:
    """What a variable's values take, on all devices together."""
    bits = {"float64": 64, "int64": 64, "float16": 16, "bfloat16": 16, "int8": 8, "uint8": 8, "bool": 8}
    return int(np.prod(variable.shape)) * bits.get(keras.backend.standardize_dtype(variable.dtype), 32) // 8
