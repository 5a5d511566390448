"""Fine-tune on many devices or machines, with the launcher of each backend's own ecosystem.

    # PyTorch, 2 processes; on more machines as torchrun's manual says (--nnodes, --rdzv-endpoint)
    KERAS_BACKEND=torch torchrun --nproc-per-node 2 examples/distributed_finetune.py --data train.jsonl --output tuned
    # TensorFlow, all devices of this machine; on several machines start it on each, with TF_CONFIG set
    KERAS_BACKEND=tensorflow python examples/distributed_finetune.py --data train.jsonl --output tuned
    # JAX, all devices of this machine, each with a part of the weights; on several start it on each, with the variables of
    # `keras.distribution.initialize` set (KERAS_DISTRIBUTION_JOB_ADDRESSES, ..._NUM_PROCESSES and ..._PROCESS_ID), or by a launcher
    # that JAX knows (Cloud TPUs, Slurm, Open MPI, Kubernetes) with --join
    KERAS_BACKEND=jax python examples/distributed_finetune.py --recipe fully_sharded --data train.jsonl --output tuned

The folder gets the adapter (`lm.load_adapter("tuned")`), or with `--lora-rank 0`, which trains all weights, the model
(`Gemma2CausalLM.from_preset("tuned")`). It must be one that all machines see. A run that was interrupted goes on after its last
whole epoch when the same command is given again, to the same losses; on JAX the mesh may be another one. (With another number of
processes rows are shuffled in another order.) Where the folder has a result already, nothing is done.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

import keras
import numpy as np

import keras_gemma2
from keras_gemma2 import distribution, processes
from keras_gemma2.finetuning.state import arrays_of, restore

STATE = "state.npz"  # of a run that is under way, in its folder
CHECKPOINTS = "checkpoints"  # the same on JAX, where each process writes its own part


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", default="gemma2_mini_en", help="built-in name, hub address or folder (default: %(default)s)")
    add("--data", required=True, help=".jsonl: text; prompt and response; or messages, in each line")
    add("--output", type=Path, required=True, help="folder to write to")
    add("--lora-rank", type=int, default=8, help="of the factors; 0 trains all weights (default: %(default)s)")
    add("--learning-rate", type=float, default=2e-4, help="of Adam (default: %(default)s)")
    add("--batch-size", type=int, default=8, help="rows a step, over all devices (default: %(default)s)")
    add("--length", type=int, default=128, help="tokens of a row (default: %(default)s)")
    add("--epochs", type=int, default=1, help="default: %(default)s")
    add("--steps", type=int, help="of an epoch; default: all there are")
    add("--timeout", type=float, default=100, help="seconds to wait for another process (PyTorch, JAX; default: %(default)s)")
    add("--recipe", choices=distribution.RECIPES, default="data_parallel", help="JAX (default: %(default)s)")
    add("--model", type=int, metavar="N", help="JAX: devices that heads are split over, with the recipes that do")
    add("--join", action="store_true", help="JAX: this is one of several processes, whose launcher JAX knows")
    add("--seed", type=int, default=0, help="default: %(default)s")
    return parser.parse_args(arguments)


def compiled_model(options: argparse.Namespace) -> Any:
    """The preset, ready to train; the same in each process."""
    keras.utils.set_random_seed(options.seed)
    lm = keras_gemma2.Gemma2CausalLM.from_preset(options.preset)
    lm.preprocessor.sequence_length = options.length
    if options.lora_rank:
        lm.enable_lora(rank=options.lora_rank, targets="all")
    # The mean over learned tokens of the whole batch, wherever they are.
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight")
    lm.compile(optimizer=keras.optimizers.Adam(options.learning_rate, global_clipnorm=1.0), loss=loss)
    lm.optimizer.build(lm.trainable_variables)
    return lm


def train(lm: Any, data: Any, options: argparse.Namespace, batch_size: int, index: int) -> None:
    """Epochs that are left, each of which starts from a seed of its own; the process of index 0 saves.

    Args:
        lm: the model.
        data: what this process gives to `fit`.
        options: the command line's.
        batch_size: rows that this process gives to a step.
        index: of this process.
    """
    on_jax = keras.backend.backend() == "jax"  # where processes have parts of the model, and each gives its own
    for epoch in range(restored_epochs(lm, options.output), options.epochs):
        keras.utils.set_random_seed(options.seed + epoch)
        callbacks = [keras_gemma2.RunCheckpoint(options.output / CHECKPOINTS)] if on_jax else []
        arguments = {"initial_epoch": epoch, "epochs": epoch + 1, "steps_per_epoch": options.steps, "callbacks": callbacks}
        history = lm.fit(data, batch_size=batch_size, verbose=0, **arguments)
        if index == 0:
            print(f"epoch {epoch + 1}: loss {history.history['loss'][0]:.4f}", flush=True)
            if not on_jax:
                save_state(lm, options.output, epoch + 1)
    save = lm.save_adapter if options.lora_rank else lm.save_to_preset
    if index == 0 or on_jax:
        save(options.output)
    if index == 0:
        options.output.joinpath(STATE).unlink(missing_ok=True)
        shutil.rmtree(options.output / CHECKPOINTS, ignore_errors=True)


def save_state(lm: Any, folder: Path, epochs: int) -> None:
    """Writes what a run needs to go on; the file changes in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f"unfinished-{STATE}"
    np.savez(unfinished, epochs=epochs, **arrays_of(lm))
    os.replace(unfinished, folder / STATE)


