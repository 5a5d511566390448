"""Exporting from each backend: weights, codes and adapters that are carried along, and what is refused."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from exported import (
    TEXTS,
    TOLERANCE,
    N,
    all_bytes,
    ask,
    data_bytes,
    decoded,
    default,
    generate,
    padded,
    prompt_rows,
    small_lm,
    small_preset,
)
from test_staging import unprivileged

import keras_gemma2
from keras_gemma2 import Gemma2Backbone, Gemma2CausalLM, Gemma2CausalLMPreprocessor, Gemma2Tokenizer, Sampler
from keras_gemma2.cli import main
from keras_gemma2.export import saved_model


@pytest.fixture(scope="module")
def lm():
    return small_lm()


def test_texts_tokens_and_scores(tmp_path, lm):
    """As the backend at hand computes them; the weights are stored once."""
    lm.compile(sampler=Sampler(temperature=0, repetition_penalty=1.3))
    lm.export(tmp_path / "served" / "1", max_new_tokens=N)
    inputs = padded(prompt_rows(), 30)
    loop = ("loop of 8", {**inputs, "cache_length": np.int32(40)})
    requests = default(), ("generate_tokens", inputs), ("score", inputs), generate(), loop
    texts, tokens, scores, numbered, looped = ask(tmp_path / "served" / "1", *requests)
    assert decoded(texts["completions"]) == lm.generate(TEXTS, max_new_tokens=N, strip_prompt=True)
    plain = lm.generate(TEXTS, max_new_tokens=N, sampler="greedy", strip_prompt=True)
    assert decoded(numbered["completions"]) == plain != decoded(texts["completions"])
    steps = lm.generate(inputs, max_new_tokens=8, sampler="greedy", stop_token_ids=None, strip_prompt=True)["token_ids"]
    assert np.array_equal(looped["token_ids"], steps[:, :8])
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


@keras.saving.register_keras_serializable("tests")
class Named(Gemma2CausalLMPreprocessor):
    """Known to this process alone."""


class Shouting(Gemma2CausalLMPreprocessor):
    def generate_preprocess(self, x, sequence_length=None):
        return super().generate_preprocess([text.upper() for text in x], sequence_length)


def test_subclasses_of_a_preprocessor(tmp_path, lm):
    backbone, tokenizer = lm.backbone, lm.preprocessor.tokenizer
    named = Gemma2CausalLM(backbone, Named(tokenizer, add_start_token=False))
    named.export(tmp_path / "served", max_new_tokens=N, sampler="greedy", signatures=["serving_default"])
    (found,) = ask(tmp_path / "served", default(TEXTS[2:]))
    assert decoded(found["completions"]) == named.generate(TEXTS[2:], max_new_tokens=N, sampler="greedy", strip_prompt=True)
    with pytest.raises(ValueError, match="Shouting, whose `generate_preprocess` differ"):
        Gemma2CausalLM(backbone, Shouting(tokenizer)).export(tmp_path / "other")


class Swearing(Gemma2Tokenizer):
    def detokenize(self, inputs):
        return super().detokenize(inputs).replace("a", "*")


def test_subclasses_of_a_tokenizer(tmp_path, lm):
    preprocessor = Gemma2CausalLMPreprocessor(Swearing(lm.preprocessor.tokenizer.proto))
    with pytest.raises(ValueError, match="Swearing, whose `detokenize` differ"):
        Gemma2CausalLM(lm.backbone, preprocessor).export(tmp_path / "served", signatures=["generate"])


def test_settings_survive_json(lm):
    sampler = Sampler(0.7, 5, 0.9, repetition_penalty=1.2, logit_bias={7: -2.5})
    settings = saved_model.read_settings(lm, 33, sampler, True, [1, 9], ["generate", "score"])
    carried = json.loads(json.dumps(saved_model._settings_config(settings)))
    assert saved_model.settings_from_config(carried) == settings


def test_what_is_not_installed_is_told_first(tmp_path, lm, monkeypatch, capsys):
    find, missing = importlib.util.find_spec, []
    monkeypatch.setattr(Gemma2CausalLM, "from_preset", lambda *arguments, **options: pytest.fail("the model was loaded first"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name in missing else find(name, *rest))
    for missing[:], words in ((["tensorflow"], "written by TensorFlow"), (["tensorflow_text"], "signatures=.'generate_tokens'")):
        with pytest.raises(ImportError, match=words):
            lm.export(tmp_path / "served")
        assert main(["export", "gemma2_mini_en", str(tmp_path / "served")]) == 2
        assert re.search(f"not installed.*pip install {missing[0].replace('_', '-')}", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_an_accelerators_process_does_not_trace(monkeypatch):
    monkeypatch.setattr("keras_gemma2.backend.on_accelerator", lambda: True)
    assert not saved_model._traces_here()


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
    command = [sys.executable, "-m", "keras_gemma2", "export", small_preset(), str(target), "--max-new-tokens", "8"]
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


@pytest.mark.backend_free
def test_the_commands_other_options(tmp_path):
    """Codes, an adapter that goes along, chat, sampling, chosen signatures, and a folder that holds an export."""
    lm = Gemma2CausalLM.from_preset(small_preset(), quantize="int8")
    lm.enable_lora(rank=4, targets=["down"])
    draw = np.random.default_rng(1)
    for variable in lm.trainable_variables:
        variable.assign(draw.normal(0, 0.1, variable.shape))
    lm.save_adapter(tmp_path / "adapter")
    target = tmp_path / "1"
    command = [sys.executable, "-m", "keras_gemma2", "export", small_preset(), str(target), "--max-new-tokens", "12"]
    command += ["--quantize", "int8", "--adapter", str(tmp_path / "adapter"), "--chat", "--temperature", "0.7", "--top-k", "1"]
    target.mkdir()
    for name in ("notes.txt", "saved_model.pb"):
        (target / name).write_text("old")
    subprocess.run([*command, "--overwrite", "--signatures", "serving_default"], capture_output=True, text=True, check=True)
    assert (target / "notes.txt").read_text() == "old"
    messages = ["What is the state of our union?", "Who are you?"]
    (found,) = ask(target, default(messages))
    # One of the likeliest: greedy. Compiled code may round activations for int8 otherwise: the answers begin alike.
    expected = [lm.chat([{"role": "user", "content": text}], max_new_tokens=12, sampler="greedy") for text in messages]
    assert [text[:8] for text in decoded(found["completions"])] == [text[:8] for text in expected]
    with lm.backbone.adapter_set.only(None):
        plain = [lm.chat([{"role": "user", "content": text}], max_new_tokens=12, sampler="greedy") for text in messages]
    assert [text[:8] for text in plain] != [text[:8] for text in expected]
    assert data_bytes(target) < 1.1 * all_bytes(lm)


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
