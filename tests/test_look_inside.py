"""`examples/look_inside.py`: the numbers it collects are the model's, and its pictures get written."""

import importlib.util
import os
import pathlib
import sys

import numpy as np
import pytest

import keras_gemma2
from keras_gemma2.presets.registry import EMBEDDED_FOLDER

pytest.importorskip("matplotlib")
from PIL import Image

SCRIPT = pathlib.Path(__file__).parents[1] / "examples" / "look_inside.py"
TEXT = "The people of the United States have reason to be thankful. The whale, the whale, and again the people of the States!"
WINDOW, CAP, FINAL_CAP = 8, 2.0, 3.0


def load_script():
    spec = importlib.util.spec_from_file_location("look_inside", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


look_inside = load_script()


@pytest.fixture(scope="module")
def lm():
    """A tiny model with weights large enough, and caps low enough, that the caps act."""
    backbone = keras_gemma2.Gemma2Backbone(
        vocabulary_size=4096,
        num_layers=3,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=24,
        intermediate_dim=40,
        head_dim=10,
        sliding_window_size=WINDOW,
        attention_logit_soft_cap=CAP,
        final_logit_soft_cap=FINAL_CAP,
        max_sequence_length=48,
        dtype="float32",
    )
    generator = np.random.default_rng(0)
    for weight in backbone.weights:
        weight.assign(generator.normal(0, 0.5, weight.shape))
    tokenizer = keras_gemma2.Gemma2Tokenizer(os.path.join(EMBEDDED_FOLDER, "tokenizer.model"))
    return keras_gemma2.Gemma2CausalLM(backbone, keras_gemma2.Gemma2CausalLMPreprocessor(tokenizer))


@pytest.fixture(scope="module")
def inside(lm):
    return look_inside.collect(lm, TEXT, layers=[0, 1, 2])


@pytest.fixture(scope="module")
def inputs(lm):
    ids = np.array([look_inside.tokenize(lm, TEXT)], "int32")
    return {"token_ids": ids, "padding_mask": np.ones_like(ids)}


def to_numpy(x):
    return look_inside.to_numpy(x)


def test_attention_rows_sum_to_one_and_keep_to_the_mask(inside):
    length = len(inside.pieces)
    assert length > 3 * WINDOW
    assert list(inside.attention) == [0, 1, 2]
    distance = np.subtract.outer(np.arange(length), np.arange(length))
    for layer, weights in inside.attention.items():
        assert weights.shape == (4, length, length)
        np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-5)
        reach = length if inside.layer_types[layer] == "global" else WINDOW
        hidden = (distance < 0) | (distance >= reach)
        assert (weights[:, hidden] == 0).all()
        assert (weights[:, ~hidden] > 0).all()


def test_weight_by_distance_is_the_mean_of_a_diagonal(inside):
    assert inside.by_distance.shape == (3, len(inside.pieces))
    assert (inside.by_distance[[0, 2], WINDOW:] == 0).all()
    assert (inside.by_distance[1] > 0).all()
    last = inside.attention[1][:, -1, 0].mean()  # the one pair that is farthest apart
    assert inside.by_distance[1, -1] == pytest.approx(last)


def test_hidden_states_are_the_backbones(inside, lm, inputs):
    np.testing.assert_allclose(inside.hidden, to_numpy(lm.backbone(inputs))[0], atol=1e-4, rtol=1e-4)


def test_logits_and_probabilities_are_the_models(inside, lm, inputs):
    logits = to_numpy(lm(inputs))[0]
    np.testing.assert_allclose(inside.logits.after, logits, atol=1e-4)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    given = [probabilities[i, token] for i, token in enumerate(inputs["token_ids"][0, 1:])]
    np.testing.assert_allclose(inside.next_probabilities, given, rtol=1e-3)
    assert len(inside.top) == 15
    assert inside.top[0][1] == pytest.approx(probabilities[-1].max(), rel=1e-3)
    assert [p for _, p in inside.top] == sorted((p for _, p in inside.top), reverse=True)


