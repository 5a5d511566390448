"""Several processes that train one model, and the share of the data that each has."""

from __future__ import annotations

from typing import Any

import keras

TIMEOUT = 100.0  # seconds; a process that is gone is noticed within two minutes


def join_processes(timeout: float = TIMEOUT) -> None:
    """Makes this process one of several that train a model; it must come before the model, and on JAX before all else.

    PyTorch: one of those that `torchrun` started; on GPUs it takes that of its `LOCAL_RANK`. `data_parallel` does it where it has
    not been done.

    JAX: as `keras.distribution.initialize`, from the same variables (KERAS_DISTRIBUTION_JOB_ADDRESSES, ..._NUM_PROCESSES and
    ..._PROCESS_ID) or from what Cloud TPUs, Slurm, Open MPI and Kubernetes (with the Python package kubernetes) say; but a process
    that is gone ends the others after `timeout`.

    Args:
        timeout: seconds after which a process gives up another that it has not heard of. PyTorch counts what one of them does
            alone, such as saving, too; JAX does not.

    Raises:
        ValueError: for a `timeout` that is not a positive number; on TensorFlow, whose strategies do it.
        RuntimeError: if nothing says who the other processes are; on JAX, if it has been used before.

    Example:
        >>> join_processes()  # in a script that torchrun runs, or that each of several machines does
    """
    _check_timeout(timeout)
    if keras.backend.backend() == "jax":
        from keras_gemma2.backend import jax_processes

        jax_processes.join_processes(timeout)
    else:
        _torch().join_processes(timeout)


def data_parallel(model: Any, timeout: float = TIMEOUT) -> Any:
    """Makes a model train in all processes that `torchrun` started, each on its own part of the data.

    All processes take the weights of the first. From then on all must call `fit`, `evaluate`, `train_on_batch` and `test_on_batch`
    together, with the same number of batches; their losses, metrics and gradients are those of the whole batch, in parts of any
    size. `generate`, `predict` and saving are each process's own: save in one alone. Adapters may be added or changed later, in
    all of them.

    With a loss or metrics of your own, gradients are the mean over processes, and what is reported is each process's own.

    Args:
        model: a `Gemma2CausalLM` or a `Distiller`.
        timeout: as `join_processes` takes it; longer than a save.

    Returns:
        The model.

    Raises:
        TypeError: for a model that is neither.
        ValueError: on every process, if their versions, configs, weights' shapes or optimizers differ; for a `timeout` that is no
            positive number; on other backends.
        RuntimeError: if the process was not started by a launcher, or the model's parameters were replaced (`fully_shard`).

    Example:
        >>> lm = data_parallel(Gemma2CausalLM.from_preset("gemma2_2b"))
        >>> lm.enable_lora(rank=8)
        >>> lm.fit(shard_of(texts), batch_size=4)  # 8 a step, where torchrun started 2
    """
    _check_timeout(timeout)
    return _torch().data_parallel(model, timeout)


def _check_timeout(timeout: float) -> None:
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
        raise ValueError(f"`timeout` must be a positive number of seconds. Received: {timeout!r}.")


def process_index() -> int:
    """Which of the processes this is, from 0; 0 where there is one."""
    return _index_and_count()[0]


def process_count() -> int:
    """How many processes train the model together."""
    return _index_and_count()[1]


def shard_of(data: Any) -> Any:
    """This process's share of data, of the same size in each: see `keras_gemma2.training.shares.share_of`.

    Args:
        data: what `lm.fit` takes, in memory; or a `tf.data.Dataset`.

    Raises:
        TypeError, ValueError: as `share_of`.

    Example:
        >>> lm.fit(shard_of(keras_gemma2.read_jsonl("train.jsonl")))
    """
    from keras_gemma2.training.shares import share_of  # a higher layer

    return share_of(data, *_share())


def _index_and_count() -> tuple[int, int]:
    backend = keras.backend.backend()
    if backend == "torch":
        return _torch().process_index(), _torch().process_count()
    if backend == "jax":
        from keras.src.backend.jax import distribution_lib  # what `keras.distribution.initialize` has set

        return distribution_lib.process_id(), distribution_lib.num_processes()
    return 0, 1  # `fit` shares out the data of a `tf.distribute` strategy itself


def _share() -> tuple[int, int]:
    """Of processes that hold one model's parts between them all have the same rows of data, so that they count as one."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return _index_and_count()
    return distribution.data_shard_id, min(distribution.num_processes, distribution.num_model_replicas)


def _torch() -> Any:
    backend = keras.backend.backend()
    if backend != "torch":
        raise ValueError(
            f"Processes that each have a model of their own are for the PyTorch backend. Received: the backend {backend!r}. On JAX "
            "use `keras_gemma2.distribution.make_distribution('data_parallel')`, on TensorFlow make the model in the scope of a "
            "`tf.distribute.MirroredStrategy` or `MultiWorkerMirroredStrategy`; or set KERAS_BACKEND=torch."
        )
    from keras_gemma2.backend import torch_parallel

    return torch_parallel
