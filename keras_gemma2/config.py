"""The numbers that define one Gemma 2 model, and the sizes Google published.

This file imports nothing but the standard library, so that sizes can be planned, printed and tested without a backend.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

LOCAL = "local"
GLOBAL = "global"
LAYER_TYPES = (LOCAL, GLOBAL)
# Beyond any model; a damaged config must not be counted out layer by layer.
LARGEST_NUM_LAYERS, LARGEST_INTEGER = 10_000, 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Gemma2Config:
    """Every number of a Gemma 2 architecture, validated where it is made.

    Sources: Gemma 2 technical report (arXiv 2408.00118), table 1 and section 2; Hugging Face `Gemma2Config`.

    Args:
        vocabulary_size: rows of the tied embedding (V).
        num_layers: decoder blocks.
        num_query_heads: query heads a layer (N).
        num_key_value_heads: key and value heads a layer (K); N must be a multiple of it.
        hidden_dim: width of the residual stream (D).
        intermediate_dim: width of **one** feed-forward gate (F). The technical report and keras-hub print twice this.
        head_dim: width of one head (H), even.
        query_pre_attn_scalar: queries are multiplied by this to the power -0.5. None means `head_dim`.
        sliding_window_size: keys a query of a local layer sees, with its own (W).
        layer_types: "local" or "global" for each layer. None means local, global, local, ...
        attention_logit_soft_cap: scores become `cap * tanh(scores / cap)`; None switches it off.
        final_logit_soft_cap: the same for the vocabulary logits; None switches it off.
        layer_norm_epsilon: RMSNorm's epsilon.
        rope_max_wavelength: base of the rotary frequencies.
        max_sequence_length: longest context the model is meant for, in tokens.
        dropout: rate on the embedding and on each residual branch, in training.

    Raises:
        ValueError: if a number makes no model; the message names the argument, its value and the mend.

    Example:
        >>> config = Gemma2Config(256, 2, 4, 2, 48, 96, 16)
        >>> config.layer_types, config.query_pre_attn_scalar
        (('local', 'global'), 16)
    """

    vocabulary_size: int
    num_layers: int
    num_query_heads: int
    num_key_value_heads: int
    hidden_dim: int
    intermediate_dim: int
    head_dim: int
    query_pre_attn_scalar: float | None = None
    sliding_window_size: int = 4096
    layer_types: tuple[str, ...] | None = None
    attention_logit_soft_cap: float | None = 50.0
    final_logit_soft_cap: float | None = 30.0
    layer_norm_epsilon: float = 1e-6
    rope_max_wavelength: float = 10000.0
    max_sequence_length: int = 8192
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in _POSITIVE_INTEGERS:
            _set(self, name, _positive_integer(name, getattr(self, name)))
        for name in _POSITIVE_NUMBERS:
            _positive_number(name, getattr(self, name))
        for name in _OPTIONAL_POSITIVE_NUMBERS:
            if getattr(self, name) is not None:
                _positive_number(name, getattr(self, name))
        if self.num_query_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_query_heads` must be a multiple of `num_key_value_heads`, so that each key/value head serves the "
                f"same number of queries. Received: num_query_heads={self.num_query_heads}, "
                f"num_key_value_heads={self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(
                f"`head_dim` must be even: the rotary embedding turns its first half against its second. "
                f"Received: head_dim={self.head_dim}."
            )
        if not _is_number(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(
                f"`dropout` must be a number from 0 up to, not including, 1. Received: dropout={self.dropout!r}."
            )
        if self.query_pre_attn_scalar is None:
            _set(self, "query_pre_attn_scalar", self.head_dim)
        _set(self, "layer_types", self._resolve_layer_types())

    def _resolve_layer_types(self) -> tuple[str, ...]:
        if self.layer_types is None:
            return tuple(LAYER_TYPES[i % 2] for i in range(self.num_layers))
        if isinstance(self.layer_types, str) or not isinstance(self.layer_types, Iterable):
            raise ValueError(
                f"`layer_types` must be a list with one entry a layer. Received: layer_types={self.layer_types!r}."
            )
        types = tuple(self.layer_types)
        if len(types) != self.num_layers:
            raise ValueError(
                f"`layer_types` must have one entry for each of the num_layers={self.num_layers} layers. "
                f"Received {len(types)}: layer_types={list(types)}."
            )
        for i, kind in enumerate(types):
            if kind not in LAYER_TYPES:
                raise ValueError(
                    f"`layer_types` entries must be 'local' or 'global'. Received: layer_types[{i}]={kind!r}."
                )
        return types

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Gemma2Config:
        """Builds a config from a mapping, refusing keys it does not know.

        Raises:
            ValueError: for an unknown key.
        """
        unknown = sorted(set(values) - set(cls.field_names()))
        if unknown:
            raise ValueError(f"Unknown Gemma2Config argument(s) {unknown}. Known: {cls.field_names()}.")
        return cls(**values)

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The names of the arguments, in order."""
        return tuple(field.name for field in dataclasses.fields(cls))

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON types; `from_dict` takes it back."""
        values = dataclasses.asdict(self)
        values["layer_types"] = list(self.layer_types)
        return values

    def window(self, layer_type: str) -> int | None:
        """The sliding window of a layer type: a number of keys, or None for a global layer."""
        return self.sliding_window_size if layer_type == LOCAL else None

    # Shapes and counts, without allocating ---------------------------------------------------------------------------

    def block_weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each weight of one decoder block, by its path below the block. Kernels are [out, in]."""
        hidden, gate = self.hidden_dim, self.intermediate_dim
        queries = self.num_query_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        return {
            "pre_attention_norm/scale": (hidden,),
            "attention/query/kernel": (queries, hidden),
            "attention/key/kernel": (keys, hidden),
            "attention/value/kernel": (keys, hidden),
            "attention/output_projection/kernel": (hidden, queries),
            "post_attention_norm/scale": (hidden,),
            "pre_ffw_norm/scale": (hidden,),
            "feed_forward/gate/kernel": (gate, hidden),
            "feed_forward/up/kernel": (gate, hidden),
            "feed_forward/down/kernel": (hidden, gate),
            "post_ffw_norm/scale": (hidden,),
        }

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight of the backbone, by its path.

        Example:
            >>> len(NAMED_SIZES["gemma2_2b"].weight_shapes())
            288
        """
        shapes: dict[str, tuple[int, ...]] = {"token_embedding/embeddings": (self.vocabulary_size, self.hidden_dim)}
        for i in range(self.num_layers):
            shapes.update({f"decoder_block_{i}/{path}": shape for path, shape in self.block_weight_shapes().items()})
        shapes["final_norm/scale"] = (self.hidden_dim,)
        return shapes

    def parameter_count(self, embedding: bool = True) -> int:
        """Number of parameters; `embedding=False` leaves out the tied embedding, as the technical report's table 2 does."""
        block = sum(math.prod(shape) for shape in self.block_weight_shapes().values())
        rest = self.num_layers * block + self.hidden_dim
        return rest + (self.vocabulary_size * self.hidden_dim if embedding else 0)


