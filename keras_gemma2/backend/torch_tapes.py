"""Which tape runs: one for each set of shapes, as long as the weights it reads are the same."""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras
import torch

from keras_gemma2.backend.torch_tape import Diverged, leaves, record, with_leaves

MAX_TAPES = 16  # of the same shapes; what looks at values that differ more often runs as it is
_IN_USE: contextvars.ContextVar[Tapes | None] = contextvars.ContextVar("tapes", default=None)
_ALL: weakref.WeakSet[Tapes] = weakref.WeakSet()


def repeated(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """`function`, run from the tapes in use; itself where there are none."""
    tapes = _IN_USE.get()
    if tapes is None or torch.compiler.is_compiling():
        return function
    return lambda *args: tapes.run(function, name, args)


def drop_all() -> None:
    """Forgets all tapes: they would keep memory alive of weights that are given up."""
    for tapes in list(_ALL):
        tapes.drop()


class Tapes:
    """The tapes of one function.

    Args:
        variables: what it reads besides its arguments. Tapes end when one is another tensor, or packed, or written to.
        is_compiled: whether the tapes are compiled with `torch.compile`.
    """

    def __init__(self, variables: list[keras.Variable], is_compiled: bool = False) -> None:
        self._variables = variables
        self._is_compiled = is_compiled
        self._state: Any = None
        self._by_shapes: dict[Any, list[tuple[Callable, Any]]] = {}
        self._is_recorded = False  # since the state was looked at
        _ALL.add(self)

    def drop(self) -> None:
        """Forgets the tapes there are."""
        self._by_shapes = {}

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """A context in which `repeated` runs functions from these tapes."""
        state = self._state_of_variables()
        if state != self._state:
            self.drop()
            self._state = state
        token = _IN_USE.set(self)
        try:
            yield
        finally:
            _IN_USE.reset(token)
            if self._is_recorded:  # a first product may have packed its weights
                self._is_recorded, self._state = False, self._state_of_variables()

    def _state_of_variables(self) -> list[tuple]:
        """What changes when a variable's values do."""
        with torch._C.DisableTorchFunctionSubclass():  # looking must not unpack what is packed
            values = [variable.value for variable in self._variables]
            return [(id(value), value.data_ptr(), _version(value), id(value.__dict__.get("packed"))) for value in values]

    def run(self, function: Callable[..., Any], name: str, args: tuple) -> Any:
        """`function(*args)`, from a tape if there is one."""
        tensors = list(leaves(args))
        key = (name, *_repetitions(tensors), *[(tensor.shape, tensor.dtype, tensor.stride()) for tensor in tensors])
        by_shapes = self._by_shapes  # other threads may drop them meanwhile: then what is recorded here is not kept
        tapes = by_shapes.setdefault(key, [])
        for i, (tape, places) in enumerate(tapes):
            try:
                found = tape(*tensors)
            except Diverged:
                continue
            if i:
                by_shapes[key] = [tapes[i], *tapes[:i], *tapes[i + 1 :]]  # likely to be the next, too
            return with_leaves(places, found.__getitem__)
        return function(*args) if len(tapes) >= MAX_TAPES else self._record(function, args, tensors, key, by_shapes)

    def _record(self, function: Callable[..., Any], args: tuple, tensors: list[torch.Tensor], key: Any, by_shapes: dict) -> Any:
        token = _IN_USE.set(None)  # on a tape, all runs from it
        try:
            with torch._C.DisableTorchFunctionSubclass():
                weights = [variable.value for variable in self._variables]
            out, tape = record(lambda: function(*args), tensors, self._is_compiled, weights)
        finally:
            _IN_USE.reset(token)
        places = itertools.count()
        numbered = with_leaves(out, lambda leaf: next(places))
        by_shapes[key] = [(tape, numbered), *by_shapes.get(key, [])]
        self._is_recorded = True
        return out


def _version(tensor: torch.Tensor) -> int | None:
    """What counts the writes to a tensor; one made in inference mode has no count."""
    return None if tensor.is_inference() else tensor._version


def _repetitions(tensors: list[torch.Tensor]) -> tuple[int, ...]:
    """Which arguments are one and the same tensor; empty where none are. On a tape they stay one."""
    first: dict[int, int] = {}
    places = tuple([first.setdefault(id(tensor), i) for i, tensor in enumerate(tensors)])
    return places if len(first) < len(places) else ()
