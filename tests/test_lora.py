"""Adapters beside the weights: what they compute, what is trained, switching, merging, generation, files, bad input."""

import keras
import numpy as np
import pytest
from conftest import TINY
from keras import ops
from oracle import numpy_logits

from keras_gemma2 import Gemma2Backbone, Gemma2CausalLM
from keras_gemma2.generation import runner
from keras_gemma2.layers import Linear

SMALL = {**TINY, "num_layers": 2}
IDS = np.random.default_rng(5).integers(1, 97, (2, 11))
X = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}
TOLERANCE = 2e-5  # of the range of the logits: float32 sums in another order
ATTENTION = ["query", "key", "value", "output_projection"]


def model(dtype="float32", **overrides):
    """Weights and norms large enough that caps and windows act; a smaller embedding, or a text repeats one token."""
    keras.utils.set_random_seed(3)
    backbone = Gemma2Backbone(**{**SMALL, **overrides}, dtype=dtype)
    draw = np.random.default_rng(1)
    for path, variable in backbone.named_weights().items():
        if hasattr(variable, "assign"):
            scale = 0.05 if path.startswith("token") else 0.3
            variable.assign(scale * draw.standard_normal(variable.shape))
    return Gemma2CausalLM(backbone)


def fill(lm, name=None, seed=4, scale=0.3):
    draw = np.random.default_rng(seed)
    for factors in lm.backbone.adapter_set.factors(name or lm.active_adapter).values():
        for variable in (factors.lora_a, factors.lora_b):
            variable.assign(scale * draw.standard_normal(variable.shape))


def logits(lm, **kwargs):
    return ops.convert_to_numpy(lm(X, **kwargs))


def texts(lm, count=9):
    return lm.generate(X, max_new_tokens=count, stop_token_ids=None)["token_ids"].tolist()


def assert_close(found, expected, tolerance=TOLERANCE):
    assert np.abs(found - expected).max() <= tolerance * np.ptp(expected)


def merged_float64(lm):
    """The weights with the active adapter added, by hand."""
    weights = {path: np.asarray(ops.convert_to_numpy(v), "float64") for path, v in lm.backbone.named_weights().items()}
    name = lm.active_adapter
    settings = lm.backbone.adapter_set.settings[name]
    for path, factors in lm.backbone.adapter_set.factors(name).items():
        a, b = (array.astype("float64") for array in factors.arrays())
        rank = settings.ranks[path]
        scale = settings.alphas[path] / (np.sqrt(rank) if settings.use_rslora else rank)
        weights[f"{path}/kernel"] = weights[f"{path}/kernel"] + scale * b @ a
    return weights


# What is computed ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets, use_rslora", [("attention", False), ("all", True)])
def test_logits_are_those_of_merged_weights(targets, use_rslora):
    """Against a float64 forward pass over W + scale * B A, by hand."""
    lm = model()
    plain = logits(lm)
    lm.enable_lora(3, 7, targets, use_rslora=use_rslora)
    assert (logits(lm) == plain).all()
    fill(lm)
    expected = np.stack([numpy_logits(merged_float64(lm), lm.backbone.config, row) for row in IDS])
    assert np.abs(expected - plain).max() > 0.3
    assert_close(logits(lm), expected)
    lm.merge_adapter()
    assert_close(logits(lm), expected)
    assert lm.adapter_names == [] and lm.active_adapter is None


def test_a_layer_makes_two_thin_products(monkeypatch):
    """The product of the factors is never made; without factors there is one product, as ever."""
    from keras_gemma2 import backend

    layer = Linear(12, name="alone")
    layer.build((None, 10))
    seen, product = [], backend.linear

    def recorded(x, kernel, *args, **kwargs):
        seen.append(tuple(kernel.shape))
        return product(x, kernel, *args, **kwargs)

    monkeypatch.setattr(backend, "linear", recorded)
    x = np.random.default_rng(0).standard_normal((3, 10)).astype("float32")
    layer(x)
    assert seen == [(12, 10)]
    factors = layer.new_factors("a", 2, 6, 0.0, False)
    layer.add_factors("a", factors)
    factors.lora_b.assign(np.random.default_rng(1).standard_normal((12, 2)))
    seen.clear()
    assert layer.active_adapter is None
    layer(x)
    layer.active_adapter = "a"
    found = ops.convert_to_numpy(layer(x))
    assert seen == [(12, 10), (12, 10), (2, 10), (12, 2)]
    a, b = factors.arrays()
    expected = x @ (ops.convert_to_numpy(layer.kernel) + 3 * b @ a).T
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(a).max() <= 1 / np.sqrt(10) and a.std() > 0.5 / np.sqrt(3 * 10)


