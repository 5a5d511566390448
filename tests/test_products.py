"""Products against float64 numpy: plain ones in every dtype, quantized ones, and their gradients."""

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

from keras_gemma2 import backend

# A sum of n products rounded in an accumulator of precision u is off by at most about n u times the sum of magnitudes (Higham,
# Accuracy and Stability of Numerical Algorithms, section 3.1); by sqrt(n) u in practice. 64 u covers that for the widths here.
SUM_ERROR = 64 * 2.0**-24
EPSILON = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # half a step, relative: one rounding of the output
SHAPES = [((1, 64), 96), ((3, 65), 1), ((2, 3, 130), 129), ((40, 33), 50), ((1, 1, 2304), 257)]


def rounded(array, dtype):
    """Numbers that the dtype holds, and the same in float64."""
    array = np.asarray(array, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    return ops.convert_to_tensor(array.astype("float32"), dtype=dtype), array.astype("float64")


def assert_product(out, x, weight, out_dtype, compute_error=SUM_ERROR):
    """`out` is x @ weight.T but for sums in float32 and one rounding of each output."""
    assert keras.backend.standardize_dtype(out.dtype) == out_dtype
    expected, magnitudes = x @ weight.T, np.abs(x) @ np.abs(weight).T
    out = ops.convert_to_numpy(ops.cast(out, "float32")).astype("float64")
    assert out.shape == expected.shape
    allowed = EPSILON[out_dtype] * np.abs(expected) + compute_error * magnitudes
    assert np.all(np.abs(out - expected) <= allowed * 1.0001 + 1e-30), np.max((np.abs(out - expected) - allowed) / magnitudes)


def int8_weights(generator, rows, columns, codes=None):
    """Codes, scales and the weights they stand for in float64."""
    codes = generator.integers(-127, 128, (rows, columns)).astype("int8") if codes is None else codes
    scales = generator.uniform(0.001, 3, (rows, 1)).astype("float32")
    return codes, scales, codes.astype("float64") * scales


def int4_weights(generator, rows, columns, group, nibbles=None):
    nibbles = generator.integers(0, 16, (rows, columns)) if nibbles is None else nibbles
    codes = (nibbles[:, : columns // 2] + 16 * nibbles[:, columns // 2 :]).astype("uint8")
    scales = generator.normal(size=(rows, columns // group)).astype("float32")
    return codes, scales, (nibbles - 8) * np.repeat(scales.astype("float64"), group, axis=1)


@pytest.mark.parametrize("float32_output", [False, True])
@pytest.mark.parametrize("shape, units", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_linear(dtype, shape, units, float32_output):
    generator = np.random.default_rng(1)
    x, exact_x = rounded(generator.normal(size=shape), dtype)
    kernel, exact_kernel = rounded(generator.normal(size=(units, shape[-1])), dtype)
    out = backend.linear(x, kernel, dtype, float32_output)
    assert_product(out, exact_x, exact_kernel, "float32" if float32_output else dtype)
