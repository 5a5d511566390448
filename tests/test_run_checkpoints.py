"""Runs that go on from a checkpoint of Keras's own Orbax callback, and what is said where one cannot be written."""

import os
import subprocess
import sys

import distributed_steps as steps
import keras
import numpy as np
import pytest

from keras_gemma2 import CheckpointError, Distiller, RunCheckpoint, restore_checkpoint


def fit(lm, folder=None, **arguments):
    x, y, weights = next(steps.batches(1, rows=8))
    saves = [RunCheckpoint(folder, **arguments.pop("options", {}))] if folder else []
    callbacks = [*saves, *arguments.pop("more", [])]
    history = lm.fit(x, y, sample_weight=weights, batch_size=4, shuffle=False, verbose=0, callbacks=callbacks, **arguments)
    return history.history["loss"]


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_goes_on(lora, tmp_path):
    whole = steps.model(lora)
    losses = fit(whole, tmp_path, epochs=3, options={"max_to_keep": None})
    for step, epoch in ((1, 2), (None, 3)):
        lm = steps.model(lora, seed=8)  # other weights
        assert restore_checkpoint(lm, tmp_path, step) == epoch - 1
        if epoch == 2:
            assert fit(lm, initial_epoch=2, epochs=3) == pytest.approx(losses[2:], abs=1e-6)  # one sum at least in another order
        steps.assert_same_weights(lm, whole)
        assert int(lm.optimizer.iterations) == 6


def test_a_distiller_goes_on(tmp_path):
    """Its student has adapters, whose frozen weights have the names of the teacher's."""

    def made(seed):
        distiller = Distiller(steps.model(True, seed=seed), steps.model(seed=1, num_layers=3))
        distiller.compile(optimizer=keras.optimizers.SGD(0.5, momentum=0.9))
        return distiller

    whole, again = made(3), made(8)
    teacher = [np.array(keras.ops.convert_to_numpy(variable)) for variable in again.teacher.weights]
    losses = fit(whole, tmp_path, epochs=2, options={"max_to_keep": None})
    assert restore_checkpoint(again, tmp_path, 0) == 0
    assert fit(again, initial_epoch=1, epochs=2) == pytest.approx(losses[1:], abs=1e-6)
    steps.assert_same_weights(again.student, whole.student)
    for value, variable in zip(teacher, again.teacher.weights):
        assert np.array_equal(value, keras.ops.convert_to_numpy(variable))


def test_what_does_not_fit_is_refused(tmp_path):
    lm = steps.model(lora=True)
    with pytest.raises(CheckpointError, match="There is no folder"):
        restore_checkpoint(lm, tmp_path / "none")
    with pytest.raises(CheckpointError, match="has no checkpoint that"):
        restore_checkpoint(lm, tmp_path)
    fit(lm, tmp_path / "a")
    fit(lm, tmp_path / "b", options={"save_weights_only": True})
    before = [np.array(keras.ops.convert_to_numpy(variable)) for variable in lm.variables]
    with pytest.raises(CheckpointError, match="no checkpoint of step 3. There are: 0"):
        restore_checkpoint(lm, tmp_path / "a", 3)
    with pytest.raises(CheckpointError, match="has weights alone"):
        restore_checkpoint(lm, tmp_path / "b")
    with pytest.raises(CheckpointError, match="differ in .*nothing here.* more. Make the model as for the run"):
        restore_checkpoint(steps.model(), tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"attention/key/kernel' \(\(32, 42\) there, \(32, 48\) here\)"):
        restore_checkpoint(steps.model(lora=True, hidden_dim=48), tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"has checkpoints of step 0 or later \(0\).*`restore_checkpoint`"):
        fit(lm, tmp_path / "a")
    with pytest.raises(CheckpointError, match="must be a folder. Received: 'gs://bucket/run'"):
        RunCheckpoint("gs://bucket/run")
    for path in (tmp_path / "a").rglob("d/*"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="or a damaged one|cannot be read"):
        restore_checkpoint(lm, tmp_path / "a")
    for value, variable in zip(before, lm.variables):
        assert np.array_equal(value, keras.ops.convert_to_numpy(variable))
    with pytest.raises(ValueError, match="`model` must be compiled"):
        restore_checkpoint(keras.Sequential(), tmp_path / "a")
    for arguments, named in (((lm, 3), "directory"), ((lm, tmp_path, "1"), "step"), ((lm, tmp_path, True), "step")):
        with pytest.raises(TypeError, match=f"`{named}` must be"):
            restore_checkpoint(*arguments)


def test_a_full_disk(tmp_path, monkeypatch):
    lm = steps.model()
    before = [np.array(keras.ops.convert_to_numpy(variable)) for variable in lm.variables]
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        fit(lm, tmp_path / "file" / "run")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100_000}))
        with pytest.raises(CheckpointError, match="is full: this save needs 0.00 GB and 0.00 GB are free"):
            fit(lm, tmp_path / "run")
    for value, variable in zip(before, lm.variables):
        assert np.array_equal(value, keras.ops.convert_to_numpy(variable))  # no step was made
    with pytest.raises(TypeError, match="`directory` must be the path"):
        RunCheckpoint(3)


FULL = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import keras
import test_run_checkpoints as test
lm = test.steps.model()
test.fit(lm)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))  # more than what is written to try
class Says(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        print("ended")
    def on_train_end(self, logs=None):
        print("ended")
test.fit(lm, sys.argv[2], more=[Says()])
"""


def test_a_save_that_fails_in_the_background(tmp_path):
    command = [sys.executable, "-c", FULL, os.path.dirname(__file__), str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode and "File too large" in done.stderr, done.stderr[-3000:]
    assert done.stdout.split() == ["ended"]  # the epoch, but not the training
    with pytest.raises(CheckpointError, match="has no checkpoint"):
        restore_checkpoint(steps.model(), tmp_path / "run")
