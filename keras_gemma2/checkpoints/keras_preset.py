"""Presets that this package's `save_to_preset` writes: keras-hub's folder layout, our classes, our kernels' layout."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from keras_gemma2.checkpoints.keras_objects import (
    VOCABULARY_FILE,
    Classes,
    quantized_policy_name,
    saved_preprocessor,
    saved_stop_token_ids,
    write_json_files,
)
from keras_gemma2.checkpoints.sentencepiece_model import read_model
from keras_gemma2.checkpoints.source import CONFIG_FILE, KERAS, Source, find_file, read_json
from keras_gemma2.config import Gemma2Config
from keras_gemma2.errors import CheckpointError

if TYPE_CHECKING:
    from keras_gemma2.checkpoints.writing import OutgoingWeights

CLASSES = Classes(
    package="keras_gemma2",
    backbone=("keras_gemma2.backbone", "Gemma2Backbone"),
    task=("keras_gemma2.causal_lm", "Gemma2CausalLM"),
    tokenizer=("keras_gemma2.tokenizer", "Gemma2Tokenizer"),
    preprocessor=("keras_gemma2.preprocessor", "Gemma2CausalLMPreprocessor"),
    preprocessor_arguments={"add_start_token": True, "add_end_token": True, "truncation": "error"},
    tasks=("CausalLM",),
)
REGISTERED_NAME = f"{CLASSES.package}>{CLASSES.backbone[1]}"


def read_source(name: str, path: str) -> Source | None:
    """Recognizes a folder by the class in its config.json."""
    config = find_file(path, CONFIG_FILE)
    values = read_json(config) if config else {}
    if values.get("registered_name") != REGISTERED_NAME:
        return None
    arguments = values.get("config")
    if not isinstance(arguments, dict):
        raise CheckpointError(f"{config} must hold the backbone's arguments under 'config'. Received: {arguments!r}.")
    known = {key: value for key, value in arguments.items() if key in Gemma2Config.field_names()}
    try:
        parsed = Gemma2Config(**known)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{config}: {error}") from error
    policy = quantized_policy_name(arguments.get("dtype"), config)
    return Source(name, KERAS, parsed, path, values, policy, saved_stop_token_ids(path), saved_preprocessor(path))


def open_tensors(source: Source, config: Gemma2Config, stack: contextlib.ExitStack) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every weight of the h5 files, one or several; quantized ones as floats."""
    from keras_gemma2.checkpoints.h5_weights import open_weight_files
    from keras_gemma2.checkpoints.quantized_matrix import joined
    from keras_gemma2.checkpoints.weight_map import rows_for

    cells = dict(rows_for(config, KERAS))
    return joined(open_weight_files(source.path, stack), config, cells, source.path), cells


def vocabulary(source: Source) -> bytes | None:
    """The bytes of the tokenizer's asset."""
    path = find_file(source.path, VOCABULARY_FILE)
    return None if path is None else read_model(path)


def write_folder(
    folder: str | os.PathLike[str],
    weights: OutgoingWeights,
    proto: bytes | None = None,
    stop_token_ids: tuple[int, ...] = (),
    max_shard_size: str | float | None = 10,
    progress: Callable[[int], Any] | None = None,
    preprocessor: Mapping[str, Any] | None = None,
) -> None:
    """Writes what `Gemma2CausalLM.save_to_preset` writes, tensor by tensor and without a model.

    Args:
        folder: an empty folder.
        weights: all weights, and what to store them in.
        proto: the serialized SentencePiece model; None writes a preset without a tokenizer.
        stop_token_ids: where generation is to stop besides the tokenizer's own stop tokens.
        max_shard_size: in GB of 1024 ** 3 bytes, as keras-hub takes it, or a text such as "5GB".
        progress: called with the number of bytes just written.
        preprocessor: arguments of the preprocessor that are not the default ones, such as `sequence_length`.

    Example:
        >>> with open_weights(source) as entries:
        ...     write_folder("out", outgoing_from_entries(entries, source.config), vocabulary(source))
    """
    from keras_gemma2.checkpoints.h5_weights import keras_order, write_weight_files
    from keras_gemma2.checkpoints.weight_map import rows_for

    folder = os.fspath(folder)
    stop = {"extra_stop_token_ids": list(stop_token_ids)} if stop_token_ids else {}
    config = weights.config
    write_json_files(folder, CLASSES, config.to_dict(), config, weights.load_dtype, proto, stop, preprocessor)
    paths = {cell.name: path for path, cell in rows_for(config, KERAS)}
    tensors = (
        (name, weights.shapes[paths[name]], weights.dtype_of(paths[name]), weights.blocks(paths[name]))
        for name in keras_order(paths)
    )
    write_weight_files(folder, tensors, weights.nbytes, max_shard_size, progress)
