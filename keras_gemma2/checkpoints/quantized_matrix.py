"""Matrices that this package's presets keep in 8 or 4 bits, as lazy tensors of floats.

`vars/0` of a layer holds the codes, `vars/1` the float32 scales (`keras_gemma2/quantization.py` has the formats).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from keras_gemma2.checkpoints.layout import ELEMENTS_A_BLOCK
from keras_gemma2.checkpoints.weight_map import Foreign
from keras_gemma2.config import Gemma2Config
from keras_gemma2.errors import CheckpointError
from keras_gemma2.quantization import CODES_DTYPES, codes_shape, dequantize_rows, scales_shape

_MODES = {dtype: mode for mode, dtype in CODES_DTYPES.items()}


def joined(tensors: Mapping[str, Any], config: Gemma2Config, cells: Mapping[str, Foreign], where: str) -> dict[str, Any]:
    """The tensors of a checkpoint, with codes and scales of each quantized matrix as one tensor under the name of the codes.

    Args:
        tensors: by name, `.../vars/0` and so on.
        config: the model's.
        cells: our paths and the cells of the format.
        where: the folder, for messages.

    Raises:
        CheckpointError: for scales or codes of a wrong dtype or shape, or codes without scales.
    """
    out, shapes = dict(tensors), config.weight_shapes()
    for path, cell in cells.items():
        scales_name = cell.name.removesuffix("0") + "1"
        if len(shapes[path]) != 2 or cell.name not in out:
            continue
        if scales_name not in out and np.dtype(out[cell.name].dtype).name in _MODES:
            raise CheckpointError(
                f"The quantized weight {cell.name!r} of {where} has no scales: {scales_name!r} is missing. Fetch the preset again, "
                "or save it again."
            )
        if scales_name in out:
            out[cell.name] = _matrix(shapes[path], cell.name, out[cell.name], out.pop(scales_name), where)
    return out


def _matrix(shape: tuple[int, int], name: str, codes: Any, scales: Any, where: str) -> QuantizedTensor:
    mode = _MODES.get(np.dtype(codes.dtype).name)
    try:
        fits = mode is not None and (codes.shape, scales.shape) == (codes_shape(shape, mode), scales_shape(shape, mode))
    except ValueError:  # a width that "int4" cannot halve
        fits = False
    if not fits or np.dtype(scales.dtype) != np.float32:
        found = ", ".join(f"{np.dtype(t.dtype).name} of shape {tuple(t.shape)}" for t in (codes, scales))
        raise CheckpointError(
            f"The quantized weight {name!r} of {where} is not as this package stores one of shape {shape}: its codes and scales "
            f"are {found}. Save the preset again."
        )
    return QuantizedTensor(shape, mode, codes, scales)


class QuantizedTensor:
    """A matrix of codes and scales in a file; slicing it along its rows gives float32.

    Args:
        shape: the matrix's.
        mode: "int8" or "int4".
        codes: a lazy tensor.
        scales: a lazy tensor.
    """

    is_quantized = True

    def __init__(self, shape: tuple[int, int], mode: str, codes: Any, scales: Any) -> None:
        self.shape, self.mode, self.dtype = shape, mode, np.dtype("float32")
        self._codes, self._scales = codes, scales

    def __getitem__(self, index: Any) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        return dequantize_rows(self._codes[index[0]], self._scales[index[0]], self.mode)[(slice(None), *index[1:])]

    def codes(self, region: tuple[slice, ...] | None = None) -> Iterator[np.ndarray]:
        """Consecutive rows of codes.

        Args:
            region: the rows, and columns of codes, that are wanted, as slices; None for all.
        """
        return _row_blocks(self._codes, region)

    def scales(self, region: tuple[slice, ...] | None = None) -> Iterator[np.ndarray]:
        """Consecutive rows of scales; `region` as `codes` takes it."""
        return _row_blocks(self._scales, region)


def _row_blocks(tensor: Any, region: tuple[slice, ...] | None) -> Iterator[np.ndarray]:
    step = max(1, ELEMENTS_A_BLOCK // max(1, math.prod(tensor.shape[1:])))
    own, *columns = region or (slice(None),)
    rows = range(tensor.shape[0])[own]
    return (tensor[(slice(start, min(start + step, rows.stop)), *columns)] for start in range(rows.start, rows.stop, step))
