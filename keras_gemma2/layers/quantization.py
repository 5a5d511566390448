"""Layers whose weights may be kept in 8 or 4 bits; the formats are in `keras_gemma2/quantization.py`.

Only weights are quantized. Dtype policies are Keras's own: "int8_from_bfloat16" keeps codes and float32 scales, and is otherwise
bfloat16. Codes and scales are not trainable, as in Keras's quantized layers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import ml_dtypes
import numpy as np
from keras import ops

from keras_gemma2 import backend
from keras_gemma2.layers.initializers import random_weights_are_skipped, row_blocks_of
from keras_gemma2.layers.low_rank import store_arrays
from keras_gemma2.quantization import (
    CODES_DTYPES,
    MODES,
    check_mode,
    codes_shape,
    dequantize_rows,
    quantize_rows,
    scales_shape,
)

ELEMENTS_A_BLOCK = 1 << 19  # of a matrix read, quantized and stored at a time
KERAS_BLOCK_SIZE = 128  # of `keras.quantizers.Int4QuantizationConfig`, unless it is told another


# Policies ---------------------------------------------------------------------------------------------------------------


def float_policy(dtype: Any = None) -> keras.DTypePolicy:
    """The policy of floats in a dtype or policy: "bfloat16" for "int8_from_bfloat16"; any other as it is.

    Args:
        dtype: what `keras.dtype_policies.get` takes; of a `DTypePolicyMap` its default counts.
    """
    policy = keras.dtype_policies.get(dtype)
    policy = getattr(policy, "default_policy", policy)
    if policy.quantization_mode is None:
        return policy
    return keras.dtype_policies.get(policy.get_config()["source_name"])


def quantized_policy(dtype: Any, mode: str) -> keras.dtype_policies.QuantizedDTypePolicy:
    """The policy of a dtype's floats with weights in `mode`.

    Raises:
        ValueError: for an unknown mode; for "int8" in float16, which Keras has no policy for.
    """
    check_mode(mode)
    policy = float_policy(dtype)
    if mode == "int8" and policy.compute_dtype == "float16":
        raise ValueError(
            f"Weights in 'int8' do not go with dtype={policy.name!r}: Keras has no such policy. Use 'int4', or load the model with "
            "dtype='bfloat16' or 'float32'."
        )
    return keras.dtype_policies.QuantizedDTypePolicy(mode, policy.name)


def check_policy(dtype: Any) -> None:
    """Refuses quantized policies that this package's layers have no weights for.

    Raises:
        ValueError: naming the policies there are.
    """
    policy = keras.dtype_policies.get(dtype)
    blocks = getattr(policy, "block_size", None)  # of "int4/128_from_bfloat16"
    if policy.quantization_mode not in (None, *MODES) or blocks is not None:
        raise ValueError(
            f"Quantized policies of this package are 'int8_from_DTYPE' and 'int4_from_DTYPE', with groups of a size that is "
            f"fixed. Received: {policy.name!r}."
        )


def _check_config(mode: str, config: Any) -> None:
    """Refuses a `QuantizationConfig` of the caller's own making: `quantize(mode)` gives Keras's default one."""
    own = getattr(config, "weight_quantizer", None) or getattr(config, "block_size", KERAS_BLOCK_SIZE) != KERAS_BLOCK_SIZE
    if mode in MODES and own:
        raise ValueError(f"`quantize` takes a mode, one of {MODES}, and no quantizers or block sizes. Received: {config!r}.")
    check_mode(mode)


# Layers -----------------------------------------------------------------------------------------------------------------


class QuantizableContainer:
    """Mixed in before Keras's class of layers and models that hold matrices in layers of theirs."""

    def quantized_call(self, *args: Any, **kwargs: Any) -> Any:
        """What Keras calls where the policy is a quantized one: nothing differs here."""
        return self.call(*args, **kwargs)

    def quantize(self, mode: str | None = None, config: Any = None) -> None:
        """Turns every matrix into codes and scales, one after another, in place.

        Args:
            mode: "int8" or "int4".
            config: not for use; Keras passes its default for the mode.

        Raises:
            ValueError: for another mode, or if a matrix cannot be quantized or is already; nothing is changed then.
        """
        _check_config(mode, config)
        layers = list(self._flatten_layers())
        matrices = [layer for layer in layers if isinstance(layer, MatrixLayer)]
        for layer in matrices:
            layer.check_quantizable(mode)
        for layer in matrices:
            layer.quantize(mode)
        for layer in layers:
            if isinstance(layer, QuantizableContainer):
                mark_as_quantized(layer, mode)


