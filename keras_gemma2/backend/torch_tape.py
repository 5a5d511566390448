"""Tapes: the PyTorch operations of a decoding step, recorded once and run again without Keras's layers around them.

A step is some hundreds of small operations a layer, and what Keras and Python do around each takes several times as long as the
operation itself. A tape is a flat Python function of the operations alone: each is there once, however many layers ask for the same
mask, and none whose result is not needed or never changes. Whatever the step decided by looking at values, say how many blocks of a
cache are filled, is looked at again each time; where the answer is another one, another tape is recorded.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

MAX_KEPT = 1 << 16  # elements of a result that is kept because it never changes
_RECORDINGS = itertools.count()
_ATEN = torch.ops.aten
_ARITHMETIC = {_ATEN.add.Tensor: torch.add, _ATEN.sub.Tensor: torch.sub, _ATEN.mul.Tensor: torch.mul, _ATEN.div.Tensor: torch.div}
_QUICK = {
    **_ARITHMETIC,
    _ATEN.view.default: torch.Tensor.view,
    _ATEN.unsqueeze.default: torch.unsqueeze,
    _ATEN.permute.default: torch.permute,
    _ATEN.transpose.int: torch.transpose,
    _ATEN.pow.Tensor_Scalar: torch.pow,
    _ATEN.where.self: torch.where,
    **{getattr(_ATEN, name).default: getattr(torch, name) for name in ("cat", "exp", "tanh", "rsqrt", "round", "mm", "mv", "bmm")},
}  # functions that take the same arguments


class Diverged(Exception):
    """A value that the recorded function looked at is another one now."""


Tape = Callable[..., list[torch.Tensor]]


def record(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor], is_compiled: bool = False, weights: Iterable[torch.Tensor] = ()
) -> tuple[Any, Tape]:
    """Runs a function and makes a tape of it.

    Args:
        function: of no arguments; reads `inputs`. It may write to tensors, but must then be safe to start again from its beginning.
        inputs: the tensors that differ from run to run.
        is_compiled: whether to compile the tape with `torch.compile`, at its first run.
        weights: tensors whose values may change unnoticed, by writes through `.data`: what comes of them is computed each time.

    Returns:
        What the function returned, and the tape: a function of other `inputs` of the same shapes, which returns the tensors of what
        `function` would have returned, in the order of `leaves`. It raises `Diverged` where the function looked at a value that is
        another one now.
    """
    recorder = _Recorder(inputs, {id(weight) for weight in weights})
    with recorder:
        out = function()
    program = _Program(recorder, [recorder.value_of(leaf) for leaf in leaves(out)], is_quick=not is_compiled)
    return out, _torch_compiled(program.function()) if is_compiled else program.function()


def _torch_compiled(tape: Tape) -> Tape:
    compiled = torch.compile(tape, dynamic=False)

    def run(*inputs: torch.Tensor) -> list[torch.Tensor]:
        try:
            return compiled(*inputs)
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            raise RuntimeError(
                "`torch.compile` cannot compile a decoding step here; on CPUs it needs a C++ compiler (Debian: `apt install g++`). "
                "Decode without it: set the model's `jit_compile` to False."
            ) from error

    return run


def leaves(tree: Any) -> Iterator[Any]:
    """What nested tuples, lists and dicts hold, in order."""
    if isinstance(tree, (tuple, list)):
        for branch in tree:
            yield from leaves(branch)
    elif isinstance(tree, dict):
        yield from leaves(list(tree.values()))
    else:
        yield tree


def with_leaves(tree: Any, replaced: Callable[[Any], Any]) -> Any:
    """The same nested tuples, lists and dicts with other leaves."""
    if isinstance(tree, tuple):
        return tuple([with_leaves(branch, replaced) for branch in tree])
    if isinstance(tree, list):
        return [with_leaves(branch, replaced) for branch in tree]
    if isinstance(tree, dict):
        return {name: with_leaves(branch, replaced) for name, branch in tree.items()}
    return replaced(tree)


class _Value:
    """A tensor of a recording, by its number; `root` is the number of the tensor whose memory it shares."""

    def __init__(self, recording: int, number: int, tensor: torch.Tensor, root: int | None = None) -> None:
        self.recording, self.number, self.root = recording, number, number if root is None else root
        self.is_float32_on_cpu = tensor.dtype == torch.float32 and tensor.device.type == "cpu"


class _Operation:
    def __init__(self, function: Any, arguments: tuple[tuple, dict], results: Any) -> None:
        self.function, self.arguments, self.results = function, arguments, results
        self.values = [leaf for leaf in leaves(arguments) if isinstance(leaf, _Value)]
        self.made = [leaf for leaf in leaves(results) if isinstance(leaf, _Value)]
        self.is_pure = not function._schema.is_mutable and torch.Tag.nondeterministic_seeded not in function.tags
        self.looks = not self.made and self.is_pure  # at a value


class _Recorder(TorchDispatchMode):
    """Writes down the operations that run while it is entered."""

    def __init__(self, inputs: Sequence[torch.Tensor], weights: set[int]) -> None:
        super().__init__()
        self.weights = weights  # by id
        self.fixed: set[int] = set()  # numbers of what never changes
        self.recording = next(_RECORDINGS)
        self.numbers = itertools.count()
        self.operations: list[_Operation] = []
        self.kept: dict[int, torch.Tensor] = {}  # by number: what the recording did not make, and small results of it
        self.changed: set[int] = set()  # roots of what is written to
        self.outside: dict[int, tuple[torch.Tensor, _Value]] = {}  # by id, with a reference: an id may be given anew
        self.inputs = [self._from_outside(tensor) for tensor in inputs]

    def value_of(self, tensor: torch.Tensor) -> _Value:
        """The value that a tensor is; one that comes from outside is taken to be the same in each run."""
        if id(tensor) in self.outside:
            return self.outside[id(tensor)][1]
        value = tensor.__dict__.get("_tape_value")
        if value is not None and value.recording == self.recording:
            return value
        value = self._from_outside(tensor)
        self.kept[value.number] = tensor
        if id(tensor) not in self.weights:
            self.fixed.add(value.number)
        return value

    def _from_outside(self, tensor: torch.Tensor) -> _Value:
        value = _Value(self.recording, next(self.numbers), tensor)
        self.outside[id(tensor)] = tensor, value
        return value

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        arguments = (args, kwargs or {})
        named = with_leaves(arguments, lambda leaf: self.value_of(leaf) if isinstance(leaf, torch.Tensor) else leaf)
        out = function(*args, **(kwargs or {}))
        root = self._shared_root(function, named)
        operation = _Operation(function, named, with_leaves(out, lambda leaf: self._made(leaf, root)))
        self.operations.append(operation)
        self._note_writes(function, named)
        if operation.is_pure and all(value.number in self.fixed for value in operation.values):
            for leaf in leaves(out):
                if isinstance(leaf, torch.Tensor) and leaf.numel() <= MAX_KEPT:
                    value = self.value_of(leaf)
                    self.kept[value.number] = leaf
                    self.fixed.add(value.number)
        return out

    def _made(self, leaf: Any, root: int | None) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        known = self.outside.get(id(leaf))
        value = known[1] if known else leaf.__dict__.get("_tape_value")
        if value is None or value.recording != self.recording:  # else an operation in place, which returns its argument
            value = leaf._tape_value = _Value(self.recording, next(self.numbers), leaf, root)
        return value

    @staticmethod
    def _shared_root(function: Any, arguments: tuple[tuple, dict]) -> int | None:
        """The root of the argument whose memory the results share, if they do."""
        schema = function._schema
        if not any(result.alias_info for result in schema.returns):
            return None
        given = {**dict(zip((argument.name for argument in schema.arguments), arguments[0])), **arguments[1]}
        shared = [given[argument.name] for argument in schema.arguments if argument.alias_info and argument.name in given]
        return next((leaf.root for leaf in leaves(shared) if isinstance(leaf, _Value)), None)

    def _note_writes(self, function: Any, arguments: tuple[tuple, dict]) -> None:
        names = (argument.name for argument in function._schema.arguments)
        for name, value in itertools.chain(zip(names, arguments[0]), arguments[1].items()):
            written = next(a for a in function._schema.arguments if a.name == name).alias_info
            if written is not None and written.is_write:
                self.changed.update(leaf.root for leaf in leaves(value) if isinstance(leaf, _Value))


def _quick(operation: _Operation) -> tuple[Any, tuple, dict]:
    """A call that does the same in less time, if there is one: PyTorch's own functions cost less than the operations by name."""
    function, (args, kwargs) = operation.function, operation.arguments
    if function is _ATEN._to_copy.default and list(kwargs) == ["dtype"]:
        return torch.Tensor.to, (args[0], kwargs["dtype"]), {}
    if function in _ARITHMETIC and args[0].is_float32_on_cpu and isinstance(args[1], float):
        args = (args[0], _as_tensor(args[1].hex()), *args[2:])  # which a number is made each time, in float64
    return _QUICK.get(function, function), args, kwargs


