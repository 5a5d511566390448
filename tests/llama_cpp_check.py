"""Compares this package with llama.cpp on GGUF files: `pip install cyllama gguf` and run `python tests/llama_cpp_check.py`.

cyllama brings a compiled llama.cpp, too large a dependency for the test suite. Two comparisons:

- Files written from the embedded model by `gguf_folder`: logits at every position of a text longer than the sliding window,
  greedy continuations, ids of hard texts. llama.cpp assumes query_pre_attn_scalar == head_dim for this model, and so does
  our reader: both compute the same function, though not quite the one that was trained.
- Files that llama.cpp's own quantizer makes of a random model: every tensor, bit by bit, against what llama.cpp itself
  dequantizes it to.
"""

import contextlib
import os
import tempfile

os.environ.setdefault("KERAS_BACKEND", "torch")

import gguf
import keras
import numpy as np
from cyllama.llama import llama_cpp
from gguf_folder import write_gguf
from oracle import hugging_face_model
from vocabulary import HARD_TEXTS, random_texts

from keras_gemma2 import Gemma2CausalLM
from keras_gemma2.checkpoints.gguf import open_tensors, read_source
from keras_gemma2.checkpoints.gguf_header import read_header
from keras_gemma2.errors import CheckpointError
from keras_gemma2.presets.registry import EMBEDDED_FOLDER

PROMPT = "The state of our union is"
NEW_TOKENS = 40
POSITIONS = 300  # the embedded model's window is 128
F32 = 0  # of ggml_type
# Largest difference of logits over their range. On the CPU llama.cpp looks GELU up in a table of float16 values
# (`ggml_table_gelu_f16`), which is what is left with float32 weights; it also rounds activations to the type of the matrix,
# or to 8 bits where that is quantized.
TOLERANCES = {"F32": 1e-3, "F16": 2e-3, "BF16": 2e-2, "Q8_0": 5e-2, "Q4_0": 1e-1}


class Model(llama_cpp.LlamaModel):
    """With the attribute that cyllama 0.2.18's `get_logits` looks for in vain."""

    @property
    def n_vocab(self):
        return self.get_vocab().n_vocab


class LlamaCpp:
    """A model in llama.cpp, one token at a time, in float32 where it lets one choose."""

    def __init__(self, path):
        parameters = llama_cpp.LlamaModelParams()
        parameters.n_gpu_layers = 0
        self.model = Model(path, parameters)
        self.vocabulary = self.model.get_vocab()
        options = llama_cpp.LlamaContextParams()
        options.n_ctx = options.n_batch = 512
        options.type_k = options.type_v = F32  # its cache is float16 by default
        options.flash_attn_type = 0  # flash attention would round queries to float16
        self.context = llama_cpp.LlamaContext(self.model, options)
        self.position = 0

    def logits(self, token_id):
        """float32 [V] after one more token."""
        batch = llama_cpp.LlamaBatch(n_tokens=1, embd=0, n_seq_max=1)
        batch.add(token_id, self.position, [0], True)
        self.context.decode(batch)
        self.position += 1
        return np.array(self.context.get_logits(), dtype="float32")

    def tokenize(self, text):
        return list(self.vocabulary.tokenize(text, False, True)) if text else []


def compare(folder, kind, tokens):
    """Prints and checks one type; tokens: as `write_gguf` takes them."""
    path = os.path.join(folder, f"{kind}.gguf")
    write_gguf(EMBEDDED_FOLDER, path, kind, tokens)
    lm = Gemma2CausalLM.from_preset(path, dtype="float32")
    tokenizer = lm.preprocessor.tokenizer
    text = np.random.default_rng(3).integers(200, 4096, POSITIONS)
    text[0] = 2
    peer = LlamaCpp(path)
    theirs = np.stack([peer.logits(int(token)) for token in text])
    ours = keras.ops.convert_to_numpy(lm({"token_ids": text[None], "padding_mask": np.ones((1, POSITIONS))}))[0]
    error = np.abs(ours - theirs).max() / np.ptp(ours)
    agreement = (ours.argmax(-1) == theirs.argmax(-1)).mean()
    print(
        f"{kind:5} logits differ by {error:.1e} of their range at {POSITIONS} positions; {agreement:.1%} same greatest", flush=True
    )
    assert error <= TOLERANCES[kind], kind
    prompt = [2, *map(int, tokenizer.tokenize(PROMPT))]
    continuation = greedy(LlamaCpp(path), prompt)
    generated = lm.generate(PROMPT, max_length=len(prompt) + NEW_TOKENS)
    same = tokenizer.detokenize(continuation) == generated.removeprefix(PROMPT)
    print(f"{'':5} greedy continuation {'equal' if same else 'DIFFERS'}: {tokenizer.detokenize(continuation)!r}")
    assert same or kind != "F32", generated
    # Spelled-out frame pieces are tokens to llama.cpp, as it is asked here, and plain text to this package.
    texts = [t for t in (*HARD_TEXTS, *random_texts(7, 300)) if not any(piece in t for piece in ("<bos>", "<eos>", "\0"))]
    different = [t for t in texts if peer.tokenize(t) != list(map(int, tokenizer.tokenize(t)))]
    print(f"{'':5} ids of {len(texts)} hard texts, vocabulary as {tokens}: {len(different)} differ")
    assert not different, different


def greedy(peer, prompt):
    logits = [peer.logits(token) for token in prompt][-1]
    token_ids = []
    while len(token_ids) < NEW_TOKENS:
        token_ids.append(int(logits.argmax()))
        if token_ids[-1] in (1, 107):
            return token_ids[:-1]
        logits = peer.logits(token_ids[-1])
    return token_ids


def compare_quantizations(folder):
    """Quantizes a random model with llama.cpp, and back to float32 with llama.cpp; our reader must agree with the latter."""
    hugging_face_model(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, head_dim=64, num_attention_heads=8
    ).save_pretrained(folder)
    start, quantized, back = (os.path.join(folder, f"{name}.gguf") for name in ("start", "quantized", "back"))
    write_gguf(folder, start, tokens=None)
    for kind in gguf.LlamaFileType:
        try:
            quantize(start, quantized, kind)
            quantize(quantized, back, gguf.LlamaFileType.ALL_F32)
        except RuntimeError:
            print(f"{kind.name:16} llama.cpp does not make without an importance matrix, or at all")
            continue
        with contextlib.ExitStack() as stack:
            try:
                ours, expected = (open_tensors(*source_and_config(path), stack)[0] for path in (quantized, back))
            except CheckpointError as error:
                print(f"{kind.name:16} is refused here: {error}")
                continue
            different = [n for n in expected if not np.array_equal(ours[n][:].astype("float32"), expected[n][:])]
        kinds = {gguf.GGMLQuantizationType(tensor.kind).name for tensor in read_header(quantized).tensors}
        print(f"{kind.name:16} holds {', '.join(sorted(kinds))}: {len(different)} of {len(expected)} tensors differ")
        assert not different, different


def quantize(source, target, kind):
    parameters = llama_cpp.LlamaModelQuantizeParams()
    parameters.ftype, parameters.allow_requantize = int(kind), True
    llama_cpp.model_quantize(source, target, parameters)


def source_and_config(path):
    source = read_source(path, path)
    return source, source.config


if __name__ == "__main__":
    llama_cpp.disable_logging()
    with tempfile.TemporaryDirectory() as folder:
        for kind, tokens in zip(TOLERANCES, ("spm", "tokenizer_config", "spm", "tokenizer_config", "spm")):
            compare(folder, kind, tokens)
        compare_quantizations(folder)