def mark_as_quantized(layer: keras.layers.Layer, mode: str) -> None:
    """Gives a layer the policy of what its weights are now."""
    layer._is_quantized = True  # Keras's own mark, without which the next line would call `quantize` again
    layer.dtype_policy = quantized_policy(layer.dtype_policy, mode)


class MatrixLayer(keras.layers.Layer):
    """A layer with one matrix of weights `[out, in]`: floats, or codes and scales if its policy is a quantized one.

    A subclass sets `matrix_name`, the attribute of the floats or codes; that of the scales is followed by `_scale`.
    """

    matrix_name = "kernel"

    def build_matrix(self, shape: tuple[int, int], initializer: Any) -> None:
        """Makes the variables.

        Args:
            shape: of the matrix.
            initializer: of the floats; those of a quantized layer are quantized as they are made.

        Raises:
            ValueError: for a policy that there are no weights for, or a width that "int4" cannot halve.
        """
        self.matrix_shape = tuple(shape)
        mode = self.quantization_mode
        if mode is None:
            setattr(self, self.matrix_name, self._new_matrix(shape, initializer))
            return
        check_policy(self._own_policy())
        self._check_width(mode)
        self._add_codes(mode, _FirstValues(row_blocks_of(initializer, shape, self.variable_dtype), mode, self.variable_dtype))
        self._is_quantized = True

    def _new_matrix(self, shape: tuple[int, int], initializer: Any) -> Any:
        add = functools.partial(self.add_weight, name=self.matrix_name, shape=shape)
        if not backend.is_spread():
            return add(initializer=initializer)
        matrix = add(initializer="zeros")  # made on its devices; the values follow, each device's own
        if not random_weights_are_skipped():
            backend.assign_row_blocks(matrix, row_blocks_of(initializer, shape, self.variable_dtype))
        return matrix

    @property
    def matrix(self) -> Any:
        """The float variable, or a `QuantizedMatrix` to read and assign the floats that codes and scales stand for."""
        stored = getattr(self, self.matrix_name)
        if self.quantization_mode is None:
            return stored
        scales = getattr(self, f"{self.matrix_name}_scale")
        return QuantizedMatrix(stored, scales, self.quantization_mode, self.variable_dtype, self.matrix_shape)

    def product(self, inputs: Any, float32_output: bool = False) -> Any:
        """`inputs [..., in]` times the matrix transposed: `[..., out]`."""
        stored = getattr(self, self.matrix_name)
        if self.quantization_mode is None:
            return backend.linear(inputs, stored, self.compute_dtype, float32_output)
        scales = getattr(self, f"{self.matrix_name}_scale")
        return backend.quantized_linear(inputs, stored, scales, self.quantization_mode, float32_output)

    def save_own_variables(self, store: Any) -> None:
        """What Keras calls to save a layer: codes or floats, then scales if there are any."""
        if not backend.is_spread():
            super().save_own_variables(store)
            return
        names = [self.matrix_name] if self.quantization_mode is None else [self.matrix_name, f"{self.matrix_name}_scale"]
        store_arrays(store, (backend.whole_array(getattr(self, name)) for name in names))

    def quantized_call(self, *args: Any, **kwargs: Any) -> Any:
        """What Keras calls where the policy is a quantized one."""
        return self.call(*args, **kwargs)

    def quantize(self, mode: str | None = None, type_check: bool = True, config: Any = None) -> None:
        """Turns the matrix into codes and scales, a block of rows at a time; the floats are freed.

        Args:
            mode: "int8" or "int4".
            type_check: as Keras's layers take it; not looked at.
            config: not for use; Keras passes its default for the mode.

        Raises:
            ValueError: for another mode, an odd width in "int4", or a layer that is quantized already; nothing is changed then.
        """
        _check_config(mode, config)
        self.check_quantizable(mode)
        floats = getattr(self, self.matrix_name)
        blocks = backend.numpy_row_blocks(floats.value, rows_a_block(self.matrix_shape))
        values = _FirstValues(blocks, mode, self.variable_dtype)
        codes = values.codes(codes_shape(self.matrix_shape, mode), CODES_DTYPES[mode])
        self._untrack_variable(floats)  # `del` would do so, too, and collect garbage each time, half a second a layer
        backend.release(floats)
        self._add_codes(mode, values, lambda shape, dtype=None: codes)
        mark_as_quantized(self, mode)

    def check_quantizable(self, mode: str) -> None:
        """Refuses what `quantize` cannot do.

        Raises:
            ValueError: naming the layer.
        """
        if not self.built:
            raise ValueError(f"The layer {self.name!r} has no weights to quantize yet: it is not built.")
        if self.quantization_mode is not None:
            raise ValueError(f"The layer {self.path!r} is already quantized: its policy is {self._own_policy().name!r}.")
        quantized_policy(self._own_policy(), mode)
        self._check_width(mode)

    def _check_width(self, mode: str) -> None:
        try:
            codes_shape(self.matrix_shape, mode)
        except ValueError as error:
            raise ValueError(f"The layer {self.path!r} cannot be quantized. {error}") from error

    def _own_policy(self) -> keras.DTypePolicy:
        policy = self.dtype_policy
        return policy[self.path] if isinstance(policy, keras.dtype_policies.DTypePolicyMap) and self.path else policy

    def _add_codes(self, mode: str, values: _FirstValues, codes: Any = None) -> None:
        name, scale_name = self.matrix_name, f"{self.matrix_name}_scale"
        fixed = {"trainable": False, "autocast": False}  # scales stay float32 where the rest computes in 16 bits
        shapes = codes_shape(self.matrix_shape, mode), scales_shape(self.matrix_shape, mode)
        dtype, first = CODES_DTYPES[mode], codes or values.codes
        is_spread = backend.is_spread()
        initializers = ("zeros", "zeros") if is_spread else (first, values.scales)
        setattr(self, name, self.add_weight(name=name, shape=shapes[0], dtype=dtype, initializer=initializers[0], **fixed))
        scales = self.add_weight(name=scale_name, shape=shapes[1], dtype="float32", initializer=initializers[1], **fixed)
        setattr(self, scale_name, scales)
        if is_spread and not random_weights_are_skipped():
            backend.assign_row_blocks(getattr(self, name), [np.asarray(codes(shapes[0]))] if codes else values.code_blocks())
            backend.assign_row_blocks(scales, values.scale_blocks())


