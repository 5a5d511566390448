"""The task as keras-hub users know it: training, evaluation, saving, and text generation with the embedded preset."""

import shutil
import subprocess
import sys
import warnings

import keras
import keras_hub
import numpy as np
import pytest
from oracle import hugging_face_folder

import keras_gemma2
from keras_gemma2 import Gemma2Backbone, Gemma2CausalLM, Gemma2CausalLMPreprocessor, Gemma2Tokenizer
from keras_gemma2.generation.requests import read_stop_token_ids


@pytest.fixture(scope="module")
def mini():
    return Gemma2CausalLM.from_preset("gemma2_mini_en")


@pytest.fixture
def lm(tiny, mini):
    """A small random model with the embedded preset's tokenizer."""
    backbone = Gemma2Backbone(**{**tiny, "num_layers": 2, "vocabulary_size": 4096})
    return Gemma2CausalLM(backbone, Gemma2CausalLMPreprocessor(mini.preprocessor.tokenizer, 16, truncation="right"))


def array(x):
    return keras.ops.convert_to_numpy(x)


def tokens(rows=3, length=12, vocabulary=4096, seed=0):
    rng = np.random.default_rng(seed)
    mask = np.ones((rows, length), "int32")
    mask[0, length // 2 :] = 0
    return {"token_ids": rng.integers(0, vocabulary, (rows, length)), "padding_mask": mask}


def plain_loss(lm, x):
    """Next-token cross-entropy of the real tokens over the number of all positions (Keras's reduction), in float64."""
    logits = array(lm(x)).astype("float64")
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_probs[:, :-1], x["token_ids"][:, 1:, None], -1)[..., 0]
    weight = x["padding_mask"][:, 1:] * x["padding_mask"][:, :-1]
    return -(picked * weight).sum() / x["token_ids"].size


# What it is ------------------------------------------------------------------------------------------------------------


def test_it_is_a_keras_hub_task(lm):
    import keras_nlp

    for package in (keras_hub, keras_nlp):
        assert isinstance(lm, package.models.CausalLM) and isinstance(lm.backbone, package.models.Backbone)
        assert isinstance(lm.preprocessor, package.models.CausalLMPreprocessor)
        assert isinstance(lm.preprocessor.tokenizer, package.tokenizers.SentencePieceTokenizer)
    assert not isinstance(lm.backbone, keras_hub.models.GemmaBackbone)


def test_logits_are_capped_float32(lm):
    logits = array(lm(tokens()))
    assert logits.shape == (3, 12, 4096) and logits.dtype == np.float32 and np.abs(logits).max() <= 3.0


def test_weights_are_the_backbones(lm):
    assert {id(v) for v in lm.weights} == {id(v) for v in lm.backbone.weights}
    assert not lm.has_task_weights()


def test_summary_shows_preprocessor_and_backbone(lm):
    lines = []
    lm.summary(print_fn=lambda line, **kwargs: lines.append(str(line)))
    text = "\n".join(lines)
    assert "gemma2_tokenizer" in text and "gemma2_backbone" in text and f"{lm.count_params():,}" in text


# Training, evaluation, prediction ----------------------------------------------------------------------------------------


def test_fit_on_strings_lowers_the_loss(lm):
    texts = ["The state of our union is strong.", "Call me Ishmael.", "The whale, the whale!"] * 4
    lm.compile(optimizer=keras.optimizers.Adam(1e-2))
    history = lm.fit(texts, batch_size=4, epochs=3, verbose=0).history
    assert history["loss"][-1] < history["loss"][0] - 0.5
    assert "sparse_categorical_accuracy" in history


def test_fit_on_a_dataset_of_strings(lm):
    tf = pytest.importorskip("tensorflow")
    data = tf.data.Dataset.from_tensor_slices(["The state of our union.", "Call me Ishmael."]).batch(2)
    lm.compile(optimizer=keras.optimizers.Adam(1e-2))
    assert np.isfinite(lm.fit(data, verbose=0, validation_data=data).history["val_loss"][0])


def test_evaluate_on_tokens_is_the_plain_loss(lm):
    """Labels are made from the tokens, although a preprocessor is attached. Keras's mean counts every position."""
    x = tokens()
    # float32 sums of 36 losses near 8
    assert lm.evaluate(x, verbose=0)[0] == pytest.approx(plain_loss(lm, x), rel=1e-5)