def restored_epochs(lm: Any, folder: Path) -> int:
    """Epochs that an interrupted run has made; the model becomes as it was after them."""
    if keras.backend.backend() == "jax":
        try:
            return keras_gemma2.restore_checkpoint(lm, folder / CHECKPOINTS) + 1
        except FileNotFoundError:
            return 0
    if not (folder / STATE).exists():
        return 0
    with np.load(folder / STATE) as file:
        arrays = dict(file)
    epochs = int(arrays.pop("epochs"))
    restore(lm, arrays)
    return epochs


# One function for each backend ------------------------------------------------------------------------------------------


def train_torch(options: argparse.Namespace) -> None:
    """Each process that torchrun started trains on its share of the rows; gradients are averaged."""
    processes.join_processes(options.timeout)
    index, count = processes.process_index(), processes.process_count()
    if options.batch_size % count:
        raise SystemExit(f"--batch-size must be a multiple of the {count} processes. Received: {options.batch_size}.")
    lm = processes.data_parallel(compiled_model(options))
    data = processes.shard_of(keras_gemma2.read_jsonl(options.data))
    train(lm, data, options, options.batch_size // count, index)


def train_tensorflow(options: argparse.Namespace) -> None:
    """All devices of this machine; with TF_CONFIG, of all machines in it. `fit` gives each its rows of a batch."""
    import tensorflow as tf

    strategy = tf.distribute.MultiWorkerMirroredStrategy() if "TF_CONFIG" in os.environ else tf.distribute.MirroredStrategy()
    with strategy.scope():
        lm = compiled_model(options)
    index = strategy.cluster_resolver.task_id if "TF_CONFIG" in os.environ else 0
    train(lm, keras_gemma2.read_jsonl(options.data), options, options.batch_size, index)


def train_jax(options: argparse.Namespace) -> None:
    """A mesh of all devices of all processes."""
    if options.join or "KERAS_DISTRIBUTION_NUM_PROCESSES" in os.environ:
        processes.join_processes(options.timeout)
    mesh = distribution.make_distribution(options.recipe, model=options.model)
    groups, count = mesh.num_model_replicas, min(mesh.num_model_replicas, mesh.num_processes)
    if options.batch_size % groups:
        raise SystemExit(f"--batch-size must be a multiple of the {groups} groups of devices. Received: {options.batch_size}.")
    with mesh.scope():
        lm, batch_size = compiled_model(options), options.batch_size // count
        data = whole_batches(processes.shard_of(keras_gemma2.read_jsonl(options.data)), batch_size)
        train(lm, data, options, batch_size, processes.process_index())


def whole_batches(data: Any, batch_size: int) -> Any:
    """Rows, or columns of them, without the last that make no batch: one must divide among devices."""
    columns = data.values() if isinstance(data, dict) else [data]
    rows = min(map(len, columns)) // batch_size * batch_size
    if not rows:
        raise SystemExit(f"--data must have a row or more for each of the {batch_size} of a batch in every process.")
    return {name: column[:rows] for name, column in data.items()} if isinstance(data, dict) else data[:rows]


def main(arguments: list[str] | None = None) -> None:
    """Trains with the backend that KERAS_BACKEND names."""
    options = parse_arguments(arguments)
    result = options.output / ("adapter_config.json" if options.lora_rank else "config.json")
    if result.exists() and not any((options.output / name).exists() for name in (STATE, CHECKPOINTS)):
        print(f"{options.output} has the result of a run that has ended. Choose another folder for another run.")
        return
    {"torch": train_torch, "tensorflow": train_tensorflow, "jax": train_jax}[keras.backend.backend()](options)


if __name__ == "__main__":
    main()
