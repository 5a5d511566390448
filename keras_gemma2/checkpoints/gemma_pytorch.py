"""Reading PyTorch pickles: google/gemma_pytorch's `model.ckpt` and shard folders, and Hugging Face's `pytorch_model.bin`.

torch parses the files with `weights_only=True`, which runs no code that is pickled in them; the tensors are then read from
the file itself, in slices, since the pages of torch's memory map would count as this process's memory.
Format: https://github.com/google/gemma_pytorch (`load_weights` in `gemma/model.py`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any

from keras_gemma2.checkpoints.source import (
    GEMMA_PYTORCH,
    HUGGING_FACE,
    Source,
    file_inside,
    find_file,
    read_json,
    refuse_lfs_pointer,
)
from keras_gemma2.checkpoints.torch_zip import BoundedFile, is_mappable, memory_maps
from keras_gemma2.checkpoints.without_config import (
    file_names,
    folder_of,
    has_main_weights,
    published_size,
    source_of_config,
    vocabulary_beside,
)
from keras_gemma2.config import Gemma2Config
from keras_gemma2.errors import CheckpointError

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
INDEX_FILE = "pytorch_model.bin.index.json"
WEIGHTS_FILES = ("pytorch_model.bin", "model.ckpt")
WRAPPER = "model_state_dict"  # around everything, in gemma_pytorch's single files
BUFFERS = ("freqs_cis", "local_freqs_cis", "global_freqs_cis")  # rotary tables, computed from the config
SCALER = "_scaler"  # appended to the name of an int8 matrix: the factors of its rows
FINAL_NORM = "model.norm.weight"
DTYPES = ("float64", "float32", "float16", "bfloat16")


def read_source(name: str, path: str) -> Source | None:
    """Recognizes a file by its suffix, and a folder by a shard index, a `pytorch_model.bin` or a `.ckpt` file.

    Without a config.json beside, the tensors' headers are read, and must be those of a published size.
    """
    files = _weight_files(path)
    if files is None:
        return None
    source = source_of_config(name, GEMMA_PYTORCH, path, folder_of(path))
    if source is not None:
        return source
    with contextlib.ExitStack() as stack:
        tensors = _open_files(files, stack)
        shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        config = published_size(shapes, lambda size: _cells(size, tensors), path)
        return Source(name, GEMMA_PYTORCH, config, path, dtype=_default_dtype(tensors))


def open_tensors(source: Source, config: Gemma2Config, stack: contextlib.ExitStack) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every tensor of the files, int8 ones dequantized when they are sliced; the names may be Hugging Face's."""
    from keras_gemma2.checkpoints.hf import EMBEDDING, HEAD, _check_tied_head

    tensors = _open_files(_weight_files(source.path) or [], stack)
    if HEAD in tensors and EMBEDDING in tensors:
        _check_tied_head(tensors, source.path)
        del tensors[HEAD]
    return tensors, _cells(config, tensors)


def vocabulary(source: Source) -> bytes | None:
    """The bytes of tokenizer.model, in the folder of the weights or the one above."""
    return vocabulary_beside(source)


def _cells(config: Gemma2Config, tensors: Mapping[str, Any]) -> dict[str, Any]:
    from keras_gemma2.checkpoints.hf import EMBEDDING
    from keras_gemma2.checkpoints.weight_map import rows_for

    return dict(rows_for(config, HUGGING_FACE if EMBEDDING in tensors else GEMMA_PYTORCH))


def _default_dtype(tensors: Mapping[str, Any]) -> str | None:
    """The stored dtype, which is None here; that of the norms where the matrices are int8."""
    quantized = any(isinstance(tensor, DequantizedTensor) for tensor in tensors.values())
    return tensors[FINAL_NORM].dtype.name if quantized else None


# Which files ----------------------------------------------------------------------------------------------------------


def _weight_files(path: str) -> list[str] | None:
    if not os.path.isdir(path):
        return [path] if os.path.isfile(path) and path.endswith(SUFFIXES) else None
    if has_main_weights(path):
        return None
    index = find_file(path, INDEX_FILE)
    if index is not None:
        return _indexed_files(index)
    single = find_file(path, *WEIGHTS_FILES)
    if single is not None:
        return [single]
    others = [name for name in file_names(path) if name.endswith(".ckpt") and find_file(path, name)]
    if len(others) > 1:
        raise CheckpointError(f"{path} holds several checkpoints: {others[:10]}. Pass the path of one.")
    return [os.path.join(path, others[0])] if others else None


def _indexed_files(index: str) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} must hold a `weight_map` from tensors to files. Download it again.")
    names = sorted({name if isinstance(name, str) else repr(name) for name in weight_map.values()})
    return [file_inside(os.path.dirname(index), name, index) for name in names]


# What is in them ------------------------------------------------------------------------------------------------------


def _open_files(paths: list[str], stack: contextlib.ExitStack) -> dict[str, Any]:
    """Lazy tensors of all files by name: without rotary tables, int8 matrices beside their scalers made one."""
    tensors: dict[str, Any] = {}
    for path in paths:
        for key, tensor in _open_file(path, stack).items():
            if key in tensors:
                raise CheckpointError(f"The tensor {key!r} stands twice in the files of {folder_of(path)}.")
            tensors[key] = tensor
    if "embed_tokens.weight" in tensors:  # a Hugging Face model saved without its head
        tensors = {f"model.{key}": tensor for key, tensor in tensors.items()}
    return _dequantized(tensors, paths)


