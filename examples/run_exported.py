"""Continues texts with an exported model, in the runtime it was exported for: neither Keras nor keras_gemma2 is needed.

    python examples/run_exported.py FOLDER "The state of our union is" --tokens 40

FOLDER is what `lm.export(FOLDER, format=...)` or `keras-gemma2 export PRESET FOLDER --format ...` wrote: "onnx" (pip install
onnxruntime), "openvino" (openvino), "litert" (ai-edge-litert), "stablehlo" (jax, safetensors) or "torch" (torch). Texts need
sentencepiece, too, and bfloat16 ml_dtypes. Each runtime is one function below: copy it together with `generate`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# (token_ids [B, T], starts [B], counts [B], caches) -> logits [B, V] as numpy, and the new caches, of whatever type.
Step = Callable[[np.ndarray, np.ndarray, np.ndarray, list[Any]], tuple[np.ndarray, list[Any]]]
PIECE = 64  # tokens of a prompt that run at a time


def generate(step: Step, about: dict[str, Any], prompts: list[list[int]], new_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest next tokens of each prompt `[B, n]`, and their logits `[B, n, V]`."""
    lengths = np.array([len(prompt) for prompt in prompts], "int32")
    piece = about.get("prefill_length", min(PIECE, about["max_sequence_length"]))
    room = about.get("cache_length", lengths.max() + new_tokens)
    most = min(room, about["max_sequence_length"])
    if new_tokens < 1 or lengths.min() < 1 or lengths.max() + new_tokens > most:
        raise ValueError(f"Prompts have {lengths.tolist()} tokens; with {new_tokens} more, at least one, they must fit in {most}.")
    if len(prompts) != about.get("batch_size", len(prompts)):
        raise ValueError(f"The program is for {about['batch_size']} prompts at a time. Received: {len(prompts)}.")
    caches = [empty(cache, len(prompts), room) for cache in about["caches"]]
    logits = np.zeros((len(prompts), about["vocabulary_size"]), "float32")
    for start in range(0, lengths.max(), piece):
        token_ids = np.array([(prompt[start : start + piece] + [0] * piece)[:piece] for prompt in prompts], "int32")
        counts = np.clip(lengths - start, 0, piece).astype("int32")
        found, caches = step(token_ids, np.full(len(prompts), start, "int32"), counts, caches)
        logits = np.where(counts[:, None] > 0, found, logits)
    tokens, seen = [], []
    for i in range(new_tokens):
        seen.append(logits)
        tokens.append(logits.argmax(-1).astype("int32"))
        if i + 1 < new_tokens:
            logits, caches = step(tokens[-1][:, None], lengths + i, np.ones_like(lengths), caches)
    return np.stack(tokens, 1), np.stack(seen, 1)


def empty(cache: dict[str, Any], batch: int, room: int) -> np.ndarray:
    """A cache with room for some tokens a row."""
    dtype = cache["dtype"]
    if dtype == "bfloat16":
        import ml_dtypes

        dtype = ml_dtypes.bfloat16
    return np.zeros((batch, cache["heads"], min(room + 1, cache["most_slots"]), cache["width"]), dtype)


# The runtimes -----------------------------------------------------------------------------------------------------------


def onnx(folder: Path, about: dict[str, Any]) -> Step:
    """ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=onnxruntime.get_available_providers())
    names = [entry.name for entry in session.get_inputs()]

    def step(token_ids, starts, counts, caches):
        logits, *caches = session.run(None, dict(zip(names, [token_ids, starts, counts, *caches])))
        return logits, caches

    return step


def openvino(folder: Path, about: dict[str, Any]) -> Step:
    """OpenVINO; its plugins compute in half precision where the processor has it, unless told otherwise."""
    from openvino import Core

    hints = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled = Core().compile_model(folder / "model.xml", "CPU", hints)

    def step(token_ids, starts, counts, caches):
        found = compiled([token_ids, starts, counts, *caches])
        logits, *caches = (np.array(found[output]) for output in compiled.outputs)
        return logits, caches

    return step


def litert(folder: Path, about: dict[str, Any]) -> Step:
    """LiteRT (TensorFlow Lite)."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(folder / "model.tflite"), num_threads=os.cpu_count())
    runners = {name: interpreter.get_signature_runner(name) for name in ("prefill", "decode")}
    names = [cache["name"] for cache in about["caches"]]

    def step(token_ids, starts, counts, caches):
        run = runners["decode" if token_ids.shape[1] == 1 else "prefill"]
        found = run(token_ids=token_ids, starts=starts, counts=counts, **dict(zip(names, caches)))
        return found["logits"], [found[f"new_{name}"] for name in names]

    return step


def stablehlo(folder: Path, about: dict[str, Any]) -> Step:
    """StableHLO, compiled by JAX for whatever device it has: once a piece, and once a step."""
    import jax
    from safetensors.numpy import load_file

    program = jax.export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
    run = jax.jit(program.call, donate_argnums=4)
    weights = jax.device_put(load_file(folder / "weights.safetensors"))

    def step(token_ids, starts, counts, caches):
        logits, caches = run(weights, token_ids, starts, counts, caches)
        return np.asarray(logits), caches

    return step


def torch(folder: Path, about: dict[str, Any]) -> Step:
    """PyTorch; the program writes to the caches it is given."""
    import torch

    module = torch.export.load(folder / "model.pt2").module()

    def step(token_ids, starts, counts, caches):
        if isinstance(caches[0], np.ndarray):
            dtypes = [getattr(torch, cache["dtype"]) for cache in about["caches"]]
            caches = [torch.zeros(cache.shape, dtype=dtype) for cache, dtype in zip(caches, dtypes)]
        with torch.no_grad():
            logits = module(*(torch.from_numpy(x) for x in (token_ids, starts, counts)), caches)
        return logits.numpy(), caches

    return step


RUNTIMES = {"onnx": onnx, "openvino": openvino, "litert": litert, "stablehlo": stablehlo, "torch": torch}


def load(folder: str | Path) -> tuple[Step, dict[str, Any]]:
    """The step of an exported model, and what its `export.json` says."""
    folder = Path(folder)
    about = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    return RUNTIMES[about["format"]](folder, about), about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=40, metavar="N", help="new tokens (default: %(default)s)")
    options = parser.parse_args()
    import sentencepiece

    vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(options.folder / "vocabulary.spm"))
    step, about = load(options.folder)
    prompt = [about["bos_token_id"], *vocabulary.encode(options.prompt)]
    prompts = [prompt] * about.get("batch_size", 1)
    tokens = generate(step, about, prompts, options.tokens)[0][0].tolist()
    stops = [i for i, token in enumerate(tokens) if token in about["stop_token_ids"]]
    print(options.prompt + vocabulary.decode([*prompt, *tokens[: stops[0] if stops else None]])[len(vocabulary.decode(prompt)) :])


if __name__ == "__main__":
    main()
