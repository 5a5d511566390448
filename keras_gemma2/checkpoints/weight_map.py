"""The one table of weights: our path beside the name and layout each format gives it.

Import applies it; export reads it backwards. `{i}` stands for a layer's number, `{_i}` for Keras's way of numbering
layers of one class (nothing, `_1`, `_2`, ...).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from keras_gemma2.checkpoints.layout import Part, Tensor, layout
from keras_gemma2.config import Gemma2Config
from keras_gemma2.errors import CheckpointError

FORMATS = ("hugging_face", "keras", "keras_hub", "gemma_pytorch", "flax", "gguf")


@dataclasses.dataclass(frozen=True)
class Foreign:
    """One of our weights as another format holds it.

    Args:
        name: the tensor's name there.
        pattern: from their axes to ours; "" where both are equal.
        part: which part of the tensor it is, counted along axis 0; None for all of it.
        stacked: parts are entries of an extra first axis instead of consecutive rows.
        offset: their values minus ours.
    """

    name: str
    pattern: str = ""
    part: int | None = None
    stacked: bool = False
    offset: float = 0.0


@dataclasses.dataclass(frozen=True)
class WeightRow:
    """One kind of weight.

    Args:
        path: ours, as in `Gemma2Config.weight_shapes`.
        hugging_face: in safetensors; kernels are [out, in] there too, norms w of 1 + w.
        keras: in a `.weights.h5` of this package's classes.
        keras_hub: in a `.weights.h5` of keras-hub's `GemmaBackbone`: kernels have a head axis.
        gemma_pytorch: in google/gemma_pytorch's `model.ckpt`: queries, keys and values are fused.
        flax: in Google's Flax checkpoints, joined by "/".
        gguf: in llama.cpp's files: norms are 1 + w.
    """

    path: str
    hugging_face: Foreign
    keras: Foreign
    keras_hub: Foreign
    gemma_pytorch: Foreign
    flax: Foreign
    gguf: Foreign


def _row(path: str, **names: str | Foreign) -> WeightRow:
    cells = {kind: cell if isinstance(cell, Foreign) else Foreign(cell) for kind, cell in names.items()}
    if path.endswith("/scale"):
        cells["gguf"] = dataclasses.replace(cells["gguf"], offset=1.0)
    return WeightRow(path, **cells)


_PREFIXES = {
    "hugging_face": "model.layers.{i}.",
    "keras": "layers/decoder_block{_i}/",
    "keras_hub": "layers/gemma_decoder_block{_i}/",
    "gemma_pytorch": "model.layers.{i}.",
    "flax": "transformer/layer_{i}/",
    "gguf": "blk.{i}.",
}
_SUFFIXES = {
    "hugging_face": ".weight",
    "keras": "/vars/0",
    "keras_hub": "/vars/0",
    "gemma_pytorch": ".weight",
    "flax": "",
    "gguf": ".weight",
}


def _block(path: str, **names: str | Foreign) -> WeightRow:
    row = _row(f"decoder_block_{{i}}/{path}", keras=path.rpartition("/")[0], **names)
    cells = {kind: getattr(row, kind) for kind in FORMATS}
    full = {k: dataclasses.replace(c, name=_PREFIXES[k] + c.name + _SUFFIXES[k]) for k, c in cells.items()}
    return dataclasses.replace(row, **full)


# Names of the formats: Hugging Face google/gemma-2-2b; transformers `modeling_gemma2`; keras-hub
# `models/gemma/gemma_decoder_block.py`; google/gemma_pytorch `gemma/model.py`; google-deepmind/gemma `params.py`;
# llama.cpp `gguf-py/gguf/constants.py`.
TABLE = (
    _row(
        "token_embedding/embeddings",
        hugging_face="model.embed_tokens.weight",
        keras="layers/tied_embedding/vars/0",
        keras_hub="layers/reversible_embedding/vars/0",
        gemma_pytorch="embedder.weight",
        flax="transformer/embedder/input_embedding",
        gguf="token_embd.weight",
    ),
    _block(
        "pre_attention_norm/scale",
        hugging_face="input_layernorm",
        keras_hub="pre_attention_norm",
        gemma_pytorch="input_layernorm",
        flax="pre_attention_norm/scale",
        gguf="attn_norm",
    ),
    _block(
        "attention/query/kernel",
        hugging_face="self_attn.q_proj",
        keras_hub=Foreign("attention/query_dense", "N D H -> (N H) D"),
        gemma_pytorch=Foreign("self_attn.qkv_proj", part=0),
        flax=Foreign("attn/q_einsum/w", "N D H -> (N H) D"),
        gguf="attn_q",
    ),
    _block(
        "attention/key/kernel",
        hugging_face="self_attn.k_proj",
        keras_hub=Foreign("attention/key_dense", "K D H -> (K H) D"),
        gemma_pytorch=Foreign("self_attn.qkv_proj", part=1),
        flax=Foreign("attn/kv_einsum/w", "K D H -> (K H) D", part=0, stacked=True),
        gguf="attn_k",
    ),
    _block(
        "attention/value/kernel",
        hugging_face="self_attn.v_proj",
        keras_hub=Foreign("attention/value_dense", "K D H -> (K H) D"),
        gemma_pytorch=Foreign("self_attn.qkv_proj", part=2),
        flax=Foreign("attn/kv_einsum/w", "K D H -> (K H) D", part=1, stacked=True),
        gguf="attn_v",
    ),
    _block(
        "attention/output_projection/kernel",
        hugging_face="self_attn.o_proj",
        keras_hub=Foreign("attention/output_dense", "N H D -> D (N H)"),
        gemma_pytorch="self_attn.o_proj",
        flax=Foreign("attn/attn_vec_einsum/w", "N H D -> D (N H)"),
        gguf="attn_output",
    ),
    _block(
        "post_attention_norm/scale",
        hugging_face="post_attention_layernorm",
        keras_hub="post_attention_norm",
        gemma_pytorch="post_attention_layernorm",
        flax="post_attention_norm/scale",
        gguf="post_attention_norm",
    ),
    _block(
        "pre_ffw_norm/scale",
        hugging_face="pre_feedforward_layernorm",
        keras_hub="pre_ffw_norm",
        gemma_pytorch="pre_feedforward_layernorm",
        flax="pre_ffw_norm/scale",
        gguf="ffn_norm",
    ),
    _block(
        "feed_forward/gate/kernel",
        hugging_face="mlp.gate_proj",
        keras_hub=Foreign("gating_ffw", "D F -> F D"),
        gemma_pytorch="mlp.gate_proj",
        flax=Foreign("mlp/gating_einsum/w", "D F -> F D", part=0, stacked=True),  # 9B and 27B: F D
        gguf="ffn_gate",
    ),
    _block(
        "feed_forward/up/kernel",
        hugging_face="mlp.up_proj",
        keras_hub=Foreign("gating_ffw_2", "D F -> F D"),
        gemma_pytorch="mlp.up_proj",
        flax=Foreign("mlp/gating_einsum/w", "D F -> F D", part=1, stacked=True),
        gguf="ffn_up",
    ),
    _block(
        "feed_forward/down/kernel",
        hugging_face="mlp.down_proj",
        keras_hub=Foreign("ffw_linear", "F D -> D F"),
        gemma_pytorch="mlp.down_proj",
        flax=Foreign("mlp/linear/w", "F D -> D F"),
        gguf="ffn_down",
    ),
    _block(
        "post_ffw_norm/scale",
        hugging_face="post_feedforward_layernorm",
        keras_hub="post_ffw_norm",
        gemma_pytorch="post_feedforward_layernorm",
        flax="post_ffw_norm/scale",
        gguf="post_ffw_norm",
    ),
    _row(
        "final_norm/scale",
        hugging_face="model.norm.weight",
        keras="layers/rms_norm/vars/0",
        keras_hub="layers/rms_normalization/vars/0",
        gemma_pytorch="model.norm.weight",
        flax="transformer/final_norm/scale",
        gguf="output_norm.weight",
    ),
)


def sizes(config: Gemma2Config) -> dict[str, int]:
    """The size of each letter of the dimension key."""
    return {
        "V": config.vocabulary_size,
        "D": config.hidden_dim,
        "N": config.num_query_heads,
        "K": config.num_key_value_heads,
        "H": config.head_dim,
        "F": config.intermediate_dim,
    }


def rows_for(config: Gemma2Config, kind: str) -> Iterator[tuple[str, Foreign]]:
    """The table written out for every layer of a model, in one format: our paths and the cells, named in full."""
    for row in TABLE:
        cell = getattr(row, kind)
        for i in range(config.num_layers) if "{i}" in row.path else [0]:
            name = cell.name.replace("{i}", str(i)).replace("{_i}", f"_{i}" if i else "")
            yield row.path.replace("{i}", str(i)), dataclasses.replace(cell, name=name)


def foreign_shapes(config: Gemma2Config, cells: Mapping[str, Foreign]) -> dict[str, tuple[int, ...]]:
    """The shape of each foreign tensor, by its name.

    Args:
        config: the model's.
        cells: our paths and the cells of one format, all parts of a tensor in order.
    """
    ours, letters = config.weight_shapes(), sizes(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for path, cell in cells.items():
        shape = layout(cell.pattern).foreign_shape(letters) if cell.pattern else ours[path]
        before = shapes.get(cell.name)
        if cell.stacked:
            shape = (1 if before is None else before[0] + 1, *shape)
        elif before is not None:
            shape = (before[0] + shape[0], *shape[1:])
        shapes[cell.name] = shape
    return shapes


class Entry:
    """One of our weights in an opened checkpoint.

    Args:
        tensor: the foreign tensor, its parts taken apart.
        cell: where it stands.
    """

    def __init__(self, tensor: Tensor, cell: Foreign) -> None:
        self.tensor, self.cell = tensor, cell

    def row_blocks(self, region: tuple[slice, ...] | None = None) -> Iterator[np.ndarray]:
        """Consecutive rows of our tensor, or of the rows and columns of it that `region` says."""
        rank = len(self.tensor.shape)
        pattern = self.cell.pattern or ("a -> a" if rank == 1 else "a b -> a b")
        for block in layout(pattern).row_blocks(self.tensor, region):
            yield block.astype(np.float32) - np.float32(self.cell.offset) if self.cell.offset else block


def match(tensors: Mapping[str, Tensor], config: Gemma2Config, cells: Mapping[str, Foreign], where: str) -> dict[str, Entry]:
    """Our paths and what stands for them in a checkpoint; every tensor is used exactly once.

    Args:
        tensors: all tensors of the checkpoint by name.
        config: the model's.
        cells: our paths and the cells of the format (`dict(rows_for(config, kind))`).
        where: file or folder, for messages.

    Raises:
        CheckpointError: naming missing, unknown and wrongly shaped tensors, with both shapes.
    """
    check_tensors(tensors, foreign_shapes(config, cells), where)
    return dict(_entries(tensors, config, cells))


def check_tensors(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], where: str, maker: str = "the config"
) -> None:
    """Compares the tensors of a checkpoint with what they should be.

    Args:
        tensors: all of them, by name.
        shapes: what there should be, by name.
        where: file or folder, for messages.
        maker: what says what there should be, for messages.

    Raises:
        CheckpointError: naming missing, unknown and wrongly shaped tensors, with both shapes.
    """
    missing, unknown = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
    if missing or unknown:
        raise CheckpointError(
            f"The tensors of {where} do not match {maker}. Missing: {missing[:5]} ({len(missing)} in all). "
            f"Unknown: {unknown[:5]} ({len(unknown)} in all)."
        )
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            received = tuple(tensors[name].shape)
            raise CheckpointError(f"The tensor {name!r} of {where} has shape {received}; {maker} makes it {shape}.")


def _entries(tensors: Mapping[str, Tensor], config: Gemma2Config, cells: Mapping[str, Foreign]) -> Iterator[tuple[str, Entry]]:
    ours, used = config.weight_shapes(), dict.fromkeys(tensors, 0)
    for path, cell in cells.items():
        tensor = tensors[cell.name]
        if cell.stacked:
            tensor = Part(tensor, cell.part, cell.part + 1, stacked=True)
        elif cell.part is not None:
            start = used[cell.name]
            used[cell.name] += ours[path][0]
            tensor = Part(tensor, start, used[cell.name])
        yield path, Entry(tensor, cell)