def test_given_labels_are_taken(lm):
    x = tokens()
    y = np.random.default_rng(5).integers(0, 4096, x["token_ids"].shape)
    logits = array(lm(x)).astype("float64")
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_probs, y[..., None], -1).mean()
    assert lm.evaluate(x, y, verbose=0)[0] == pytest.approx(expected, rel=1e-5)
    weights = np.zeros(y.shape, "float32")
    weights[1, 3] = 1.0
    expected = -log_probs[1, 3, y[1, 3]] / y.size
    assert lm.evaluate(x, y, sample_weight=weights, verbose=0)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("attached", [True, False])
def test_tokens_bypass_the_preprocessor_everywhere(lm, attached):
    if not attached:
        lm = Gemma2CausalLM(lm.backbone)
    x = tokens()
    np.testing.assert_allclose(lm.predict(x, verbose=0), array(lm(x)), atol=1e-5)
    np.testing.assert_allclose(array(lm.predict_on_batch(x)), array(lm(x)), atol=1e-5)
    lm.compile(optimizer=keras.optimizers.SGD(0.1))
    losses = [
        lm.test_on_batch(x)[0],
        lm.train_on_batch(x)[0],
        lm.fit(x, verbose=0).history["loss"][0],
        lm.fit(x, validation_data=x, verbose=0).history["val_loss"][0],
        lm.evaluate(x, x["token_ids"], verbose=0)[0],
    ]
    assert np.isfinite([float(loss) for loss in losses]).all()
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-5) and losses[3] < losses[0]


def test_any_nonzero_mask_marks_a_token(lm):
    x = tokens()
    other = {**x, "padding_mask": x["padding_mask"] * 7}
    np.testing.assert_allclose(array(lm(other)), array(lm(x)), atol=1e-5)
    assert lm.evaluate(other, verbose=0)[0] == pytest.approx(lm.evaluate(x, verbose=0)[0], rel=1e-5)


def test_what_stands_in_the_padding_is_not_looked_at(lm):
    x = tokens()
    expected = array(lm(x))[0, :6]
    x["token_ids"][0, 6:] = -1
    np.testing.assert_allclose(array(lm(x))[0, :6], expected, atol=1e-5)


def test_weights_of_samples_weight_rows(lm):
    """Also where the batch is as long as the rows, so that columns could be taken for rows."""
    x, y = tokens(6, 6), np.random.default_rng(5).integers(0, 4096, (6, 6))
    rows = np.array([1, 0, 0, 0.5, 0, 0])
    result = lm.evaluate(x, y, sample_weight=rows, verbose=0)[0]
    expected = lm.evaluate(x, y, sample_weight=np.repeat(rows[:, None], 6, 1), verbose=0)[0]
    assert result == pytest.approx(expected, rel=1e-6)
    assert result != pytest.approx(lm.evaluate(x, y, sample_weight=np.repeat(rows[None], 6, 0), verbose=0)[0], rel=1e-3)


def test_labels_of_weight_zero_may_be_anything(lm):
    x = tokens()
    y = x["token_ids"].copy()
    weight = np.random.default_rng(2).integers(0, 2, y.shape).astype("float32")
    expected = lm.evaluate(x, y, sample_weight=weight, verbose=0)[0]
    assert lm.evaluate(x, np.where(weight, y, -100), sample_weight=weight, verbose=0)[0] == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"y": np.full((3, 12), 4096)}, r"`y` must be in \[0, 4096\).*4096"),
        ({"y": np.full((3, 12), -100)}, "`y`.*-100"),
        ({"y": np.zeros((3, 11), int)}, r"`y` must have the shape.*\(3, 12\).*\(3, 11\)"),
        ({"y": np.zeros((3, 12))}, "`y` must hold integers.*float64"),
        ({"sample_weight": np.ones((2, 12))}, r"`sample_weight` must have the shape.*\(2, 12\)"),
        ({"class_weight": {0: 1.0}}, "`class_weight`.*`sample_weight`"),
    ],
)
def test_bad_labels_raise(lm, arguments, message):
    with pytest.raises(ValueError, match=message):
        lm.fit(tokens(), verbose=0, **arguments)


@pytest.mark.parametrize(
    "texts, message", [([], "at least one text"), (["a\ud800"], "surrogates"), ([1, 2], "must be a string")]
)
def test_bad_texts_raise(lm, texts, message):
    for call in (lm.fit, lm.evaluate, lm.predict):
        with pytest.raises((ValueError, TypeError), match=message):
            call(texts, verbose=0)


def test_validation_split_of_texts(lm):
    history = lm.fit(
        ["Call me Ishmael.", "The whale.", "The sea.", "Our union."], validation_split=0.25, verbose=0
    ).history
    assert np.isfinite(history["val_loss"][0])