@pytest.mark.parametrize(
    "targets, count, some",
    [
        ("attention", 8, "decoder_block_1/attention/output_projection"),
        ("all", 14, "decoder_block_0/feed_forward/down"),
        ("gate_proj", 2, "decoder_block_1/feed_forward/gate"),
        ("decoder_block_0/attention/key", 1, "decoder_block_0/attention/key"),
        (r".*_1/(attention/.*|feed_forward/up)", 5, "decoder_block_1/feed_forward/up"),
        (["query", "v_proj"], 4, "decoder_block_0/attention/value"),
        (("output", "decoder_block_1/feed_forward/up"), 3, "decoder_block_1/feed_forward/up"),
    ],
)
def test_targets(targets, count, some):
    lm = model()
    lm.enable_lora(2, targets=targets)
    found = lm.backbone.adapter_set.factors("default")
    assert len(found) == count and some in found
    assert {v.path for v in lm.trainable_variables} == {f"{path}/default/lora_{f}" for path in found for f in "ab"}


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16", "float16", "int8_from_bfloat16"])
def test_dtypes(dtype):
    """Factors are float32; sums leave in the compute dtype, once rounded."""
    if dtype == "float16":
        with pytest.warns(UserWarning, match="float16"):
            lm = model(dtype)
    else:
        lm = model(dtype)
    lm.enable_lora(3, 7, "all")
    fill(lm)
    assert {v.dtype for v in lm.trainable_variables} == {"float32"}
    compute = lm.backbone.compute_dtype
    layer = lm.backbone.transformer_layers[0].attention.query
    x = np.random.default_rng(0).standard_normal((5, 42)).astype("float32")
    found = layer(ops.cast(x, compute))
    assert keras.backend.standardize_dtype(found.dtype) == compute
    a, b = layer.adapters["default"].arrays()
    kernel = ops.convert_to_numpy(ops.cast(layer.matrix.numpy(), "float32")) + 7 / 3 * b @ a
    found = ops.convert_to_numpy(ops.cast(found, "float32"))
    # Inputs, kernel and factors have 8 bits (11 in float16): an eighth of a unit in sums of tens.
    np.testing.assert_allclose(found, x @ kernel.T, atol=0.01 * np.abs(x @ kernel.T).max())
    half = ops.convert_to_numpy(ops.cast(lm(X), "float32"))
    assert np.isfinite(half).all()


# Training -----------------------------------------------------------------------------------------------------------------


def test_the_factors_alone_are_trained():
    lm = model(num_layers=1)
    lm.compile(optimizer=keras.optimizers.Adam(0.01, beta_1=0.7))
    lm.fit(X, verbose=0)  # builds the optimizer with all weights
    weights = {path: ops.convert_to_numpy(v) for path, v in lm.backbone.named_weights().items()}
    lm.enable_lora(4, 8, "all")
    assert len(lm.trainable_variables) == 2 * 7
    history = lm.fit(X, epochs=6, verbose=0).history
    assert history["loss"][-1] < history["loss"][0] - 0.05 and "perplexity" in history
    assert len(lm.optimizer._trainable_variables) == 14 and float(lm.optimizer.beta_1) == pytest.approx(0.7)
    assert int(lm.optimizer.iterations) == 6
    for path, variable in lm.backbone.named_weights().items():
        assert (ops.convert_to_numpy(variable) == weights[path]).all(), path
    for factors in lm.backbone.adapter_set.factors("default").values():
        assert all(np.abs(array).max() > 0 for array in factors.arrays())


