"""One of the processes that train a small model: `torchrun torch_processes.py NAME ...`, where NAMEs are functions of this file.

Each compares what several processes make with what this one makes of whole batches alone, by Keras's own steps.
"""

import os
import signal
import sys
import time
import warnings

import keras
import numpy as np
from distributed_steps import REDUCTIONS, assert_near, assert_same_weights, batches, model, part

from keras_gemma2 import processes


def steps(split=((0, 2), (2, 4))):
    """Three steps of each kind: metrics, gradients and weights."""
    processes.join_processes(30)
    rows = slice(*split[processes.process_index()])
    for lora in (False, True):
        for reduction in REDUCTIONS:
            one = model(lora, reduction)
            # The first's weights are what all get.
            many = processes.data_parallel(model(lora, reduction, seed=3 + processes.process_index()))
            frozen = [keras.ops.convert_to_numpy(v).copy() for v in many.non_trainable_weights]
            for batch in batches():
                expected = one.train_on_batch(*batch, return_dict=True)
                for name, value in many.train_on_batch(*part(batch, rows), return_dict=True).items():
                    assert_near(value, expected[name])
                for a, b in zip(many.trainable_variables, one.trainable_variables, strict=True):
                    assert_near(a.value.grad, b.value.grad)
            assert_same_weights(many, one)
            assert all((a == keras.ops.convert_to_numpy(b)).all() for a, b in zip(frozen, many.non_trainable_weights, strict=True))
            assert bool(frozen) == lora
            expected = one.evaluate(*batch[:2], sample_weight=batch[2], batch_size=4, verbose=0)
            x, y, weights = part(batch, rows)
            assert_near(many.evaluate(x, y, sample_weight=weights, batch_size=4, verbose=0), expected)


def uneven_steps():
    """Parts of 1 and of 3 rows."""
    steps(((0, 1), (1, 4)))


def adapters_and_packed_rows():
    """An adapter added, and changed, after `data_parallel`; quantized weights, recomputed blocks, packed rows through `fit`."""
    processes.join_processes(30)
    index = processes.process_index()
    one, many = model(), processes.data_parallel(model())
    for lm in (one, many):
        lm.quantize("int4")
        keras.utils.set_random_seed(5 if lm is one else 5 + index)  # other factors in each process, until the first step
        lm.enable_lora(rank=2)
        lm.enable_gradient_checkpointing()
    (x, y, weights), *_ = batches(1, rows=8)
    mask = np.repeat([[1, 1, 1, 1, 2, 2, 2, 0, 0]], 8, axis=0)
    data = {**x, "padding_mask": mask}, y, weights
    for name in ("default", "second"):
        if name == "second":
            for lm in (one, many):
                keras.utils.set_random_seed(6)
                lm.enable_lora(rank=3, targets="all", name=name)
        x, y, weights = data
        expected = one.fit(x, y, sample_weight=weights, batch_size=4, shuffle=False, verbose=0).history
        # Rows 0, 2 | 4, 6 and 1, 3 | 5, 7: with steps over the same rows as alone.
        x, y, weights = processes.shard_of(data)
        found = many.fit(x, y, sample_weight=weights, batch_size=2, shuffle=False, verbose=0).history
        for key, values in expected.items():
            assert_near(found[key], values)
        assert_same_weights(many, one)


def different_models():
    """Refused in each process, by name."""
    processes.join_processes(30)
    try:
        processes.data_parallel(model(hidden_dim=42 + 2 * processes.process_index()))
    except ValueError as error:
        assert "the config's hidden_dim is 42 in process 0 and 44 in process 1" in str(error)
    else:
        raise AssertionError


def sharded():
    """`fully_shard` on blocks, the backbone and the model: refused before a step, which would train each process's old weights."""
    from torch.distributed.fsdp import fully_shard

    processes.join_processes(30)
    for apply in (
        lambda lm: [fully_shard(block) for block in lm.backbone.transformer_layers],
        lambda lm: fully_shard(lm.backbone),
        fully_shard,
    ):
        lm = model(lora=True)
        apply(lm)
        for train in (lambda lm: lm.train_on_batch(*next(batches())), processes.data_parallel):
            try:
                train(lm)
            except RuntimeError as error:
                assert "no longer parameters" in str(error) and "data_parallel(lm)" in str(error)
            else:
                raise AssertionError


def killed():
    """The second process is gone after a step, without a word; the first says so."""
    processes.join_processes(10)
    lm = processes.data_parallel(model())
    for number, batch in enumerate(batches(3)):
        if number == 1 and processes.process_index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        lm.train_on_batch(*batch)


def fewer_batches():
    """The second process waits, with no batch left, for longer than the timeout."""
    processes.join_processes(3)
    lm = processes.data_parallel(model())
    for batch in batches(1 + (processes.process_index() == 0)):
        lm.train_on_batch(*batch)
    time.sleep(30)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for name in sys.argv[1:]:
        globals()[name]()
        print(f"passed {name}", flush=True)
