"""`convert`: from every format to every other, tensor by tensor, bit by bit."""

import json
import os
import shutil
import subprocess
import sys

import keras
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from oracle import hugging_face_folder, hugging_face_logits

from keras_gemma2 import CheckpointError, Gemma2CausalLM, convert
from keras_gemma2.cli import main

IDS = np.random.default_rng(1).integers(0, 97, (2, 13))
MINI = {"sliding_window": 128, "vocab_size": 4096}


def weights_of(folder):
    lm = Gemma2CausalLM.from_preset(folder, preprocessor=None)
    return {path: keras.ops.convert_to_numpy(v.value) for path, v in lm.backbone.named_weights().items()}, lm.dtype


def assert_same(first, second):
    (ours, dtype), (theirs, other) = weights_of(first), weights_of(second)
    assert dtype == other and ours.keys() == theirs.keys()
    for path in ours:
        np.testing.assert_array_equal(ours[path].view(np.uint8), theirs[path].view(np.uint8), err_msg=path)


@pytest.fixture(scope="module")
def alternating():
    """Random weights of an architecture that every format can express: keras-hub has no other RoPE base or scalar."""
    folder, model = hugging_face_folder(rope_theta=10000.0, query_pre_attn_scalar=16)
    return folder, model


@pytest.mark.parametrize("to", ["hf", "preset", "keras_hub"])
def test_a_folder_comes_back_bit_by_bit(alternating, tmp_path, to):
    folder, _ = alternating
    convert(folder, tmp_path / "there", to=to)
    convert(tmp_path / "there", tmp_path / "back", to="hf")
    before = safetensors.numpy.load_file(os.path.join(folder, "model.safetensors"))
    after = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)
    assert_same(folder, tmp_path / "there")


@pytest.mark.parametrize("to", ["preset", "keras_hub"])
def test_the_embedded_preset_round_trips_with_its_tokenizer(tmp_path, to):
    """Stored in float16, loaded in float32: both survive, and so do the vocabulary and the stop tokens."""
    if to == "keras_hub":  # which has no scalar of 48 for heads of 64, 192 / 4 = 48 is its other rule
        with pytest.warns(UserWarning, match="keras-hub"):
            convert("gemma2_mini_en", tmp_path / "there", to=to)
    else:
        convert("gemma2_mini_en", tmp_path / "there", to=to)
    convert(tmp_path / "there", tmp_path / "back", to="hf", max_shard_size="3MB")
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 2
    assert_same("gemma2_mini_en", tmp_path / "back")
    tokenizers = [Gemma2CausalLM.from_preset(where).preprocessor.tokenizer for where in ("gemma2_mini_en", tmp_path / "back")]
    assert tokenizers[0].proto == tokenizers[1].proto and tokenizers[0].stop_token_ids == tokenizers[1].stop_token_ids


def test_dtype_is_converted(alternating, tmp_path):
    folder, model = alternating
    convert(folder, tmp_path / "out", to="preset", dtype="bfloat16")
    lm = Gemma2CausalLM.from_preset(tmp_path / "out", preprocessor=None)
    assert lm.dtype == "bfloat16"
    logits = keras.ops.convert_to_numpy(
        Gemma2CausalLM.from_preset(tmp_path / "out", dtype="float32", preprocessor=None)(
            {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}
        )
    )
    expected = hugging_face_logits(model, IDS)
    # Weights rounded to 8 bits of mantissa, four layers: a few percent of the range. Wrong weights give 100%.
    assert 1e-5 < np.abs(logits - expected).max() / np.ptp(expected) < 0.1


def test_a_conversion_that_fails_leaves_nothing(alternating, tmp_path):
    folder, _ = hugging_face_folder(rope_theta=500.0)  # keras-hub's is fixed
    with pytest.raises(CheckpointError, match="rope"):
        convert(folder, tmp_path / "out", to="keras_hub")
    with pytest.raises(ValueError, match="`max_shard_size`.*'lots'"):
        convert(folder, tmp_path / "out", max_shard_size="lots")
    assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match="`to` must be one of.*'gguf'"):
        convert(folder, tmp_path / "out", to="gguf")
    with pytest.raises(ValueError, match="`dtype` must be one of.*'int8'"):
        convert(folder, tmp_path / "out", dtype="int8")
    with pytest.raises(CheckpointError, match="Unknown preset 'nowhere'"):
        convert("nowhere", tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_the_target_replaces_a_checkpoint_and_keeps_other_files(alternating, tmp_path):
    folder, _ = alternating
    convert(folder, tmp_path / "model", to="hf")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    convert(folder, tmp_path / "model", to="preset")
    assert_same(folder, tmp_path / "model")
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "model" / "model.safetensors").exists()
    with pytest.raises(CheckpointError, match="`target` cannot be the source itself"):
        convert(tmp_path / "model", tmp_path / "model" / ".." / "model", to="hf")


@pytest.mark.parametrize("to", ["hf", "preset", "keras_hub"])
def test_each_weight_keeps_its_dtype(alternating, tmp_path, to):
    folder = shutil.copytree(alternating[0], tmp_path / "mixed")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors = {k: v if "norm" in k else v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    convert(folder, tmp_path / "there", to=to)
    convert(tmp_path / "there", tmp_path / "back", to="hf")
    back = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
    for name, value in tensors.items():
        assert back[name].dtype == value.dtype
        np.testing.assert_array_equal(back[name], value, err_msg=name)


@pytest.mark.parametrize("to", ["preset", "keras_hub"])
def test_a_mixed_policy_survives(alternating, tmp_path, to):
    Gemma2CausalLM.from_preset(alternating[0], dtype="mixed_bfloat16", preprocessor=None).save_to_preset(tmp_path / "mixed")
    convert(tmp_path / "mixed", tmp_path / "there", to=to)
    assert Gemma2CausalLM.from_preset(tmp_path / "there", preprocessor=None).backbone.dtype_policy.name == "mixed_bfloat16"
    convert(tmp_path / "mixed", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float32"


def test_a_chat_template_and_generation_settings_are_kept(tmp_path):
    folder = tmp_path / "tuned"
    convert("gemma2_mini_en", folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }} of my own")
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, "temperature": 0.25, "do_sample": True}))
    convert(folder, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }} of my own"
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["temperature"] == 0.25 and written["do_sample"] is True and written["eos_token_id"] == [1, 107]


def test_weights_that_are_not_finite_are_named(alternating, tmp_path):
    folder = shutil.copytree(alternating[0], tmp_path / "bad")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = np.nan
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.warns(UserWarning, match=r"'model.norm.weight'.*NaN or infinite") as caught:
        convert(folder, tmp_path / "out")
    assert caught[0].filename == __file__


def test_the_command_draws_a_bar_on_stderr_and_imports_no_backend(alternating, tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "keras_gemma2", "convert", alternating[0], str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "" and "converting: 100%" in result.stderr
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert not imported & {"jax", "torch", "tensorflow"}
    assert_same(alternating[0], tmp_path / "out")


def test_the_command_reports_one_line(tmp_path, capsys):
    assert main(["convert", "gemma2_mini_em", str(tmp_path / "out"), "--quiet"]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "gemma2_mini_en" in captured.err
