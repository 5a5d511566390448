"""Trains a small model on the replicas of a strategy: `python tensorflow_replicas.py NAME`, where NAME is a function of this file.

Each compares what `fit` makes under the strategy with what it makes on one device.
"""

import os
import signal
import sys

import keras
import numpy as np
import tensorflow as tf
from distributed_steps import assert_near, assert_same_weights, batches, model


def data(rows):
    """The batches in one."""
    x, y, weights = (keras.tree.map_structure(lambda *parts: np.concatenate(parts)[:rows], *parts) for parts in zip(*batches()))
    return {"x": x, "y": y, "sample_weight": weights}


def compare(strategy, reduction, lora, rows=12):
    """Three steps of `fit`, and `evaluate`."""
    one = model(lora, reduction)
    with strategy.scope():
        many = model(lora, reduction)
    options = {**data(rows), "batch_size": 4, "verbose": 0}
    found, expected = (lm.fit(**options, shuffle=False).history for lm in (many, one))
    evaluated = [lm.evaluate(**options, return_dict=True) for lm in (many, one)]
    assert_same_weights(many, one)
    for name in expected:
        # Keras weighs the loss of a replica by its rows, also where it is divided by something else: an uneven batch shows.
        if name != "loss" or rows % 4 == 0:
            assert_near(found[name], expected[name])
            assert_near(evaluated[0][name], evaluated[1][name])


def mirrored():
    """Two devices of one process."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    compare(strategy, "sum_over_batch_size", lora=False)
    compare(strategy, "mean_with_sample_weight", lora=True)
    compare(strategy, "mean_with_sample_weight", lora=False, rows=9)  # the last batch has no row for one of them


def workers():
    """One of two processes, by TF_CONFIG."""
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    compare(strategy, "mean_with_sample_weight", lora=True)


class _Dies(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def killed():
    """The second worker is gone after a step, without a word."""
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with strategy.scope():
        lm = model()
    callbacks = [_Dies()] if strategy.cluster_resolver.task_id else []
    lm.fit(**data(12), batch_size=4, epochs=5, verbose=0, callbacks=callbacks)


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    print(f"passed {sys.argv[1]}", flush=True)