def _dequantized(tensors: dict[str, Any], paths: list[str]) -> dict[str, Any]:
    for key in [key for key, tensor in tensors.items() if tensor.dtype.name == "int8"]:
        codes, scaler = tensors[key], tensors.pop(key + SCALER, None)
        if scaler is None:
            raise CheckpointError(
                f"The tensor {key!r} of {paths[0]} is int8, and there is no {key + SCALER!r} to multiply it with."
            )
        if len(codes.shape) != 2 or tuple(scaler.shape) != tuple(codes.shape[:1]) or scaler.dtype.name not in DTYPES:
            raise CheckpointError(
                f"The tensor {key + SCALER!r} of {paths[0]} must be a vector of factors, one for each row of {key!r} "
                f"{tuple(codes.shape)}. Received: {scaler.dtype.name} {tuple(scaler.shape)}."
            )
        tensors[key] = DequantizedTensor(codes, scaler)
    return tensors


class DequantizedTensor:
    """int8 rows times their factors: gemma_pytorch's `quant` variants. Slices are float32.

    Args:
        codes: the matrix, int8.
        scaler: the factor of each row.
    """

    is_quantized = True

    def __init__(self, codes: Any, scaler: Any) -> None:
        import numpy as np

        self._codes, self._scaler = codes, scaler
        self.shape, self.dtype = tuple(codes.shape), np.dtype("float32")

    def __getitem__(self, index: Any) -> Any:
        rows = index[0] if isinstance(index, tuple) else index
        factors = self._scaler[rows].astype(self.dtype)
        return self._codes[index].astype(self.dtype) * factors[:, None]


class LoadedTensor:
    """A torch tensor in memory, or in torch's memory map, as numpy slices: copies, so that the map is not held by them."""

    def __init__(self, tensor: Any, dtype: Any) -> None:
        self._tensor, self.shape, self.dtype = tensor, tuple(tensor.shape), dtype

    def __getitem__(self, index: Any) -> Any:
        import torch

        block = self._tensor[index].clone()
        return block.view(torch.uint16).numpy().view(self.dtype) if block.dtype == torch.bfloat16 else block.numpy()


def _open_file(path: str, stack: contextlib.ExitStack) -> dict[str, Any]:
    state, mapped = _load(path)
    values = dict.get(state, WRAPPER, state) if isinstance(state, dict) else state
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a dict of tensors, or one under {WRAPPER!r}. Received: {type(values).__name__}.")
    # dict's own methods: a pickle may put attributes of these names on an OrderedDict.
    named = {key: value for key, value in dict.items(values) if str(key).rpartition(".")[2] not in BUFFERS}
    kept = {key: _plain(value) for key, value in named.items()}
    dtypes = {key: _checked_dtype(path, key, value) for key, value in kept.items()}
    return _tensors_in_file(path, kept, dtypes, stack) if mapped else {k: LoadedTensor(kept[k], dtypes[k]) for k in kept}


def _plain(value: Any) -> Any:
    """A tensor without gradients, a pending sign and attributes that a pickle may have put on it; other values as they are."""
    import torch

    if not isinstance(value, torch.Tensor):
        return value
    plain = torch.Tensor.detach(value)
    return plain.resolve_neg() if plain.layout == torch.strided else plain


def _load(path: str) -> tuple[Any, bool]:
    """The unpickled content, and whether its tensors are mapped from the file. No code of the pickle is run."""
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(f"{path} is a PyTorch checkpoint, and reading it needs torch: pip install torch.") from error
    refuse_lfs_pointer(path)
    mapped = is_mappable(path)
    try:
        if mapped:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True), True
        with BoundedFile(path) as file:
            return torch.load(file, map_location="cpu", weights_only=True), False
    except Exception as error:  # torch's unpickler raises whatever a hostile pickle makes it stumble over
        reason = str(error).partition("\n")[0][:300]
        raise CheckpointError(
            f"{path} cannot be read without running code that is pickled in it, or it is damaged "
            f"({type(error).__name__}: {reason}). Download it again, or take safetensors."
        ) from error


def _checked_dtype(path: str, key: Any, value: Any) -> Any:
    """numpy's dtype of a tensor, which must be a plain one of numbers."""
    import ml_dtypes
    import numpy as np
    import torch

    if not isinstance(key, str) or not isinstance(value, torch.Tensor):
        raise CheckpointError(f"{path} must hold named tensors only. Received: {key!r} of type {type(value).__name__}.")
    name = str(value.dtype).removeprefix("torch.")
    if value.layout != torch.strided or value.device.type != "cpu" or name not in (*DTYPES, "int8"):
        raise CheckpointError(
            f"The tensor {key!r} of {path} is {value.layout}, on {value.device.type}, of dtype {name}; those read are dense "
            f"tensors of {', '.join(DTYPES)}, and int8 with a scaler."
        )
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(f"The tensor {key!r} of {path} claims the shape {tuple(value.shape)}, and has fewer bytes than that.")
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


# Where in the file ----------------------------------------------------------------------------------------------------


def _tensors_in_file(
    path: str, tensors: Mapping[str, Any], dtypes: Mapping[str, Any], stack: contextlib.ExitStack
) -> dict[str, Any]:
    """Tensors to read from the file itself where their place in it is known, and from torch's memory map elsewhere."""
    from keras_gemma2.checkpoints.safetensors_file import SafetensorsTensor

    descriptor = os.open(path, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    maps = memory_maps(path)

    def tensor_of(key: str) -> Any:
        tensor, start = tensors[key], tensors[key].data_ptr()
        nbytes = tensor.numel() * tensor.element_size()
        for first, end, offset in maps:
            if tensor.is_contiguous() and tensor.dim() and first <= start and start + nbytes <= end:
                return SafetensorsTensor(descriptor, path, offset + start - first, tuple(tensor.shape), dtypes[key])
        return LoadedTensor(tensor, dtypes[key])

    return {key: tensor_of(key) for key in tensors}
