"""A model as one step over caches, for ONNX Runtime, OpenVINO, LiteRT, StableHLO and PyTorch."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import os
import tempfile
from typing import Any, NamedTuple

import keras

from keras_gemma2 import backend
from keras_gemma2.export.elsewhere import write_elsewhere
from keras_gemma2.export.steps import step
from keras_gemma2.from_preset import weights_bytes
from keras_gemma2.staging import replacing_folder

DESCRIPTION, VOCABULARY = "export.json", "tokenizer.model"


class Format(NamedTuple):
    """What a format is written by.

    Args:
        backend: the Keras backend.
        packages: what must be installed, each of the name that it is imported by.
        files: what is written, beside the description and the vocabulary.
        dtypes: the compute dtypes that its runtime has on CPUs.
        modes: how weights may be quantized.
    """

    backend: str
    packages: tuple[str, ...]
    files: tuple[str, ...]
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    modes: tuple[str, ...] = ("int8", "int4")


_ONNX = ("torch", "onnx", "onnxscript")
FORMATS = {
    "onnx": Format("torch", _ONNX, ("model.onnx", "model.onnx.data"), ("float32",)),
    "openvino": Format("torch", (*_ONNX, "openvino"), ("model.xml", "model.bin")),
    "litert": Format("tensorflow", ("tensorflow",), ("model.tflite",), ("float32",), ("int8",)),
    "stablehlo": Format("jax", ("jax",), ("model.stablehlo", "model.safetensors")),
    "torch": Format("torch", ("torch",), ("model.pt2",)),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a format that has no free ones; elsewhere None.

    Args:
        batch_size: rows.
        cache_length: tokens that a row has room for.
        prefill_length: tokens of a row that one call of `prefill` takes.
    """

    batch_size: int | None = None
    cache_length: int | None = None
    prefill_length: int | None = None


def read_sizes(lm: Any, format: str, batch_size: Any, cache_length: Any, prefill_length: Any) -> Sizes:
    """The sizes of an export, checked, with their defaults; the arguments and errors are those of `Gemma2CausalLM.export`."""
    given = {"batch_size": batch_size, "cache_length": cache_length, "prefill_length": prefill_length}
    if format != "litert":
        fixed = {name: value for name, value in given.items() if value is not None}
        if fixed:
            raise ValueError(f"The sizes of format={format!r} are free; only 'litert' fixes them. Leave out {fixed}.")
        return Sizes()
    context = lm.backbone.config.max_sequence_length
    defaults = {"batch_size": 1, "cache_length": min(1024, context), "prefill_length": min(64, context)}
    most = {"batch_size": 1 << 16, "cache_length": context, "prefill_length": context}
    for name, value in given.items():
        least = 2 if name == "cache_length" else 1
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most[name]):
            raise ValueError(f"`{name}` must be an integer from {least} to {most[name]}. Received: {value!r}.")
    return Sizes(**{name: defaults[name] if value is None else value for name, value in given.items()})


def check_format(format: Any, backbone: Any) -> None:
    """Raises for a format that is unknown, that cannot hold such a model, or whose packages are missing."""
    if format not in FORMATS:
        names = ", ".join(repr(name) for name in ("tf_saved_model", *FORMATS))
        raise ValueError(f"`format` must be one of {names}. Received: {format!r}.")
    dtype, mode = backbone.compute_dtype, backbone.dtype_policy.quantization_mode
    if dtype not in FORMATS[format].dtypes:
        raise ValueError(
            f"format={format!r} is for models that compute in {' or '.join(FORMATS[format].dtypes)}: its runtime has no {dtype} on "
            f"CPUs. Load the model with dtype='float32', and quantize='int8' where it is to be small. "
            f"Received a model of dtype={backbone.dtype_policy.name!r}."
        )
    if mode not in (None, *FORMATS[format].modes):
        raise ValueError(f"format={format!r} takes weights in {' or '.join(FORMATS[format].modes)}, or floats. Received: {mode!r}.")
    missing = [name for name in FORMATS[format].packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"format={format!r} is written with {', '.join(missing)}, not installed here. "
            f"Install with: pip install {' '.join(missing)}"
        )


def write_program(lm: Any, target: str, format: str, sizes: Sizes) -> None:
    """Writes a model to a folder, which changes in one step, from whatever backend.

    Raises:
        CheckpointError: if the folder cannot be written or the disk is full.
    """
    adapters = lm.backbone.adapter_set
    # The other process has the active adapter alone.
    here = keras.backend.backend() == FORMATS[format].backend and not set(adapters.settings) - {adapters.active}
    needed = weights_bytes(lm.backbone) * (1 + (not here) + (format in ("openvino", "litert")))
    with replacing_folder(target, needed, (*FORMATS[format].files, DESCRIPTION, VOCABULARY)) as staging:
        if here:
            write(lm, staging, format, sizes)
        else:
            write_elsewhere(lm, staging, FORMATS[format].backend, format, dataclasses.asdict(sizes))


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

        save_stablehlo(function, backbone, caches, context, folder)
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
