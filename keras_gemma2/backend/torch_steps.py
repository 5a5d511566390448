"""PyTorch: Keras's own steps, in one process or as one of several that `torch_parallel` has made the model train in."""

from __future__ import annotations

import contextlib
from typing import Any

from keras_gemma2.backend.torch_replaced import check_parameters


class CompilesSteps:
    """Mixed in before `keras.Model`: lets the forward pass of a training step go through `DistributedDataParallel`."""

    _parallel: Any = None  # a `torch_parallel.Processes`

    def keeping_values(self) -> contextlib.AbstractContextManager[None]:
        """A context in which an exception leaves variables their values, as it does here anyway."""
        return contextlib.nullcontext()

    def make_train_function(self, force: bool = False) -> Any:
        """As `keras.Model`'s; Keras calls it before it trains.

        Raises:
            RuntimeError: if the module's parameters are no longer the model's variables, as after `fully_shard`.
        """
        check_parameters(self)
        return super().make_train_function(force)

    def train_step(self, *args: Any) -> Any:
        """One step of training."""
        with self._parallel.step() if self._parallel else contextlib.nullcontext():
            return super().train_step(*args)

    def test_step(self, *args: Any) -> Any:
        """One step of evaluation."""
        with self._parallel.talking() if self._parallel else contextlib.nullcontext():
            return super().test_step(*args)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._parallel and self._parallel.takes_call():
            return self._parallel.forward(*args, **kwargs)
        return super().__call__(*args, **kwargs)

    def over_replicas(self, sums: dict[str, Any]) -> dict[str, Any]:
        """Sums over a process's part of a batch as those over the whole batch."""
        return self._parallel.sums(sums) if self._parallel else sums
