"""The loss in chunks against the plain one on the logits: values, gradients, metrics, what is never made."""

import importlib

import keras
import numpy as np
import pytest
from conftest import TINY
from keras import ops

from keras_gemma2 import Gemma2Backbone, Gemma2CausalLM, backend
from keras_gemma2.training import cross_entropy

# float32 sums in another order, as a share of the largest gradient of a variable.
TOLERANCE = 1e-5
ROWS, LENGTH = 3, 11


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 4 tokens and tiles of 40 of the vocabulary's 97, so that there are several, and one that is not full."""
    monkeypatch.setattr(cross_entropy, "MAX_ROWS", 4)
    frozen = importlib.import_module(f"keras_gemma2.backend.{keras.backend.backend()}_frozen_loss")
    if hasattr(frozen, "TILE"):
        monkeypatch.setattr(frozen, "TILE", 40)


def model(dtype="float32", scale=0.3, **overrides):
    keras.utils.set_random_seed(3)
    backbone = Gemma2Backbone(**{**TINY, "num_layers": 2, **overrides}, dtype=dtype)
    draw = np.random.default_rng(1)
    for variable in backbone.trainable_variables:
        if len(variable.shape) == 1:
            variable.assign(scale * draw.standard_normal(variable.shape))
    return Gemma2CausalLM(backbone)


def batch(weights="some"):
    draw = np.random.default_rng(2)
    x = {"token_ids": draw.integers(1, 97, (ROWS, LENGTH)).astype("int32"), "padding_mask": np.ones((ROWS, LENGTH), "int32")}
    y = draw.integers(1, 97, (ROWS, LENGTH)).astype("int32")
    of = {
        "some": draw.uniform(0.2, 2, (ROWS, LENGTH)) * (draw.uniform(size=(ROWS, LENGTH)) < 0.6),
        "all": np.ones((ROWS, LENGTH)),
        "rows": np.array([1.0, 0.0, 0.5]),
        "one": np.eye(1, ROWS * LENGTH, 17).reshape(ROWS, LENGTH),
        "none": np.zeros((ROWS, LENGTH)),
    }
    return x, y, of[weights].astype("float32")


