"""`keras-gemma2 finetune`: what it writes, that it goes on after being killed as if it had not been, and what it refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import safetensors.numpy
from conftest import TINY

import keras_gemma2
from keras_gemma2.cli import main
from keras_gemma2.errors import CheckpointError
from keras_gemma2.finetuning import folder as folder_module
from keras_gemma2.finetuning.rows import Rows
from keras_gemma2.finetuning.run import finetune
from keras_gemma2.finetuning.settings import FinetuneSettings
from keras_gemma2.finetuning.tensorboard import EventFile
from keras_gemma2.training.jsonl import read_jsonl
from keras_gemma2.training.samples import Sample

PAIRS = [{"prompt": f"Who came in {1800 + i}?", "response": f" The number {i % 7} of them all."} for i in range(14)]


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """A two-layer random model with the embedded preset's tokenizer, its weights large enough that there is something to learn."""
    keras.utils.set_random_seed(5)
    preprocessor = keras_gemma2.Gemma2CausalLMPreprocessor.from_preset("gemma2_mini_en", sequence_length=48)
    backbone = keras_gemma2.Gemma2Backbone(**{**TINY, "num_layers": 2, "vocabulary_size": 4096})
    folder = tmp_path_factory.mktemp("presets") / "small"
    keras_gemma2.Gemma2CausalLM(backbone, preprocessor).save_to_preset(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", PAIRS)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def options_of(preset, data, output, **others):
    """A run of 2 epochs of 3 steps, with what has a state of its own: dropout, accumulation."""
    values = {
        "hold_out": 0.2,
        "batch_size": 4,
        "epochs": 2,
        "accumulate": 2,
        "dropout": 0.2,
        "learning_rate": 0.01,
        "save_every": 2,
    }
    return {"preset": preset, "data": data, "output": str(output), "targets": "all", "lora_rank": 4, "seed": 3, **values, **others}


def arguments_of(options):
    pairs = [[f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])] for name, value in options.items()]
    return ["finetune", "--quiet", *(text for pair in pairs for text in pair)]


def run(preset, data, output, **others):
    return finetune(FinetuneSettings(**options_of(preset, data, output, **others)), progress=False)


