"""PyTorch: one model trained by several processes, each on its part of every batch (`DistributedDataParallel`).

A process is started by `torchrun`, or anything else that sets its variables. Each has the whole model. Their gradients are averaged
in the backward pass, bucket by bucket, while it runs (Li et al., "PyTorch Distributed", arXiv 2006.15704). What a loss is divided
by is the whole batch's, so that parts of any size, and any weights, give the gradient of one process with all of the batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import re
from collections.abc import Iterator
from typing import Any

import keras
import torch
import torch.distributed as dist
from keras.src.backend.torch.core import get_device
from torch.nn.parallel import DistributedDataParallel

from keras_gemma2.backend import torch_tapes
from keras_gemma2.backend.torch_replaced import check_parameters

_PIECE = 1 << 28  # bytes of a weight that are sent at a time
_MOST_NAMED = 5  # differences in an error
_LAUNCH = "torchrun --nproc-per-node 2 your_script.py"


def join_processes(timeout: float) -> None:
    """See `keras_gemma2.processes.join_processes`."""
    if dist.is_initialized():
        return
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise RuntimeError(
            f"Several processes are started by a launcher, which tells each who it is in the environment; {', '.join(missing)} are "
            f"not set. Start the script with `{_LAUNCH}`."
        )
    on_gpu = get_device().startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=datetime.timedelta(seconds=timeout))


def process_index() -> int:
    """Which of the processes this is, from 0; 0 where there is one."""
    return dist.get_rank() if dist.is_initialized() else 0


def process_count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def data_parallel(model: Any, timeout: float) -> Any:
    """See `keras_gemma2.processes.data_parallel`."""
    if not hasattr(model, "over_replicas"):
        raise TypeError(
            f"`model` must be a `Gemma2CausalLM` or a `Distiller`. Received: {model!r}, of type {type(model).__name__}."
        )
    check_parameters(model)
    join_processes(timeout)
    with _explained():
        _check_agreement(model)
        _take_values_of_first(model)
    model._parallel = Processes(model)
    return model


class Processes:
    """What a model's steps go through where several processes train it."""

    def __init__(self, model: Any) -> None:
        self._model, self._wrapped, self._variables, self._awaits_call = model, None, [], False

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A context in which the model's next call goes through `DistributedDataParallel`."""
        self._awaits_call = True
        try:
            with self.talking():
                yield
        finally:
            self._awaits_call = False

    def talking(self) -> contextlib.AbstractContextManager[None]:
        """A context in which a lost connection is explained."""
        return _explained()

    def takes_call(self) -> bool:
        """Whether this is the call of a training step; true once a step."""
        awaited, self._awaits_call = self._awaits_call, False
        return awaited

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's call, after which the backward pass averages gradients over processes."""
        variables = self._model.trainable_variables
        if [id(v) for v in variables] != [id(v) for v in self._variables]:
            # It sends all processes the first one's values, for those of an adapter added since are drawn by each.
            self._wrapped = DistributedDataParallel(_Call(self._model, [v.value for v in variables]))
            self._variables = variables
        return self._wrapped(*args, **kwargs)

    def sums(self, sums: dict[str, Any]) -> dict[str, Any]:
        """Sums over the whole batch. Only "loss" can be differentiated."""
        names = list(sums)
        totals = _SumOverProcesses.apply(torch.stack([torch.as_tensor(sums[name], dtype=torch.float32) for name in names]))
        return dict(zip(names, totals.unbind()))


class _Call(torch.nn.Module):
    """A model's call, and the parameters that it trains: `DistributedDataParallel` need not know of frozen ones."""

    def __init__(self, model: Any, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__()
        self.trained = torch.nn.ParameterList(parameters)
        self._model = (model,)  # not as a submodule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._model[0](*args, **kwargs)


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> torch.Tensor:
        # The gradients of parameters are averaged over processes afterwards, where those of a sum are to be added.
        return upstream * dist.get_world_size()


# Before training --------------------------------------------------------------------------------------------------------


def _check_agreement(model: Any) -> None:
    described: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(described, _description(model))
    first, wrong = described[0], []
    for index, other in enumerate(described):
        names = sorted(name for name in {*first, *other} if first.get(name) != other.get(name))
        wrong += [f"{name} is {first.get(name)} in process 0 and {other.get(name)} in process {index}" for name in names]
    if wrong:
        raise ValueError(
            f"All processes must have the same model: {'; '.join(wrong[:_MOST_NAMED])}. Start all of them with the same "
            "arguments and the same versions of packages."
        )


def _description(model: Any) -> dict[str, str]:
    """What must be the same in all processes, by name."""
    import keras_gemma2

    config = dataclasses.asdict(model.backbone.config)
    found = {f"the config's {name}": str(value) for name, value in config.items()}
    found |= {"keras_gemma2": keras_gemma2.__version__, "keras": keras.__version__, "torch": torch.__version__}
    found["the dtype policy"] = model.backbone.dtype_policy.name
    trained = [v.shape for v in model.trainable_variables]
    found["the number of weights"] = f"{len(model.variables)} ({len(trained)} of them trained)"
    found["the number of trained parameters"] = str(sum(torch.Size(shape).numel() for shape in trained))
    if model.optimizer is not None:
        settings = {"class": type(model.optimizer).__name__, **model.optimizer.get_config()}
        found |= {f"the optimizer's {name}": json.dumps(value, default=str) for name, value in settings.items()}
    return found


def _take_values_of_first(model: Any) -> None:
    """Gives all processes the weights, and the optimizer's values, of the first."""
    optimizer = getattr(model, "optimizer", None)
    for variable in [*model.variables, *(optimizer.variables if optimizer is not None else ())]:
        found = variable.value.detach().clone()
        for piece in found.reshape(-1).view(torch.uint8).split(_PIECE):
            dist.broadcast(piece, 0)
        if "seed_generator" in variable.path:
            # Or all parts of a batch would lose the same units to dropout.
            found[0] += dist.get_rank()
        if not torch.equal(found, variable.value):
            variable.assign(found)
    torch_tapes.drop_all()


# Errors -----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """A context in which an error of communication says what to do."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(r"gloo|nccl|connection|timed out|timeout|process group", str(error), re.IGNORECASE):
            raise
        raise RuntimeError(
            f"Process {process_index()} of {process_count()} has lost the others. One of them has ended (the first error is in its "
            "output), has had fewer batches (give all the same number: see `shard_of`), or was busy for longer than the `timeout` "
            f"of `data_parallel`. Start all of them again, from the last checkpoint. PyTorch says: {str(error).splitlines()[0]}"
        ) from error