def plain_loss():
    """Keras's own, by a name that the package does not know."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return lambda labels, logits: loss.call(labels, logits)


def trained(lm, loss, data, optimizer=None, **kwargs):
    """The loss of one step of plain descent at rate 1, and by how much each variable changed: its gradient."""
    before = [ops.convert_to_numpy(ops.cast(v.value, "float32")) for v in lm.trainable_variables]
    lm.compile(optimizer=optimizer or keras.optimizers.SGD(1.0), loss=loss, **kwargs)
    logs = lm.train_on_batch(*data, return_dict=True)
    after = [ops.convert_to_numpy(ops.cast(v.value, "float32")) for v in lm.trainable_variables]
    return {k: float(v) for k, v in logs.items()}, [a - b for a, b in zip(before, after)]


def assert_close(found, expected, tolerance=TOLERANCE):
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one - other).max() <= tolerance * np.abs(other).max() + 1e-8


@pytest.mark.parametrize("weights", ["some", "all", "rows", "one"])
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_loss_and_gradients_are_the_plain_ones(weights, run_eagerly):
    data = batch(weights)
    logs, gradients = trained(model(), "auto", data, run_eagerly=run_eagerly)
    expected, plain = trained(model(), plain_loss(), data, run_eagerly=run_eagerly)
    assert logs["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
    assert logs["sparse_categorical_accuracy"] == pytest.approx(expected["sparse_categorical_accuracy"], abs=1e-6)
    assert_close(gradients, plain)
    assert all(np.abs(g).max() > 1e-6 for g in plain)
    total = np.broadcast_to(data[2] if data[2].ndim == 2 else data[2][:, None], data[1].shape).sum()
    assert logs["perplexity"] == pytest.approx(np.exp(expected["loss"] * ROWS * LENGTH / total), rel=1e-4)


@pytest.mark.parametrize("cap", [None, 0.5])
def test_the_cap_is_differentiated(cap):
    """0.5: most logits are in the bend."""
    data = batch()
    _, gradients = trained(model(final_logit_soft_cap=cap), "auto", data)
    assert_close(gradients, trained(model(final_logit_soft_cap=cap), plain_loss(), data)[1])


@pytest.mark.parametrize("reduction, rate", [("sum", 0.1), ("mean_with_sample_weight", 1.0)])
def test_reductions(reduction, rate):
    data = batch()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
    lm, plain = model(), model()
    found = trained(lm, loss, data, optimizer=keras.optimizers.SGD(rate))
    expected = trained(plain, loss, data, optimizer=keras.optimizers.SGD(rate), weighted_metrics=["sparse_categorical_accuracy"])
    assert lm._is_chunked and not plain._is_chunked
    assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=TOLERANCE)
    assert_close(found[1], expected[1], 5e-5)  # differences of weights before and after a step: their own last bits


@pytest.mark.parametrize("frozen", ["embedding", "blocks"])
@pytest.mark.parametrize("weights", ["some", "rows", "one", "none"])
def test_what_is_frozen_gets_no_gradient(frozen, weights):
    """And a frozen table, whose logits are made another way, gives the same loss."""

    def freeze():
        lm = model(final_logit_soft_cap=None if weights == "rows" else 3.0)
        lm.backbone.token_embedding.trainable = frozen != "embedding"
        for block in lm.backbone.transformer_layers:
            block.trainable = frozen != "blocks"
        return lm

    data = batch(weights)
    logs, gradients = trained(freeze(), "auto", data)
    expected, plain = trained(freeze(), plain_loss(), data)
    assert logs["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
    assert logs["sparse_categorical_accuracy"] == pytest.approx(expected["sparse_categorical_accuracy"], abs=1e-6)
    assert_close(gradients, plain)


def test_a_frozen_table_is_evaluated_as_it_is_trained():
    data = batch()
    lm, plain = model(), model()
    for m, loss in ((lm, "auto"), (plain, plain_loss())):
        m.backbone.token_embedding.trainable = False
        m.compile(loss=loss)
    found, expected = (m.test_on_batch(*data, return_dict=True) for m in (lm, plain))
    assert found["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
    assert lm.backbone.token_embedding.frozen_float32_table is not None


def test_mixed_precision():
    data = batch()
    logs, gradients = trained(model("mixed_bfloat16"), "auto", data)
    expected, plain = trained(model("mixed_bfloat16"), plain_loss(), data)
    assert logs["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    assert_close(gradients, plain, 0.05)  # of bfloat16's 8 bits, through two layers


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_quantized_weights(mode):
    def quantized():
        lm = model()
        lm.quantize(mode)
        return lm

    data = batch()
    logs, gradients = trained(quantized(), "auto", data)
    expected, plain = trained(quantized(), plain_loss(), data)
    assert logs["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert_close(gradients, plain, 5e-3)  # int8 products on CPU round activations, and depend on how many rows they get


def test_evaluate_and_fit_and_files(tmp_path):
    x, y, weights = batch()
    lm, plain = model(), model()
    lm.compile(optimizer=keras.optimizers.Adam(0.01))
    plain.compile(optimizer=keras.optimizers.Adam(0.01), loss=plain_loss())
    ours, other = (m.evaluate(x, y, sample_weight=weights, batch_size=2, verbose=0, return_dict=True) for m in (lm, plain))
    assert set(ours) == {"loss", "sparse_categorical_accuracy", "perplexity"}
    assert ours["loss"] == pytest.approx(other["loss"], rel=TOLERANCE)
    histories = [m.fit(x, y, sample_weight=weights, batch_size=2, epochs=3, shuffle=False, verbose=0).history for m in (lm, plain)]
    np.testing.assert_allclose(histories[0]["loss"], histories[1]["loss"], rtol=1e-4)  # Adam divides by small second moments
    assert histories[0]["perplexity"][-1] < histories[0]["perplexity"][0]
    assert lm.predict(x, verbose=0).shape == (ROWS, LENGTH, 97) and tuple(lm(x).shape) == (ROWS, LENGTH, 97)
    lm.save(tmp_path / "lm.keras")
    again = keras.models.load_model(tmp_path / "lm.keras")
    saved, now = (m.evaluate(x, y, sample_weight=weights, verbose=0, return_dict=True) for m in (again, lm))
    assert saved == pytest.approx(now, rel=1e-5)


def test_logits_are_made_for_chunks_only(monkeypatch):
    """From the first step on, and for no more chunks than the tokens that count need."""
    lm, seen = model(), []
    x, y, weights = batch("one")
    lm.compile()
    embedding = type(lm.backbone.token_embedding)
    product = embedding.uncapped_logits

    def recorded(self, hidden):
        seen.append(tuple(hidden.shape))
        return product(self, hidden)

    monkeypatch.setattr(embedding, "uncapped_logits", recorded)
    monkeypatch.setattr(embedding, "_logits", lambda *args: pytest.fail("all logits at once"))
    for step in ("train", "test"):
        lm.train_function = lm.test_function = None
        getattr(lm, f"{step}_on_batch")(x, y, weights)
        assert seen and all(rows <= 4 for rows, _ in seen)
        if keras.backend.backend() == "torch":  # the others trace their loop, however often it runs
            assert seen == [(1, 42)]
        seen.clear()


def test_tokens_of_weight_0_are_not_looked_at():
    """Hidden states that are not numbers are in no chunk."""
    lm = model()
    labels, weights = np.arange(12).reshape(2, 6), np.zeros((2, 6), "float32")
    hidden = np.random.default_rng(0).standard_normal((2, 6, 42)).astype("float32")
    weights[1, 1] = 2
    hidden[0], hidden[1, 2:] = np.nan, np.nan
    embedding = lm.backbone.token_embedding
    sums = cross_entropy.next_token_sums(embedding, *map(ops.array, (hidden, labels, weights)), False)
    (logits,) = ops.convert_to_numpy(embedding(ops.array(hidden[1, 1:2]), reverse=True)).astype("float64")
    expected = 2 * (np.log(np.exp(logits).sum()) - logits[7])
    assert float(sums["nll"]) == pytest.approx(expected, rel=1e-5) and float(sums["weight"]) == 2


def test_labels_outside_the_vocabulary_are_not_numbers():
    x, y, weights = batch("all")
    lm = model()
    lm.compile()
    y[1, 3] = 97

    def loss():
        return float(keras.Model.test_on_batch(lm, x, y, weights)[0])  # past the check of what is at hand

    assert np.isnan(loss())
    weights[1, 3] = 0
    assert np.isfinite(loss())


def test_all_weights_zero():
    x, y, weights = batch("none")
    logs, gradients = trained(model(), "auto", (x, y, weights))
    assert logs["loss"] == 0 and all((g == 0).all() for g in gradients)


def test_rows_a_chunk(monkeypatch):
    monkeypatch.undo()
    assert cross_entropy.rows_a_chunk(256000) == 64 and cross_entropy.rows_a_chunk(97) == 1024


def test_rows_a_chunk_over_a_frozen_table(monkeypatch):
    """At 2B's sizes: within the rule's bytes, multiples of what it says, and hardly more rows than there are tokens."""
    monkeypatch.undo()
    rule = backend.FROZEN_CHUNKS
    for count in (1, 100, 512, 2048, 8192, 30000):
        rows = cross_entropy.rows_over_frozen_table(count, 2304, 256000)
        logits, gradient = 4 * rows * 256000 * rule.logits_held, 4 * count * 2304
        assert rows == 64 or (rows % rule.multiple == 0 and logits + gradient <= rule.working_bytes)
        assert -(-count // rows) * rows - count < rule.multiple * -(-count // rows)
    assert cross_entropy.rows_over_frozen_table(None, 2304, 256000) == 64