@pytest.fixture(scope="module")
def uninterrupted(preset, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "whole"
    return output, run(preset, data, output)


def log_of(output):
    return (Path(output) / "log.csv").read_text()


def assert_same_run(one, other):
    """The same steps of the same texts, with the same losses and the same adapter at the end.

    Not bit for bit: the libraries under the backends share a product out among threads as these are free, which adds its terms in
    another order, 1e-7 of it. A step that was left out, made twice, or made of other texts or another dropout mask shows in the
    losses at 1e-2 and more, and Adam moves each weight by some 0.01 a step.
    """
    rows = [[line.split(",") for line in log_of(output).splitlines()] for output in (one, other)]
    assert [[*row[:2], row[3], bool(row[4])] for row in rows[0]] == [[*row[:2], row[3], bool(row[4])] for row in rows[1]]
    losses = [[float(cell or "nan") for row in table[1:] for cell in (row[2], row[4])] for table in rows]
    np.testing.assert_allclose(*losses, rtol=1e-3)
    adapters = [safetensors.numpy.load_file(Path(output) / "adapter_model.safetensors") for output in (one, other)]
    assert adapters[0].keys() == adapters[1].keys()
    for name, array in adapters[0].items():
        np.testing.assert_allclose(array, adapters[1][name], atol=1e-3, err_msg=name)


# What it writes ---------------------------------------------------------------------------------------------------------


def test_the_command_writes_an_adapter_that_gives_the_loss_it_printed(preset, data, tmp_path, capsys, uninterrupted):
    output = tmp_path / "run"
    assert main(arguments_of(options_of(preset, data, output, merge=True, tensorboard=tmp_path / "events"))) == 0
    printed = capsys.readouterr().out
    before, after = map(float, re.search(r"held-out loss ([\d.]+) -> ([\d.]+), in 6 steps\n", printed).groups())
    assert after < before and printed.endswith(f"adapter in {output}\n")
    assert_same_run(output, uninterrupted[0])

    rows = [line.split(",") for line in log_of(output).splitlines()]
    assert rows[0] == ["step", "epoch", "loss", "tokens", "validation_loss"]
    assert [row[0] for row in rows[1:]] == list("0123456") and [row[1] for row in rows[1:]] == list("0111222")
    assert [bool(row[4]) for row in rows[1:]] == [True, False, False, True, False, False, True]

    lm = keras_gemma2.Gemma2CausalLM.from_preset(preset)
    order = np.random.default_rng(3).permutation(len(PAIRS))
    held_out = [PAIRS[index] for index in sorted(order[:2])]
    pairs = {name + "s": [row[name] for row in held_out] for name in ("prompt", "response")}
    lm.compile()
    losses = [np.log(lm.evaluate(pairs, verbose=0, return_dict=True)["perplexity"])]
    lm.load_adapter(output)
    losses.append(np.log(lm.evaluate(pairs, verbose=0, return_dict=True)["perplexity"]))
    np.testing.assert_allclose(losses, [before, after], atol=1e-4)  # printed with 4 digits
    merged = keras_gemma2.Gemma2CausalLM.from_preset(output / "merged")
    merged.compile()
    np.testing.assert_allclose(np.log(merged.evaluate(pairs, verbose=0, return_dict=True)["perplexity"]), after, atol=1e-4)

    events = list((tmp_path / "events").iterdir())
    read = read_events(events[0])
    assert [(step, round(values["loss"], 4)) for step, values in read if "loss" in values] == [
        (int(row[0]), round(float(row[2]), 4)) for row in rows[2:]
    ]
    assert read[0][1]["validation_loss"] == pytest.approx(before, abs=1e-4)

    # Once more: it is ended, which is said at once, from the log.
    assert main(arguments_of(options_of(preset, data, output, merge=True))) == 0
    assert capsys.readouterr().out == printed


def read_events(path):
    """Steps and values of an event file, by TensorFlow's own reader."""
    import tensorflow as tf

    events = [event for event in tf.compat.v1.train.summary_iterator(str(path))]
    assert events[0].file_version == "brain.Event:2" and events[1].session_log.status == 1
    return [(event.step, {value.tag: value.simple_value for value in event.summary.value}) for event in events[2:]]


def test_event_files_hold_large_steps_and_any_tag(tmp_path):
    events = EventFile(tmp_path, first_step=300)
    events.scalars(70_000, {"a" * 200: -1.5, "b": float("inf")})
    events.close()
    assert read_events(next(tmp_path.iterdir())) == [(70_000, {"a" * 200: -1.5, "b": float("inf")})]


# Going on ---------------------------------------------------------------------------------------------------------------

KILLED_WHILE_WRITING = """
import os, signal, sys
from keras_gemma2 import staging
from keras_gemma2.cli import main

took_place, times = staging.take_place, []

def dies(folder, path, *rest):
    times.append(path)
    if len(times) == 2:  # the second checkpoint is written, and not in its place
        os.kill(os.getpid(), signal.SIGKILL)
    took_place(folder, path, *rest)

staging.take_place = dies
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.backend_free
def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(preset, data, tmp_path, uninterrupted):
    output = tmp_path / "run"
    arguments = arguments_of(options_of(preset, data, output))
    process = subprocess.Popen([sys.executable, "-m", "keras_gemma2", *arguments], stderr=subprocess.DEVNULL)
    wait_for(lambda: (output / "log.csv").exists() and log_of(output).count("\n") >= 3, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (output / "checkpoint" / "state.npz").exists()

    result = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, *arguments], capture_output=True, text=True)
    if result.returncode == 0:  # the first process was quick: it had ended but for its last checkpoint
        assert_same_run(output, uninterrupted[0])
    else:
        assert result.returncode == -signal.SIGKILL, result.stderr
        assert [name for name in os.listdir(output) if name.startswith(".checkpoint.saving-")], "what was half written is beside"
    shutil.copyfile(output / "log.csv", tmp_path / "log.csv")
    with open(output / "log.csv", "a") as file:  # a row of a step that was never saved, half of it
        file.write("6,2,9.7")

    result = run(preset, data, output)
    assert result.steps == uninterrupted[1].steps and result.after == pytest.approx(uninterrupted[1].after, rel=1e-3)
    assert_same_run(output, uninterrupted[0])
    assert not [name for name in os.listdir(output) if "saving" in name]


def wait_for(condition, process, seconds=300):
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)


@pytest.mark.backend_free
def test_two_runs_in_one_folder(preset, data, tmp_path):
    output = tmp_path / "run"
    locks = "with only_writer(sys.argv[1]): print(1, flush=True); time.sleep(600)"
    holder = f"import sys, time; from keras_gemma2.staging import only_writer\n{locks}"
    other = subprocess.Popen([sys.executable, "-c", holder, output / "log.csv"], stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(CheckpointError, match="Another process is writing to .*run'. Wait for it"):
        run(preset, data, output, epochs=1)
    assert os.listdir(output) == ["log.csv"] and log_of(output) == ""
    other.kill()  # which gives the lock back
    other.communicate()
    assert run(preset, data, output, epochs=1, accumulate=1).steps == 3


class Stop(Exception):
    pass


@pytest.fixture
def stopped_after(monkeypatch):
    """Runs that end with an exception once a step's row is written."""

    def stop_at(last):
        row = folder_module.Log.row

        def dies(self, step, *rest):
            row(self, step, *rest)
            if step == last:
                raise Stop

        monkeypatch.setattr(folder_module.Log, "row", dies)
        return lambda: monkeypatch.setattr(folder_module.Log, "row", row)

    return stop_at


@pytest.mark.parametrize(
    "others",
    [
        {"quantize": "int8", "targets": ("query", "down"), "dtype": "mixed_bfloat16", "gradient_checkpointing": True},
        pytest.param(  # of int4 and of packed rows, losses and gradients are compared on each backend elsewhere
            {"quantize": "int4", "targets": ("query", "down"), "pack": True, "length": 40, "rslora": True, "hold_out": 0},
            marks=pytest.mark.backend_free,
        ),
    ],
    ids=lambda others: others["quantize"],
)
def test_qlora_goes_on_too(others, preset, data, tmp_path, stopped_after):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = run(preset, data, whole, **others)
    assert result.after is None or result.after < result.before
    go_on = stopped_after(2 if "pack" in others else 3)
    with pytest.raises(Stop):
        run(preset, data, parts, **others)
    go_on()
    run(preset, data, parts, **others)
    assert_same_run(parts, whole)


def test_accumulated_steps_equal_a_larger_batch(preset, tmp_path):
    """Where each batch has as many learned tokens, as the loss is their mean."""
    data = write_rows(tmp_path / "even.jsonl", [{"prompt": f"{i}", "response": " yes and no"} for i in (1, 2, 3, 4, 5, 6, 7, 8)])
    options = {"hold_out": 0, "dropout": 0, "epochs": 1, "learning_rate": 1e-3}
    adapters = []
    for name, batch_size, accumulate in (("large", 4, 1), ("small", 2, 2)):
        run(preset, data, tmp_path / name, batch_size=batch_size, accumulate=accumulate, **options)
        lm = keras_gemma2.Gemma2CausalLM.from_preset(preset)
        lm.load_adapter(tmp_path / name)
        adapters.append([keras.ops.convert_to_numpy(variable) for variable in lm.trainable_variables])
    # Sums of float32 in another order, 1e-7 of a gradient; Adam's first steps divide by the gradient's own size, which widens that
    # where a gradient is next to nothing. The steps themselves are of 1e-3.
    for large, small in zip(*adapters):
        np.testing.assert_allclose(small, large, atol=2e-5)


# Bad input --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"dropout": 0.1}, "dropout=0.2, and this one has dropout=0.1.*--restart.*another output folder"),
        ({"seed": 4}, "seed=3, and this one has seed=4"),
        ({"targets": "attention"}, "targets='all', and this one has targets='attention'"),
        ({"data": "other"}, "data='sha256"),
    ],
)
def test_a_run_of_other_settings_is_not_continued(changed, message, preset, data, tmp_path, uninterrupted, capsys):
    if "data" in changed:
        changed, data = {}, write_rows(tmp_path / "other.jsonl", PAIRS[:9])
    before = log_of(uninterrupted[0])
    assert main(arguments_of(options_of(preset, data, uninterrupted[0], **changed))) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
    assert log_of(uninterrupted[0]) == before


