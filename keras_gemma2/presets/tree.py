"""The tree of a model's layers as text, from its config alone: nothing is built or allocated."""

from __future__ import annotations

import math

from keras_gemma2.config import LOCAL, Gemma2Config


def format_tree(config: Gemma2Config, title: str) -> str:
    """Layers with shapes, head groups, layer types and parameter counts.

    Args:
        config: the model's.
        title: first line.

    Returns:
        Lines of text, without a final newline.

    Example:
        >>> print(format_tree(Gemma2Config(256, 2, 4, 2, 48, 96, 16), "tiny"))  # doctest: +ELLIPSIS
        tiny...
    """
    total, embedding = config.parameter_count(), config.vocabulary_size * config.hidden_dim
    lines = [
        f"{title}: Gemma 2, {total:,} parameters ({total - embedding:,} without the embedding)",
        f"  {2 * total / 1e9:.2f} GB in bfloat16, {4 * total / 1e9:.2f} GB in float32; context {config.max_sequence_length} tokens",
        _row("token_embedding (tied)", (config.vocabulary_size, config.hidden_dim), "also the output projection"),
    ]
    for first, last, kind in _runs(config.layer_types):
        lines += _blocks(config, first, last, kind)
    lines.append(_row("final_norm", (config.hidden_dim,), f"epsilon {config.layer_norm_epsilon:g}"))
    lines.append(f"  logits [B, T, {config.vocabulary_size}], {_cap(config.final_logit_soft_cap)}")
    return "\n".join(lines)


def _runs(layer_types: tuple[str, ...]) -> list[tuple[int, int, str]]:
    """Layers to print one by one, or as "every second": (first, last, description)."""
    if len(layer_types) > 2 and all(kind == layer_types[i % 2] for i, kind in enumerate(layer_types)):
        kinds = layer_types[:2]
        return [(i, len(layer_types) - 1 - (len(layer_types) - 1 - i) % 2, kinds[i]) for i in (0, 1)]
    return [(i, i, kind) for i, kind in enumerate(layer_types)]


def _blocks(config: Gemma2Config, first: int, last: int, kind: str) -> list[str]:
    shapes = config.block_weight_shapes()
    count = sum(math.prod(shape) for shape in shapes.values())
    number = (last - first) // 2 + 1
    indices = [str(first), str(first + 2), f"... {last}"] if number > 3 else [str(first + 2 * i) for i in range(number)]
    many = f"decoder_block_{', '.join(indices)}"
    sees = f"sliding window of {config.sliding_window_size} keys" if kind == LOCAL else "all earlier keys"
    head = f"  {many}: {kind} ({sees}), {count:,} parameters" + ("" if number == 1 else f" each, {number} blocks")
    scale = f"{config.query_pre_attn_scalar:g}**-0.5"
    notes = {
        "attention/query/kernel": f"{config.num_query_heads} heads of {config.head_dim}, scaled by {scale}",
        "attention/key/kernel": _groups(config),
        "attention/value/kernel": _cap(config.attention_logit_soft_cap),
        "feed_forward/gate/kernel": "gelu (tanh form)",
        "feed_forward/up/kernel": "times the gate",
    }
    return [head, *(_row(f"  {path}", shape, notes.get(path, "")) for path, shape in shapes.items())]


def _groups(config: Gemma2Config) -> str:
    groups = config.num_query_heads // config.num_key_value_heads
    return f"{config.num_key_value_heads} heads, each for {groups} query head{'s' if groups > 1 else ''}"


def _cap(cap: float | None) -> str:
    return "no soft cap" if cap is None else f"soft cap {cap:g}"


def _row(name: str, shape: tuple[int, ...], note: str = "") -> str:
    size = f"[{', '.join(map(str, shape))}]"
    return f"  {name:<44}{size:<18}{math.prod(shape):>16,}{'   ' + note if note else ''}"
