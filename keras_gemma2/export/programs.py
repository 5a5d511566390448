"""A model as one step over caches, for ONNX Runtime, OpenVINO, LiteRT, StableHLO and PyTorch."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import tempfile
from typing import Any

import keras

from keras_gemma2 import backend
from keras_gemma2.export.elsewhere import write_elsewhere
from keras_gemma2.export.failures import disk_errors
from keras_gemma2.export.formats import DESCRIPTION, FORMATS, VOCABULARY, WEIGHTS, Sizes, owned_files
from keras_gemma2.export.steps import step
from keras_gemma2.from_preset import weights_bytes
from keras_gemma2.staging import replacing_folder


def write_program(lm: Any, target: str, format: str, sizes: Sizes) -> None:
    """Writes a model to a folder, which changes in one step, from whatever backend.

    Raises:
        CheckpointError: if the folder cannot be written or the disk is full.
        RuntimeError: if the process that writes fails.
    """
    here, files = _writes_here(lm, format), (*FORMATS[format].files, DESCRIPTION)
    needed = weights_bytes(lm.backbone) * (1 + (not here) + (format in ("openvino", "litert")))
    with replacing_folder(target, needed, owned_files(target, files)) as staging, disk_errors():
        if here:
            write(lm, staging, format, sizes)
        else:
            write_elsewhere(lm, staging, FORMATS[format].backend, format, dataclasses.asdict(sizes))


def _writes_here(lm: Any, format: str) -> bool:
    """Whether this process writes: one of the format's backend, on a CPU (a program traced for a GPU may not run without), with no
    adapters but the active one, which is all that another process gets."""
    adapters = lm.backbone.adapter_set
    is_its_backend = keras.backend.backend() == FORMATS[format].backend and not backend.on_accelerator()
    return is_its_backend and not set(adapters.settings) - {adapters.active}


def write(lm: Any, folder: str, format: str, sizes: Sizes) -> None:
    """Writes all files of an export to an empty folder, with the format's backend as Keras's."""
    backbone, caches = lm.backbone, _caches(lm.backbone)
    context = backbone.config.max_sequence_length
    function = functools.partial(step, backbone)
    if format == "litert":
        from keras_gemma2.backend.tensorflow_programs import save_litert

        slots = {most: min(most, sizes.cache_length + 1) for *_, most, _ in caches}
        save_litert(function, backbone, caches, sizes.batch_size, slots, sizes.prefill_length, folder)
    elif format == "stablehlo":
        from keras_gemma2.backend.jax_programs import save_stablehlo

        save_stablehlo(function, backbone, caches, context, folder, WEIGHTS)
    elif format == "torch":
        from keras_gemma2.backend.torch_programs import save_program

        save_program(function, backbone, caches, context, folder)
    else:
        _write_onnx(function, backbone, caches, context, folder, format)
    _describe(lm, folder, format, sizes, caches)


def _write_onnx(function: Any, backbone: Any, caches: list[tuple], context: int, folder: str, format: str) -> None:
    from keras_gemma2.backend.torch_programs import save_onnx

    if format == "onnx":
        save_onnx(function, backbone, caches, context, folder)
        return
    import openvino

    with tempfile.TemporaryDirectory(dir=folder) as place:
        save_onnx(function, backbone, caches, context, place)
        model = openvino.convert_model(os.path.join(place, "model.onnx"))
        openvino.save_model(model, os.path.join(folder, "model.xml"), compress_to_fp16=False)
        del model  # which reads its weights from the files


def _caches(backbone: Any) -> list[tuple]:
    """For each cache `(name, heads, width, most_slots, dtype)`: keys and values of each layer."""
    config, dtype = backbone.config, backend.cache_dtype(backbone.compute_dtype)

    def most(kind: str) -> int:
        return min(config.window(kind) or config.max_sequence_length, config.max_sequence_length) + 1

    parts = [(f"{part}_{i}", kind) for i, kind in enumerate(config.layer_types) for part in ("keys", "values")]
    return [(name, config.num_key_value_heads, config.head_dim, most(kind), dtype) for name, kind in parts]


def _describe(lm: Any, folder: str, format: str, sizes: Sizes, caches: list[tuple]) -> None:
    """What a loop around the program must know, as JSON, and the vocabulary as SentencePiece has it."""
    config, preprocessor = lm.backbone.config, lm.preprocessor
    tokenizer = None if preprocessor is None else preprocessor.tokenizer
    described = {
        "format": format,
        "vocabulary_size": config.vocabulary_size,
        "max_sequence_length": config.max_sequence_length,
        **{name: value for name, value in dataclasses.asdict(sizes).items() if value is not None},
        "bos_token_id": None if tokenizer is None else tokenizer.start_token_id,
        "stop_token_ids": [] if tokenizer is None else list(tokenizer.stop_token_ids),
        "caches": [
            {"name": name, "heads": heads, "width": width, "most_slots": most, "dtype": dtype}
            for name, heads, width, most, dtype in caches
        ],
    }
    with open(os.path.join(folder, DESCRIPTION), "w", encoding="utf-8") as file:
        json.dump(described, file, indent=1)
    if tokenizer is not None:
        with open(os.path.join(folder, VOCABULARY), "wb") as file:
            file.write(tokenizer.proto)
