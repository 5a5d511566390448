"""What a compiled program does, read from its text: collectives, products, and how often loops run.

The text is XLA's HLO (https://openxla.org/xla/operation_semantics). A computation runs as often as what calls it, and the body of a
loop as often as XLA knows, in `known_trip_count`; of other loops the caller says how often.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator

import numpy as np

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "reduce-scatter")
ITEM_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "f64": 8,
}
_HEAD = re.compile(r"(?P<entry>ENTRY )?%(?P<name>\S+) \(.*\) -> .* \{$")
_LINE = re.compile(r"\s+(?:ROOT )?%(?P<name>\S+) = (?P<type>\(.*?\)|\S+) (?P<op>[\w-]+)\((?P<rest>.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_NAME = re.compile(r'op_name="([^"]*)"')
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_IDS = r"\(\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?\)"
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=" + _IDS + r")? \{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a program: its result's arrays (dtype, shape), and the text after the opening bracket."""

    name: str
    op: str
    arrays: list[tuple[str, tuple[int, ...]]]
    rest: str

    @property
    def op_name(self) -> str:
        """Where in the model it is from."""
        found = _NAME.search(self.rest)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Collective:
    """Something that devices do together.

    Args:
        kind: one of `KINDS`.
        arrays: dtype and shape of each array of its result, on one device.
        group: ids of the devices of its first group.
        op_name: where in the model it is from.
        times: how often it runs in a step.
        is_counted: whether XLA knows that; else the caller does.
    """

    kind: str
    arrays: list[tuple[str, tuple[int, ...]]]
    group: tuple[int, ...]
    op_name: str
    times: float
    is_counted: bool

    @property
    def bytes(self) -> int:
        """Of its result, on one device, once."""
        return sum(ITEM_BYTES.get(dtype, 1) * math.prod(shape) for dtype, shape in self.arrays)


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a program does: its collectives, and products and sums of its matrix products on one device."""

    collectives: list[Collective]
    flops: float
    unknown_loops: int


def read_program(text: str, trips: Callable[[Instruction], float]) -> Contents:
    """Reads the text of a compiled program.

    Args:
        text: of one device's part, as `compiled.as_text()` gives it.
        trips: how often a loop runs where XLA does not say, given its `while`.

    Raises:
        ValueError: if the text has no entry.
    """
    computations, entry = _computations(text)
    collectives, flops, unknown = [], 0.0, 0
    for name, times, is_counted in _runs(computations, entry, trips):
        shapes = {line.name: line.arrays for line in computations[name]}
        for line in computations[name]:
            kind = line.op.removesuffix("-start")
            if kind in KINDS:
                collectives.append(Collective(kind, _result(line), group_of(line.rest), line.op_name, times, is_counted))
            elif line.op == "dot":
                flops += times * _flops(line, shapes)
            elif line.op == "while" and not _TRIPS.search(line.rest):
                unknown += 1
    return Contents(collectives, flops, unknown)


def _computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    computations: dict[str, list[Instruction]] = {}
    lines: list[Instruction] = []
    entry = None
    for line in text.splitlines():
        if (head := _HEAD.match(line)) is not None:
            lines = computations.setdefault(head["name"], [])
            entry = head["name"] if head["entry"] else entry
        elif (found := _LINE.match(line)) is not None:
            lines.append(Instruction(found["name"], found["op"], _arrays(found["type"]), found["rest"]))
    if entry is None:
        raise ValueError("`text` must be the text of a compiled program. Received a text without a line that begins with ENTRY.")
    return computations, entry


def _arrays(type_text: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(dtype, _numbers(sizes)) for dtype, sizes in _ARRAY.findall(type_text)]


def _numbers(text: str | None) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number) if text else ()


def _runs(computations: dict, entry: str, trips: Callable[[Instruction], float]) -> Iterator[tuple[str, float, bool]]:
    """Each computation with how often it runs, once for each way to come to it."""
    waiting = [(entry, 1.0, True)]
    while waiting:
        name, times, is_counted = waiting.pop()
        yield name, times, is_counted
        for line in computations[name]:
            called = _CALLED.findall(line.rest) + [part.strip(" %") for part in _branches(line.rest)]
            if line.op == "while":
                known = _TRIPS.search(line.rest)
                rounds = int(known[1]) if known else trips(line)
                waiting += [(part, times * rounds, is_counted and known is not None) for part in called]
            else:
                waiting += [(part, times, is_counted) for part in called]


def _branches(rest: str) -> list[str]:
    found = _BRANCHES.search(rest)
    return found[1].split(",") if found else []


def _result(line: Instruction) -> list[tuple[str, tuple[int, ...]]]:
    """The arrays that a collective gives; one that only starts names its operands first."""
    if line.op in ("all-gather-start", "collective-permute-start"):
        return line.arrays[1:2]
    return line.arrays


def _flops(line: Instruction, shapes: dict[str, list]) -> float:
    """Two for each product that is summed up."""
    operand = line.rest.split(",")[0].split(")")[0].strip().rsplit("%", 1)[-1]
    inputs = _arrays(line.rest.split(")")[0]) or shapes.get(operand)
    contracted = _numbers(re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.rest)[1])
    return 2.0 * math.prod(line.arrays[0][1]) * math.prod(inputs[0][1][axis] for axis in contracted)


# Groups of devices ------------------------------------------------------------------------------------------------------


def group_of(rest: str) -> tuple[int, ...]:
    """The devices of a collective's first group of more than one, in any of the ways that HLO writes groups.

    Example:
        >>> group_of("%x), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add")
        (0, 2, 4, 6)
    """
    if (mesh := _MESH.search(rest)) is not None:
        return _group_of_mesh(*mesh.groups())
    if (listed := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,{}]*)\}\}", rest)) is not None:
        groups = [_numbers(part) for part in listed[1].split("},{")]
        return next((group for group in groups if len(set(group)) > 1), groups[0])
    if (iota := _IOTA.search(rest)) is not None:
        sizes, base, order = map(_numbers, iota.groups())
        return tuple(int(i) for i in _ids(base, order).reshape(sizes)[0])
    return ()


def _ids(base: tuple[int, ...], order: tuple[int, ...]) -> np.ndarray:
    ids = np.arange(math.prod(base)).reshape(base)
    return ids.transpose(order) if order else ids


def _group_of_mesh(axes: str, shape: str | None, base: str | None, order: str | None, along: str) -> tuple[int, ...]:
    """Of `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}`: devices that differ along the last."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    ids = _ids(_numbers(base) or _numbers(shape) or (math.prod(sizes.values()),), _numbers(order)).reshape(tuple(sizes.values()))
    wanted = re.findall(r"'([^']+)'", along)
    index = tuple(slice(None) if name in wanted else 0 for name in sizes)
    return tuple(int(i) for i in ids[index].reshape(-1))
