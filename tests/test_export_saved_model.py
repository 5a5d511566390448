"""Exporting from each backend: weights, codes and adapters that are carried along, and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from exported import TEXTS, TOLERANCE, N, all_bytes, ask, data_bytes, decoded, default, padded, prompt_rows, small_lm
from test_staging import unprivileged

import keras_gemma2
from keras_gemma2 import Gemma2Backbone, Gemma2CausalLM, Sampler
from keras_gemma2.export import saved_model


@pytest.fixture(scope="module")
def lm():
    return small_lm()


def test_texts_tokens_and_scores(tmp_path, lm):
    """As the backend at hand computes them; the weights are stored once."""
    lm.compile(sampler=Sampler(temperature=0, repetition_penalty=1.3))
    lm.export(tmp_path / "served" / "1", max_new_tokens=N)
    inputs = padded(prompt_rows(), 30)
    texts, tokens, scores = ask(tmp_path / "served" / "1", default(), ("generate_tokens", inputs), ("score", inputs))
    assert decoded(texts["completions"]) == lm.generate(TEXTS, max_new_tokens=N, strip_prompt=True)
    expected = lm.generate(inputs, max_new_tokens=N)
    width = tokens["token_ids"].shape[1]
    assert np.array_equal(tokens["padding_mask"], expected["padding_mask"][:, :width])
    assert np.array_equal(tokens["token_ids"], expected["token_ids"][:, :width])
    for found, mask, one in zip(scores["log_probabilities"], inputs["padding_mask"] > 0, lm.score(inputs)):
        assert np.abs(found[mask][1:] - one).max(initial=0) < TOLERANCE
    assert all_bytes(lm) < data_bytes(tmp_path / "served" / "1") < 1.01 * all_bytes(lm) + 4096  # an index of some bytes a weight


def test_bfloat16_stays_bfloat16(tmp_path):
    inputs = padded(prompt_rows(), 30)
    exact = small_lm()
    exact.save_to_preset(tmp_path / "preset")
    lm = Gemma2CausalLM.from_preset(tmp_path / "preset", dtype="bfloat16")
    lm.export(tmp_path / "served", signatures=["logits"])
    assert data_bytes(tmp_path / "served") < 1.05 * all_bytes(lm) + 4096
    (found,) = ask(tmp_path / "served", ("logits", inputs), kind="tokens")
    real = inputs["padding_mask"] > 0
    inputs = {key: keras.ops.convert_to_tensor(value) for key, value in inputs.items()}
    wanted, rounded = (keras.ops.convert_to_numpy(one(inputs)).astype("float32")[real] for one in (exact, lm))
    # No further from the float32 model than the backend's own bfloat16 is, but for chance.
    error, own = np.abs(found["logits"][real] - wanted).mean(), np.abs(rounded - wanted).mean()
    assert 0 < error < 1.5 * own


def test_codes_and_the_active_adapter_go_along(tmp_path):
    """int8 codes with an adapter over them, which is not merged; one that is not active stays behind."""
    lm, inputs = small_lm(), padded(prompt_rows(), 30)
    lm.quantize("int8")
    plain = lm.score(inputs)
    draw = np.random.default_rng(1)
    for name in ("idle", "used"):
        lm.enable_lora(rank=16, targets=["query", "down"], name=name)
        for variable in lm.trainable_variables:
            variable.assign(draw.normal(0, 0.5, variable.shape))
    factors = sum(int(np.prod(variable.shape)) * 4 for variable in lm.trainable_variables)
    lm.export(tmp_path / "served", signatures=["score"])
    (found,) = ask(tmp_path / "served", ("score", inputs), kind="tokens")
    expected = lm.score(inputs)
    for scores, mask, one in zip(found["log_probabilities"], inputs["padding_mask"] > 0, expected):
        # Compiled code of jax and tensorflow rounds activations for int8 to 8,100 and more whole numbers; the graph does not.
        assert np.abs(scores[mask][1:] - one).max(initial=0) < 0.02
    assert np.abs(expected[2] - plain[2]).max() > 0.2
    assert data_bytes(tmp_path / "served") < all_bytes(lm) - factors / 2  # one adapter is missing; an index has some bytes a weight


# What is refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sampler": "top_k"}, "`sampler` must be a keras_gemma2.Sampler.*TopKSampler"),
        ({"sampler": Sampler(logits_processor=lambda ids, logits: logits)}, "`logits_processor` is Python code"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be an integer of at least 1"),
        ({"signatures": ["serve"]}, "`signatures` must be a list of names out of .*serving_default.*Received: .'serve'"),
        ({"signatures": []}, "`signatures` must be a list of names"),
        ({"input_signature": [1]}, "`input_signature` is not for Gemma 2"),
        ({"stop_token_ids": [5000]}, "`stop_token_ids` must be"),
    ],
)
def test_arguments_are_checked_first(tmp_path, lm, arguments, message):
    with pytest.raises(ValueError, match=message):
        lm.export(tmp_path / "served", **arguments)
    assert not list(tmp_path.iterdir())


def test_text_needs_a_preprocessor(tmp_path, tiny):
    lm = Gemma2CausalLM(Gemma2Backbone(**tiny), None)
    for arguments in ({"signatures": ["generate"]}, {"chat": True}):
        with pytest.raises(ValueError, match="need a model with a preprocessor"):
            lm.export(tmp_path / "served", **arguments)


def test_folders_that_hold_something(tmp_path, lm, monkeypatch):
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "mine.txt").write_text("kept")
    (folder / "saved_model.pb").write_text("old")
    with pytest.raises(keras_gemma2.CheckpointError, match="is not empty.*overwrite=True"):
        lm.export(folder)
    monkeypatch.setattr(saved_model, "write", fake_write)
    monkeypatch.setattr(saved_model, "write_elsewhere", fake_write)
    lm.export(folder, overwrite=True)
    assert (folder / "mine.txt").read_text() == "kept" and (folder / "saved_model.pb").read_text() == "new"
    # What a killed export has left in a folder that cannot be renamed is nobody's.
    killed = tmp_path / "killed"
    (killed / ".saving-1-abc").mkdir(parents=True)
    lm.export(killed)
    # Files of the same names that no export wrote.
    site = tmp_path / "site"
    (site / "assets").mkdir(parents=True)
    for name in ("assets/logo.png", "export.json", "model.onnx"):
        (site / name).write_text("mine")
    lm.export(site, overwrite=True)
    assert [(site / name).read_text() for name in ("assets/logo.png", "export.json", "model.onnx")] == ["mine"] * 3
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(keras_gemma2.CheckpointError, match="is a file"):
        lm.export(file)


def fake_write(lm, folder, *settings):
    Path(folder, "saved_model.pb").write_text("new")


def full_disk(lm, folder, *settings):
    Path(folder, "saved_model.pb").write_text("half")
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_nothing(tmp_path, lm, monkeypatch):
    monkeypatch.setattr(saved_model, "write", full_disk)
    monkeypatch.setattr(saved_model, "write_elsewhere", full_disk)
    with pytest.raises(keras_gemma2.CheckpointError, match="is full"):
        lm.export(tmp_path / "a" / "served")
    assert not list(tmp_path.iterdir())


def test_somebody_elses_folder(lm, monkeypatch):
    monkeypatch.setattr(saved_model, "write", fake_write)
    monkeypatch.setattr(saved_model, "write_elsewhere", fake_write)
    with unprivileged() as parent:
        os.chmod(parent, 0o555)
        with pytest.raises(keras_gemma2.CheckpointError, match="cannot be written: .*Permission denied"):
            lm.export(parent / "served")


# The command line -------------------------------------------------------------------------------------------------------


@pytest.mark.backend_free  # its process takes TensorFlow, whatever the backend here
def test_the_command(tmp_path):
    target = tmp_path / "1"
    command = [sys.executable, "-m", "keras_gemma2", "export", "gemma2_mini_en", str(target), "--max-new-tokens", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"SavedModel in {target}\n"
    (found,) = ask(target, default(["The state of our union is"]))
    assert len(found["completions"][0]) > 8
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2 and "is not empty" in again.stderr and "--overwrite" not in again.stdout
    shown = subprocess.run(
        [str(Path(sys.executable).with_name("saved_model_cli")), "show", "--dir", str(target), "--tag_set", "serve"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 'SignatureDef key: "serving_default"' in shown.stdout and 'SignatureDef key: "decode_step"' in shown.stdout


def test_a_failing_process_says_why(tmp_path, lm, monkeypatch):
    monkeypatch.setattr(saved_model, "_traces_here", lambda: False)  # with TensorFlow as the backend, too
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "tensorflow.py").write_text("raise ImportError('a broken TensorFlow')")
    with pytest.raises(RuntimeError, match="(?s)ended with code 1.*a broken TensorFlow"):
        lm.export(tmp_path / "served")
    assert [path.name for path in tmp_path.iterdir()] == ["tensorflow.py"]


def test_no_more_tokens_than_the_context(lm):
    settings = saved_model.read_settings(lm, 3_000_000_000, "greedy", False, "auto", None)
    assert settings.max_new_tokens == lm.backbone.config.max_sequence_length