class _FirstValues:
    """Initializers of codes and scales, which come out of one pass over the floats: `codes` is called first."""

    def __init__(self, blocks: Iterable[np.ndarray], mode: str, dtype: str) -> None:
        self._blocks, self._mode, self._dtype = blocks, mode, dtype
        self._scales: list[np.ndarray] = []

    def codes(self, shape: tuple[int, ...], dtype: Any = None) -> Any:
        if random_weights_are_skipped():
            return backend.untouched_tensor(shape, dtype)
        return backend.tensor_from_row_blocks(self.code_blocks(), shape, dtype)

    def code_blocks(self) -> Iterator[np.ndarray]:
        """Consecutive rows of the codes, which leave their scales behind."""
        return _quantized(self._blocks, self._mode, self._dtype, self._scales)

    def scale_blocks(self) -> list[np.ndarray]:
        """Consecutive rows of the scales, once all codes were made."""
        return self._scales

    def scales(self, shape: tuple[int, ...], dtype: Any = None) -> Any:
        if random_weights_are_skipped():
            return backend.untouched_tensor(shape, dtype)
        return backend.tensor_from_row_blocks(self._scales, shape, dtype)


# Values -----------------------------------------------------------------------------------------------------------------


class QuantizedMatrix:
    """A matrix kept as codes and scales, seen as the floats that they stand for.

    Args:
        codes: the variable.
        scales: the variable.
        mode: "int8" or "int4".
        dtype: of the floats that are quantized; those read are float32.
        shape: of the matrix.
    """

    def __init__(self, codes: keras.Variable, scales: keras.Variable, mode: str, dtype: str, shape: tuple[int, int]) -> None:
        self.codes, self.scales, self.mode, self.dtype, self.shape = codes, scales, mode, dtype, shape

    def row_blocks(self, rows: int | None = None) -> Iterator[np.ndarray]:
        """Consecutive rows in float32.

        Args:
            rows: how many at a time; None for blocks of a bounded size.
        """
        rows = rows or rows_a_block(self.shape)
        codes, scales = (backend.numpy_row_blocks(variable.value, rows) for variable in (self.codes, self.scales))
        return (dequantize_rows(*block, self.mode) for block in zip(codes, scales))

    def own_regions(self) -> tuple[tuple[slice, ...] | None, tuple[slice, ...] | None]:
        """What this process's devices hold of the codes and of the scales; None for all."""
        return backend.own_region(self.codes), backend.own_region(self.scales)

    def own_rows(self) -> tuple[slice, ...] | None:
        """The rows that this process's devices hold, as a region; None for all. A row's scale is that of all its columns."""
        region = backend.own_region(self.codes)
        return None if region is None else (region[0],)

    def assign_row_blocks(self, blocks: Iterable[np.ndarray], region: tuple[slice, ...] | None = None) -> None:
        """Quantizes consecutive rows of floats, rounded to `dtype` first, and takes them in place of what is there.

        Args:
            blocks: the rows.
            region: `own_rows`, where the blocks are no more than those.
        """
        scales: list[np.ndarray] = []
        self.assign_quantized(_quantized(blocks, self.mode, self.dtype, scales), scales, (region, region))

    def assign_quantized(
        self,
        codes: Iterable[np.ndarray],
        scales: Iterable[np.ndarray],
        regions: tuple[tuple[slice, ...] | None, tuple[slice, ...] | None] = (None, None),
    ) -> None:
        """Takes consecutive rows of codes, then of scales, in place of what is there.

        Args:
            codes, scales: the rows.
            regions: `own_regions`, where they are no more than those.
        """
        backend.assign_row_blocks(self.codes, codes, regions[0])
        backend.assign_row_blocks(self.scales, scales, regions[1])

    def numpy(self) -> np.ndarray:
        """The whole matrix in float32."""
        return np.concatenate(list(self.row_blocks()))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.numpy().astype(dtype or np.float32, copy=False)


