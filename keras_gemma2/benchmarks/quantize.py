"""Perplexity of the embedded preset with its weights in fewer and fewer bits, and the bytes that they take.

The text is the Gettysburg Address: of the preset's kind (speeches of presidents), and not in its training data. Perplexity is that
of the whole text after <bos>, each token from the true ones before it; bytes are those of all variables.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from keras_gemma2.benchmarks.processes import BACKENDS, in_fresh_process

# Name, and the arguments of `from_preset`.
KINDS: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "quantize": "int8"},
    "int4": {"dtype": "float32", "quantize": "int4"},
    "int8, rest bfloat16": {"dtype": "bfloat16", "quantize": "int8"},
    "int4, rest bfloat16": {"dtype": "bfloat16", "quantize": "int4"},
}


def add_command(commands: Any) -> None:
    """Adds `quantize` to the program's commands."""
    parser = commands.add_parser("quantize", help="what fewer bits cost the embedded preset", description=__doc__)
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="default: all three")
    parser.add_argument("--preset", default="gemma2_mini_en", help="another one, or a folder (default: %(default)s)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints a table with one row a kind of weights and one column a backend."""
    if options.child:
        print(json.dumps({name: measure(options.preset, arguments) for name, arguments in KINDS.items()}))
        return
    backends = options.backend or BACKENDS
    found = {backend: in_fresh_process("quantize", backend, "--child", "--preset", options.preset) for backend in backends}
    print(f"Perplexity a token of {options.preset}, and its change from float32's\n")
    print(f"| weights | MB | bits a weight | {' | '.join(backends)} |")
    print("|---" * (3 + len(backends)) + "|")
    for name in KINDS:
        row, plain = found[backends[0]][name], found[backends[0]]["float32"]
        cells = []
        for backend in backends:
            value, before = (found[backend][key]["perplexity"] for key in (name, "float32"))
            cells.append(f"{value:.3f}" + (f" ({100 * (value / before - 1):+.2f} %)" if name != "float32" else ""))
        print(f"| {name} | {row['bytes'] / 1e6:.2f} | {32 * row['bytes'] / plain['bytes']:.2f} | {' | '.join(cells)} |")


def measure(preset: str, arguments: dict[str, str]) -> dict[str, float]:
    """Loads the preset in this process.

    Args:
        preset: as `from_preset` takes it.
        arguments: of `from_preset`.

    Returns:
        `perplexity` a token, and `bytes` of the model's variables.
    """
    from keras_gemma2 import Gemma2CausalLM
    from keras_gemma2.presets.verify_known import TEXT
    from keras_gemma2.presets.verify_running import nats

    lm = Gemma2CausalLM.from_preset(preset, **arguments)
    tokenizer = lm.preprocessor.tokenizer
    perplexity = math.exp(nats(lm, [tokenizer.start_token_id, *(int(i) for i in tokenizer(TEXT))]).mean())
    return {"perplexity": perplexity, "bytes": float(sum(_bytes(variable) for variable in lm.backbone.weights))}


def _bytes(variable: Any) -> int:
    itemsize = {"int8": 1, "uint8": 1, "bfloat16": 2, "float16": 2}.get(variable.dtype, 4)
    return itemsize * math.prod(variable.shape)
