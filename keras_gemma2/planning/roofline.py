"""How long a step takes a chip at least, and what holds it up.

A roofline (Williams et al., doi 10.1145/1498765.1498785): the longest of computing, of reading and writing memory, and of speaking
to other devices, each at its full rate. Bandwidths of collectives are those of rings (Thakur et al., doi 10.1177/1094342005051521).
"""

from __future__ import annotations

import dataclasses

from keras_gemma2.planning.chips import NODE, Chip
from keras_gemma2.planning.program import Collective

COMPUTE, MEMORY, INTERCONNECT = "compute", "memory bandwidth", "interconnect"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of a step on a chip: computing, at memory, between devices."""

    compute: float
    memory: float
    interconnect: float

    @property
    def at_least(self) -> float:
        """Seconds, if all of them overlap."""
        return max(self.compute, self.memory, self.interconnect)

    @property
    def in_turn(self) -> float:
        """Seconds, if none of them overlap."""
        return self.compute + self.memory + self.interconnect

    @property
    def limit(self) -> str:
        """What takes longest."""
        return {self.compute: COMPUTE, self.memory: MEMORY, self.interconnect: INTERCONNECT}[self.at_least]


def estimate(chip: Chip, flops: float, moved: float, collectives: list[tuple[Collective, float]]) -> Estimate:
    """The roofline of a step.

    Args:
        chip: of which each device is one.
        flops: products and sums, on one device.
        moved: bytes that it reads and writes.
        collectives: each with the bytes of its result.
    """
    seconds = sum(c.times * sent_bytes(c.kind, size, len(c.group)) / bandwidth(chip, c.group) for c, size in collectives)
    return Estimate(flops / chip.flops, moved / chip.bandwidth, seconds)


def sent_bytes(kind: str, size: float, group: int) -> float:
    """What a device sends in a collective whose result is so large, around a ring of so many devices.

    Example:
        >>> sent_bytes("all-reduce", 800, 4), sent_bytes("all-gather", 800, 4), sent_bytes("reduce-scatter", 200, 4)
        (1200.0, 600.0, 600.0)
    """
    others = max(group - 1, 0)
    if kind == "all-reduce":
        return 2 * size * others / max(group, 1)
    if kind == "reduce-scatter":
        return float(size * others)
    if kind in ("collective-permute", "collective-broadcast"):
        return float(size)
    return size * others / max(group, 1)


def bandwidth(chip: Chip, group: tuple[int, ...]) -> float:
    """Bytes a second that a device of a group can send: over links, or over the network of all its members in a node."""
    nodes = {device // NODE for device in group}
    if chip.network is None or len(nodes) < 2:
        return chip.link
    here = sum(device // NODE == group[0] // NODE for device in group)
    return min(chip.link, chip.network * here)
