"""The weights of a transformers model in the layouts of other formats, written out by hand from their definitions."""

import numpy as np
import torch

NORMS = {
    "input_layernorm": "pre_attention_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "pre_ffw_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
PROJECTIONS = {
    "self_attn.q_proj": "attention/query",
    "self_attn.k_proj": "attention/key",
    "self_attn.v_proj": "attention/value",
    "self_attn.o_proj": "attention/output_projection",
    "mlp.gate_proj": "feed_forward/gate",
    "mlp.up_proj": "feed_forward/up",
    "mlp.down_proj": "feed_forward/down",
}


def state_of(model):
    """transformers' state dict, without the tied head."""
    return {key: value.detach().clone() for key, value in model.state_dict().items() if key != "lm_head.weight"}


def our_weights(model):
    """Our paths and what must stand there, as numpy arrays; float32."""
    state = {key: value.numpy() for key, value in state_of(model).items()}
    weights = {"token_embedding/embeddings": state["model.embed_tokens.weight"], "final_norm/scale": state["model.norm.weight"]}
    for i in range(model.config.num_hidden_layers):
        for theirs, ours in PROJECTIONS.items():
            weights[f"decoder_block_{i}/{ours}/kernel"] = state[f"model.layers.{i}.{theirs}.weight"]
        for theirs, ours in NORMS.items():
            weights[f"decoder_block_{i}/{ours}/scale"] = state[f"model.layers.{i}.{theirs}.weight"]
    return weights


def gemma_pytorch_state(model):
    """As google/gemma_pytorch saves it: queries, keys and values in one matrix, the embedding outside, a rotary table."""
    state = state_of(model)
    out = {"embedder.weight": state.pop("model.embed_tokens.weight")}
    for i in range(model.config.num_hidden_layers):
        prefix = f"model.layers.{i}.self_attn."
        parts = [state.pop(f"{prefix}{name}_proj.weight") for name in "qkv"]
        out[f"{prefix}qkv_proj.weight"] = torch.cat(parts, dim=0)
    out["freqs_cis"] = torch.polar(torch.ones(32, 8), torch.arange(256.0).reshape(32, 8))
    return {**out, **state}


def quantized(state, scaler_dtype=torch.float32):
    """gemma_pytorch's `quant` variant: every matrix int8, with a factor for each row."""
    out = {}
    for key, value in state.items():
        if value.ndim == 2 and key.endswith(".weight"):
            scaler = (value.abs().amax(dim=1) / 127).to(scaler_dtype)
            out[key] = torch.clamp(torch.round(value / scaler.float()[:, None]), -127, 127).to(torch.int8)
            out[key + "_scaler"] = scaler
        else:
            out[key] = value
    return out


def flax_arrays(model, gates_first_in=True, fused=False, padding=0):
    """As Google's Flax checkpoints hold it: names joined by "/" -> numpy arrays.

    gates_first_in: gates as [2, D, F] (2B), else [2, F, D] (9B, 27B).
    fused: queries, keys and values in one array, for as many key as query heads.
    padding: rows of rubbish behind the vocabulary.
    """
    state = {key: value.numpy() for key, value in state_of(model).items()}
    config, heads = model.config, {"q": model.config.num_attention_heads}
    heads["k"] = heads["v"] = config.num_key_value_heads
    depth, size = config.hidden_size, config.head_dim

    def by_head(i, letter):  # [N * H, D] -> [N, D, H]
        matrix = state[f"model.layers.{i}.self_attn.{letter}_proj.weight"]
        out = np.empty((heads[letter], depth, size), matrix.dtype)
        for head in range(heads[letter]):
            out[head] = matrix[head * size : (head + 1) * size].T
        return out

    rubbish = np.full((padding, depth), 77.0, "float32")
    arrays = {"transformer/embedder/input_embedding": np.concatenate([state["model.embed_tokens.weight"], rubbish])}
    for i in range(config.num_hidden_layers):
        theirs, ours = f"model.layers.{i}.", f"transformer/layer_{i}/"
        if fused:
            arrays[f"{ours}attn/qkv_einsum/w"] = np.stack([by_head(i, letter) for letter in "qkv"])
        else:
            arrays[f"{ours}attn/q_einsum/w"] = by_head(i, "q")
            arrays[f"{ours}attn/kv_einsum/w"] = np.stack([by_head(i, "k"), by_head(i, "v")])
        output = state[f"{theirs}self_attn.o_proj.weight"]  # [D, N * H] -> [N, H, D]
        slices = [output[:, head * size : (head + 1) * size].T for head in range(heads["q"])]
        arrays[f"{ours}attn/attn_vec_einsum/w"] = np.stack(slices)
        gates = np.stack([state[f"{theirs}mlp.gate_proj.weight"], state[f"{theirs}mlp.up_proj.weight"]])  # [2, F, D]
        arrays[f"{ours}mlp/gating_einsum/w"] = np.ascontiguousarray(np.swapaxes(gates, 1, 2)) if gates_first_in else gates
        arrays[f"{ours}mlp/linear/w"] = np.ascontiguousarray(state[f"{theirs}mlp.down_proj.weight"].T)
        for name, norm in NORMS.items():
            arrays[f"{ours}{norm}/scale"] = state[f"{theirs}{name}.weight"]
    arrays["transformer/final_norm/scale"] = state["model.norm.weight"]
    return arrays
