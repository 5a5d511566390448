"""Hugging Face folders of Gemma 2: `config.json`, safetensors, `tokenizer.model`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from keras_gemma2 import backend
from keras_gemma2.checkpoints.hf_config import config_to_hugging_face
from keras_gemma2.checkpoints.weight_map import rows_for
from keras_gemma2.from_preset import move_into

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOKENIZER_FILE = "tokenizer.model"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
ELEMENTS_A_BLOCK = 1 << 22
STORED_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def load_weights(backbone: Any, folder: str) -> None:
    """Fills a backbone from a folder's safetensors, one file or several.

    Tensors are memory-mapped and copied in blocks of rows, so that besides the model itself only one block is in memory.
    Every tensor is used exactly once; a duplicate `lm_head.weight` must equal the embedding.

    Args:
        backbone: a `Gemma2Backbone` of the folder's config.
        folder: local path.

    Raises:
        ValueError: if tensors are missing, unknown or of another shape, before any is loaded.
        FileNotFoundError: if the folder has no safetensors.
    """
    with contextlib.ExitStack() as stack:
        tensors = _open_tensors(folder, stack)
        variables = {row.hugging_face: backbone.named_weights()[row.path] for row in rows_for(backbone.config)}
        _check_names_and_shapes(tensors, variables, folder)
        if HEAD in tensors:
            _check_tied_head(tensors, folder)
        for name, variable in variables.items():
            shape = tuple(variable.shape)
            variable.assign(backend.tensor_from_row_blocks(_row_blocks(tensors[name]), shape, variable.dtype))


def save_hugging_face_folder(
    lm: Any, folder: str, weights_dtype: str = "float16", config_dtype: str = "float32"
) -> None:
    """Writes a model as a Hugging Face folder, which `from_preset` and transformers read.

    All files are written beside and moved when complete.

    Args:
        lm: a `Gemma2CausalLM`; its tokenizer, if any, is written too.
        folder: where to; made if missing.
        weights_dtype: "float32", "float16" or "bfloat16", of the stored tensors.
        config_dtype: the dtype that readers load the weights in by default.

    Raises:
        ValueError: if a weight does not fit `weights_dtype`'s range.

    Example:
        >>> save_hugging_face_folder(lm, "./my_gemma2", "bfloat16", "bfloat16")
    """
    if weights_dtype not in STORED_DTYPES:
        raise ValueError(f"`weights_dtype` must be one of {sorted(STORED_DTYPES)}. Received: {weights_dtype!r}.")
    dtype = STORED_DTYPES[weights_dtype]
    named = lm.backbone.named_weights()
    tensors = {row.hugging_face: _converted(named[row.path], row.path, dtype) for row in rows_for(lm.backbone.config)}
    target = os.path.abspath(folder)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    staging = tempfile.mkdtemp(prefix=".hugging-face-", dir=os.path.dirname(target))
    try:
        weights = os.path.join(staging, WEIGHTS_FILE)
        safetensors.numpy.save_file(tensors, weights, metadata={"format": "pt"})
        os.chmod(
            weights, 0o644
        )  # the library makes it readable for its owner only, others in a shared folder need it too
        _write_json(os.path.join(staging, CONFIG_FILE), config_to_hugging_face(lm.backbone.config, config_dtype))
        generation = {"bos_token_id": 2, "eos_token_id": [1, 107], "pad_token_id": 0}
        if lm.preprocessor is not None:
            tokenizer = lm.preprocessor.tokenizer
            generation = {
                "bos_token_id": tokenizer.start_token_id,
                "eos_token_id": list(tokenizer.stop_token_ids),
                "pad_token_id": tokenizer.pad_token_id,
            }
            with open(os.path.join(staging, TOKENIZER_FILE), "wb") as file:
                file.write(tokenizer.proto)
        _write_json(os.path.join(staging, "generation_config.json"), generation)
        move_into(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def stored_dtype(folder: str) -> str:
    """The dtype of a folder's first tensor, as Keras names it."""
    with contextlib.ExitStack() as stack:
        first = next(iter(_open_tensors(folder, stack).values()))
        return {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(first.get_dtype(), "float32")


def _open_tensors(folder: str, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Lazy slices of every tensor in a folder, by name; a base model's names get the prefix of the full one's."""
    tensors: dict[str, Any] = {}
    for name in _weight_files(folder):
        path = os.path.join(folder, name)
        try:
            file = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is not a complete safetensors file ({error}). Download it again.") from error
        for key in file.keys():
            full = key if key.startswith("model.") or key == HEAD else f"model.{key}"
            if full in tensors:
                raise ValueError(f"The tensor {key!r} stands twice in the safetensors of {folder}.")
            tensors[full] = file.get_slice(key)
    return tensors


def _weight_files(folder: str) -> list[str]:
    index = os.path.join(folder, INDEX_FILE)
    if os.path.exists(index):
        with open(index, encoding="utf-8") as file:
            names = sorted(set(json.load(file)["weight_map"].values()))
        for name in names:
            if os.path.basename(name) != name or not os.path.exists(os.path.join(folder, name)):
                raise FileNotFoundError(f"{index} names the file {name!r}, which is not in the folder. Download it.")
        return names
    if os.path.exists(os.path.join(folder, WEIGHTS_FILE)):
        return [WEIGHTS_FILE]
    raise FileNotFoundError(f"No {WEIGHTS_FILE} and no {INDEX_FILE} in {folder}.")


def _check_names_and_shapes(tensors: Mapping[str, Any], variables: Mapping[str, Any], folder: str) -> None:
    missing = sorted(set(variables) - set(tensors))
    unknown = sorted(set(tensors) - set(variables) - {HEAD})
    if missing or unknown:
        raise ValueError(
            f"The safetensors of {folder} do not match its config.json. Missing: {missing[:5]} ({len(missing)} in all). "
            f"Unknown: {unknown[:5]} ({len(unknown)} in all)."
        )
    for name, variable in variables.items():
        if tuple(tensors[name].get_shape()) != tuple(variable.shape):
            raise ValueError(
                f"The tensor {name!r} of {folder} has shape {tuple(tensors[name].get_shape())}; "
                f"config.json makes it {tuple(variable.shape)}."
            )


def _check_tied_head(tensors: Mapping[str, Any], folder: str) -> None:
    pairs = zip(_row_blocks(tensors[HEAD]), _row_blocks(tensors[EMBEDDING]))
    same_shape = tensors[HEAD].get_shape() == tensors[EMBEDDING].get_shape()
    if not same_shape or not all(np.array_equal(head, embedding) for head, embedding in pairs):
        raise ValueError(
            f"{HEAD!r} of {folder} differs from the embedding. Gemma 2 ties the two; a model trained with an untied head "
            "cannot be loaded."
        )


def _row_blocks(tensor: Any) -> Iterator[np.ndarray]:
    """Consecutive rows of a lazy tensor, in float32 or the stored dtype, a bounded number of elements at a time."""
    shape = tensor.get_shape()
    rows = max(1, ELEMENTS_A_BLOCK // max(1, int(np.prod(shape[1:]))))
    for start in range(0, shape[0], rows):
        yield tensor[start : min(start + rows, shape[0])]


def _converted(variable: Any, path: str, dtype: Any) -> np.ndarray:
    value = keras.ops.convert_to_numpy(keras.ops.cast(variable.value, "float32"))
    with np.errstate(over="ignore"):  # an overflow is refused below
        converted = value.astype(dtype)
    if not np.isfinite(converted.astype("float32")).all():
        largest = np.abs(value).max()
        raise ValueError(
            f"The weight {path!r} does not fit `weights_dtype` {np.dtype(dtype).name}: largest is {largest}."
        )
    return converted


def _write_json(path: str, values: Mapping[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(values, file, indent=2)
        file.write("\n")