@pytest.mark.backend_free
def test_restart_drops_the_run_and_keeps_what_is_not_of_it(preset, data, tmp_path, uninterrupted):
    output = tmp_path / "run"
    shutil.copytree(uninterrupted[0], output)
    (output / "notes.txt").write_text("mine")
    finetune(FinetuneSettings(**options_of(preset, data, output, epochs=1, accumulate=1)), restart=True, progress=False)
    assert log_of(output).count("\n") == 5 and (output / "notes.txt").read_text() == "mine"


@pytest.mark.backend_free
@pytest.mark.parametrize(
    "options, message",
    [
        ({"data": "nowhere.jsonl"}, "There is no file 'nowhere.jsonl'"),
        ({"validation": "nowhere.jsonl"}, "There is no file 'nowhere.jsonl'"),
        ({"preset": "gemma2_mini_em"}, "Unknown preset 'gemma2_mini_em'.*'gemma2_mini_en'"),
        ({"lora_rank": 0}, "--lora-rank: must be an integer of at least 1, got '0'"),
        ({"lora_rank": 4000}, "rank.*at most the smaller side.*4000"),
        ({"targets": "quary"}, "names no projection.*'quary'.*Did you mean 'query'"),
        ({"dropout": 1}, "`dropout` must be a rate in .0, 1.. Received: 1.0"),
        ({"learning_rate": 0}, "`learning_rate` must be a positive number"),
        ({"hold_out": 1}, "`hold_out` must be a share"),
        ({"batch_size": 0}, "--batch-size: must be an integer of at least 1"),
        ({"length": 65}, "`length` must be at most the model's context, 64"),
        ({"length": 8}, r"pairs.jsonl: 14 of 14 samples have more than `length` \+ 1 tokens, 9. Raise --length.*--truncate"),
        ({"accumulate": 7}, "`accumulate` must be at most the steps there are, 6"),
        ({"quantize": "int3"}, "--quantize"),
        ({"tensorboard": __file__}, "`tensorboard` must be a folder"),
    ],
    ids=str,
)
def test_bad_options_give_one_line_and_exit_code_2(options, message, preset, data, tmp_path, capsys):
    refused({**options_of(preset, data, tmp_path / "run"), **options}, message, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.backend_free
@pytest.mark.parametrize(
    "text, message",
    [
        ("", "has no rows"),
        ('{"text": "a"}\n{"text": "a"\n', "line 2 is not JSON"),
        ('{"text": "a"}\n\n{"text": 3}\n', "line 3"),
        ('{"words": "a"}\n', "line 1"),
    ],
)
def test_bad_data_is_named_with_its_line_before_a_model_loads(text, message, preset, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(keras_gemma2.Gemma2CausalLM, "from_preset", None)
    (tmp_path / "data.jsonl").write_text(text)
    refused(options_of(preset, str(tmp_path / "data.jsonl"), tmp_path / "run"), message, capsys)


@pytest.mark.backend_free
def test_a_folder_of_something_else_is_left_alone(preset, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(keras_gemma2.Gemma2CausalLM, "from_preset", None)
    (tmp_path / "settings.json").write_text('{"made_by": "somebody"}')
    refused(options_of(preset, data, tmp_path), "is not empty, and no fine-tuning run of this package is in it", capsys)
    refused({**options_of(preset, data, tmp_path), "restart": True}, "is not empty", capsys)
    refused(options_of(preset, data, data), "must be a folder", capsys)
    assert os.listdir(tmp_path) == ["settings.json"]


@pytest.mark.backend_free
def test_a_full_disk_is_told_before_the_first_step(preset, data, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(CheckpointError, match="disk of .*checkpoint' is full"):
        run(preset, data, tmp_path / "run")


@pytest.mark.backend_free
def test_a_damaged_checkpoint_or_log_is_told(preset, data, tmp_path, uninterrupted):
    output = tmp_path / "run"
    shutil.copytree(uninterrupted[0], output)
    os.remove(output / "adapter_model.safetensors")
    (output / "log.csv").write_text("step,")
    with pytest.raises(CheckpointError, match="has 5 bytes, and had .*--restart"):
        run(preset, data, output)
    state = output / "checkpoint" / "state.npz"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be read.*--restart"):
        run(preset, data, output)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(preset, data, tmp_path, monkeypatch):
    def broken(self, *args, **kwargs):
        return {"loss": np.float32("nan")}

    monkeypatch.setattr(keras_gemma2.Gemma2CausalLM, "train_on_batch", broken)
    with pytest.raises(FloatingPointError, match="The loss is nan at step 1, in epoch 1"):
        run(preset, data, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint" / "state.npz").exists()


@pytest.mark.backend_free
def test_ctrl_c_says_how_to_go_on(preset, data, tmp_path, monkeypatch, capsys):
    def interrupted(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(keras_gemma2.Gemma2CausalLM, "train_on_batch", interrupted)
    assert main(arguments_of(options_of(preset, data, tmp_path / "run"))) == 130
    assert "The same command goes on from the last checkpoint" in capsys.readouterr().err


@pytest.mark.backend_free
@pytest.mark.parametrize("name", ["epochs", "batch_size", "accumulate", "save_every", "length"])
def test_counts_are_checked(name):
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match=f"`{name}` must be an integer of at least 1"):
            FinetuneSettings("p", "d", "o", **{name: wrong})


def refused(options, message, capsys):
    try:
        code = main(arguments_of(options))
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    assert re.search(message, captured.err) and captured.err.count("\n") == 1, captured.err


def test_orders_of_epochs():
    rows = Rows([Sample(np.arange(3, dtype="int32"), np.ones(3, "float32"))] * 20, 2, 0, packs=False, batch_size=4)
    orders = [tuple(rows.order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)]
    assert len(set(orders)) == 4 and all(sorted(order) == list(range(20)) for order in orders)
    assert orders[0] == tuple(rows.order(1, 0))


def test_rows_read_back(data):
    assert len(read_jsonl(data)["prompts"]) == len(PAIRS)


@pytest.mark.backend_free
def test_float32_factors_beside_bfloat16_weights_are_no_reason_to_warn(preset, data, tmp_path, recwarn):
    run(preset, data, tmp_path / "run", dtype="bfloat16", epochs=1, accumulate=1)
    assert not [str(warning.message) for warning in recwarn if "rounded away" in str(warning.message)]
