"""Each block of Gemma 2 against float64 numpy, and its config round trip."""

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import ops

from keras_gemma2 import Gemma2Config, backend
from keras_gemma2.layers import (
    AttentionMask,
    DecoderBlock,
    FeedForward,
    GroupedQueryAttention,
    Linear,
    RMSNorm,
    RotaryEmbedding,
    TiedEmbedding,
    apply_rotary,
    attention_mask,
    token_positions,
)
from keras_gemma2.layers.initializers import ELEMENTS_A_BLOCK, FanInNormal

CLOSE = {"rtol": 2e-6, "atol": 2e-6}  # float32: a few roundings of 6e-8 on values near 1


def array(x):
    return ops.convert_to_numpy(x)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def round_trip(layer):
    """The layer rebuilt from its serialized config, through Keras's registry."""
    return keras.layers.deserialize(keras.layers.serialize(layer))


# RMSNorm ---------------------------------------------------------------------------------------------------------------


def test_rms_norm():
    x, scale = normal(2, 3, 7), normal(7, seed=1)
    layer = RMSNorm(epsilon=0.1)
    layer.build(x.shape)
    layer.scale.assign(scale)
    expected = x / np.sqrt((x.astype("float64") ** 2).mean(-1, keepdims=True) + 0.1) * (1 + scale)
    np.testing.assert_allclose(array(layer(x)), expected, **CLOSE)
    assert round_trip(layer).epsilon == 0.1


def test_rms_norm_of_bfloat16_computes_in_float32():
    x = (normal(4, 64) * 3).astype(ml_dtypes.bfloat16)
    layer = RMSNorm(dtype="bfloat16")
    layer.build(x.shape)
    layer.scale.assign(normal(64, seed=1))
    exact = x.astype("float64") / np.sqrt((x.astype("float64") ** 2).mean(-1, keepdims=True) + 1e-6)
    exact *= 1 + array(ops.cast(layer.scale.value, "float32"))
    ours = array(ops.cast(layer(ops.convert_to_tensor(x.astype("float32"), "bfloat16")), "float32"))
    # One rounding to bfloat16, at the end: half a step of 2^-7. Rounding after the norm as well would double it.
    assert np.abs(ours / exact - 1).max() <= 2**-8 + 1e-6


def test_rms_norm_output_dtype():
    layer = RMSNorm(dtype="float16", output_dtype="float32")
    assert keras.backend.standardize_dtype(layer(ops.ones((1, 4), "float16")).dtype) == "float32"
    assert round_trip(layer).output_dtype == "float32"
    narrow = RMSNorm(dtype="mixed_float16")
    narrow.build((1, 4))
    narrow.scale.assign(np.full(4, 1e6))
    assert set(array(ops.cast(narrow(ops.ones((1, 4))), "float32")).ravel()) == {65504.0}  # float16's largest, not infinity


# Rotary embedding ------------------------------------------------------------------------------------------------------


def rotate(x, positions, base):
    """float64 oracle: elements (i, i + half) as a complex number, turned."""
    half = x.shape[-1] // 2
    angles = positions[:, :, None] * base ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, :, None, :]
    return np.concatenate([turned.real, turned.imag], -1)


def test_rotary_embedding():
    x, positions = normal(2, 5, 3, 8), np.array([[0, 1, 2, 3, 4], [0, 0, 7, 8191, 9]])
    layer = RotaryEmbedding(8, max_wavelength=300.0)
    ours = array(apply_rotary(ops.convert_to_tensor(x), *layer(ops.convert_to_tensor(positions))))
    # float32 angles of up to 8191 carry 2^-24 * 8191 = 5e-4 of absolute error.
    np.testing.assert_allclose(ours, rotate(x.astype("float64"), positions, 300.0), atol=3e-3)
    np.testing.assert_allclose(ours[0], rotate(x.astype("float64"), positions, 300.0)[0], **CLOSE)
    again = round_trip(layer)
    assert (again.head_dim, again.max_wavelength) == (8, 300.0)
    with pytest.raises(ValueError, match="head_dim=7"):
        RotaryEmbedding(7)


