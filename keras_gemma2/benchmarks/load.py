"""Time and peak memory of loading bfloat16 safetensors into a model ready to generate, ours beside its peers'.

A Hugging Face folder with random weights, of Gemma 2 2B's widths, is written first; each loader then reads it in a fresh process,
warm: the files are in the page cache.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from keras_gemma2.benchmarks.processes import BACKENDS, WIDTHS_2B, in_fresh_process, peak_bytes, resident_bytes

LOADERS = ("ours", "keras_hub", "transformers")
MAKE_FOLDER = "make-folder"


def add_command(commands: Any) -> None:
    """Adds `load` to the program's commands."""
    parser = commands.add_parser("load", help="time and peak memory of loading safetensors", description=__doc__)
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="default: all three")
    parser.add_argument("--layers", type=int, default=4, help="26 is the whole 2B (default: %(default)s)")
    parser.add_argument("--dtype", help="load in another dtype than the stored bfloat16")
    parser.add_argument("--quantize", choices=("int8", "int4"), help="ours quantizes while it loads")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="measure the peers too")
    parser.add_argument("--export", action="store_true", help="ours also writes a Hugging Face folder, for the last column")
    parser.add_argument("--folder", help="keep the random checkpoint here, or use the one that is here")
    parser.add_argument("--child", choices=(*LOADERS, MAKE_FOLDER), help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints a table with one row a loader and backend."""
    if options.child == MAKE_FOLDER:
        write_random_folder(options.folder, options.layers)
        print("{}")
    elif options.child:
        print(json.dumps(measure(options.child, options.folder, options.dtype, options.export, options.quantize)))
    else:
        with _checkpoint(options) as folder:
            _warm(folder)
            _print_table(options, folder)


def _print_table(options: argparse.Namespace, folder: str) -> None:
    weights = sum(os.path.getsize(os.path.join(folder, n)) for n in os.listdir(folder) if n.endswith(".safetensors"))
    print(f"Gemma 2 2B's widths, {options.layers} layers: {weights / 1e9:.2f} GB of bfloat16 safetensors, warm\n")
    print("| loader | backend | seconds | peak growth, GB | peak growth / weights | first token after, s | process peak, GB |")
    print("|---|---|---|---|---|---|---|")
    for backend in options.backend or BACKENDS:
        peers = [who for who in LOADERS[1:] if who == "keras_hub" or backend == "torch"]
        for who in ("ours", *(peers if options.peer else ())):
            extra = [*(["--dtype", options.dtype] if options.dtype else []), *(["--export"] if options.export else [])]
            extra += ["--quantize", options.quantize] if options.quantize else []
            row = in_fresh_process("load", backend, "--child", who, "--folder", folder, *extra)
            first = f"{row['first_token']:.1f}" if row["first_token"] else ""
            print(
                f"| {who} | {backend} | {row['seconds']:.2f} | {row['peak'] / 1e9:.2f} | {row['peak'] / weights:.2f} | {first} "
                f"| {row['process'] / 1e9:.2f} |",
                flush=True,
            )


def _warm(folder: str) -> None:
    """Brings the files into the page cache."""
    for name in os.listdir(folder):
        with open(os.path.join(folder, name), "rb") as file:
            while file.read(1 << 24):
                continue


@contextlib.contextmanager
def _checkpoint(options: argparse.Namespace) -> Iterator[str]:
    if options.folder and os.path.isdir(options.folder):
        yield options.folder
        return
    folder = options.folder or tempfile.mkdtemp(prefix="gemma2-load-")
    try:
        in_fresh_process("load", "torch", "--child", MAKE_FOLDER, "--folder", folder, "--layers", str(options.layers))
        yield folder
    finally:
        if not options.folder:
            shutil.rmtree(folder)


def write_random_folder(folder: str, layers: int, widths: Mapping[str, int] = WIDTHS_2B) -> None:
    """Writes a Hugging Face folder with random bfloat16 weights, seeded, without a tokenizer.

    Args:
        folder: where to.
        layers: decoder blocks.
        widths: of `Gemma2Config`, by default 2B's.
    """
    from keras_gemma2.checkpoints import hf_writer
    from keras_gemma2.checkpoints.writing import OutgoingWeights, stored
    from keras_gemma2.config import Gemma2Config

    config = Gemma2Config(num_layers=layers, **widths)
    shapes = config.weight_shapes()
    generator = np.random.default_rng(0)

    def row_blocks(path: str) -> Iterator[np.ndarray]:
        shape = shapes[path]
        step = max(1, (1 << 22) // int(np.prod(shape[1:], dtype=int)))
        for start in range(0, shape[0], step):
            block = generator.standard_normal((min(step, shape[0] - start), *shape[1:]), np.float32)
            yield block / np.float32(np.sqrt(shape[-1]))

    os.makedirs(folder, exist_ok=True)
    weights = OutgoingWeights(config, stored("bfloat16"), row_blocks)
    hf_writer.write_folder(folder, weights, None, (), "5GB", None)


def measure(who: str, folder: str, dtype: str | None, export: bool = False, quantize: str | None = None) -> dict[str, float]:
    """Loads the folder in this process; ours then generates a token, and exports if asked to.

    Returns:
        `seconds` of loading, `peak` growth of resident memory over that after the imports, in bytes, `first_token`: seconds
        of the first token after loading, which includes compilation (ours only, else 0), and `process`: the highest resident
        memory of the process in all, imports included.
    """
    load = {"ours": _ours, "keras_hub": _keras_hub, "transformers": _transformers}[who]()
    before, start = resident_bytes(), time.perf_counter()
    model = load(folder, dtype, quantize) if who == "ours" else load(folder, dtype)
    seconds, peak = time.perf_counter() - start, peak_bytes() - before
    first_token = _first_token(model) if who == "ours" else 0.0
    if who == "ours" and export:
        with tempfile.TemporaryDirectory(dir=os.path.dirname(os.path.abspath(folder))) as target:
            model.export_to_transformers(os.path.join(target, "exported"))
    return {"seconds": seconds, "peak": float(peak), "first_token": first_token, "process": float(peak_bytes())}


def _first_token(lm: Any) -> float:
    start = time.perf_counter()
    ids = np.array([[2, 651, 2134, 603]])
    lm.generate({"token_ids": ids, "padding_mask": np.ones_like(ids)}, max_length=5, stop_token_ids=None)
    return time.perf_counter() - start


def _ours() -> Callable[..., Any]:
    import keras

    from keras_gemma2 import Gemma2CausalLM
    from keras_gemma2.checkpoints import hf, safetensors_file, weight_map
    from keras_gemma2.presets import load

    keras.ops.zeros(1)  # the backend's own start-up belongs to the imports, and so does what from_preset imports on first use
    del hf, safetensors_file, weight_map, load
    return lambda folder, dtype, quantize: Gemma2CausalLM.from_preset(folder, dtype=dtype, quantize=quantize, preprocessor=None)


def _keras_hub() -> Callable[[str, str | None], Any]:
    import keras
    import keras_hub

    keras.ops.zeros(1)
    return lambda folder, dtype: keras_hub.models.GemmaBackbone.from_preset(folder, dtype=dtype or "bfloat16")


def _transformers() -> Callable[[str, str | None], Any]:
    import transformers

    transformers.Gemma2ForCausalLM  # noqa: B018 - imported lazily
    return lambda folder, dtype: transformers.Gemma2ForCausalLM.from_pretrained(folder, dtype=dtype or "bfloat16")
