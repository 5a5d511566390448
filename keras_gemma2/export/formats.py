"""The formats of other runtimes: what each is written by and can hold, and the folder it is written to."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from typing import Any, NamedTuple

from keras_gemma2.errors import CheckpointError

DESCRIPTION, VOCABULARY, WEIGHTS = "export.json", "vocabulary.spm", "weights.safetensors"
SAVED_MODEL = "saved_model.pb"
# What TensorFlow writes, as patterns of paths.
SAVED_MODEL_FILES = (SAVED_MODEL, "fingerprint.pb", "variables/*", "assets/*", "assets.extra/*")


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
    "onnx": Format("torch", _ONNX, ("model.onnx", "model.onnx.data"), ("float32",), ("int8",)),
    "openvino": Format("torch", (*_ONNX, "openvino"), ("model.xml", "model.bin"), modes=("int8",)),  # it widens nibbles to floats
    "litert": Format("tensorflow", ("tensorflow",), ("model.tflite",), ("float32",), ("int8",)),
    "stablehlo": Format("jax", ("jax",), ("model.stablehlo", WEIGHTS)),
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
    check_dtype(format, backbone.compute_dtype, backbone.dtype_policy.quantization_mode, backbone.dtype_policy.name)
    missing = [name for name in FORMATS[format].packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"format={format!r} is written with {', '.join(missing)}, not installed here. "
            f"Install with: pip install {' '.join(missing)}"
        )


def check_dtype(format: str, dtype: str, mode: str | None, shown: str) -> None:
    """Raises for a compute dtype or a quantization that a format's runtime has no arithmetic for; `shown` is the model's."""
    can = FORMATS[format]
    if dtype not in can.dtypes:
        raise ValueError(
            f"format={format!r} is for models that compute in {' or '.join(can.dtypes)}: its runtime has no {dtype} on CPUs. "
            f"Load the model with dtype='float32', and quantize='int8' where it is to be small. "
            f"Received a model of dtype={shown!r}."
        )
    if mode not in (None, *can.modes):
        raise ValueError(f"format={format!r} takes weights in {' or '.join(can.modes)}, or floats. Received: {mode!r}.")


# The folder -------------------------------------------------------------------------------------------------------------


def check_folder(target: str, overwrite: bool) -> None:
    """Raises a CheckpointError for a folder that holds something, unless it may be overwritten."""
    try:
        # What a save that was killed has left is removed by the next one.
        holds_something = os.path.isdir(target) and any(not name.startswith(".saving-") for name in os.listdir(target))
    except OSError as error:
        raise CheckpointError(f"The folder {target!r} cannot be read: {error}. Choose another, or get the right to.") from error
    if holds_something and not overwrite:
        raise CheckpointError(
            f"The folder {target!r} is not empty. Choose another, or pass `overwrite=True` to replace the export in it."
        )


def _describes_an_export(path: str) -> bool:
    """Whether a file is the description of one of these exports; another file of that name is somebody else's."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):  # not there, or not JSON
        return False
    return isinstance(found, dict) and found.get("format") in FORMATS


def owned_files(target: str, files: tuple[str, ...]) -> tuple[str, ...]:
    """Patterns of the files of a folder that an export replaces: its own, and those of an export of whatever format before it."""
    if _describes_an_export(os.path.join(target, DESCRIPTION)):
        files += (*(name for format in FORMATS.values() for name in format.files), DESCRIPTION, VOCABULARY)
    if os.path.isfile(os.path.join(target, SAVED_MODEL)):
        files += SAVED_MODEL_FILES
    return files