def test_what_was_trainable_is_so_again():
    lm = model()
    lm.backbone.token_embedding.trainable = False
    lm.backbone.transformer_layers[0].trainable = False
    before = [v.path for v in lm.trainable_variables]
    assert len(before) == 12
    lm.enable_lora(2)
    lm.enable_lora(3, name="second")
    assert len(lm.trainable_variables) == 16  # in the frozen block, too
    lm.delete_adapter("default")
    assert lm.active_adapter == "second"
    lm.delete_adapter("second")
    assert [v.path for v in lm.trainable_variables] == before
    assert not lm.backbone.transformer_layers[0].attention.query.trainable


def test_gradients_are_those_of_the_factors():
    """One step of plain descent against differences of the loss over merged weights in float64."""
    lm = model()
    lm.enable_lora(2, 3, ["value", "up"])
    fill(lm)
    weights = merged_float64(lm)
    config = lm.backbone.config

    def loss(weights):
        rows = [numpy_logits(weights, config, row) for row in IDS]
        nll = [np.log(np.exp(r[:-1]).sum(-1)) - r[np.arange(len(row) - 1), row[1:]] for r, row in zip(rows, IDS)]
        return np.sum(nll) / IDS.size  # Keras divides by all tokens

    path, step = "decoder_block_1/feed_forward/up", 1e-5
    factors = lm.backbone.adapter_set.factors("default")[path]
    before = [array.astype("float64") for array in factors.arrays()]
    lm.compile(optimizer=keras.optimizers.SGD(1.0))
    assert lm.train_on_batch(X)[0] == pytest.approx(loss(weights), rel=1e-5)
    after = factors.arrays()
    for which, places in ((0, [(0, 3), (1, 40)]), (1, [(5, 0), (79, 1)])):
        for place in places:
            found = before[which][place] - after[which][place]
            losses = []
            for sign in (1, -1):
                moved = [array.copy() for array in before]
                moved[which][place] += sign * step
                delta = 1.5 * (moved[1] @ moved[0] - before[1] @ before[0])
                losses.append(loss({**weights, f"{path}/kernel": weights[f"{path}/kernel"] + delta}))
            # The step is taken in float32, of which a factor has 1e-8 and the gradient 1e-4.
            assert found == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=2e-3, abs=1e-7)


