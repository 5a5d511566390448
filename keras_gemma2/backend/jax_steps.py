"""JAX: compiled training, evaluation and prediction steps that leave alone the weights they do not change.

Keras donates all variables to a compiled step and takes all of them back. What JAX made over another owner's memory (checkpoint
files in memory, numpy arrays) cannot be donated: XLA then copies it, so that the first step of a loaded model holds its weights
twice. Here a step is given the variables that it changes, which are donated, and the others, which are only read.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import keras

# What is to be computed again in the backward pass stands behind optimization barriers. XLA's CPU compiler takes them out early,
# sees then that the same was computed before, and keeps that instead: `jax.checkpoint` saves nothing. This pass does it.
_KEEP_BARRIERS = {"xla_disable_hlo_passes": "cse_barrier_expander"}
# Left to itself XLA orders a program for CPUs so that much could run at once: the zeros that each layer's loops begin with are all
# made at the start, and are in memory until then.
_LITTLE_MEMORY = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}


class CompilesSteps:
    """Mixed in before `keras.Model`: its compiled steps neither donate nor return the weights that they only read.

    A training step changes trainable weights, seeds, the optimizer's and the metrics' variables; the others change seeds and
    metrics alone. A weight that is not trainable and changed in `call` would keep its value: Gemma 2 has none.
    """

    def make_train_function(self, force: bool = False) -> None:
        """Makes `train_function`, if there is none."""
        if self.train_function is None or force:
            super().make_train_function(force)
            if self._compiles:
                self.train_function = self._make_function(self._compiled("train", self.train_step))
            elif self._is_spread and self.jit_compile and not self.run_eagerly:
                self.train_function = self._make_function(self._compiled_on_devices())

    def make_test_function(self, force: bool = False) -> None:
        """Makes `test_function`, if there is none."""
        if self.test_function is None or force:
            super().make_test_function(force)
            if self._compiles:
                self.test_function = self._make_function(self._compiled("test", self.test_step))

    def make_predict_function(self, force: bool = False) -> Any:
        """Makes `predict_function`, if there is none."""
        if self.predict_function is not None and not force:
            return self.predict_function
        super().make_predict_function(force)
        if self._compiles:
            step = self._compiled("predict", self._predict_step_with_state)
            self.predict_function = self._make_function(step, concatenate_outputs=True)
        return self.predict_function

    def _get_jax_state(self, *, purge_model_variables: bool = False, **parts: bool) -> tuple:
        state = super()._get_jax_state(purge_model_variables=purge_model_variables, **parts)
        if purge_model_variables:  # from which `jax_state_sync` gives variables their values back, should the first step fail
            self._jax_state = dict(zip([name for name, wanted in parts.items() if wanted], state, strict=True))
        return state

    @contextlib.contextmanager
    def keeping_values(self) -> Iterator[None]:
        """A context in which an exception, Ctrl-C too, leaves variables with the values that they had after the last step.

        Keras takes variables their values away while it evaluates and predicts, and puts them back at the end alone; a step that
        fails, or a batch that cannot be read, leaves a model without weights.
        """
        try:
            yield
        except BaseException:
            self.jax_state_sync()
            raise

    def _compiled_on_devices(self) -> Callable:
        """The training step as Keras compiles it for a distribution, but with this module's options."""
        shardings = (None, self._get_state_sharding_spec())
        return jax.jit(self.train_step, donate_argnums=0, out_shardings=shardings, compiler_options=_compiler_options())

    @property
    def _is_spread(self) -> bool:
        return keras.distribution.distribution() is not None and not keras.config.is_nnx_enabled()

    @property
    def _compiles(self) -> bool:
        # Under NNX and on several devices Keras's own functions: they pass variables and shardings in their own way.
        spread = keras.distribution.distribution() is not None
        return self.jit_compile and not self.run_eagerly and not spread and not keras.config.is_nnx_enabled()

    def _predict_step_with_state(self, state: tuple, data: Any) -> tuple[Any, tuple]:
        outputs, non_trainable = self.predict_step(state, data)
        return outputs, (state[0], non_trainable)

    def _compiled(self, kind: str, step: Callable) -> Callable:
        """A compiled `step(state, data) -> (result, state)`."""

        def changing_only(changing: list, fixed: list, data: Any, kept: tuple) -> tuple[Any, list]:
            result, state = step(_joined(changing, fixed, kept), data)
            return result, _split(state, kept)[0]

        compiled = jax.jit(changing_only, donate_argnums=0, static_argnums=3, compiler_options=_compiler_options())

        def run(state: tuple, data: Any) -> tuple[Any, tuple]:
            kept = self._kept(kind)  # asked each time: layers may have been frozen since
            changing, fixed = _split(state, kept)
            # What a step gives is tied to its device, as one of its inputs may be; what is new (an optimizer's zeros, metrics that
            # were reset) is not, and JAX would compile once more for each mixture of both.
            changing = [[_committed(value) for value in part] for part in changing]
            result, changing = compiled(changing, fixed, data, kept)
            return result, _joined(changing, fixed, kept)

        return run

    def _kept(self, kind: str) -> tuple[tuple[bool, ...], ...]:
        """What a step leaves alone, by part of Keras's state: trainable variables, the others, the optimizer's, the metrics'."""
        weights = {id(variable) for variable in self.non_trainable_weights}
        trainable = (kind != "train",) * len(self.trainable_variables)
        others = tuple(id(variable) in weights for variable in self.non_trainable_variables)
        changed = {"train": lambda: (self.optimizer.variables, self.metrics_variables), "test": lambda: (self.metrics_variables,)}
        more = changed[kind]() if kind in changed else ()
        return trainable, others, *((False,) * len(variables) for variables in more)


@functools.cache
def _compiler_options() -> dict[str, str] | None:
    """For this process's devices, as far as the installed XLA knows them."""
    if jax.default_backend() != "cpu":
        return None
    options = _KEEP_BARRIERS | _LITTLE_MEMORY
    try:
        jax.jit(lambda x: x + 1, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:  # no such option
        return _KEEP_BARRIERS
    return options


def _committed(value: jax.Array) -> jax.Array:
    """The same memory, tied to the device it is on."""
    return value if value.committed else jax.device_put(value, value.sharding)


def _split(state: tuple, kept: tuple[tuple[bool, ...], ...]) -> tuple[list, list]:
    """State as two: what changes and what does not, each a list a part."""
    return tuple(
        [[value for value, keep in zip(part, keeps, strict=True) if keep == fixed] for part, keeps in zip(state, kept, strict=True)]
        for fixed in (False, True)
    )


def _joined(changing: list, fixed: list, kept: tuple[tuple[bool, ...], ...]) -> tuple:
    """`_split` undone."""
    parts = []
    for values, others, keeps in zip(changing, fixed, kept, strict=True):
        values, others = iter(values), iter(others)
        parts.append([next(others) if keep else next(values) for keep in keeps])
    return tuple(parts)