def test_fit_on_a_torch_loader_of_tokens(lm):
    import torch

    rows = [({key: value[i] for key, value in tokens().items()}, tokens()["token_ids"][i]) for i in range(3)]
    assert np.isfinite(lm.fit(torch.utils.data.DataLoader(rows, batch_size=3), verbose=0).history["loss"][0])


@pytest.mark.parametrize("sampler", ["greddy", 3, "contrastive"])
def test_unknown_samplers_raise(lm, sampler):
    with pytest.raises(ValueError, match="`sampler` must be a keras_gemma2.Sampler, one of 'greedy'"):
        lm.compile(sampler=sampler)


def test_misspelled_arguments_raise(lm, tiny):
    with pytest.raises(TypeError, match="'sliding_window'.*'sliding_window_size'"):
        Gemma2Backbone(**tiny, sliding_window=3)
    with pytest.raises(TypeError, match="'preproccessor'.*'preprocessor'"):
        Gemma2CausalLM(lm.backbone, preproccessor=None)
    with pytest.raises(TypeError, match="'slidin'"):
        Gemma2Backbone.from_preset("gemma2_mini_en", slidin=3)


def test_fit_on_a_pydataset_of_tokens(lm):
    class Rows(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            x = tokens(seed=index)
            return x, np.roll(x["token_ids"], -1, 1)

    assert np.isfinite(lm.fit(Rows(), verbose=0).history["loss"][0])
    assert np.isfinite(lm.evaluate(Rows(), verbose=0)[0])


def test_padding_does_not_train(lm):
    """Other ids in the padding give the same gradients."""
    first, second = tokens(), tokens()
    second["token_ids"][0, 6:] = 7
    results = []
    start = lm.get_weights()
    for x in (first, second):
        lm.set_weights(start)
        lm.compile(optimizer=keras.optimizers.SGD(1.0))
        lm.train_on_batch(x)
        results.append(array(lm.backbone.transformer_layers[0].feed_forward.gate.kernel))
    np.testing.assert_allclose(*results, atol=1e-6)


@pytest.mark.parametrize("call", ["fit", "evaluate", "predict", "train_on_batch", "test_on_batch", "predict_on_batch"])
def test_ids_outside_the_vocabulary_raise_before_any_work(lm, call):
    x = tokens()
    x["token_ids"][2, 3] = 4096
    before = lm.get_weights()
    with pytest.raises(ValueError, match=r"`token_ids` must be in \[0, 4096\).*the id 4096"):
        getattr(lm, call)(x)
    for a, b in zip(before, lm.get_weights()):
        np.testing.assert_array_equal(a, b)


def test_training_in_mixed_precision(tiny):
    lm = Gemma2CausalLM(Gemma2Backbone(**{**tiny, "num_layers": 2}, dtype="mixed_bfloat16"))
    lm.compile(optimizer=keras.optimizers.Adam(1e-3))
    losses = lm.fit(tokens(vocabulary=97), epochs=3, verbose=0).history["loss"]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


def test_training_of_bfloat16_weights_is_finite_and_warns(tiny):
    lm = Gemma2CausalLM(Gemma2Backbone(**{**tiny, "num_layers": 2}, dtype="bfloat16"))
    lm.compile(optimizer=keras.optimizers.SGD(1.0))  # large steps: small ones are rounded away, as the warning says
    with pytest.warns(UserWarning, match="mixed_bfloat16"):
        losses = lm.fit(tokens(vocabulary=97), epochs=3, verbose=0).history["loss"]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


# Saving ----------------------------------------------------------------------------------------------------------------


def test_keras_file_round_trip(lm, tmp_path):
    lm.compile(optimizer=keras.optimizers.Adam(3e-4), sampler=keras_hub.samplers.TopKSampler(k=7, seed=1))
    lm.fit(tokens(), verbose=0)
    lm.save(tmp_path / "lm.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = keras.saving.load_model(tmp_path / "lm.keras")
    np.testing.assert_array_equal(array(again(tokens())), array(lm(tokens())))
    assert again.sampler.k == 7 and float(array(again.optimizer.learning_rate)) == pytest.approx(3e-4)
    for a, b in zip(again.optimizer.variables, lm.optimizer.variables):
        np.testing.assert_array_equal(array(a), array(b))
    assert again.preprocessor.tokenizer.proto == lm.preprocessor.tokenizer.proto


@pytest.mark.parametrize("name", ["Gemma2Tokenizer", "Gemma2Config", "layers"])
def test_any_public_name_registers_all_classes(lm, tmp_path, name):
    lm.save(tmp_path / "lm.keras")
    code = f"""
from keras_gemma2 import {name}
import keras
lm = keras.saving.load_model({str(tmp_path / "lm.keras")!r})
print(type(lm).__name__, type(lm.preprocessor).__name__)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["Gemma2CausalLM", "Gemma2CausalLMPreprocessor"]


def test_preset_round_trip_of_all_four_classes(lm, tmp_path):
    folder = tmp_path / "preset"
    lm.save_to_preset(folder)
    again = Gemma2CausalLM.from_preset(folder)
    np.testing.assert_array_equal(array(again(tokens())), array(lm(tokens())))
    assert again.preprocessor.sequence_length == 16 and again.preprocessor.truncation == "right"
    assert Gemma2Backbone.from_preset(folder).config == lm.backbone.config
    assert Gemma2Tokenizer.from_preset(folder)("a whale").tolist() == lm.preprocessor.tokenizer("a whale").tolist()
    assert Gemma2CausalLMPreprocessor.from_preset(folder).sequence_length == 16
    theirs = keras_hub.models.CausalLM.from_preset(str(folder))
    assert type(theirs) is Gemma2CausalLM
    assert Gemma2Backbone.from_preset(folder).dtype_policy.name == "float32"
    half = tmp_path / "half"
    Gemma2CausalLM.from_preset(folder, dtype="bfloat16").save_to_preset(half)
    for cls in (Gemma2CausalLM, Gemma2Backbone):  # a preset comes back in the dtype it was saved in
        assert {v.dtype for v in cls.from_preset(half).variables if "seed" not in v.path} >= {"bfloat16"}
    shutil.rmtree(half)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["preset"]


def test_keras_hub_still_picks_its_own_class_for_its_own_presets(tmp_path):
    backbone = keras_hub.models.GemmaBackbone(32, 1, 2, 1, 8, 16, 4)
    keras_hub.models.GemmaCausalLM(backbone=backbone, preprocessor=None).save_to_preset(str(tmp_path / "theirs"))
    loaded = keras_hub.models.CausalLM.from_preset(str(tmp_path / "theirs"), preprocessor=None)
    assert type(loaded) is keras_hub.models.GemmaCausalLM
    assert type(keras_hub.models.Backbone.from_preset(str(tmp_path / "theirs"))) is keras_hub.models.GemmaBackbone
    assert not set(keras_gemma2.preset_names()[:1]) & set(keras_hub.models.GemmaBackbone.presets)
    with pytest.raises(ValueError, match="is a Gemma 1"):
        Gemma2CausalLM.from_preset(tmp_path / "theirs")


# Text ------------------------------------------------------------------------------------------------------------------


def test_generate_text(mini):
    mini.compile(sampler="greedy")
    one = mini.generate("The state of our union is", max_length=20)
    assert isinstance(one, str) and one.startswith("The state of our union is ") and len(one) > 35
    both = mini.generate(["The state of our union is", "Call me"], max_length=20)
    assert isinstance(both, list) and both[0] == one and both[1].startswith("Call me")
    stripped = mini.generate("The state of our union is", max_length=20, strip_prompt=True)
    assert "The state of our union is" + stripped == one


def test_generate_from_a_dataset(mini):
    tf = pytest.importorskip("tensorflow")
    mini.compile(sampler="greedy")
    texts = ["The state of", "Call me", "In"]
    out = mini.generate(tf.data.Dataset.from_tensor_slices(texts).batch(2), max_length=12)
    assert out == [mini.generate(text, max_length=12) for text in texts]
    assert mini.generate(tf.constant(texts), max_length=12) == out
    assert mini.generate(np.array(texts), max_length=12) == out


def test_generate_with_a_token_dict_returns_a_token_dict(mini):
    mini.compile(sampler="greedy")
    inputs = mini.preprocessor.generate_preprocess(["Call me"], sequence_length=12)
    out = mini.generate(inputs)
    assert set(out) == {"token_ids", "padding_mask"} and out["token_ids"].shape == (1, 12)
    assert mini.preprocessor.generate_postprocess(out)[0] == mini.generate("Call me", max_length=12)


def test_auto_stops_at_end_of_turn_too(mini):
    tokenizer = mini.preprocessor.tokenizer
    assert read_stop_token_ids(mini, "auto") == (tokenizer.end_token_id, tokenizer.end_of_turn_token_id) == (1, 107)
    assert read_stop_token_ids(mini, None) == () and read_stop_token_ids(mini, [5]) == (5,)


@pytest.mark.parametrize(
    "inputs, kwargs, message",
    [
        ([], {}, "`inputs` must hold at least one text"),
        (3, {}, "`inputs` must be a string.*3"),
        (["a", 3], {}, r"`inputs\[1\]` must be a string.*3"),
        (b"\xff", {}, "must be UTF-8"),
        (
            "The state of our union is strong",
            {"max_length": 4},
            "max_length=4, but the prompt of row 0 has 9 tokens. Raise",
        ),
        (["a", "whale " * 600], {}, "the prompt of row 1 has .* tokens. The model takes 512 at most"),
        ("a", {"stop_token_ids": [4096]}, r"`stop_token_ids`.*\[0, 4096\).*4096"),
        ("a", {"stop_token_ids": 1}, "`stop_token_ids`.*Received: 1"),
        ("a", {"stop_token_ids": [1.5]}, "`stop_token_ids`.*1.5"),
        ("lone \ud800 surrogate", {}, "surrogate"),
        ("a", {"max_length": 513}, "`max_length`.*512.*513"),
    ],
)
def test_bad_text(mini, inputs, kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        mini.generate(inputs, **kwargs)


def test_an_empty_prompt_starts_from_bos(mini):
    mini.compile(sampler="greedy")
    assert len(mini.generate("", max_length=10)) > 5


# Presets ---------------------------------------------------------------------------------------------------------------


def test_the_embedded_preset_equals_transformers_on_its_folder(mini):
    import torch
    import transformers

    from keras_gemma2.presets.registry import EMBEDDED_FOLDER

    model = transformers.Gemma2ForCausalLM.from_pretrained(
        EMBEDDED_FOLDER, dtype="float32", attn_implementation="eager"
    )
    x = mini.preprocessor.generate_preprocess(["It is our duty to preserve the peace. " * 20], sequence_length=400)
    token_ids = array(x["token_ids"])[:, : int(array(x["padding_mask"]).sum())]
    assert token_ids.shape[1] > 140  # past the window of 128
    with torch.no_grad():
        expected = model(torch.tensor(token_ids, dtype=torch.long)).logits.numpy()
    ours = array(mini({"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}))
    assert np.abs(ours - expected).max() <= 2e-5 * np.ptp(expected)
    assert mini.backbone.dtype_policy.name == "float32"


def test_the_embedded_preset_has_every_feature(mini):
    config = mini.backbone.config
    assert config.sliding_window_size < config.max_sequence_length
    assert 1 < config.num_key_value_heads < config.num_query_heads
    assert (config.attention_logit_soft_cap, config.final_logit_soft_cap) == (50.0, 30.0)
    assert config.query_pre_attn_scalar != config.head_dim and set(config.layer_types) == {"local", "global"}


@pytest.mark.parametrize("cls", [Gemma2Backbone, Gemma2CausalLM, Gemma2CausalLMPreprocessor, Gemma2Tokenizer])
def test_from_preset_of_each_class(cls):
    assert isinstance(cls.from_preset("gemma2_mini_en"), cls)
    with pytest.raises(ValueError, match="Unknown preset 'gemma2_2b_em'.*'gemma2_2b_en'.*Built-in names"):
        cls.from_preset("gemma2_2b_em")
    with pytest.raises(TypeError, match="`preset`.*3"):
        cls.from_preset(3)
    with pytest.raises(TypeError, match="`load_weights`.*'bfloat16'.*`dtype=`"):
        cls.from_preset("gemma2_mini_en", "bfloat16")


def test_a_folder_without_tokenizer_warns():
    with pytest.warns(UserWarning, match="no tokenizer"):
        assert Gemma2CausalLM.from_preset(hugging_face_folder()[0]).preprocessor is None


@pytest.mark.parametrize("cls", [Gemma2CausalLMPreprocessor, Gemma2Tokenizer])
@pytest.mark.parametrize("save", ["save_to_preset", "export_to_transformers"])
def test_tokenizers_load_from_a_folder_of_their_own(tmp_path, cls, save):
    arguments = {"sequence_length": 77} if cls is Gemma2CausalLMPreprocessor and save == "save_to_preset" else {}
    thing = cls.from_preset("gemma2_mini_en", **arguments)
    getattr(thing, save)(tmp_path / "alone")
    loaded = cls.from_preset(tmp_path / "alone")
    assert getattr(loaded, "tokenizer", loaded).proto == getattr(thing, "tokenizer", thing).proto
    if arguments:
        assert loaded.sequence_length == 77
    with pytest.raises(ValueError, match="no config.json"):
        Gemma2Backbone.from_preset(tmp_path / "alone")


def test_preset_names():
    names = keras_gemma2.preset_names()
    assert names[0] == "gemma2_mini_en" and len(names) == 10 and "shieldgemma_27b_en" in names