@functools.lru_cache
def _as_tensor(number: str) -> torch.Tensor:
    return torch.tensor(float.fromhex(number), dtype=torch.float32, device="cpu")


class _Program:
    """The operations of a recording that have to run again, as Python source."""

    def __init__(self, recorder: _Recorder, outputs: list[_Value], is_quick: bool) -> None:
        self._changed, self._inputs = recorder.changed, recorder.inputs
        self._same: dict[int, int] = {}  # number of a value -> of an equal one that is there before it
        self._fixed = recorder.kept
        self._outside = recorder.kept.keys() & {value.number for _, value in recorder.outside.values()}
        self._names: dict[str, Any] = {"Diverged": Diverged}  # of what is not a literal
        self._ids: dict[int, str] = {}
        self._outputs, self._is_quick = outputs, is_quick
        self._operations = self._needed(self._distinct(self._varying(recorder.operations)))

    def function(self) -> Tape:
        body = self._lines()
        arguments = ", ".join(f"v{value.number}" for value in self._inputs)
        head = [f"def make({', '.join(self._names)}):", f" def tape({arguments}):"]
        source = [*head, *(f"  {line}" for line in body), " return tape"]
        scope: dict[str, Any] = {}
        exec(compile("\n".join(source), "<tape>", "exec"), scope)
        return scope["make"](*self._names.values())

    def _varying(self, operations: list[_Operation]) -> list[_Operation]:
        """Without those whose results never change."""
        fixed = set(self._outside)
        varying = []
        for operation in operations:
            is_fixed = self._is_repeatable(operation) and all(value.number in fixed for value in operation.values)
            if is_fixed and all(value.number in self._fixed for value in operation.made):
                fixed.update(value.number for value in operation.made)
            else:
                varying.append(operation)
        self._fixed = {number: self._fixed[number] for number in fixed}
        return varying

    def _is_repeatable(self, operation: _Operation) -> bool:
        """Whether it gives the same for the same arguments wherever it stands."""
        return operation.is_pure and not any(value.root in self._changed for value in (*operation.values, *operation.made))

    def _distinct(self, operations: list[_Operation]) -> list[_Operation]:
        """Without those that compute again what is there already."""
        seen: dict[str, _Operation] = {}
        distinct = []
        for operation in operations:
            if self._is_repeatable(operation):
                before = seen.setdefault(self._call(operation), operation)
                if before is not operation:
                    self._same.update(zip([v.number for v in operation.made], [v.number for v in before.made]))
                    continue
            distinct.append(operation)
        return distinct

    def _needed(self, operations: list[_Operation]) -> list[_Operation]:
        """Without those whose results nobody reads."""
        read = {self._number(value) for value in self._outputs}
        needed = []
        for operation in reversed(operations):
            if operation.looks or not operation.is_pure or any(value.number in read for value in operation.made):
                needed.append(operation)
                read.update(self._number(value) for value in operation.values)
        return needed[::-1]

    def _lines(self) -> list[str]:
        last_use = {self._number(value): i for i, op in enumerate(self._operations) for value in (*op.values, *op.made)}
        given_back = {self._number(value) for value in self._outputs}
        lines = []
        for i, operation in enumerate(self._operations):
            if operation.looks:
                lines.append(f"if {self._call(operation)} != {self._expression(operation.results)}: raise Diverged")
            else:
                lines.append(f"{self._targets(operation.results)} = {self._call(operation)}")
            numbers = dict.fromkeys(self._number(value) for value in (*operation.values, *operation.made))
            done = [n for n in numbers if last_use[n] == i and n not in self._fixed and n not in given_back]
            if done:
                lines.append(f"del {', '.join(f'v{number}' for number in done)}")
        return [*lines, f"return [{', '.join(self._expression(value) for value in self._outputs)}]"]

    def _targets(self, results: Any) -> str:
        if isinstance(results, (tuple, list)):
            return "".join(f"{self._targets(result)}, " for result in results)
        return f"v{results.number}" if isinstance(results, _Value) else "_"

    def _call(self, operation: _Operation) -> str:
        # What `torch.compile` is given are operations by name, which it knows.
        function, args, kwargs = _quick(operation) if self._is_quick else (operation.function, *operation.arguments)
        given = [self._expression(value) for value in args]
        given += [f"{name}={self._expression(value)}" for name, value in kwargs.items()]
        return f"{self._name_of(function)}({', '.join(given)})"

    def _expression(self, value: Any) -> str:
        if isinstance(value, _Value):
            number = self._number(value)
            return self._name_of(self._fixed[number]) if number in self._fixed else f"v{number}"
        if isinstance(value, (tuple, list)):
            return f"[{', '.join(self._expression(each) for each in value)}]"
        if value is None or isinstance(value, (bool, int, str)):
            return repr(value)
        if isinstance(value, float):
            return repr(value) if math.isfinite(value) else f"float('{value}')"
        return self._name_of(value)

    def _number(self, value: _Value) -> int:
        return self._same.get(value.number, value.number)

    def _name_of(self, thing: Any) -> str:
        if id(thing) not in self._ids:
            self._ids[id(thing)] = f"c{len(self._ids)}"
            self._names[self._ids[id(thing)]] = thing
        return self._ids[id(thing)]