def take_dequantized(codes: Any, scales: Any, indices: Any, mode: str) -> Any:
    """Rows of a matrix `[V, in]` at `indices [...]`, in float32: `[..., in]`."""
    codes, scales = backend.take_rows(codes, indices), backend.take_rows(scales, indices)
    if mode == "int8":
        return ops.cast(codes, "float32") * scales
    codes = ops.cast(codes, "int32")
    halves = [ops.bitwise_and(codes, 15), ops.right_shift(codes, 4)]
    values = ops.cast(ops.concatenate(halves, axis=-1), "float32") - 8.0
    lead, groups = ops.shape(values)[:-1], scales.shape[-1]
    grouped = ops.reshape(values, (*lead, groups, values.shape[-1] // groups)) * scales[..., None]
    return ops.reshape(grouped, (*lead, values.shape[-1]))


def quantized_arrays(blocks: Iterable[np.ndarray], mode: str, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes and float32 scales of consecutive rows of floats, rounded to `dtype` first."""
    scales: list[np.ndarray] = []
    codes = np.concatenate(list(_quantized(blocks, mode, dtype, scales)))
    return codes, np.concatenate(scales)


def rows_a_block(shape: tuple[int, ...]) -> int:
    """How many rows of a matrix are read, quantized and stored at a time."""
    return max(1, ELEMENTS_A_BLOCK // max(1, math.prod(shape[1:])))


def _quantized(blocks: Iterable[np.ndarray], mode: str, dtype: str, scales: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The codes of consecutive rows; their scales are added to a list."""
    rounded = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    for block in blocks:
        # What is quantized is the weight as a float model of this dtype has it, in whatever order the two are asked for.
        codes, found = quantize_rows(block.astype(rounded, copy=False), mode)
        scales.append(found)
        yield codes
