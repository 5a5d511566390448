"""What lies on a device between steps - weights, an optimizer's variables, caches - from shapes and layouts alone."""

from __future__ import annotations

import math
import re
from typing import Any

from keras_gemma2.cache import cache_slots
from keras_gemma2.config import Gemma2Config
from keras_gemma2.distribution import BATCH, MODEL, RECIPES, layout_map, make_mesh, model_sizes
from keras_gemma2.generation.runner import cache_bucket
from keras_gemma2.planning.settings import MOST_DEVICES, PlanSettings

_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8, "int32": 4, "uint32": 4, "int8": 1, "uint8": 1, "uint16": 2}
_NUMBER = re.compile(r"decoder_block_\d+")


def variables_bytes(variables: list[Any], config: Gemma2Config, recipe: str, mesh: tuple[int, int], mode: str | None) -> int:
    """Bytes of a model's variables on one device of a mesh, which need not exist.

    Args:
        variables: of a model of Keras; they need no values.
        config: the model's.
        recipe, mesh: as in `PlanSettings`.
        mode: "int8" or "int4", if the model's matrices are quantized.

    Raises:
        ValueError: if the model does not divide among the mesh's devices.
    """
    names = [f"cpu:{i}" for i in range(mesh[0] * mesh[1])]
    layouts = layout_map(make_mesh(recipe, batch=mesh[0], model=mesh[1], devices=names), fully_sharded=RECIPES[recipe][1])
    layouts.settle(config, mode)
    sizes, known, total = {BATCH: mesh[0], MODEL: mesh[1]}, {}, 0
    for variable in variables:
        kind = _NUMBER.sub("decoder_block_0", variable.path)  # blocks are alike
        if kind not in known:
            layout = layouts[kind]
            axes = layout.axes if layout is not None else ()
            known[kind] = math.prod(sizes.get(axis, 1) for axis in axes)
        total += math.prod(variable.shape) * _BYTES[variable.dtype] // known[kind]
    return total


def cache_shapes(config: Gemma2Config, batch: int, length: int) -> list[tuple[int, int, int, int]]:
    """The shape `[B, K, slots + 1, H]` of each layer's keys, and of its values, with the room that `generate` makes."""
    room = cache_bucket(length, config.max_sequence_length)
    slots = [cache_slots(room, config.window(kind)) for kind in config.layer_types]
    return [(batch, config.num_key_value_heads, count + 1, config.head_dim) for count in slots]


def caches_bytes(config: Gemma2Config, batch: int, length: int, compute_dtype: str, mesh: tuple[int, int]) -> int:
    """Bytes of all caches on one device; rows and heads that do not divide are whole on each."""
    over = math.prod(size for count, size in zip((batch, config.num_key_value_heads), mesh) if count % size == 0)
    return sum(2 * math.prod(shape) * _BYTES[compute_dtype] // over for shape in cache_shapes(config, batch, length))


def other_meshes(settings: PlanSettings) -> list[tuple[int, int]]:
    """Meshes of the same recipe that the model divides among, the smallest first; those that split heads most come first."""
    models = model_sizes(settings.config, settings.quantize) if RECIPES[settings.recipe][0] else [1]
    counts = [2**i for i in range(MOST_DEVICES.bit_length())]
    pairs = [(count // size, size) for count in counts for size in reversed(models) if count % size == 0]
    is_generation = settings.task == "generate"
    return [pair for pair in pairs if settings.batch % pair[0] == 0 or (is_generation and pair == settings.mesh)]