def test_rotary_symbolic_shapes():
    cos, sin = RotaryEmbedding(8)(keras.Input((None,), dtype="int32"))
    assert cos.shape == sin.shape == (None, None, 1, 4) and cos.dtype == "float32"


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
def test_rotary_stays_float32_inside_a_half_precision_attention(dtype):
    """cos and sin cast to bfloat16 would add their own rounding to the keys'."""
    layer = GroupedQueryAttention(4, 2, 16, dtype=dtype)
    layer.build((None, None, 24))
    x = ops.cast(normal(1, 6, 24), "bfloat16")
    positions = np.array([[0, 11, 500, 3000, 5001, 8000]])
    cos, sin = RotaryEmbedding(16, dtype=dtype)(ops.convert_to_tensor(positions))
    seen = {}

    class Recorder:
        def attend(self, queries, keys, values, soft_cap):
            seen["keys"] = array(ops.cast(keys, "float32"))
            return queries

    layer(x, cos, sin, None, cache=Recorder())
    plain = array(ops.cast(layer.key(x), "float32")).reshape(1, 6, 2, 16)
    exact = np.transpose(rotate(plain.astype("float64"), positions, 10000.0), (0, 2, 1, 3))
    # A single rounding: half a bfloat16 step of the result, and float32's 5e-4 of angle error on values up to 4.
    assert np.all(np.abs(seen["keys"] - exact) <= np.abs(exact) * 2**-8 + 4e-3 * 0.5)


# Masks -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 1, 3])
def test_attention_mask(window):
    padding = np.array([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0], [1, 0, 1, 1, 0, 1]])
    positions = token_positions(ops.convert_to_tensor(padding))
    layer = round_trip(AttentionMask(window))
    ours = array(layer(positions, ops.convert_to_tensor(padding)))
    for row in range(3):
        rank = np.cumsum(padding[row]) - 1
        for q in np.flatnonzero(padding[row]):
            for k in range(6):
                sees = padding[row, k] and rank[k] <= rank[q] and (window is None or rank[q] - rank[k] < window)
                assert ours[row, q, k] == bool(sees), (row, q, k)


def test_window_edges():
    """The query at p sees p - W + 1 and not p - W."""
    positions = ops.arange(10, dtype="int32")[None]
    mask = array(attention_mask(positions, positions, ops.ones((1, 10), "bool"), 4))[0]
    assert mask[9].tolist() == [False] * 6 + [True] * 4
    assert mask.sum(-1).tolist() == [1, 2, 3] + [4] * 7


def test_positions_do_not_depend_on_padding():
    padding = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]], bool)
    positions = array(token_positions(ops.convert_to_tensor(padding)))
    assert [positions[i][padding[i]].tolist() for i in range(3)] == [[0, 1, 2]] * 3
    assert positions.min() == 0 and positions.dtype == "int32"


# Attention, feed-forward, embedding, linear ------------------------------------------------------------------------------


def test_attention_with_every_key_masked_is_finite():
    layer = GroupedQueryAttention(4, 2, 8)
    cos, sin = RotaryEmbedding(8)(ops.zeros((1, 3), "int32"))
    out = array(layer(normal(1, 3, 20), cos, sin, ops.zeros((1, 3, 3), "bool")))
    assert out.shape == (1, 3, 20) and np.isfinite(out).all()


def test_attention_config(tiny):
    layer = round_trip(GroupedQueryAttention(6, 2, 16, 20, 5.0, dtype="mixed_bfloat16"))
    assert (layer.num_query_heads, layer.num_key_value_heads, layer.head_dim) == (6, 2, 16)
    assert (layer.query_pre_attn_scalar, layer.logit_soft_cap, layer.compute_dtype) == (20, 5.0, "bfloat16")
    assert GroupedQueryAttention(6, 2, 16).query_pre_attn_scalar == 16
    with pytest.raises(ValueError, match="num_query_heads=5, num_key_value_heads=2"):
        GroupedQueryAttention(5, 2, 16)


