"""One model on many devices (JAX): meshes, and along which of their axes each weight is split.

Tensor parallelism is that of Megatron-LM (Shoeybi et al., arXiv 1909.08053): query heads, both gates and the vocabulary are split
by rows of their matrices `[out, in]`, the matrices that follow by columns, so that a layer has two sums over devices and no more.
Fully sharded weights (ZeRO, Rajbhandari et al., arXiv 1910.02054) are split along the batch's axis, too, and put together for each
layer. What belongs to a weight lies as it does: factors of adapters, scales of quantized matrices, and by Keras an optimizer's
variables. Keys and values are cached where their heads are.
"""

from __future__ import annotations

import functools
import importlib.metadata
import math
from collections.abc import Sequence
from typing import Any

import keras

from keras_gemma2.config import Gemma2Config
from keras_gemma2.processes import data_parallel, join_processes, process_count, process_index, shard_of

__all__ = [
    "RECIPES",
    "Gemma2LayoutMap",
    "data_parallel",
    "join_processes",
    "layout_map",
    "make_distribution",
    "make_mesh",
    "model_sizes",
    "process_count",
    "process_index",
    "shard_of",
]

MODEL, BATCH = "model", "batch"
RECIPES = {  # whether matrices are split by heads, and whether along the batch's axis
    "data_parallel": (False, False),
    "fully_sharded": (False, True),
    "tensor_parallel": (True, False),
    "fully_sharded_tensor_parallel": (True, True),
}
# By the end of a matrix's path: whether its rows (else its columns) are split by heads.
_SPLIT_BY_ROWS = {
    "token_embedding": True,
    "attention/query": True,
    "attention/key": True,
    "attention/value": True,
    "attention/output_projection": False,
    "feed_forward/gate": True,
    "feed_forward/up": True,
    "feed_forward/down": False,
}
_OF_KEYS = ("attention/key", "attention/value")


# Meshes -----------------------------------------------------------------------------------------------------------------


def make_mesh(
    recipe: str = "tensor_parallel",
    *,
    batch: int | None = None,
    model: int | None = None,
    devices: Sequence[Any] | None = None,
) -> keras.distribution.DeviceMesh:
    """A mesh of devices with the axes "batch" and "model".

    Args:
        recipe: "data_parallel" (each device has all weights and some rows of a batch), "fully_sharded" (weights split over those
            devices as well), "tensor_parallel" (weights split by heads; default) or "fully_sharded_tensor_parallel" (both).
        batch: size of the axis that a batch's rows are split along; None for what the devices leave, 1 with "tensor_parallel".
        model: size of the axis that heads are split along; None for what the devices leave.
        devices: names such as "gpu:0"; None for all of all processes.

    Raises:
        ValueError: for an unknown recipe, sizes that are not positive integers or do not multiply to the number of devices.

    Example:
        >>> make_mesh("tensor_parallel", batch=2, model=4)  # 8 devices
        <DeviceMesh shape=(2, 4), axis_names=('batch', 'model')>
    """
    splits_heads = _recipe(recipe)[0]
    for name, size in (("batch", batch), ("model", model)):
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"`{name}` must be a positive integer or None. Received: {size!r}.")
    if not splits_heads and model not in (None, 1):
        raise ValueError(
            f"`model` must be 1 with recipe={recipe!r}, which does not split heads. Received: model={model}. Use 'tensor_parallel' "
            "or 'fully_sharded_tensor_parallel'."
        )
    devices = keras.distribution.list_devices() if devices is None else list(devices)
    sizes = _sizes(recipe, splits_heads, batch, model, len(devices))
    if math.prod(sizes) != len(devices):
        _refuse_sizes(recipe, sizes, len(devices))
    return keras.distribution.DeviceMesh(sizes, (BATCH, MODEL), devices)


def _recipe(recipe: str) -> tuple[bool, bool]:
    if recipe not in RECIPES:
        raise ValueError(f"`recipe` must be one of {tuple(RECIPES)}. Received: {recipe!r}.")
    return RECIPES[recipe]


