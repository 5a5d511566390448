"""Attention in blocks of the sequence itself, as training uses it: against float64 numpy, forward and backward."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_gemma2 import Gemma2Backbone, backend
from keras_gemma2.layers import TokenPositions, VisibleKeys, token_positions
from keras_gemma2.layers.trained_attention import attend_in_blocks

CAP = 5.0


def array(x):
    return np.asarray(ops.convert_to_numpy(x), "float64")


def plain_mask(padding, window):
    """bool [B, T, T] by the definition, pair by pair."""
    batch, length = padding.shape
    visible = np.zeros((batch, length, length), bool)
    for row in range(batch):
        rank = {}
        for t in range(length):
            if padding[row, t]:
                members = [u for u in range(t + 1) if padding[row, u] == padding[row, t]]
                rank[t] = len(members) - 1
                for u in members:
                    visible[row, t, u] = window is None or rank[t] - rank[u] < window
    return visible


def plain_attention(queries, keys, values, visible, cap, upstream):
    """Outputs and gradients in float64; queries that see nothing give and take nothing."""
    scores = np.einsum("bkgth,bksh->bkgts", queries, keys)
    capped = scores if cap is None else cap * np.tanh(scores / cap)
    visible = visible[:, None, None]
    weights = np.where(visible, np.exp(capped - capped.max()), 0)
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    heads = np.einsum("bkgts,bksh->bkgth", weights, values)
    to_values = np.einsum("bkgts,bkgth->bksh", weights, upstream)
    to_weights = np.einsum("bkgth,bksh->bkgts", upstream, values)
    to_scores = weights * (to_weights - (to_weights * weights).sum(-1, keepdims=True))
    if cap is not None:
        to_scores *= 1 - (capped / cap) ** 2
    to_queries = np.einsum("bkgts,bksh->bkgth", to_scores, keys)
    return heads, to_queries, np.einsum("bkgts,bkgth->bksh", to_scores, queries), to_values


def differentiated(function, arguments, upstream):
    """The function's value and its gradients, under the backend's own compiler."""
    backend = keras.backend.backend()
    tensors = [ops.convert_to_tensor(x, "float32") for x in arguments]
    upstream = ops.convert_to_tensor(upstream, "float32")
    if backend == "jax":
        import jax

        def run(tensors, upstream):
            value, pull = jax.vjp(lambda *tensors: function(*tensors), *tensors)
            return value, pull(upstream)

        value, gradients = jax.jit(run)(tensors, upstream)
    elif backend == "tensorflow":
        import tensorflow as tf

        @tf.function(jit_compile=True)
        def run(tensors, upstream):
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                value = function(*tensors)
            return value, tape.gradient(value, tensors, output_gradients=upstream)

        value, gradients = run(tensors, upstream)
    else:
        tensors = [x.requires_grad_() for x in tensors]
        value = function(*tensors)
        value.backward(upstream)
        gradients = [x.grad for x in tensors]
    return [array(x.detach() if backend == "torch" else x) for x in (value, *gradients)]


PADDINGS = {
    "full": [[1] * 21, [1] * 21],
    "padded": [[0] * 6 + [1] * 9 + [0] * 2 + [1] * 4, [1] * 5 + [0] * 16],
    "packed": [[1] * 7 + [2] * 1 + [3] * 10 + [0] * 3, [1] * 2 + [2] * 13 + [0] * 2 + [2] * 2 + [3] * 2],
    "empty": [[0] * 21, [1] * 21],
}


@pytest.mark.parametrize("window", [None, 3, 9])
@pytest.mark.parametrize("cap", [None, CAP])
@pytest.mark.parametrize("padding", PADDINGS)
def test_values_and_gradients(padding, cap, window):
    padding = np.array(PADDINGS[padding])
    rng = np.random.default_rng(7)
    queries, upstream = rng.normal(0, 2, (2, 2, 2, 3, 21, 8))  # scores up to 20, four times the cap
    keys, values = rng.normal(0, 1, (2, 2, 2, 21, 8))
    first, index = VisibleKeys(window)(ops.convert_to_tensor(padding, "int32"))

    def function(queries, keys, values):
        return attend_in_blocks(queries, keys, values, first, index, cap, block=5)

    ours = differentiated(function, (queries, keys, values), upstream)
    visible = plain_mask(padding, window)
    expected = plain_attention(queries, keys, values, visible, cap, upstream)
    for name, found, wanted in zip(("heads", "queries", "keys", "values"), ours, expected):
        # Sums of up to 21 float32 products of sizes up to 20.
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=5e-5, err_msg=name)
    assert np.abs(expected[2]).max() > 0.1 and not np.isnan(ours[0]).any()


def test_blocks_that_no_query_sees_are_left_out():
    """Keys of NaN in them are not looked at."""
    keys = np.random.default_rng(0).normal(size=(1, 1, 20, 4)).astype("float32")
    padding = np.array([[1] * 5 + [2] * 10 + [0] * 5])
    first, index = VisibleKeys(4)(ops.convert_to_tensor(padding))
    queries = ops.ones((1, 1, 1, 20, 4))
    clean = array(attend_in_blocks(queries, ops.convert_to_tensor(keys), ops.convert_to_tensor(keys), first, index, CAP, block=5))
    spoilt = keys.copy()
    spoilt[:, :, :5] = spoilt[:, :, 15:] = np.nan
    spoilt = array(
        attend_in_blocks(queries, ops.convert_to_tensor(spoilt), ops.convert_to_tensor(spoilt), first, index, CAP, block=5)
    )
    np.testing.assert_array_equal(spoilt[..., 5:15, :], clean[..., 5:15, :])
    assert np.isnan(spoilt[..., :5, :]).all() and np.all(clean[..., 15:, :] == 0)


def packed_rows(lengths, padding, vocabulary=31):
    ids = np.random.default_rng(5).integers(0, vocabulary, (1, sum(lengths) + padding)).astype("int32")
    numbers = np.concatenate([np.full(n, i + 1) for i, n in enumerate(lengths)] + [np.zeros(padding, int)])
    return ids, numbers[None].astype("int32")


def small_backbone(**kwargs):
    keras.utils.set_random_seed(3)
    backbone = Gemma2Backbone(31, 2, 4, 2, 24, 40, 8, sliding_window_size=70, **kwargs)
    rng = np.random.default_rng(11)
    for weight in backbone.weights:
        weight.assign(ops.convert_to_tensor(rng.normal(0, 0.6, weight.shape), weight.dtype))
    return backbone


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_long_row_gives_what_masks_of_all_pairs_give(is_compiled):
    """Through two layers, with samples longer and shorter than a block and than the window, and what they give alone."""
    backbone, (ids, numbers) = small_backbone(), packed_rows([300, 13, 290], 17)
    inputs = {"token_ids": ids, "padding_mask": numbers}
    ours = array(backbone.predict_on_batch(inputs) if is_compiled else backbone(inputs))
    positions = token_positions(ops.convert_to_tensor(numbers))
    masks = {kind: ops.convert_to_tensor(plain_mask(numbers, backbone.config.window(kind))) for kind in ("local", "global")}
    expected = array(backbone.layer_norm(backbone.run_blocks(ops.convert_to_tensor(ids), positions, masks)))
    real = numbers[0] > 0
    # Float32 sums in another order, through two layers; hidden states are of size 1.
    np.testing.assert_allclose(ours[0, real], expected[0, real], rtol=1e-4, atol=1e-4)
    for sample in (1, 2, 3):
        alone = ids[:, numbers[0] == sample]
        alone = array(backbone({"token_ids": alone, "padding_mask": np.ones_like(alone)}))
        np.testing.assert_allclose(ours[0, numbers[0] == sample], alone[0], rtol=1e-4, atol=1e-4)


def test_a_long_row_in_bfloat16():
    backbone, (ids, numbers) = small_backbone(dtype="bfloat16"), packed_rows([300], 17)
    inputs = {"token_ids": ids, "padding_mask": numbers}
    positions = token_positions(ops.convert_to_tensor(numbers))
    masks = {kind: ops.convert_to_tensor(plain_mask(numbers, backbone.config.window(kind))) for kind in ("local", "global")}
    expected = array(ops.cast(backbone.layer_norm(backbone.run_blocks(ops.convert_to_tensor(ids), positions, masks)), "float32"))
    ours = array(ops.cast(backbone(inputs), "float32"))
    # Hidden states of size 1 in steps of 2^-8, a few steps of which two layers of rounding make.
    assert np.abs(ours - expected)[0, :300].mean() < 2**-6


def test_positions_of_packed_samples():
    padding = ops.convert_to_tensor([[0, 1, 1, 2, 0, 2, 2, 3, 0], [255] * 9, [1, 1, 2, 3, 4, 5, 6, 7, 8]])
    positions, real = array(token_positions(padding)), array(padding) != 0
    assert positions[0][real[0]].tolist() == [0, 1, 0, 1, 2, 0]
    assert positions[1].tolist() == list(range(9)) and positions[2].tolist() == [0, 1] + [0] * 7


def test_configs():
    policy = keras.DTypePolicy("mixed_bfloat16")
    layers = [
        keras.layers.deserialize(keras.layers.serialize(x)) for x in (TokenPositions(dtype=policy), VisibleKeys(3, dtype=policy))
    ]
    assert layers[1].sliding_window_size == 3
    assert layers[0].dtype_policy.name == layers[1].dtype_policy.name == "mixed_bfloat16"


def test_gated_gelu(monkeypatch):
    """Values and gradients in float64; on PyTorch the rows of the gradient are cut to several blocks, the last not full."""
    if keras.backend.backend() == "torch":
        from keras_gemma2.backend import torch_products

        monkeypatch.setattr(torch_products, "ELEMENTS_A_BLOCK", 4 * 6)
    rng = np.random.default_rng(4)
    gate, up, upstream = rng.normal(0, 2, (3, 2, 5, 6))
    found = differentiated(backend.gated_gelu, (gate, up), upstream)
    c, cubic = np.sqrt(2 / np.pi), 0.044715
    t = np.tanh(c * (gate + cubic * gate**3))
    gelu = 0.5 * gate * (1 + t)
    slope = 0.5 * (1 + t) + 0.5 * gate * (1 - t**2) * c * (1 + 3 * cubic * gate**2)
    for one, wanted in zip(found, (gelu * up, upstream * up * slope, upstream * gelu), strict=True):
        np.testing.assert_allclose(one, wanted, rtol=1e-5, atol=1e-5)  # float32 of numbers up to 10
