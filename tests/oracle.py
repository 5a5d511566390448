"""Independent oracles: transformers' Gemma 2, and a float64 numpy forward pass without a cache."""

import functools
import tempfile

import numpy as np
import torch
import transformers

torch.set_num_threads(1)  # products this small lose more to hand-over than they gain

BASE = {
    "vocab_size": 97,
    "hidden_size": 42,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 20,
    "sliding_window": 5,
    "rms_norm_eps": 1e-3,
    "rope_theta": 500.0,
    "max_position_embeddings": 64,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 3.0,
}


def hugging_face_model(enlarge=1.0, **overrides):
    """A random Gemma 2 of transformers with weights large enough that caps and windows act.

    enlarge: factor on the embedding and the query projections, for scores and logits of tens.
    """
    torch.manual_seed(8)
    overrides = {name: list(value) if isinstance(value, tuple) else value for name, value in overrides.items()}
    # 0.3 instead of the default 0.02: with small weights, removing the attention cap moves logits by 1e-7 only.
    config = transformers.Gemma2Config(**{**BASE, **overrides}, initializer_range=0.3, attn_implementation="eager")
    model = transformers.Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # transformers starts them at zero, where 1 + w and w differ by a constant only
                parameter.normal_(0.0, 0.3)
            if "embed_tokens" in name:  # smaller, or each token predicts itself and greedy texts repeat one token
                parameter.mul_(0.12 * enlarge)
            if "q_proj" in name:
                parameter.mul_(enlarge)
    return model


@functools.lru_cache
def hugging_face_folder(**overrides):
    """Path of a folder with such a model, written by transformers, and the model."""
    model = hugging_face_model(**overrides)
    folder = tempfile.mkdtemp(prefix="gemma2-oracle-")
    model.save_pretrained(folder)
    return folder, model


def hugging_face_logits(model, token_ids):
    """float32 logits [B, T, V]."""
    with torch.no_grad():
        return model(torch.tensor(np.asarray(token_ids), dtype=torch.long)).logits.float().numpy()


def naive_generate(model, prompt, length):
    """Greedy continuation without a cache: the whole text again for each token; and the logits of each step."""
    token_ids, steps = list(prompt), []
    while len(token_ids) < length:
        steps.append(hugging_face_logits(model, [token_ids])[0, -1])
        token_ids.append(int(steps[-1].argmax()))
    return token_ids, np.stack(steps)


# float64 numpy ----------------------------------------------------------------------------------------------------------


def numpy_logits(weights, config, token_ids):
    """Gemma 2's forward pass in float64, one row [T] -> [T, V], written from the technical report alone.

    weights: our paths (`Backbone.named_weights`) -> arrays.
    """
    w = {name: np.asarray(value, "float64") for name, value in weights.items()}
    embeddings = w["token_embedding/embeddings"]
    x = embeddings[np.asarray(token_ids)] * np.sqrt(config.hidden_dim)
    for i, kind in enumerate(config.layer_types):
        block = {
            path.removeprefix(f"decoder_block_{i}/"): v
            for path, v in w.items()
            if path.startswith(f"decoder_block_{i}/")
        }
        h = _norm(x, block["pre_attention_norm/scale"], config)
        x = x + _norm(_attention(h, block, config, kind == "local"), block["post_attention_norm/scale"], config)
        h = _norm(x, block["pre_ffw_norm/scale"], config)
        gate, up = h @ block["feed_forward/gate/kernel"].T, h @ block["feed_forward/up/kernel"].T
        gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        x = x + _norm((gelu * up) @ block["feed_forward/down/kernel"].T, block["post_ffw_norm/scale"], config)
    return _cap(_norm(x, w["final_norm/scale"], config) @ embeddings.T, config.final_logit_soft_cap)


def _norm(x, scale, config):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.layer_norm_epsilon) * (1 + scale)


def _cap(x, cap):
    return x if cap is None else cap * np.tanh(x / cap)


def _attention(x, block, config, is_local):
    steps, heads = len(x), config.num_query_heads
    q = _rotate((x @ block["attention/query/kernel"].T).reshape(steps, heads, -1), config)
    k = _rotate((x @ block["attention/key/kernel"].T).reshape(steps, config.num_key_value_heads, -1), config)
    v = (x @ block["attention/value/kernel"].T).reshape(steps, config.num_key_value_heads, -1)
    outputs = np.zeros_like(q)
    for head in range(heads):
        shared = head // (heads // config.num_key_value_heads)
        for t in range(steps):
            first = max(0, t - config.sliding_window_size + 1) if is_local else 0
            scores = k[first : t + 1, shared] @ q[t, head] / np.sqrt(config.query_pre_attn_scalar)
            scores = np.exp(_cap(scores, config.attention_logit_soft_cap))
            outputs[t, head] = scores / scores.sum() @ v[first : t + 1, shared]
    return outputs.reshape(steps, -1) @ block["attention/output_projection/kernel"].T


def _rotate(x, config):
    half = config.head_dim // 2
    angles = np.arange(len(x))[:, None] * config.rope_max_wavelength ** (-np.arange(half) / half)
    # A rotation in the plane of elements (i, i + half), as a complex product.
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None, :]
    return np.concatenate([turned.real, turned.imag], -1)
