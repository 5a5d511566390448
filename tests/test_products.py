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


# CPU products with int8 codes round a row of x to whole numbers, up to this at its largest magnitude (torch; 32,000 elsewhere):
# each element is off by half a step.
INT8_STEPS = 8_100


def assert_product(out, x, weight, out_dtype, rounding=0.0, mode=None):
    """`out` is x @ weight.T but for sums in float32, one rounding of each output, to its dtype or coarser, and in int8 of x."""
    assert keras.backend.standardize_dtype(out.dtype) == out_dtype
    expected, magnitudes = x @ weight.T, np.abs(x) @ np.abs(weight).T
    out = ops.convert_to_numpy(ops.cast(out, "float32")).astype("float64")
    assert out.shape == expected.shape
    allowed = max(EPSILON[out_dtype], rounding) * np.abs(expected) + SUM_ERROR * magnitudes
    if mode == "int8":
        allowed = allowed + 0.51 / INT8_STEPS * np.abs(x).max(axis=-1, keepdims=True) * np.abs(weight).sum(axis=1)
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
    # torch's fast product of one row in bfloat16 rounds its sums to it.
    rounded_sums = keras.backend.backend() == "torch" and dtype == "bfloat16" and shape[0] == 1
    assert_product(out, exact_x, exact_kernel, "float32" if float32_output else dtype, EPSILON[dtype] if rounded_sums else 0.0)


