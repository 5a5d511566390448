"""A step of a model as a LiteRT file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf


def save_litert(
    step: Callable, model: Any, caches: Sequence[Any], batch: int, slots: dict[int, int], prefill: int, folder: str
) -> None:
    """Writes `model.tflite`, with the signatures `prefill` and `decode` over one copy of the weights.

    Their inputs are `token_ids`, `starts`, `counts` and the caches by their names, their outputs `logits` and, as `new_` and the
    name, the caches.

    Args:
        step: `(token_ids, starts, counts, caches)` to logits and the caches.
        model: the layer whose variables it uses.
        caches: for each cache `(name, heads, width, most_slots, dtype)`, keys and values by turns.
        batch: rows.
        slots: of a cache with so many slots at most, how many it has.
        prefill: tokens of a row that `prefill` takes.
        folder: to write to.
    """
    names = [cache[0] for cache in caches]

    def run(token_ids: Any, starts: Any, counts: Any, **held: Any) -> dict[str, Any]:
        logits, *caches = step(token_ids, starts, counts, [held[name] for name in names])
        return {"logits": logits, **{f"new_{name}": cache for name, cache in zip(names, caches)}}

    spec, each = tf.TensorSpec, tf.TensorSpec((batch,), tf.int32)
    held = {name: spec((batch, heads, slots[most], width), dtype, name) for name, heads, width, most, dtype in caches}
    traced = {
        name: tf.function(run, autograph=False).get_concrete_function(spec((batch, steps), tf.int32), each, each, **held)
        for name, steps in (("prefill", prefill), ("decode", 1))
    }
    module = tf.Module()
    module.weights = [variable.value for variable in model.variables]
    with tempfile.TemporaryDirectory(dir=folder) as saved:
        tf.saved_model.save(module, saved, signatures=traced)
        converted = tf.lite.TFLiteConverter.from_saved_model(saved, signature_keys=list(traced)).convert()
    with open(os.path.join(folder, "model.tflite"), "wb") as file:
        file.write(converted)
