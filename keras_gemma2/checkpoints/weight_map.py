"""The one table of weights: our path beside the name each format gives it.

Import applies it; export reads it backwards. `{i}` stands for a layer's number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from keras_gemma2.config import Gemma2Config


@dataclasses.dataclass(frozen=True)
class WeightRow:
    """One kind of weight.

    Args:
        path: ours, as in `Gemma2Config.weight_shapes`.
        hugging_face: its name in a Hugging Face checkpoint. Shapes are equal: both store kernels [out, in], norms as w of 1 + w.
    """

    path: str
    hugging_face: str


TABLE = (
    WeightRow("token_embedding/embeddings", "model.embed_tokens.weight"),
    WeightRow("decoder_block_{i}/pre_attention_norm/scale", "model.layers.{i}.input_layernorm.weight"),
    WeightRow("decoder_block_{i}/attention/query/kernel", "model.layers.{i}.self_attn.q_proj.weight"),
    WeightRow("decoder_block_{i}/attention/key/kernel", "model.layers.{i}.self_attn.k_proj.weight"),
    WeightRow("decoder_block_{i}/attention/value/kernel", "model.layers.{i}.self_attn.v_proj.weight"),
    WeightRow("decoder_block_{i}/attention/output_projection/kernel", "model.layers.{i}.self_attn.o_proj.weight"),
    WeightRow("decoder_block_{i}/post_attention_norm/scale", "model.layers.{i}.post_attention_layernorm.weight"),
    WeightRow("decoder_block_{i}/pre_ffw_norm/scale", "model.layers.{i}.pre_feedforward_layernorm.weight"),
    WeightRow("decoder_block_{i}/feed_forward/gate/kernel", "model.layers.{i}.mlp.gate_proj.weight"),
    WeightRow("decoder_block_{i}/feed_forward/up/kernel", "model.layers.{i}.mlp.up_proj.weight"),
    WeightRow("decoder_block_{i}/feed_forward/down/kernel", "model.layers.{i}.mlp.down_proj.weight"),
    WeightRow("decoder_block_{i}/post_ffw_norm/scale", "model.layers.{i}.post_feedforward_layernorm.weight"),
    WeightRow("final_norm/scale", "model.norm.weight"),
)


def rows_for(config: Gemma2Config) -> Iterator[WeightRow]:
    """The table written out for every layer of a model."""
    for row in TABLE:
        layers = range(config.num_layers) if "{i}" in row.path else [None]
        for i in layers:
            yield WeightRow(row.path.replace("{i}", str(i)), row.hugging_face.replace("{i}", str(i)))