@pytest.mark.parametrize("float32_output", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mode", ["int8", "int4"])
@pytest.mark.parametrize("shape, units", [((1, 64), 96), ((3, 66), 1), ((2, 3, 130), 129), ((40, 34), 50), ((1, 1, 2304), 257)])
def test_quantized_linear(shape, units, mode, dtype, float32_output):
    """Tensors, which have no packed form."""
    generator = np.random.default_rng(2)
    x, exact_x = rounded(generator.normal(size=shape), dtype)
    codes, scales, weight = weights_of(generator, mode, units, shape[-1])
    out = backend.quantized_linear(x, ops.convert_to_tensor(codes), ops.convert_to_tensor(scales), mode, float32_output)
    assert_product(out, exact_x, weight, "float32" if float32_output else dtype, mode=mode)


def weights_of(generator, mode, rows, columns):
    if mode == "int8":
        return int8_weights(generator, rows, columns)
    return int4_weights(generator, rows, columns, group=np.gcd(columns // 2, 64))


def stored(array, name):
    """A variable that layers would hold."""
    return keras.Variable(array, dtype=array.dtype.name, trainable=False, name=name)


# Rows of activations go through a few digits on some backends: with an error that is even over a row, where bfloat16's is relative
# to each number. No row may lose more than bfloat16 would: half a step of 2^-9 on average, 2^-8 at most, of each number. The
# bound on a sum of errors is random: 2^-9 |x| |w| / sqrt(3), times 6 for the largest of all outputs.
def activations_error(x, weight):
    return 6 / np.sqrt(3) * 2.0**-9 * np.linalg.norm(x, axis=-1)[..., None] * np.linalg.norm(weight, axis=-1)


@pytest.mark.parametrize("shape", [(1, 515), (3, 515), (2, 4, 515), (40, 515)])
@pytest.mark.parametrize("mode, units", [("int8", 131), ("int4", 144), ("int4", 131)])
def test_variables_of_codes_in_products_of_any_number_of_rows(mode, units, shape):
    """First few rows, then others: on torch the first product packs the codes."""
    generator = np.random.default_rng(3)
    shape = (*shape[:-1], 640) if mode == "int4" else shape
    codes, scales, weight = weights_of(generator, mode, units, shape[-1])
    codes_variable, scales_variable = stored(codes, "codes"), stored(scales, "scales")
    first, exact_first = rounded(generator.normal(size=(1, shape[-1])), "float32")
    assert_product(
        backend.quantized_linear(first, codes_variable, scales_variable, mode), exact_first, weight, "float32", mode=mode
    )
    values = generator.normal(size=shape)
    values[..., 0, 7] = 4000  # far out: the digits of the others become small
    values[..., 0, :] *= 1e-3
    x, exact = rounded(values, "float32")
    out = ops.convert_to_numpy(backend.quantized_linear(x, codes_variable, scales_variable, mode)).astype("float64")
    assert np.all(np.abs(out - exact @ weight.T) <= activations_error(exact, weight))
    np.testing.assert_array_equal(ops.convert_to_numpy(codes_variable.value), codes)  # readable after products
    assert_product(
        backend.quantized_linear(first, codes_variable, scales_variable, mode), exact_first, weight, "float32", mode=mode
    )


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_codes_can_be_replaced_between_products(mode):
    generator = np.random.default_rng(4)
    x, exact = rounded(generator.normal(size=(2, 256)), "float32")
    codes, scales, weight = weights_of(generator, mode, 112, 256)
    codes_variable, scales_variable = stored(codes, "codes"), stored(scales, "scales")
    for take in (False, True):  # a table's rows are taken, too
        for _ in range(2):
            if take:
                rows = backend.take_rows(codes_variable, ops.convert_to_tensor(np.array([5, 0], "int32")))
                np.testing.assert_array_equal(ops.convert_to_numpy(rows), codes[[5, 0]])
            assert_product(backend.quantized_linear(x, codes_variable, scales_variable, mode), exact, weight, "float32", mode=mode)
            codes, _, _ = weights_of(generator, mode, 112, 256)
            codes_variable.assign(codes)
            weight = reference_weight(codes, scales, mode)
            assert_product(backend.quantized_linear(x, codes_variable, scales_variable, mode), exact, weight, "float32", mode=mode)
            codes, _, _ = weights_of(generator, mode, 112, 256)
            backend.assign_row_blocks(codes_variable, iter([codes[:50], codes[50:]]))
            weight = reference_weight(codes, scales, mode)
    assert_product(backend.quantized_linear(x, codes_variable, scales_variable, mode), exact, weight, "float32", mode=mode)
    np.testing.assert_array_equal(np.concatenate(list(backend.numpy_row_blocks(codes_variable.value, 60))), codes)


def reference_weight(codes, scales, mode):
    if mode == "int8":
        return codes.astype("float64") * scales
    nibbles = np.concatenate([codes % 16, codes // 16], axis=1).astype("float64")
    return (nibbles - 8) * np.repeat(scales.astype("float64"), nibbles.shape[1] // scales.shape[1], axis=1)


@pytest.mark.parametrize("rows", [1, 3, 33])
@pytest.mark.parametrize("code", [-127, 127])
@pytest.mark.parametrize("value", [-1.0, 1.0, 3e4, -3e-30])
def test_the_largest_codes_do_not_saturate(rows, code, value):
    """8-bit products of AVX2 add pairs in 16 bits: two of 255 * 127 would not fit."""
    codes = np.full((40, 2304), code, "int8")
    codes[::3, ::2] = -code
    scales = np.full((40, 1), 0.5, "float32")
    variables = stored(codes, "codes"), stored(scales, "scales")
    for _ in range(2):
        x, exact = rounded(np.full((rows, 2304), value), "float32")
        out = backend.quantized_linear(x, *variables, "int8")
        # Sums cancel to zero in every third output; the error is against the magnitudes.
        expected, magnitudes = exact @ (codes * 0.5).T.astype("float64"), np.abs(exact) @ np.abs(codes * 0.5).T
        assert np.max(np.abs(ops.convert_to_numpy(out) - expected) / magnitudes) < 1e-4


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("rows", [1, 12])
def test_what_is_not_finite_stays_so_and_in_its_row(rows, bad):
    generator = np.random.default_rng(5)
    codes, scales, _ = int8_weights(generator, 80, 256)
    codes[:, 0] = np.where(codes[:, 0] == 0, 1, codes[:, 0])
    variables = stored(codes, "codes"), stored(scales, "scales")
    values = generator.normal(size=(rows + 1, 256)).astype("float32")
    values[0, 0] = bad
    for _ in range(2):
        out = ops.convert_to_numpy(backend.quantized_linear(ops.convert_to_tensor(values), *variables, "int8"))
        assert not np.isfinite(out[0]).any() and np.isfinite(out[1:]).all()


def test_zeros_and_no_rows():
    codes, scales, _ = int8_weights(np.random.default_rng(6), 80, 256)
    variables = stored(codes, "codes"), stored(scales, "scales")
    for rows in (1, 20, 0):
        out = backend.quantized_linear(ops.zeros((rows, 256)), *variables, "int8")
        assert tuple(out.shape) == (rows, 80) and not ops.convert_to_numpy(out).any()
        assert tuple(backend.linear(ops.zeros((rows, 256)), ops.ones((80, 256)), "float32").shape) == (rows, 80)


def gradient_of(function, x):
    """The gradient of `sum(function(x) * weights)` for fixed weights, on the running backend; and those weights."""
    name = keras.backend.backend()
    if name == "torch":
        import torch

        x = torch.tensor(x, requires_grad=True)
        out = function(x)
        weights = np.random.default_rng(8).normal(size=tuple(out.shape)).astype("float32")
        (out * torch.tensor(weights)).sum().backward()
        return x.grad.numpy(), weights
    shape = tuple(function(ops.convert_to_tensor(x)).shape)
    weights = np.random.default_rng(8).normal(size=shape).astype("float32")
    if name == "jax":
        import jax

        return np.asarray(jax.grad(lambda x: (function(x) * weights).sum())(x)), weights
    import tensorflow as tf

    x = tf.convert_to_tensor(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        total = tf.reduce_sum(function(x) * weights)
    return tape.gradient(total, x).numpy(), weights


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_gradients_with_respect_to_x(mode, rows):
    generator = np.random.default_rng(7)
    codes, scales, weight = weights_of(generator, mode, 144, 256)
    variables = stored(codes, "codes"), stored(scales, "scales")
    x = generator.normal(size=(rows, 256)).astype("float32")
    with backend.no_gradients():
        backend.quantized_linear(ops.convert_to_tensor(x), *variables, mode)  # on torch, this one packs the codes
    gradient, upstream = gradient_of(lambda x: backend.quantized_linear(x, *variables, mode), x)
    assert_product(ops.convert_to_tensor(gradient), upstream.astype("float64"), weight.T, "float32")


@pytest.mark.parametrize("rows", [1, 40])
def test_gradients_of_bfloat16_products(rows):
    """Both gradients, as training in bfloat16 takes them; float32 variables are rounded where they are used."""
    generator = np.random.default_rng(9)
    _, exact_kernel = rounded(generator.normal(size=(50, 130)), "bfloat16")
    x, exact_x = rounded(generator.normal(size=(rows, 130)), "bfloat16")
    cast = ops.cast

    def of_x(x):
        kernel = cast(ops.convert_to_tensor(exact_kernel.astype("float32")), "bfloat16")
        return cast(backend.linear(cast(x, "bfloat16"), kernel, "bfloat16"), "float32")

    def of_kernel(kernel):
        return cast(backend.linear(x, cast(kernel, "bfloat16"), "bfloat16"), "float32")

    # Upstream gradients are rounded to bfloat16 where the output is, and results once: two roundings.
    for function, argument, left in ((of_x, exact_x, exact_kernel), (of_kernel, exact_kernel, exact_x)):
        gradient, upstream = gradient_of(function, argument.astype("float32"))
        upstream = upstream.astype("float64")
        expected = upstream @ left if function is of_x else upstream.T @ left
        magnitudes = np.abs(upstream) @ np.abs(left) if function is of_x else np.abs(upstream.T) @ np.abs(left)
        assert np.all(np.abs(gradient - expected) <= 2.0**-8 * (np.abs(expected) + magnitudes))
