"""Products and rows of variables inside compiled functions, where half-precision weights take paths of their own."""

import importlib

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

from keras_gemma2 import backend

# One rounding of each output, and sums of 36 products in float32 (see test_products.py).
ROUNDING = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}
SUM_ERROR = 64 * 2.0**-24


def variable(values, dtype):
    """A variable, and its values in float64."""
    exact = np.asarray(values, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    made = keras.Variable(ops.convert_to_tensor(exact.astype("float32")), dtype=dtype, name="kernel")
    return made, exact.astype("float64")


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few rows, so that small matrices have several and one left over."""
    name = f"keras_gemma2.backend.{keras.backend.backend()}_blocks"
    if keras.backend.backend() != "torch":
        monkeypatch.setattr(importlib.import_module(name), "ELEMENTS_A_BLOCK", 36 * 7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_linear_and_rows(dtype, small_blocks):
    generator = np.random.default_rng(3)
    kernel, exact = variable(generator.normal(size=(40, 36)), dtype)
    _, exact_x = variable(generator.normal(size=(2, 3, 36)), dtype)
    x = ops.cast(ops.convert_to_tensor(exact_x.astype("float32")), dtype)

    def run(unused, x, indices):
        return backend.linear(x, kernel, dtype), backend.linear(x, kernel, dtype, True), backend.take_rows(kernel, indices)

    compiled = backend.compile_function(run, [kernel])
    for factor in (1, 2):  # the second time with values assigned since
        out, wide, rows = compiled((), x, ops.convert_to_tensor(np.array([39, 0, 7], "int32")))
        expected, magnitudes = factor * exact_x @ exact.T, factor * np.abs(exact_x) @ np.abs(exact).T
        for result, rounding in ((out, ROUNDING[dtype]), (wide, 0.0)):
            error = np.abs(ops.convert_to_numpy(ops.cast(result, "float32")) - expected)
            assert np.all(error <= rounding * np.abs(expected) + SUM_ERROR * magnitudes + 1e-30)
        assert keras.backend.standardize_dtype(wide.dtype) == "float32"
        np.testing.assert_array_equal(ops.convert_to_numpy(ops.cast(rows, "float32")), factor * exact[[39, 0, 7]])
        kernel.assign(ops.cast(ops.convert_to_tensor((2 * exact).astype("float32")), dtype))


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_linear(mode, small_blocks):
    generator = np.random.default_rng(4)
    if mode == "int8":
        codes, scales = generator.integers(-127, 128, (40, 36)).astype("int8"), generator.uniform(0.1, 1, (40, 1))
        weight = codes * scales.astype("float32").astype("float64")
    else:
        codes, scales = generator.integers(0, 256, (40, 18)).astype("uint8"), generator.normal(size=(40, 18))
        nibbles = np.concatenate([codes & 15, codes >> 4], axis=1).astype("float64") - 8
        weight = nibbles * np.repeat(scales.astype("float32").astype("float64"), 2, axis=1)
    kept = [keras.Variable(codes, dtype=codes.dtype.name, trainable=False), keras.Variable(scales, dtype="float32")]
    x = generator.normal(size=(3, 36)).astype("float32")
    compiled = backend.compile_function(lambda unused, x: backend.quantized_linear(x, *kept, mode), kept)
    error = np.abs(ops.convert_to_numpy(compiled((), ops.convert_to_tensor(x))) - x.astype("float64") @ weight.T)
    allowed = SUM_ERROR * (np.abs(x.astype("float64")) @ np.abs(weight).T)
    if mode == "int8":  # half a step of x's whole numbers (see test_products.py)
        allowed = allowed + 0.51 / 8_100 * np.abs(x).max(axis=1, keepdims=True) * np.abs(weight).sum(axis=1)
    assert np.all(error <= allowed)
