"""Gradient checkpointing: the same losses and gradients, with less kept between the passes."""

import types

import keras
import numpy as np
import pytest
from conftest import TINY
from keras import ops

from keras_gemma2 import Gemma2Backbone, Gemma2CausalLM, layers
from keras_gemma2.layers import attention, feed_forward

# The same operations are done twice; XLA may fuse them otherwise: last bits, as a share of the largest gradient of a variable.
TOLERANCE = 1e-5


def model(checkpointing, dtype="float32", **overrides):
    keras.utils.set_random_seed(3)
    lm = Gemma2CausalLM(Gemma2Backbone(**{**TINY, "num_layers": 2, **overrides}, dtype=dtype))
    draw = np.random.default_rng(1)
    for variable in lm.trainable_variables:
        if len(variable.shape) == 1:
            variable.assign(0.3 * draw.standard_normal(variable.shape))
    if checkpointing:
        lm.enable_gradient_checkpointing()
    return lm


def data(rows=2, length=13):
    draw = np.random.default_rng(2)
    mask = np.ones((rows, length), "int32")
    mask[0, -3:] = 0
    return {"token_ids": draw.integers(1, 97, (rows, length)), "padding_mask": mask}


def trained(lm, run_eagerly=False, steps=1):
    before = [ops.convert_to_numpy(v.value).astype("float32") for v in lm.trainable_variables]
    lm.compile(optimizer=keras.optimizers.SGD(1.0), run_eagerly=run_eagerly)
    losses = [float(lm.train_on_batch(data(), return_dict=True)["loss"]) for _ in range(steps)]
    after = [ops.convert_to_numpy(v.value).astype("float32") for v in lm.trainable_variables]
    return losses, [a - b for a, b in zip(before, after)]


def assert_equal(found, expected, tolerance=TOLERANCE):
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    for one, other in zip(found[1], expected[1], strict=True):
        assert np.abs(other).max() > 1e-7
        assert np.abs(one - other).max() <= tolerance * np.abs(other).max() + 1e-8


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_loss_and_gradients_are_the_same(run_eagerly):
    assert_equal(trained(model(True), run_eagerly), trained(model(False), run_eagerly))


def test_attention_in_blocks(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 8)
    assert_equal(trained(model(True)), trained(model(False)))


def test_mixed_precision():
    # bfloat16 has 8 bits, and what XLA fuses it does not round: a few of its steps, through the layers.
    assert_equal(trained(model(True, "mixed_bfloat16")), trained(model(False, "mixed_bfloat16")), 0.1)


@pytest.mark.parametrize("seed", [None, 7])
def test_dropout_is_drawn_once_a_step(seed):
    """Its masks are those of the forward pass in the backward pass, too, and others in the next step.

    Keras draws them from PyTorch's own generator, unless a layer was given a seed.
    """

    def run(checkpointing):
        lm = model(checkpointing, dropout=0.4)
        for block in lm.backbone.transformer_layers:
            block.dropout.seed_generator._initial_seed = seed
        keras.utils.set_random_seed(5)
        return trained(lm, steps=2)

    plain = run(False)
    assert_equal(run(True), plain, 1e-4)  # two steps of rate 1
    assert plain[0][0] != plain[0][1]


def test_it_can_be_switched_off_after_a_step():
    lm = model(True)
    first = trained(lm)
    lm.disable_gradient_checkpointing()
    assert not any(block.recomputes for block in lm.backbone.transformer_layers)
    assert_equal(trained(model(False)), first)
    assert np.isfinite(trained(lm)[0]).all()


def test_calls_outside_of_training_are_not_touched():
    lm, plain = model(True), model(False)
    difference = np.abs(ops.convert_to_numpy(lm(data())) - ops.convert_to_numpy(plain(data()))).max()
    assert difference < 1e-5
    block = lm.backbone.transformer_layers[0]
    assert isinstance(block, layers.DecoderBlock) and block.recomputes
    found, expected = (m.generate(data(), max_length=20, stop_token_ids=None)["token_ids"] for m in (lm, plain))
    assert np.array_equal(ops.convert_to_numpy(found), ops.convert_to_numpy(expected))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_are_computed_again(checkpointing, monkeypatch):
    """Counted by calls of a layer inside; JAX traces it once and marks what is to be computed again."""
    lm, calls = model(checkpointing), []
    layer = lm.backbone.transformer_layers[1].feed_forward
    own = layer.call
    monkeypatch.setattr(layer, "call", lambda inputs, **options: calls.append(1) or own(inputs, **options))
    lm.compile(optimizer=keras.optimizers.SGD(1.0), run_eagerly=keras.backend.backend() != "jax")
    if keras.backend.backend() != "jax":
        lm.train_on_batch(data())  # builds, too
        calls.clear()
        lm.train_on_batch(data())
        assert len(calls) == 1 + checkpointing
        return
    import jax

    # The feed-forward's own gates are always computed again: not what is counted here.
    plain = types.SimpleNamespace(gated_gelu=lambda gate, up: ops.gelu(gate, approximate=True) * up)
    monkeypatch.setattr(feed_forward, "backend", plain)

    x = {key: value.astype("int32") for key, value in data().items()}

    def loss(values):
        others = [v.value for v in lm.non_trainable_variables]
        return ops.sum(lm.stateless_call(values, others, x, training=True)[0])

    text = str(jax.make_jaxpr(jax.grad(loss))([v.value for v in lm.trainable_variables]))
    assert text.count("prevent_cse=") // len(lm.backbone.transformer_layers) == checkpointing