def test_feed_forward_is_tanh_geglu():
    x = normal(2, 3, 6)
    layer = round_trip(FeedForward(10))
    layer.build(x.shape)
    gate, up, down = (array(p.kernel).astype("float64") for p in (layer.gate, layer.up, layer.down))
    g = 3 * x @ gate.T
    gelu = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
    np.testing.assert_allclose(array(layer(3 * x)), (gelu * (3 * x @ up.T)) @ down.T, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("hidden, rounded", [(2304, 48.0), (3584, 59.75), (4608, 68.0)])
def test_embedding_scale_is_rounded_to_the_compute_dtype(hidden, rounded):
    layer = TiedEmbedding(3, hidden, dtype="bfloat16", embeddings_initializer="ones")
    assert set(array(ops.cast(layer(np.array([[1]])), "float32")).ravel()) == {rounded}
    exact = TiedEmbedding(3, hidden, embeddings_initializer="ones")
    np.testing.assert_allclose(array(exact(np.array([[1]]))), np.sqrt(hidden), rtol=1e-6)


def test_embedding_and_logits_share_the_table():
    layer = round_trip(TiedEmbedding(11, 6, logit_soft_cap=0.5))
    ids, hidden = np.array([[0, 10, 3]]), normal(2, 4, 6)
    table = array(layer(ids, reverse=False)) / np.sqrt(6)
    np.testing.assert_allclose(table[0], array(layer.embeddings)[[0, 10, 3]], **CLOSE)
    logits = hidden @ array(layer.embeddings).astype("float64").T
    np.testing.assert_allclose(array(layer(hidden, reverse=True)), 0.5 * np.tanh(logits / 0.5), **CLOSE)
    assert len(layer.weights) == 1


def test_logits_of_half_precision_are_float32():
    layer = TiedEmbedding(300, 64, dtype="bfloat16", logit_soft_cap=None)
    layer.build()
    logits = array(layer(ops.cast(normal(1, 64), "bfloat16"), reverse=True))
    assert logits.dtype == "float32"


@pytest.mark.parametrize("bad", [-1, 11, 2**30])
def test_an_unknown_id_gives_nan_in_compiled_code(bad):
    """Ids cannot be checked there; NaN is the same, and seen, on every backend."""
    layer = TiedEmbedding(11, 6)
    out = array(layer(np.array([[3, bad]], "int32")))
    assert np.isfinite(out[0, 0]).all() and np.isnan(out[0, 1]).all()


def test_linear():
    x = normal(2, 3, 5)
    layer = round_trip(Linear(7))
    layer.build(x.shape)
    expected = x.astype("float64") @ array(layer.kernel).astype("float64").T
    np.testing.assert_allclose(array(layer(x)), expected, **CLOSE)
    assert tuple(layer.kernel.shape) == (7, 5) and layer.compute_output_shape((2, 3, 5)) == (2, 3, 7)
    assert layer(keras.Input((None, 5))).shape == (None, None, 7)


def test_decoder_block_config(tiny):
    block = round_trip(DecoderBlock(Gemma2Config(**tiny), name="a_block", dtype="mixed_bfloat16"))
    assert block.config == Gemma2Config(**tiny) and block.name == "a_block" and block.compute_dtype == "bfloat16"
    x = keras.Input((None, 42), dtype="bfloat16")
    cos, sin = RotaryEmbedding(16)(keras.Input((None,), dtype="int32"))
    assert block(x, cos, sin, keras.Input((None, None), dtype="bool")).shape == (None, None, 42)
    assert len(block.weights) == 11


def test_dropout_acts_in_training_only(tiny):
    block = DecoderBlock(Gemma2Config(**{**tiny, "dropout": 0.5}))
    x = ops.convert_to_tensor(normal(1, 4, 42))
    cos, sin = RotaryEmbedding(16)(ops.arange(4, dtype="int32")[None])
    mask = ops.ones((1, 4, 4), "bool")
    calm = [array(block(x, cos, sin, mask)) for _ in range(2)]
    np.testing.assert_array_equal(*calm)
    assert np.abs(array(block(x, cos, sin, mask, training=True)) - calm[0]).max() > 0.1


# Initializer -----------------------------------------------------------------------------------------------------------


def test_initializer_statistics_and_seed():
    shape = (ELEMENTS_A_BLOCK // 64 + 13, 64)  # more than one block, the last a short one
    a, b = array(FanInNormal(seed=3)(shape, "float32")), array(FanInNormal(seed=3)(shape, "float32"))
    np.testing.assert_array_equal(a, b)
    # 4.2 million draws: the mean's standard error is 6e-5, the deviation's 4e-5 of it.
    assert abs(a.mean()) < 5e-4 and abs(a.std() * 8 - 1) < 3e-3
    assert np.abs(a[-13:]).min() > 0 and len(np.unique(a[:, 0])) > 60000
    half = array(ops.cast(FanInNormal(seed=3)((40, 8), "bfloat16"), "float32"))
    exact = array(FanInNormal(seed=3)((40, 8), "float32"))
    np.testing.assert_allclose(half, exact, rtol=2**-8)


def test_initializer_follows_the_global_seed():
    def draw():
        keras.utils.set_random_seed(5)
        return [array(FanInNormal()((3, 4), "float32")) for _ in range(2)]

    first, second = draw(), draw()
    np.testing.assert_array_equal(first, second)
    assert np.abs(first[0] - first[1]).max() > 0.01


@pytest.mark.parametrize("units, width", [(7, 5), (1000, 2304)])  # the second in several blocks of rows and a rest
def test_bfloat16_products_in_compiled_code(units, width):
    """On CPUs the kernel is widened block by block there, and must give the float64 product."""
    layer = Linear(units, dtype="bfloat16")
    layer.build((None, width))
    x = ops.cast(keras.random.normal((2, 3, width), seed=5), "bfloat16")
    run = backend.compile_function(lambda donated, x: layer(x), layer.variables)
    kernel, rows = (ops.convert_to_numpy(ops.cast(value, "float32")).astype("float64") for value in (layer.kernel, x))
    for factor in (1.0, -2.0):  # an assignment in between is seen
        layer.kernel.assign(layer.kernel * (1.0 if factor == 1.0 else -2.0))
        out = ops.convert_to_numpy(ops.cast(run((), x), "float32"))
        expected = rows @ (factor * kernel).T
        # Sums are in float32; the result is rounded to 8 bits of mantissa.
        assert np.abs(out - expected).max() <= 2**-8 * np.abs(expected).max()


def gradients(loss, *values):
    """The gradients of `loss(*values)`, by the running backend."""
    name = keras.backend.backend()
    if name == "jax":
        import jax

        return jax.grad(loss, argnums=tuple(range(len(values))))(*values)
    if name == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(values)
            result = loss(*values)
        return tape.gradient(result, values)
    values = [value.detach().requires_grad_() for value in values]
    loss(*values).backward()
    return [value.grad for value in values]


def test_gradients_of_bfloat16_products():
    """TensorFlow's product in blocks has a gradient of its own."""
    upstream = normal(3, 1000, seed=1)
    x, kernel = (ops.cast(normal(*shape, seed=shape[0]), "bfloat16") for shape in ((3, 2304), (1000, 2304)))

    def loss(x, kernel):
        return ops.sum(backend.linear(x, kernel, "bfloat16", float32_output=True) * ops.convert_to_tensor(upstream))

    ours = [array(ops.cast(value, "float32")) for value in gradients(loss, x, kernel)]
    rows, weights = (array(ops.cast(value, "float32")).astype("float64") for value in (x, kernel))
    for gradient, expected in zip(ours, (upstream @ weights, upstream.T @ rows)):
        # The upstream gradient and the result are rounded to 8 bits of mantissa.
        assert np.abs(gradient - expected).max() <= 2**-6 * np.abs(expected).max()


@pytest.mark.parametrize("width", [7, 200_001])  # a row is more than PyTorch takes at a time
def test_gated_activation_and_its_gradients(width):
    gate, up, upstream = (3 * normal(2, 3, width, seed=seed) for seed in range(3))

    def loss(gate, up):
        return ops.sum(backend.gated_gelu(gate, up) * ops.convert_to_tensor(upstream))

    of_gate, of_up = (array(x) for x in gradients(loss, ops.convert_to_tensor(gate), ops.convert_to_tensor(up)))
    wide = gate.astype("float64")
    inner = np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)
    activated = 0.5 * wide * (1 + np.tanh(inner))
    slope = 0.5 * (1 + np.tanh(inner)) + 0.5 * wide * (1 - np.tanh(inner) ** 2) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * wide**2)
    # `1 + tanh` loses digits where the gate is far below 0: an absolute error of 6e-8 there, times values of up to 15 three times.
    tolerance = {"rtol": 2e-5, "atol": 3e-4}
    np.testing.assert_allclose(array(backend.gated_gelu(*map(ops.convert_to_tensor, (gate, up)))), activated * up, **tolerance)
    np.testing.assert_allclose(of_up, upstream * activated, **tolerance)
    np.testing.assert_allclose(of_gate, upstream * up * slope, **tolerance)