_POSITIVE_INTEGERS = (
    "vocabulary_size",
    "num_layers",
    "num_query_heads",
    "num_key_value_heads",
    "hidden_dim",
    "intermediate_dim",
    "head_dim",
    "sliding_window_size",
    "max_sequence_length",
)
_POSITIVE_NUMBERS = ("layer_norm_epsilon", "rope_max_wavelength")
_OPTIONAL_POSITIVE_NUMBERS = ("query_pre_attn_scalar", "attention_logit_soft_cap", "final_logit_soft_cap")


def _set(config: Gemma2Config, name: str, value: Any) -> None:
    object.__setattr__(config, name, value)  # the way to fill a frozen dataclass while it is being made


def _is_number(value: Any) -> bool:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _positive_integer(name: str, value: Any) -> int:
    """`value` as an int; numpy's integers are taken, floats and bools are not."""
    try:
        integer = value.__index__()
    except AttributeError:
        integer = None
    if integer is None or isinstance(value, bool) or integer < 1:
        raise ValueError(f"`{name}` must be a positive integer. Received: {name}={value!r}.")
    limit = LARGEST_NUM_LAYERS if name == "num_layers" else LARGEST_INTEGER
    if integer > limit:
        raise ValueError(f"`{name}` must be at most {limit}. Received: {name}={value!r}.")
    return integer


def _positive_number(name: str, value: Any) -> None:
    if not _is_number(value) or value <= 0:
        raise ValueError(f"`{name}` must be a positive, finite number. Received: {name}={value!r}.")


# Technical report, table 1; Hugging Face config.json of google/gemma-2-{2b,9b,27b}. The report's feed-forward widths are
# those of both gates together; 27B alone scales its queries by hidden_dim / num_query_heads = 144, not by head_dim.
NAMED_SIZES: dict[str, Gemma2Config] = {
    "gemma2_2b": Gemma2Config(256000, 26, 8, 4, 2304, 9216, 256),
    "gemma2_9b": Gemma2Config(256000, 42, 16, 8, 3584, 14336, 256),
    "gemma2_27b": Gemma2Config(256000, 46, 32, 16, 4608, 36864, 128, query_pre_attn_scalar=144),
}
