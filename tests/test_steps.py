"""Compiled steps and the weights that they do not change."""

import keras
import numpy as np
import pytest
from conftest import TINY
from keras import ops

from keras_gemma2 import Gemma2Backbone, Gemma2CausalLM


def model(dropout=0.0):
    keras.utils.set_random_seed(3)
    lm = Gemma2CausalLM(Gemma2Backbone(**{**TINY, "num_layers": 2, "dropout": dropout}))
    lm.backbone.token_embedding.trainable = False
    lm.backbone.transformer_layers[0].trainable = False
    lm.compile(optimizer=keras.optimizers.SGD(0.5))
    return lm


def data(rows=4, length=7):
    draw = np.random.default_rng(2)
    return {"token_ids": draw.integers(1, 97, (rows, length)), "padding_mask": np.ones((rows, length), "int32")}


def address(variable):
    """Of a variable's memory."""
    if keras.backend.backend() == "jax":
        return variable.value.unsafe_buffer_pointer()
    return variable.value.data_ptr() if keras.backend.backend() == "torch" else variable.value.handle._id


def values(variables):
    return [ops.convert_to_numpy(v.value).copy() for v in variables]


@pytest.mark.parametrize("step", ["fit", "train_on_batch", "evaluate", "predict", "predict_on_batch"])
def test_frozen_weights_stay_where_they_are(step):
    lm = model()
    frozen, trained = lm.non_trainable_weights, lm.trainable_weights
    before, addresses, first = values(frozen), [address(v) for v in frozen], values(trained)
    arguments = {"batch_size": 2, "verbose": 0} if step in ("fit", "evaluate", "predict") else {}
    getattr(lm, step)(data(), **arguments)
    assert [address(v) for v in frozen] == addresses
    assert all((a == b).all() for a, b in zip(before, values(frozen)))
    changed = [not np.array_equal(a, b) for a, b in zip(first, values(trained))]
    assert all(changed) if step in ("fit", "train_on_batch") else not any(changed)


def test_a_layer_frozen_between_two_evaluations():
    """The compiled function is told of other variables than the ones before."""
    lm = model()
    loss = lm.evaluate(data(), verbose=0, return_dict=True)
    lm.backbone.transformer_layers[1].trainable = False
    assert lm.evaluate(data(), verbose=0, return_dict=True) == loss


def test_dropout_draws_anew_in_each_step():
    lm = model(dropout=0.5)
    lm.compile(optimizer=keras.optimizers.SGD(0.0))
    losses = {float(lm.train_on_batch(data(), return_dict=True)["loss"]) for _ in range(3)}
    assert len(losses) == 3


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="Keras's trainer on PyTorch takes one step a call")
def test_several_steps_a_call():
    """Weights after five steps, two at a time, are those of five single ones, to the last bits of another order of sums."""
    found = []
    for steps in (1, 2):
        lm = model()
        lm.compile(optimizer=keras.optimizers.SGD(0.5), steps_per_execution=steps)
        lm.fit(data(rows=10), batch_size=2, shuffle=False, verbose=0)
        found.append(values(lm.trainable_weights))
        assert lm.predict(data(rows=6), batch_size=2, verbose=0).shape == (6, 7, 97)
    assert all(np.abs(a - b).max() < 1e-5 for a, b in zip(*found))


# TensorFlow runs generators in threads of its own, where no Ctrl-C comes.
BREAKS = [OSError] if keras.backend.backend() == "tensorflow" else [OSError, KeyboardInterrupt]


@pytest.mark.parametrize("good", [0, 2])
@pytest.mark.parametrize("step", ["fit", "evaluate", "predict"])
@pytest.mark.parametrize("error", BREAKS)
def test_a_model_keeps_its_weights_when_batches_break_off(step, error, good):
    lm = model()
    before = values(lm.weights)

    def batches():
        for _ in range(good):
            yield data()
        raise error("broken off")

    with pytest.raises((error, Exception), match="broken off"):  # TensorFlow's own kind of exception tells of it
        getattr(lm, step)(batches(), verbose=0)
    after = values(lm.weights)
    assert all(a.shape == b.shape for a, b in zip(before, after))
    moved = not all(np.array_equal(a, b) for a, b in zip(before, after))
    assert moved == (step == "fit" and good > 0)
    lm.evaluate(data(), verbose=0)