def test_dropout_is_seeded_and_in_training_only():
    def trained(rate):
        lm = model(num_layers=1)
        keras.utils.set_random_seed(9)
        lm.enable_lora(2, 4, "all", dropout=rate)
        fill(lm)
        plain = logits(lm)
        return lm, plain, [logits(lm, training=True) for _ in range(2)]

    lm, plain, (first, second) = trained(0.4)
    assert np.abs(first - second).max() > 0.01 and (logits(lm) == plain).all()
    again = trained(0.4)[2]
    assert (again[0] == first).all() and (again[1] == second).all()
    lm, plain, (first, second) = trained(0.0)
    assert_close(first, plain)
    assert not any("seed" in v.path for v in lm.backbone.variables)
    lm.compile(optimizer=keras.optimizers.SGD(0.01))
    assert np.isfinite(lm.fit(X, verbose=0).history["loss"]).all()


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_training_over_quantized_weights(mode, tmp_path):
    """QLoRA: trained, saved, loaded over the same codes, merged, exported."""
    lm = model(num_layers=1)
    lm.quantize(mode)
    codes = ops.convert_to_numpy(lm.backbone.transformer_layers[0].attention.query.kernel)
    lm.enable_lora(4, 16, "all", dropout=0.1)
    lm.compile(optimizer=keras.optimizers.Adam(0.02))
    losses = lm.fit(X, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < losses[0] - 0.1
    assert (ops.convert_to_numpy(lm.backbone.transformer_layers[0].attention.query.kernel) == codes).all()
    expected = logits(lm)
    lm.save_adapter(tmp_path / "adapter")
    again = model(num_layers=1)
    again.quantize(mode)
    assert np.abs(logits(again) - expected).max() > 0.05
    again.load_adapter(tmp_path / "adapter")
    assert_close(logits(again), expected, 2e-3)  # int8 products round activations on CPU
    wanted = merged_float64(lm)
    lm.export_to_transformers(tmp_path / "hf", dtype="float32")
    exported = _from_folder(tmp_path / "hf")
    for path, weight in exported.backbone.named_weights().items():
        np.testing.assert_allclose(ops.convert_to_numpy(weight), wanted[path], atol=1e-6, err_msg=path)
    lm.save_to_preset(tmp_path / "preset")
    assert lm.active_adapter == "default" and (logits(lm) == expected).all()
    lm.merge_adapter()
    saved = _from_folder(tmp_path / "preset")
    assert saved.backbone.dtype_policy.quantization_mode == mode and saved.adapter_names == []
    for path, weight in lm.backbone.named_weights().items():
        other = saved.backbone.named_weights()[path]
        assert (np.asarray(_numpy(weight)) == np.asarray(_numpy(other))).all(), path
        steps = np.abs(wanted[path]).max() / (127 if mode == "int8" else 7)
        assert np.abs(_numpy(weight) - wanted[path]).max() <= steps, path


def _numpy(weight):
    return weight.numpy() if hasattr(weight, "codes") else ops.convert_to_numpy(weight)


def _from_folder(path):
    with pytest.warns(UserWarning, match="no tokenizer"):
        return Gemma2CausalLM.from_preset(path)


def test_a_model_quantized_under_its_adapter():
    lm = model(num_layers=1)
    lm.enable_lora(3, targets="all")
    fill(lm)
    expected, text = logits(lm), texts(lm)
    lm.quantize("int8")
    other = model(num_layers=1)
    other.quantize("int8")
    other.enable_lora(3, targets="all")
    fill(other)
    assert_close(logits(lm), logits(other), 1e-6)
    assert np.abs(logits(lm) - expected).max() > 1e-3
    assert lm.adapter_names == ["default"] and len(lm.trainable_variables) == 14
    assert len(texts(lm)[0]) == len(text[0])
    lm.delete_adapter("default")
    assert len(lm.trainable_variables) == 5  # the norms; codes stay as they are


# Switching and generation -------------------------------------------------------------------------------------------------


def test_switching():
    lm = model(num_layers=1)
    outputs = {None: (logits(lm), texts(lm))}
    lm.compile(optimizer=keras.optimizers.Adam(0.01))
    for seed, (name, targets) in enumerate({"first": "attention", "second": ["up", "query"]}.items()):
        lm.enable_lora(2 + seed, 9, targets, name=name)
        fill(lm, seed=seed)
        outputs[name] = logits(lm), texts(lm)
        assert_close(lm.predict(X, verbose=0), outputs[name][0])
    assert len({str(text) for _, text in outputs.values()}) == 3
    assert lm.adapter_names == ["first", "second"] and lm.active_adapter == "second"

    def check(name):
        assert_close(logits(lm), outputs[name][0])
        assert_close(lm.predict(X, verbose=0), outputs[name][0])
        assert texts(lm) == outputs[name][1]

    for name in ("first", "second", "first"):
        lm.set_adapter(name)
        assert {v.path.split("/")[-2] for v in lm.trainable_variables} == {name}
        check(name)
    with lm.disable_adapter():
        assert lm.active_adapter is None
        check(None)
        with pytest.raises(RuntimeError, match="set_adapter.*first.*second"):
            lm.fit(X, verbose=0)
    check("first")
    other = [factors.arrays() for factors in lm.backbone.adapter_set.factors("second").values()]
    lm.fit(X, verbose=0)
    state = int(lm.optimizer.iterations)
    with lm.disable_adapter():
        lm.evaluate(X, verbose=0)
    lm.fit(X, verbose=0)
    assert int(lm.optimizer.iterations) == state + 1  # the optimizer is the same one
    for arrays, factors in zip(other, lm.backbone.adapter_set.factors("second").values()):
        assert all((one == two).all() for one, two in zip(arrays, factors.arrays()))
    lm.set_adapter("second")
    check("second")
    lm.fit(X, verbose=0)
    assert int(lm.optimizer.iterations) == 1  # a fresh one
    lm.delete_adapter("second")
    assert lm.active_adapter is None and lm.trainable_variables == []
    check(None)


def test_generation_follows_the_values(monkeypatch):
    """Against the same model with merged weights: greedy texts, streams, scores; after each change."""
    monkeypatch.setattr(runner, "CHUNK", 16)
    lm, merged = model(num_layers=1), model(num_layers=1)

    def check():
        for path, weight in merged_float64(lm).items():
            merged.backbone.named_weights()[path].assign(weight)
        expected = texts(merged)
        assert texts(lm) == expected
        streamed = list(lm.stream(X, max_new_tokens=9, stop_token_ids=None))
        assert [[token for row, token in streamed if row == i] for i in range(2)] == [row[11:] for row in expected]
        for one, two in zip(lm.score(X), merged.score(X)):
            np.testing.assert_allclose(one, two, atol=2e-4)
        return expected

    lm.enable_lora(3, 9, "all")
    seen = [check()]
    fill(lm)
    seen.append(check())
    fill(lm, seed=11)
    seen.append(check())
    lm.compile(optimizer=keras.optimizers.SGD(2.0))
    lm.fit(X, verbose=0)
    seen.append(check())
    lm.enable_lora(2, 9, "attention")
    fill(lm, seed=12)
    seen.append(check())
    assert len({str(text) for text in seen}) >= 4


@pytest.mark.backend_free
def test_a_text_that_was_begun_goes_on_with_its_adapter():
    lm = model(num_layers=1)
    lm.enable_lora(3, 9, "all")
    fill(lm)
    expected, row = texts(lm)[0], {"token_ids": IDS[:1], "padding_mask": np.ones((1, 11), int)}
    again = model(num_layers=1)
    again.enable_lora(3, 9, "all")
    fill(again)
    stream = again.stream(row, max_new_tokens=9, stop_token_ids=None)
    found = [next(stream)[1]]
    with again.disable_adapter():  # steps are compiled, or recorded, in here
        found += [token for _, token in stream]
    assert expected[11:] == found
    assert texts(again)[0] == expected


def test_the_backbones_own_methods_are_followed():
    """As users of keras-hub know it."""
    lm = model(num_layers=1)
    lm.compile(optimizer=keras.optimizers.Adam(0.02))
    lm.fit(X, verbose=0)
    plain = texts(lm)
    assert lm.backbone.default_lora_layer_names() == ["query", "value"]
    lm.backbone.enable_lora(3)
    assert {path.split("/")[-1] for path in lm.backbone.adapter_set.factors("default")} == {"query", "value"}
    assert len(lm.trainable_variables) == 4
    losses = lm.fit(X, epochs=5, verbose=0).history["loss"]
    assert losses[-1] < losses[0] and len(lm.optimizer._trainable_variables) == 4
    lm.backbone.enable_lora(2, ["query_dense", "value_dense", "gating_ffw"])
    fill(lm)
    assert len(lm.trainable_variables) == 6
    scaled = lm.backbone.adapter_set.settings["default"]
    assert set(scaled.alphas.values()) == {2}
    adapted = texts(lm)
    assert adapted != plain
    lm.backbone.merge_adapter()
    assert texts(lm) == adapted
    with pytest.raises(NotImplementedError, match="save_adapter"):
        lm.backbone.save_lora_weights("x.lora.h5")
    with pytest.raises(NotImplementedError, match="load_adapter"):
        lm.backbone.load_lora_weights("x.lora.h5")


@pytest.mark.backend_free
def test_kept_prompts_belong_to_their_adapter():
    lm = model(num_layers=1)
    lm.enable_lora(3, 9, "all")
    fill(lm)
    prefix = lm.prefill([2, 5, 7])
    session = lm.open_session()
    session.extend([2, 5, 7])
    list(session.stream(max_new_tokens=2, stop_token_ids=None))
    with lm.disable_adapter():
        with pytest.raises(ValueError, match="another adapter"):
            lm.generate(X, prefix=prefix, max_new_tokens=2, stop_token_ids=None)
        list(session.stream(max_new_tokens=2, stop_token_ids=None))
        again = {"token_ids": [session.token_ids[:5]], "padding_mask": [[1] * 5]}
        assert lm.generate(again, max_new_tokens=2, stop_token_ids=None)["token_ids"][0].tolist() == session.token_ids
    assert len(lm.generate(X, prefix=prefix, max_new_tokens=2, stop_token_ids=None)["token_ids"]) == 2


# Files --------------------------------------------------------------------------------------------------------------------


def test_keras_files_keep_adapters(tmp_path):
    lm = model("mixed_bfloat16", num_layers=1)
    lm.enable_lora(2, 5, "all", dropout=0.2, use_rslora=True, name="first")
    fill(lm)
    lm.enable_lora(3, 7, ["query", "decoder_block_0/feed_forward/up"], name="second")
    fill(lm, seed=6)
    lm.compile(optimizer=keras.optimizers.Adam(0.01))
    lm.fit(X, verbose=0)
    lm.set_adapter("first")
    lm.fit(X, epochs=2, verbose=0)
    lm.save(tmp_path / "lm.keras")
    again = keras.models.load_model(tmp_path / "lm.keras")
    assert again.adapter_names == ["first", "second"] and again.active_adapter == "first"
    assert (logits(again) == logits(lm)).all() and int(again.optimizer.iterations) == 2
    assert [v.path for v in again.trainable_variables] == [v.path for v in lm.trainable_variables]
    for each in (lm, again):
        each.set_adapter("second")
    assert (logits(again) == logits(lm)).all()
    lm.save_weights(tmp_path / "lm.weights.h5")
    fresh = Gemma2CausalLM.from_config(lm.get_config())
    assert fresh.active_adapter == "second"
    fresh.load_weights(tmp_path / "lm.weights.h5")
    assert (logits(fresh) == logits(lm)).all()
    with pytest.raises(ValueError, match="adapters for 9 projections.*enable_lora"):
        model("mixed_bfloat16", num_layers=1).load_weights(tmp_path / "lm.weights.h5")
    plain = model("mixed_bfloat16", num_layers=1)
    plain.save_weights(tmp_path / "plain.weights.h5")
    with pytest.raises(ValueError, match="could not be loaded"):
        lm.load_weights(tmp_path / "plain.weights.h5")


@pytest.mark.parametrize("form", ["keras_gemma2", "keras_hub"])
def test_presets_hold_merged_weights(form, tmp_path):
    keras_hubs = {"rope_max_wavelength": 10000.0, "layer_norm_epsilon": 1e-6, "query_pre_attn_scalar": 16}
    lm = model(**keras_hubs, max_sequence_length=8192)
    plain = logits(lm)
    lm.enable_lora(3, 7, "all")
    fill(lm)
    expected = logits(lm)
    lm.save_to_preset(tmp_path / "merged", format=form)
    with lm.disable_adapter():
        lm.save_to_preset(tmp_path / "plain", format=form)
    lm.backbone.save_to_preset(tmp_path / "backbone", format=form)
    assert (logits(lm) == expected).all() and lm.adapter_names == ["default"]
    for name, wanted in (("merged", expected), ("plain", plain), ("backbone", expected)):
        again = _from_folder(tmp_path / name)
        assert again.adapter_names == [] and "adapters" not in (tmp_path / name / "config.json").read_text()
        assert_close(logits(again), wanted)


def test_a_sharded_preset_holds_merged_weights(tmp_path):
    lm = model()
    lm.enable_lora(3, 7, "all")
    fill(lm)
    lm.save_to_preset(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model_*.weights.h5"))) > 1
    assert_close(logits(_from_folder(tmp_path)), logits(lm))


# Bad input ----------------------------------------------------------------------------------------------------------------

WRONG = [
    ({"rank": 0}, ValueError, "rank.*at least 1.*0"),
    ({"rank": -2}, ValueError, "rank.*-2"),
    ({"rank": 2.0}, TypeError, "rank.*2.0"),
    ({"rank": True}, TypeError, "rank.*True"),
    ({"rank": 33}, ValueError, r"rank=33.*decoder_block_0/attention/key.*\(32, 42\)"),
    ({"alpha": 0}, ValueError, "alpha.*0"),
    ({"alpha": float("nan")}, ValueError, "alpha.*nan"),
    ({"alpha": "8"}, ValueError, "alpha.*'8'"),
    ({"dropout": 1.0}, ValueError, r"dropout.*\[0, 1\).*1.0"),
    ({"dropout": -0.1}, ValueError, "dropout.*-0.1"),
    ({"use_rslora": "yes"}, TypeError, "use_rslora.*yes"),
    ({"targets": "atention"}, ValueError, "atention.*Did you mean 'attention'.*query.*q_proj.*decoder_block_1/feed_forward/down"),
    ({"targets": ["query", "c_attn"]}, ValueError, "c_attn"),
    ({"targets": []}, ValueError, "targets"),
    ({"targets": "(query"}, ValueError, "regular expression"),
    ({"targets": 5}, TypeError, "targets.*5"),
    ({"targets": ["query", 1]}, TypeError, "targets"),
    ({"name": "a/b"}, ValueError, "name.*a/b"),
    ({"name": ""}, ValueError, "name"),
]


@pytest.fixture(scope="module")
def adapted():
    lm = model()
    lm.enable_lora(2)
    fill(lm)
    return lm, logits(lm)


@pytest.mark.parametrize("arguments, error, message", WRONG)
def test_bad_arguments_change_nothing(arguments, error, message, adapted):
    lm, before = adapted
    with pytest.raises(error, match=message):
        lm.enable_lora(**{"rank": 2, **arguments})
    assert (logits(lm) == before).all() and lm.adapter_names == ["default"] and len(lm.trainable_variables) == 16


def test_names_that_there_are_none_of(adapted, tmp_path):
    lm, before = adapted
    for call in (lm.set_adapter, lm.delete_adapter, lm.merge_adapter, lambda name: lm.save_adapter(tmp_path, name)):
        with pytest.raises(ValueError, match="'french'.*default"):
            call("french")
    with pytest.raises(ValueError, match="name"):
        lm.set_adapter(None)
    with lm.disable_adapter(), pytest.raises(ValueError, match="No adapter is active.*default"):
        lm.merge_adapter()
    assert (logits(lm) == before).all()
    plain = model()
    for call in (plain.merge_adapter, lambda: plain.set_adapter("default"), lambda: plain.save_adapter(tmp_path)):
        with pytest.raises(ValueError, match="no adapter.*enable_lora"):
            call()
    with pytest.raises(TypeError, match="target_layer_names"):
        plain.backbone.enable_lora(2, "query")
    with pytest.raises(ValueError, match="c_attn"):
        plain.backbone.enable_lora(2, ["c_attn"])
    assert len(plain.trainable_variables) == len(model().trainable_variables)


def test_what_cannot_be_merged_changes_nothing():
    with pytest.warns(UserWarning, match="float16"):
        lm = model("float16")
    lm.enable_lora(2, targets=["query", "value"])
    fill(lm)
    last = lm.backbone.adapter_set.factors("default")["decoder_block_1/attention/value"]
    last.lora_a.assign(np.full(last.lora_a.shape, 1e4))
    last.lora_b.assign(np.full(last.lora_b.shape, 1e4))
    before = ops.convert_to_numpy(lm.backbone.transformer_layers[0].attention.query.kernel)
    with pytest.raises(ValueError, match="decoder_block_1/attention/value.*float16.*Nothing"):
        lm.merge_adapter()
    last.lora_a.assign(np.full(last.lora_a.shape, np.nan))
    with pytest.raises(ValueError, match="not finite"):
        lm.merge_adapter()
    assert (ops.convert_to_numpy(lm.backbone.transformer_layers[0].attention.query.kernel) == before).all()
    assert lm.adapter_names == ["default"]
