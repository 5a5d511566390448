"""Writes GGUF files of Hugging Face folders with the `gguf` package, as llama.cpp's convert_hf_to_gguf.py does for Gemma 2."""

import json
from pathlib import Path

import gguf
import numpy as np
import safetensors.numpy
import sentencepiece.sentencepiece_model_pb2 as spm

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
# Pieces that the converter calls control pieces when it reads them in tokenizer_config.json.
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<2mass>", "[@BOS@]", "<start_of_turn>", "<end_of_turn>")
CAN_QUANTIZE = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
_NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA2, 64)


def write_gguf(folder, path, kind="F32", tokens="spm", change=None, **options):
    """Writes the model in a folder to one GGUF file, or to several with `split_max_tensors` among the options.

    kind: name of a GGML type for the matrices. Types that the package cannot quantize get random blocks.
    tokens: "spm" (types of the vocabulary itself), "tokenizer_config" (as the converter writes them where there is a
        tokenizer_config.json), "tokenizer_model" (where there is none), or None for a file without a vocabulary.
    change: called with the writer before the tensors are added.
    Returns what a model loaded from it should hold, by Hugging Face's names: float32 arrays dequantized by the package.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "gemma2", **options)
    add_parameters(writer, config)
    if tokens is not None:
        add_tokenizer(writer, (folder / "tokenizer.model").read_bytes(), config["vocab_size"], tokens)
    if change is not None:
        change(writer)
    stored = {}
    for name, array in safetensors.numpy.load_file(folder / "model.safetensors").items():
        foreign = _NAMES.get_name(name, try_suffixes=(".weight",))
        offset = np.float32(1 if name.endswith("norm.weight") else 0)
        array = array.astype(np.float32) + offset
        stored[name] = add_tensor(writer, foreign, array, kind if array.ndim > 1 else "F32") - offset
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def add_parameters(writer, config):
    """`Gemma2Model.set_gguf_parameters`."""
    rope = config.get("rope_parameters") or config
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
    if rope["rope_theta"] != 10000.0:  # no Gemma 2 writes it; llama.cpp reads it for every architecture
        writer.add_rope_freq_base(rope["rope_theta"])


def add_tokenizer(writer, proto, vocabulary_size, tokens):
    """`set_vocab`: pieces, scores and types, and the ids that generation needs."""
    model = spm.ModelProto()
    model.ParseFromString(proto)
    entries = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    if tokens == "tokenizer_config":
        entries = [_with_tokenizer_config(*entry) for entry in entries]
    elif tokens == "tokenizer_model":  # SentencePieceProcessor does not tell which pieces are user-defined
        entries = [(text, score, NORMAL if kind == USER_DEFINED else kind) for text, score, kind in entries]
    entries += [(f"[PAD{i}]", -10000.0, UNUSED) for i in range(len(entries), vocabulary_size)]
    texts, scores, kinds = zip(*entries)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text.encode("utf-8") for text in texts])
    writer.add_token_scores(list(scores))
    writer.add_token_types(list(kinds))
    ids = {text: i for i, text in enumerate(texts)}
    writer.add_bos_token_id(ids["<bos>"])
    writer.add_eos_token_id(ids["<eos>"])
    writer.add_eot_token_id(ids["<end_of_turn>"])
    writer.add_pad_token_id(ids["<pad>"])
    writer.add_unk_token_id(ids["<unk>"])
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)


def add_tensor(writer, name, array, kind):
    """Adds a tensor in a type; returns what it dequantizes to."""
    qtype = gguf.GGMLQuantizationType[kind]
    raw = gguf.quants.quantize(array, qtype) if kind in CAN_QUANTIZE else random_blocks(array.shape, kind)
    writer.add_tensor(name, raw, raw_dtype=None if raw.dtype != np.uint8 else qtype)
    return gguf.quants.dequantize(raw, qtype)


def random_blocks(shape, kind):
    """uint8 [rows, bytes]: blocks with random codes, their float16 scales small enough for a model to work."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    draw = np.random.default_rng(shape[0] * 1000 + shape[1])
    blocks = draw.integers(0, 256, (shape[0], shape[1] // block, size), dtype=np.uint8)
    for start in {"Q4_K": (0, 2), "Q6_K": (208,)}[kind]:  # block_q4_K: d, dmin, ...; block_q6_K: ..., d (ggml-common.h)
        scale = draw.uniform(1e-5, 2e-4, (*blocks.shape[:2], 1)).astype(np.float16)
        blocks[..., start : start + 2] = scale.view(np.uint8)
    return blocks.reshape(shape[0], -1)


def _with_tokenizer_config(text, score, kind):
    if text in SPECIAL or text.startswith("<unused"):
        return text, -1000.0, CONTROL
    if kind == USER_DEFINED:
        return text.replace("\u2581", " "), -1000.0, USER_DEFINED
    return text, score, kind
