"""A Hugging Face folder as the GGUF file that llama.cpp is measured with.

Keys and names as llama.cpp's `convert_hf_to_gguf.py` writes them for Gemma 2: norms as 1 + weight, in float32. Every matrix,
the embedding included, has the same type. There is no vocabulary in it: ids go in.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

import numpy as np

TYPES = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
ROWS = 1 << 12  # that are quantized at a time


def gguf_path(folder: str, dtype: str) -> str:
    """Where a folder's GGUF file of a dtype is: beside it."""
    return f"{os.path.abspath(folder)}.{TYPES[dtype].lower()}.gguf"


def write_gguf(folder: str, dtype: str) -> None:
    """Writes the file unless it is there, one tensor in memory at a time. Needs the package `gguf`.

    Args:
        folder: with `config.json` and safetensors.
        dtype: one of `TYPES`.
    """
    import gguf

    from keras_gemma2.checkpoints.safetensors_file import open_safetensors

    path = gguf_path(folder, dtype)
    if os.path.exists(path):
        return
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA2, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(path + ".part", "gemma2")
    _add_parameters(writer, config)
    with contextlib.ExitStack() as stack:
        files = [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if name.endswith(".safetensors")]
        tensors = {name: tensor for file in files for name, tensor in open_safetensors(file, stack).items()}
        for name, tensor in tensors.items():
            kind = _kind(gguf, tensor, dtype)
            shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
            foreign = names.get_name(name, try_suffixes=(".weight",))
            writer.add_tensor_info(foreign, shape, np.dtype("uint8"), int(np.prod(shape)), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():
            writer.write_tensor_data(_stored(gguf, name, tensor, _kind(gguf, tensor, dtype)))
    writer.close()
    os.replace(path + ".part", path)


def _kind(gguf: Any, tensor: Any, dtype: str) -> Any:
    return gguf.GGMLQuantizationType[TYPES[dtype] if len(tensor.shape) > 1 else "F32"]


def _stored(gguf: Any, name: str, tensor: Any, kind: Any) -> np.ndarray:
    """The bytes of a tensor, uint8."""
    if len(tensor.shape) == 1:
        return (tensor[:].astype("float32") + np.float32(name.endswith("norm.weight"))).view("uint8")
    stored = np.empty(gguf.quant_shape_to_byte_shape(tensor.shape, kind), "uint8")
    for start in range(0, tensor.shape[0], ROWS):
        block = gguf.quants.quantize(tensor[start : start + ROWS].astype("float32"), kind)
        stored[start : start + ROWS] = block.view("uint8")
    return stored


def _add_parameters(writer: Any, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
