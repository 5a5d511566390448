"""int4 codes in the order in which PyTorch's own 4-bit product on CPU reads them, and that product.

The order depends on the processor. It is a fixed one of the weights within blocks of 64 rows, and is found by packing numbers that
say where they come from.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from keras_gemma2.backend.torch_products import float32_product

FEW_ROWS = 32
ROWS_A_BLOCK = 64
ELEMENTS_A_PIECE = 1 << 21
_NIBBLES_OF_AN_INDEX = 8


class PackedInt4:
    """A packed matrix of int4 codes, uint8 `[out, in / 2]`."""

    def __init__(self, codes: torch.Tensor) -> None:
        self.packed = torch.empty(codes.shape, dtype=torch.uint8)
        for piece in self._pieces():
            self.packed[piece] = _convert(torch.cat([codes[piece] & 15, codes[piece] >> 4], dim=1).int())
        self._for_product: tuple[object, torch.Tensor] = (None, torch.empty(0))

    @staticmethod
    def takes(codes: torch.Tensor, scales: torch.Tensor) -> bool:
        """Whether there is a packed form: for groups of 32 or 64 columns and a number of rows that 16 divides."""
        group = 2 * codes.shape[1] // scales.shape[1]
        return codes.dtype == torch.uint8 and group in (32, 64) and codes.shape[0] % 16 == 0 and _has_int4()

    def unpacked(self) -> torch.Tensor:
        """The codes in plain order."""
        return torch.cat([self._codes(piece) for piece in self._pieces()])

    def product(self, rows: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """float32 `rows [n, in]` times the matrix transposed: float32 `[n, out]`."""
        if rows.shape[0] <= FEW_ROWS:
            group = rows.shape[1] // scales.shape[1]
            return torch.ops.aten._weight_int4pack_mm_for_cpu(rows.contiguous(), self.packed, group, self._scales(scales))
        out = rows.new_empty(rows.shape[0], self.packed.shape[0])
        for piece in self._pieces():
            out[:, piece] = float32_product(rows, widened_int4(self._codes(piece), scales[piece]))
        return out

    def _scales(self, scales: torch.Tensor) -> torch.Tensor:
        """Scales and zero points as the product takes them, `[in / group, out, 2]`; made again if the scales have changed."""
        state = (scales.data_ptr(), scales._version)
        if self._for_product[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                pairs = torch.stack([scales, torch.zeros_like(scales)], dim=-1).transpose(0, 1).contiguous()
            self._for_product = (state, pairs)
        return self._for_product[1]

    def _pieces(self) -> Iterator[slice]:
        """Slices of rows, of whole blocks but for the last."""
        count, width = self.packed.shape
        step = max(1, ELEMENTS_A_PIECE // (2 * width * ROWS_A_BLOCK)) * ROWS_A_BLOCK
        return (slice(start, min(start + step, count)) for start in range(0, count, step))

    def _codes(self, piece: slice) -> torch.Tensor:
        packed, parts = self.packed[piece], []
        whole = packed.shape[0] // ROWS_A_BLOCK * ROWS_A_BLOCK
        for part, rows in ((packed[:whole], ROWS_A_BLOCK), (packed[whole:], packed.shape[0] - whole)):
            if part.shape[0]:
                places = _places(rows, 2 * part.shape[1])
                weights = _nibbles(part).reshape(-1, places.shape[0])[:, places].reshape(part.shape[0], 2, -1)
                parts.append(weights[:, 0] | (weights[:, 1] << 4))
        return torch.cat(parts)


def widened_int4(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Rows of an int4 matrix, in plain order, in float32."""
    halves = torch.stack([codes & 15, codes >> 4], dim=1)
    values = halves.reshape(*scales.shape, -1).float().sub_(8).mul_(scales[:, :, None])
    return values.reshape(codes.shape[0], -1)


def _convert(nibbles: torch.Tensor) -> torch.Tensor:
    """int32 `[rows, in]` packed: uint8 `[rows, in / 2]`."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles, 1)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=-1)


@functools.lru_cache(maxsize=16)
def _places(rows: int, columns: int) -> torch.Tensor:
    """For each weight of a block `[rows, in]`, where among the block's packed nibbles it is."""
    with torch.inference_mode(False), torch.no_grad():
        index = torch.arange(rows * columns, dtype=torch.int32).reshape(rows, columns)
        sources = torch.zeros(rows * columns, dtype=torch.int64)
        for place in range(0, 4 * _NIBBLES_OF_AN_INDEX - 4, 4):
            sources += _nibbles(_convert((index >> place) & 15)).reshape(-1).long() << place
        return torch.argsort(sources)


@functools.cache
def _has_int4() -> bool:
    names = ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")
    return all(hasattr(torch.ops.aten, name) for name in names)
