"""One Gemma 2 decoder block."""

from __future__ import annotations

from typing import Any

import keras

from keras_gemma2 import backend
from keras_gemma2.config import Gemma2Config
from keras_gemma2.layers.attention import GroupedQueryAttention
from keras_gemma2.layers.feed_forward import FeedForward
from keras_gemma2.layers.numerics import stream_dtype
from keras_gemma2.layers.quantization import QuantizableContainer, float_policy
from keras_gemma2.layers.rms_norm import RMSNorm


@keras.saving.register_keras_serializable(package="keras_gemma2")
class DecoderBlock(QuantizableContainer, keras.layers.Layer):
    """Attention and feed-forward, each normalized before and after, each added to the residual stream.

    The post-norms act on the branch, before the addition (technical report, section 2; Hugging Face `Gemma2DecoderLayer`).
    Whether a block is local or global is decided by the mask it is called with.

    Args:
        config: a `Gemma2Config`, or the dict of one.

    Attributes:
        recomputes: whether training keeps a block's input alone, and computes the rest again in the backward pass.

    Call arguments:
        inputs: `[B, T, D]`, the residual stream.
        cos, sin, mask, cache: as `GroupedQueryAttention` takes them.

    Returns:
        `[B, T, D]`.

    Example:
        >>> block = DecoderBlock(Gemma2Config(32, 2, 4, 2, 24, 32, 8))
        >>> block.build((None, None, 24))
    """

    def __init__(self, config: Gemma2Config | dict[str, Any], **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)  # the residual stream may be wider than the compute dtype
        self.config = config if isinstance(config, Gemma2Config) else Gemma2Config.from_dict(config)
        config, policy, stream = self.config, self.dtype_policy, stream_dtype(self.compute_dtype)
        self.pre_attention_norm = self._norm("pre_attention_norm")
        self.attention = GroupedQueryAttention(
            config.num_query_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.query_pre_attn_scalar,
            config.attention_logit_soft_cap,
            dtype=policy,
            name="attention",
        )
        self.post_attention_norm = self._norm("post_attention_norm", stream)
        self.pre_ffw_norm = self._norm("pre_ffw_norm")
        self.feed_forward = FeedForward(config.intermediate_dim, dtype=policy, name="feed_forward")
        self.post_ffw_norm = self._norm("post_ffw_norm", stream)
        self.recomputes = False
        self._is_recomputing = False
        self.dropout = keras.layers.Dropout(config.dropout, dtype=stream, name="dropout") if config.dropout else None

    def _norm(self, name: str, output_dtype: str | None = None) -> RMSNorm:
        return RMSNorm(self.config.layer_norm_epsilon, output_dtype, dtype=float_policy(self.dtype_policy), name=name)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        for layer in (
            self.pre_attention_norm,
            self.attention,
            self.post_attention_norm,
            self.pre_ffw_norm,
            self.feed_forward,
            self.post_ffw_norm,
        ):
            layer.build(input_shape)
        self.built = True

    def call(self, inputs: Any, cos: Any, sin: Any, mask: Any, cache: Any = None, training: bool | None = None) -> Any:
        if self.recomputes and training and cache is None and not self._is_recomputing:
            return self._recomputed(inputs, cos, sin, mask)
        attended = self.attention(self.pre_attention_norm(inputs), cos, sin, mask, cache=cache)
        x = inputs + self._drop(self.post_attention_norm(attended), training)
        return x + self._drop(self.post_ffw_norm(self.feed_forward(self.pre_ffw_norm(x))), training)

    def _recomputed(self, inputs: Any, cos: Any, sin: Any, mask: Any) -> Any:
        """The call's result, of which nothing is kept for the backward pass but what it is called with."""
        masks = list(mask) if isinstance(mask, (tuple, list)) else [mask]

        def run(inputs: Any, cos: Any, sin: Any, *masks: Any) -> Any:
            # Through `__call__`, for in the backward pass there is no call around this to say that it is training.
            mask = tuple(masks) if len(masks) > 1 else masks[0]
            self._is_recomputing = True
            try:
                return self(inputs, cos, sin, mask, training=True)
            finally:
                self._is_recomputing = False

        weights = {id(weight) for weight in self.weights}
        seeds = [variable for variable in self.variables if id(variable) not in weights]
        return backend.recomputed(run, seeds, inputs, cos, sin, *masks)

    def _drop(self, x: Any, training: bool | None) -> Any:
        return x if self.dropout is None else self.dropout(x, training=training)

    def compute_output_spec(self, inputs: Any, *args: Any, **kwargs: Any) -> keras.KerasTensor:
        return keras.KerasTensor(inputs.shape, inputs.dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "config": self.config.to_dict()}