def _sizes(recipe: str, splits_heads: bool, batch: int | None, model: int | None, count: int) -> tuple[int, int]:
    if not splits_heads:
        return batch or count, 1
    if batch is None and model is None and recipe != "tensor_parallel":
        raise ValueError(f"`batch` or `model` must be given with recipe={recipe!r}, which splits {count} devices in two ways.")
    if model is None:
        return batch or 1, max(1, count // (batch or 1))
    return batch or max(1, count // model), model


def _refuse_sizes(recipe: str, sizes: tuple[int, int], count: int) -> None:
    pairs = ", ".join(f"{count // size}x{size}" for size in _divisors(count))
    more = ""
    if math.prod(sizes) > count and keras.backend.backend() == "jax":
        more = f" (On CPUs XLA_FLAGS=--xla_force_host_platform_device_count={math.prod(sizes)} makes virtual ones.)"
    raise ValueError(
        f"A mesh of batch={sizes[0]} and model={sizes[1]} has {math.prod(sizes)} devices, and there are {count}. Sizes that use "
        f"them all: {pairs}; or pass some of `keras.distribution.list_devices()` as `devices`.{more}"
    )


def make_distribution(
    recipe: str = "tensor_parallel",
    *,
    batch: int | None = None,
    model: int | None = None,
    devices: Sequence[Any] | None = None,
    **kwargs: Any,
) -> keras.distribution.ModelParallel:
    """A distribution by a recipe, for `keras.distribution.set_distribution` or as a scope; models are made after it is set.

    Args:
        recipe, batch, model, devices: as `make_mesh` takes them.
        **kwargs: for `keras.distribution.ModelParallel`. `auto_shard_dataset` is False unless given: each process gives `fit` its
            own share of the data (`shard_of`).

    Raises:
        ValueError: as `make_mesh`, and on other backends than JAX.

    Example:
        >>> keras.distribution.set_distribution(make_distribution("tensor_parallel", model=8))
        >>> lm = Gemma2CausalLM.from_preset("gemma2_9b")  # each device reads an eighth
    """
    if keras.backend.backend() != "jax":
        raise ValueError(
            f"Distributions of Keras run on the JAX backend. Received: the backend {keras.backend.backend()!r}. On PyTorch use "
            "`keras_gemma2.distribution.data_parallel`, on TensorFlow `tf.distribute.MirroredStrategy`; or set KERAS_BACKEND=jax."
        )
    mesh = make_mesh(recipe, batch=batch, model=model, devices=devices)
    layouts = layout_map(mesh, fully_sharded=RECIPES[recipe][1])
    return keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name=BATCH, **{"auto_shard_dataset": False, **kwargs})


# Layouts ----------------------------------------------------------------------------------------------------------------


def layout_map(
    mesh: keras.distribution.DeviceMesh,
    model_parallel_dim_name: str = MODEL,
    data_parallel_dim_name: str = BATCH,
    fully_sharded: bool = False,
) -> Gemma2LayoutMap:
    """Which axis of a mesh each axis of each weight is split along; `Gemma2Backbone.get_layout_map` is this function.

    Args:
        mesh: with both axes.
        model_parallel_dim_name: the axis that heads are split along.
        data_parallel_dim_name: the axis that rows of data are split along.
        fully_sharded: whether weights are split along that, too.

    Raises:
        ValueError: for axes that the mesh has not.
        TypeError: if `mesh` is no `DeviceMesh`.
    """
    if not isinstance(mesh, keras.distribution.DeviceMesh):
        raise TypeError(f"`mesh` must be a `keras.distribution.DeviceMesh`. Received: {mesh!r}, of type {type(mesh).__name__}.")
    given = {"model_parallel_dim_name": model_parallel_dim_name, "data_parallel_dim_name": data_parallel_dim_name}
    for argument, name in given.items():
        if name not in mesh.axis_names:
            raise ValueError(f"`{argument}` must be one of the mesh's axes, {tuple(mesh.axis_names)}. Received: {name!r}.")
    if model_parallel_dim_name == data_parallel_dim_name:
        raise ValueError(
            "`model_parallel_dim_name` and `data_parallel_dim_name` must be two axes. Received for both: "
            f"{model_parallel_dim_name!r}."
        )
    return Gemma2LayoutMap(mesh, model_parallel_dim_name, data_parallel_dim_name, fully_sharded)


class Gemma2LayoutMap(keras.distribution.LayoutMap):
    """Layouts of Gemma 2's weights, by the end of their paths; `layout_map` makes it.

    A backbone that is built settles the map for its own sizes: keys and values are split where their heads divide, and whole on
    each device where they do not.

    Args:
        device_mesh, model_axis, batch_axis, fully_sharded: as `layout_map` takes them.
    """

    def __init__(
        self, device_mesh: keras.distribution.DeviceMesh, model_axis: str, batch_axis: str, fully_sharded: bool = False
    ) -> None:
        super().__init__(device_mesh)
        self.model_axis, self.batch_axis, self.fully_sharded = model_axis, batch_axis, fully_sharded
        self._fill(None, None)

    def axis_size(self, axis: str) -> int:
        """Devices along an axis."""
        return self.device_mesh.shape[list(self.device_mesh.axis_names).index(axis)]

    def settle(self, config: Gemma2Config, mode: str | None = None) -> None:
        """Takes the layouts that fit a model.

        Args:
            config: the model's.
            mode: "int8" or "int4", if its matrices are quantized.

        Raises:
            ValueError: if the model does not divide among the mesh's devices; the message says which sizes would do.
        """
        check_divides(config, self.axis_size(self.model_axis), self.axis_size(self.batch_axis) if self.fully_sharded else 1, mode)
        self._fill(config, mode)

    def _fill(self, config: Gemma2Config | None, mode: str | None) -> None:
        for name, by_rows in _SPLIT_BY_ROWS.items():
            heads = self._axis_of_heads(name, config)
            along = self.batch_axis if self.fully_sharded else None
            # In 4 bits a group of columns has a scale, and groups do not divide as heads do: all are split by rows.
            out, into = (heads, along) if by_rows or mode == "int4" else (along, heads)
            self._take(rf"(.*/)?{name}/(kernel|embeddings)", (out, into))
            self._take(rf"(.*/)?{name}/(kernel|embeddings)_scale", (out, None))
            self._take(rf"(.*/)?{name}/[^/]+/lora_a", (None, into))
            self._take(rf"(.*/)?{name}/[^/]+/lora_b", (out, None))

    def _axis_of_heads(self, name: str, config: Gemma2Config | None) -> str | None:
        is_whole = name in _OF_KEYS and config is not None and config.num_key_value_heads % self.axis_size(self.model_axis)
        return None if is_whole else self.model_axis

    def _take(self, pattern: str, axes: tuple[str | None, ...]) -> None:
        self._layout_map.pop(pattern, None)
        self[pattern] = axes


# What divides -----------------------------------------------------------------------------------------------------------


def model_sizes(config: Gemma2Config, mode: str | None = None) -> list[int]:
    """The sizes of a mesh's "model" axis that a model's heads, feed-forward and vocabulary divide among.

    Args:
        config: the model's.
        mode: "int8" or "int4", if its matrices are quantized.

    Example:
        >>> model_sizes(NAMED_SIZES["gemma2_2b"])
        [1, 2, 4, 8]
    """
    return _divisors(functools.reduce(math.gcd, _split_counts(config, mode).values()))


def batch_sizes_of_weights(config: Gemma2Config, mode: str | None = None) -> list[int]:
    """The sizes of the "batch" axis that fully sharded weights divide among."""
    if mode != "int4":
        return _divisors(config.hidden_dim)
    widths = config.hidden_dim, config.intermediate_dim, config.num_query_heads * config.head_dim
    return _divisors(math.gcd(*widths) // 2)  # two columns a byte


def _split_counts(config: Gemma2Config, mode: str | None) -> dict[str, int]:
    """What is split along the model's axis, and into how many pieces it can be."""
    counts = {
        "num_query_heads": config.num_query_heads,
        "intermediate_dim": config.intermediate_dim,
        "vocabulary_size": config.vocabulary_size,
    }
    return counts | ({"hidden_dim": config.hidden_dim} if mode == "int4" else {})


def check_divides(config: Gemma2Config, model: int, batch: int = 1, mode: str | None = None) -> None:
    """Refuses a mesh that a model's weights do not divide among.

    Args:
        config: the model's.
        model: devices along the "model" axis.
        batch: devices that fully sharded weights are split among along the "batch" axis; 1 where they are not.
        mode: "int8" or "int4", if its matrices are quantized.

    Raises:
        ValueError: naming what does not divide, and the sizes that would do.
    """
    wrong = [f"{name}={count}" for name, count in _split_counts(config, mode).items() if count % model]
    if wrong:
        raise ValueError(
            f"The mesh's model axis has {model} devices, which do not divide the model's {' and '.join(wrong)}. Sizes that do: "
            f"{', '.join(map(str, model_sizes(config, mode)))}. Put the other devices on the batch axis."
        )
    sizes = batch_sizes_of_weights(config, mode)
    if batch not in sizes:
        also = " (in 4 bits also intermediate_dim and the heads, two columns a byte)" if mode == "int4" else ""
        raise ValueError(
            f"The mesh's batch axis has {batch} devices, which do not divide hidden_dim={config.hidden_dim}, along which fully "
            f"sharded weights are split{also}. Sizes that do: {', '.join(map(str, sizes))}."
        )


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def settle_current(config: Gemma2Config, mode: str | None = None) -> None:
    """Settles the layouts of the distribution that is set, if they are of this module, for a model that is about to be built.

    Args:
        config, mode: as `Gemma2LayoutMap.settle` takes them.

    Raises:
        ValueError: as `settle`; on each of several processes, if they do not all build the same.
    """
    from keras_gemma2 import backend  # imports a framework

    layouts = getattr(keras.distribution.distribution(), "_layout_map", None)
    if isinstance(layouts, Gemma2LayoutMap):
        mesh = dict(zip(layouts.device_mesh.axis_names, layouts.device_mesh.shape))
        versions = {name: importlib.metadata.version(name) for name in ("keras", keras.backend.backend())}
        backend.check_alike(f"{config.to_dict()}, mode={mode}, mesh={mesh}, {versions}")
        layouts.settle(config, mode)