@pytest.mark.parametrize(("name", "cap"), [("scores", CAP), ("logits", FINAL_CAP)])
def test_capped_values_never_pass_the_cap(inside, name, cap):
    values = getattr(inside, name)
    assert values.cap == cap
    assert np.abs(values.before).max() > cap  # else the test would show nothing
    assert np.abs(values.after).max() <= cap
    np.testing.assert_allclose(values.after, cap * np.tanh(values.before / cap), atol=1e-5)


def test_only_visible_scores_are_counted(inside):
    length = len(inside.pieces)
    everything = length * (length + 1) // 2
    window = everything - (length - WINDOW) * (length - WINDOW + 1) // 2
    assert inside.scores.before.size == 4 * (2 * window + everything)


def test_rms_of_each_norm(inside, lm):
    length = len(inside.pieces)
    assert {name: values.shape for name, values in inside.rms.items()} == {
        **dict.fromkeys(look_inside.NORMS, (3, 2, length)),
        "final_norm": (1, 2, length),
    }
    np.testing.assert_allclose(inside.rms["final_norm"][0, 1], np.sqrt((inside.hidden**2).mean(-1)), rtol=1e-5)
    embedded = to_numpy(lm.backbone.token_embedding(np.array([[2]])))[0, 0]
    assert inside.rms["pre_attention_norm"][0, 0, 0] == pytest.approx(np.sqrt((embedded**2).mean()), rel=1e-5)


def test_other_numbers_than_the_models_raise(lm):
    with pytest.raises(RuntimeError, match="hidden states recomputed layer by layer differ"):
        look_inside.check_equal("hidden states", np.ones(3, "float32"), np.zeros(3, "float32"))


def test_long_text_is_cut_at_the_models_context(lm, capsys):
    assert len(look_inside.tokenize(lm, TEXT * 9)) == lm.backbone.config.max_sequence_length
    assert "the first 48 are drawn" in capsys.readouterr().out


@pytest.mark.parametrize("pieces", [["<bos>", "▁a"], ["<bos>", "x" * 300, "▁word", "s", "\n\n", "▁$x$", "\t", "▁" * 9] * 9])
def test_places_follow_each_other_without_overlap(pieces):
    places = look_inside.place(pieces)
    ends = [(line, column + len(piece)) for (line, column), piece in zip(places, pieces, strict=True)]
    assert all(end <= start for end, start in zip(ends, places[1:], strict=False))
    assert all(column == 0 or column + len(piece) <= look_inside.COLUMNS for (_, column), piece in zip(places, pieces, strict=True))


def check_pictures(folder):
    paths = sorted(folder.glob("*.png"))
    assert [path.stem for path in paths] == [f"look_inside_{name}" for name in ("attention", "caps", "norms", "tokens")]
    for path in paths:
        with Image.open(path) as image:
            assert min(image.size) > 100
            assert len(image.convert("RGB").getcolors(1 << 24)) > 30


def test_command_line_writes_four_pictures(lm, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(keras_gemma2.Gemma2CausalLM, "from_preset", lambda preset, dtype: lm)
    monkeypatch.setattr(look_inside, "DPI", 50)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    folder = tmp_path / "new" / "folder"
    look_inside.main(
        ["--preset", "path/to/tiny", "--file", str(tmp_path / "text.txt"), "--layers", "2,1,0", "--output", str(folder)]
    )
    check_pictures(folder)
    assert capsys.readouterr().out.splitlines() == [str(folder / f"look_inside_{name}.png") for name in look_inside.PICTURES]


def test_a_text_of_one_token_makes_figures_too(lm):
    inside = look_inside.collect(lm, "$")
    assert list(inside.attention) == [0, 1]  # the first local and the first global layer
    for draw_picture in look_inside.PICTURES.values():
        draw_picture(inside, "tiny")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", " \n"], "the text is empty"),
        (["--file", "no/such/file.txt"], "cannot read 'no/such/file.txt'"),
        (["--layers", "0,b"], "--layers: takes numbers with commas between, as in 0,1; got '0,b'"),
        (["--preset", "no_such_preset"], "no_such_preset"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as raised:
        look_inside.main(arguments)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_a_layer_that_is_not_there_is_named(lm):
    with pytest.raises(ValueError, match=r"layers 0 to 2\. Received: --layers 3"):
        look_inside.collect(lm, TEXT, layers=[0, 3])


def test_missing_matplotlib_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "look_inside")
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        load_script()
