"""The blocks of Gemma 2 as Keras layers."""

from keras_gemma2.layers.attention import GroupedQueryAttention
from keras_gemma2.layers.decoder_block import DecoderBlock
from keras_gemma2.layers.embedding import TiedEmbedding
from keras_gemma2.layers.feed_forward import FeedForward
from keras_gemma2.layers.linear import Linear
from keras_gemma2.layers.mask import AttentionMask, TokenPositions, VisibleKeys, attention_mask, token_positions, visible_pairs
from keras_gemma2.layers.rms_norm import RMSNorm
from keras_gemma2.layers.rotary import RotaryEmbedding, apply_rotary

__all__ = [
    "AttentionMask",
    "DecoderBlock",
    "FeedForward",
    "GroupedQueryAttention",
    "Linear",
    "RMSNorm",
    "RotaryEmbedding",
    "TiedEmbedding",
    "TokenPositions",
    "VisibleKeys",
    "apply_rotary",
    "attention_mask",
    "token_positions",
    "visible_pairs",
]
