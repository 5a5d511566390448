"""Accelerators by their makers' figures: what a plan is measured against."""

from __future__ import annotations

import dataclasses

NODE = 8  # GPUs that NVLink joins in a DGX or HGX; more of them speak over the network


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Args:
        name: as it is called.
        flops: products and sums a second in bfloat16, at most, without sparsity.
        memory: bytes.
        bandwidth: bytes of memory a second.
        link: bytes a second that a chip can send to its neighbours while it receives as many.
        network: the same between groups of `NODE` chips; None where all are joined by links.
        source: where the figures are from.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float
    network: float | None
    source: str


# TPUs: the interconnect bandwidth of a chip is that of all its links, in one direction; a collective along one axis of a torus has
# two of them, of four (v5e) or six (v5p). GPUs: NVLink's bandwidth is given for both directions together, the network's (ConnectX-6
# of a DGX A100: 200 Gb/s a GPU; ConnectX-7 of a DGX H100 or H200: 400 Gb/s) for one.
CHIPS = {
    "v5e": Chip(
        "TPU v5e",
        197e12,
        16e9,
        819e9,
        1600e9 / 8 * 2 / 4,
        None,
        "https://cloud.google.com/tpu/docs/v5e (197 TFLOPs, ICI 1600 Gbps)",
    ),
    "v5p": Chip(
        "TPU v5p",
        459e12,
        95e9,
        2765e9,
        4800e9 / 8 * 2 / 6,
        None,
        "https://cloud.google.com/tpu/docs/v5p (459 TFLOPs, ICI 4800 Gbps)",
    ),
    "a100": Chip(
        "A100 80GB SXM",
        312e12,
        80e9,
        2039e9,
        300e9,
        25e9,
        "https://www.nvidia.com/en-us/data-center/a100/ (312 TFLOPS, NVLink 600 GB/s); DGX A100 data sheet",
    ),
    "h100": Chip(
        "H100 SXM",
        989.5e12,
        80e9,
        3350e9,
        450e9,
        50e9,
        "https://www.nvidia.com/en-us/data-center/h100/ (1,979 TFLOPS with sparsity, NVLink 900 GB/s); DGX H100 data sheet",
    ),
    "h200": Chip(
        "H200 SXM",
        989.5e12,
        141e9,
        4800e9,
        450e9,
        50e9,
        "https://www.nvidia.com/en-us/data-center/h200/ (1,979 TFLOPS with sparsity, NVLink 900 GB/s); DGX H200 data sheet",
    ),
}


def chips(names: str) -> list[Chip]:
    """Chips by their names, separated by commas.

    Raises:
        ValueError: for a name that there is not, listing those there are.

    Example:
        >>> [chip.memory for chip in chips("v5e,h100")]
        [16000000000.0, 80000000000.0]
    """
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in CHIPS:
            raise ValueError(f"argument --chips: must be some of {', '.join(CHIPS)}, separated by commas, got {name!r}")
    return [CHIPS[name] for name in wanted]
