"""The numbers of a model: published counts, layer types, refusals."""

import numpy as np
import pytest

from keras_gemma2 import Gemma2Config
from keras_gemma2.config import NAMED_SIZES

# Technical report table 2 (non-embedding), Hugging Face's files (tensors), and counts of the built peers.
PUBLISHED = {
    "gemma2_2b": (2_614_341_888, 2_024_517_888, 288),
    "gemma2_9b": (9_241_705_984, 8_324_201_984, 464),
    "gemma2_27b": (27_227_128_320, 26_047_480_320, 508),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name):
    config, (total, without_embedding, tensors) = NAMED_SIZES[name], PUBLISHED[name]
    assert config.parameter_count() == total
    assert config.parameter_count(embedding=False) == without_embedding
    assert len(config.weight_shapes()) == tensors


def test_27b_alone_scales_by_hidden_dim_over_heads():
    scalars = {name: config.query_pre_attn_scalar for name, config in NAMED_SIZES.items()}
    assert scalars == {"gemma2_2b": 256, "gemma2_9b": 256, "gemma2_27b": 144}
    assert NAMED_SIZES["gemma2_27b"].head_dim == 128


def test_layers_alternate_from_local(tiny):
    assert Gemma2Config(**{**tiny, "num_layers": 5}).layer_types == ("local", "global", "local", "global", "local")


def test_defaults(tiny):
    del tiny["query_pre_attn_scalar"]
    config = Gemma2Config(**tiny)
    assert config.query_pre_attn_scalar == config.head_dim
    assert config.window("local") == config.sliding_window_size and config.window("global") is None


def test_round_trip_and_frozen(tiny):
    config = Gemma2Config(**tiny, layer_types=["global", "local", "local", "global"], dropout=0.1)
    assert Gemma2Config.from_dict(config.to_dict()) == config
    with pytest.raises(AttributeError):
        config.num_layers = 3
    with pytest.raises(ValueError, match="num_layer"):
        Gemma2Config.from_dict({**tiny, "num_layer": 3})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_layers": 0}, "`num_layers` must be a positive integer.*num_layers=0"),
        ({"num_layers": 10**12}, "`num_layers` must be at most 10000"),
        ({"vocabulary_size": 2**31}, "`vocabulary_size` must be at most 2147483647"),
        ({"hidden_dim": -4}, "`hidden_dim`.*hidden_dim=-4"),
        ({"vocabulary_size": 2.5}, "`vocabulary_size`.*2.5"),
        ({"intermediate_dim": "80"}, "`intermediate_dim`.*'80'"),
        ({"num_query_heads": True}, "`num_query_heads`.*True"),
        ({"num_query_heads": 5}, "multiple of `num_key_value_heads`.*num_query_heads=5, num_key_value_heads=2"),
        ({"head_dim": 15}, "`head_dim` must be even.*head_dim=15"),
        ({"sliding_window_size": 0}, "`sliding_window_size`"),
        ({"layer_types": ["local"]}, "num_layers=4.*Received 1"),
        ({"layer_types": ["local", "glob", "local", "global"]}, r"layer_types\[1\]='glob'"),
        ({"layer_types": 3}, "one entry a layer.*3"),
        ({"layer_types": "local"}, "one entry a layer.*'local'"),
        ({"attention_logit_soft_cap": 0}, "`attention_logit_soft_cap`.*0"),
        ({"final_logit_soft_cap": -30.0}, "`final_logit_soft_cap`.*-30"),
        ({"layer_norm_epsilon": 0.0}, "`layer_norm_epsilon`"),
        ({"rope_max_wavelength": float("inf")}, "`rope_max_wavelength`.*inf"),
        ({"query_pre_attn_scalar": float("nan")}, "`query_pre_attn_scalar`.*nan"),
        ({"dropout": 1.0}, "`dropout`.*1.0"),
    ],
)
def test_bad_numbers_are_refused(tiny, changes, message):
    with pytest.raises(ValueError, match=message):
        Gemma2Config(**{**tiny, **changes})


def test_numpy_numbers_are_taken(tiny):
    config = Gemma2Config(**{**tiny, "hidden_dim": np.int64(42), "layer_norm_epsilon": np.float32(0.5)})
    assert config == Gemma2Config(**{**tiny, "layer_norm_epsilon": 0.5}) and type(config.hidden_dim) is int
