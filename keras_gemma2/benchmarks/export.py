"""The SavedModel against the model it was made of, and against keras-hub's export.

2B's widths with random weights. Decoding is greedy, one row, a prompt of 32 tokens; the time of a token is that of a call for many
less that of one for a single token, both models in one process and by turns. A load is `tf.saved_model.load` in a fresh process, a
read that of the same files into memory of another fresh process, by turns; both from the disk, and again, when the system may have
the files in memory. Before either, its process has the system get as much memory as it will need: a virtual machine's comes from
its host, which may take longer than reading and is neither's own time. Scores are those of 64 rows of 32 tokens; keras-hub's
SavedModel gives logits, of which the same is computed. Times are medians.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from keras_gemma2.benchmarks.machine import device_name, repeated, seconds
from keras_gemma2.benchmarks.processes import NARROW, WIDTHS_2B, in_fresh_process

PROMPT, ROWS, LENGTH, REPEATS, LOADS = 32, 64, 32, 5, 5
MAKING, DECODING, SCORING = ("make", "make_keras_hub"), ("decode",), ("score", "score_keras_hub")
STEPS = (*MAKING, *("read_disk", "load_disk") * LOADS, *("read", "load") * LOADS, *DECODING, *SCORING)


def add_command(commands: Any) -> None:
    """Adds `export` to the program's commands."""
    parser = commands.add_parser("export", help="the SavedModel's speed and size, beside keras-hub's", description=__doc__)
    add = parser.add_argument
    add("--layers", type=int, default=4, metavar="N", help="default: %(default)s")
    add("--dtype", default="float32", help="default: %(default)s")
    add("--new-tokens", type=int, default=64, metavar="N", help="default: %(default)s")
    add("--no-peers", action="store_true", help="leave keras-hub out")
    add("--quick", action="store_true", help="narrow models, to see that it runs")
    add("--child", choices=sorted(set(STEPS)), help=argparse.SUPPRESS)
    add("--folder", help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints a table of what was found."""
    if options.child:
        print(json.dumps(_child(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        shared = ["--folder", folder, "--layers", str(options.layers), "--dtype", options.dtype]
        shared += ["--new-tokens", str(options.new_tokens), *(["--quick"] if options.quick else [])]
        found: dict[str, list[float]] = {}
        for step in STEPS:
            if not (options.no_peers and step.endswith("keras_hub")):
                for name, value in in_fresh_process("export", "tensorflow", "--child", step, *shared).items():
                    found.setdefault(name, []).append(value)
    widths = "Narrow layers" if options.quick else "Gemma 2 2B's widths"
    print(f"{widths}, {options.layers} layers, {options.dtype}; {device_name()}\n")
    print("\n".join(_table({name: statistics.median(values) for name, values in found.items()})))


def _table(found: dict[str, float]) -> list[str]:
    rows = [
        ("decoding, s a token", "saved_model", "`lm.generate` on tensorflow", "generate", 1, ".4f"),
        ("size, MB", "size", "its weights", "weights", 1e-6, ".1f"),
        ("loading from the disk, s", "load_disk", "reading its files", "read_disk", 1, ".2f"),
        ("loading again, s", "load", "reading its files again", "read", 1, ".2f"),
        ("scores of 64 texts, s", "score", "keras-hub's logits export", "score_keras_hub", 1, ".2f"),
        ("size, MB", "size", "keras-hub's export", "size_keras_hub", 1e-6, ".1f"),
    ]
    lines = ["| | SavedModel | beside | | ratio |", "|---|---|---|---|---|"]
    for what, ours, beside, theirs, unit, form in rows:
        if ours in found and theirs in found:
            values = f"{found[ours] * unit:{form}} | {beside} | {found[theirs] * unit:{form}}"
            lines.append(f"| {what} | {values} | {found[ours] / found[theirs]:.3f} |")
    lines.append(f"\nWriting it took {found['seconds']:.1f} s.")
    return lines


# In a process of its own ------------------------------------------------------------------------------------------------


def _child(options: argparse.Namespace) -> dict[str, float]:
    ours, theirs = (os.path.join(options.folder, name) for name in ("ours", "keras_hub"))
    steps: dict[str, Callable[[], dict[str, float]]] = {
        "make": lambda: _make(options, ours),
        "make_keras_hub": lambda: _make_keras_hub(options, theirs),
        "read_disk": lambda: {"read_disk": _reading(ours, True)},
        "load_disk": lambda: {"load_disk": _load(ours, True)[1]},
        "read": lambda: {"read": _reading(ours)},
        "load": lambda: {"load": _load(ours)[1]},
        "decode": lambda: _decoding(options, ours),
        "score": lambda: {"score": _scoring(ours)},
        "score_keras_hub": lambda: {"score_keras_hub": _scoring_keras_hub(theirs)},
    }
    return steps[options.child]()


def _numbers(options: argparse.Namespace) -> dict[str, Any]:
    return {**(NARROW if options.quick else WIDTHS_2B), "num_layers": options.layers, "dtype": options.dtype}


def _make(options: argparse.Namespace, folder: str) -> dict[str, float]:
    from keras_gemma2.from_preset import weights_bytes

    lm = _model(options)
    wrote = seconds(lambda: lm.export(folder, max_new_tokens=options.new_tokens, stop_token_ids=None, sampler="greedy"))
    return {"weights": float(weights_bytes(lm.backbone)), "size": _size(folder), "seconds": wrote}


def _model(options: argparse.Namespace) -> Any:
    from keras_gemma2 import Gemma2Backbone, Gemma2CausalLM

    return Gemma2CausalLM(Gemma2Backbone(**_numbers(options)), None)


def _make_keras_hub(options: argparse.Namespace, folder: str) -> dict[str, float]:
    import keras_hub

    from keras_gemma2.benchmarks.build import _keras_hub

    lm = keras_hub.models.GemmaCausalLM(_keras_hub()(**_numbers(options)), None)
    lm.export(folder, verbose=False)
    return {"size_keras_hub": _size(folder)}


def _size(folder: str) -> float:
    return float(sum(path.stat().st_size for path in _files(folder)))


def _files(folder: str) -> list[Path]:
    return [path for path in Path(folder).rglob("*") if path.is_file()]


def _reading(folder: str, from_disk: bool = False) -> float:
    with _ready(folder, from_disk):
        return seconds(lambda: [path.read_bytes() for path in _files(folder)])


def _load(folder: str, from_disk: bool = False) -> tuple[Any, float]:
    import keras

    from keras_gemma2.backend.tensorflow_graph import load

    keras.ops.zeros(1)  # TensorFlow's own start-up
    with _ready(folder, from_disk):
        start = time.perf_counter()
        return load(folder), time.perf_counter() - start


@contextlib.contextmanager
def _ready(folder: str, from_disk: bool) -> Iterator[None]:
    """A context in which the system has memory for a folder's files, and has forgotten them where they are to come from the disk.

    Both on Linux. Of the memory a page in each half MB stays taken: what is free in pieces of 2 MB goes back to the host at once.
    There is as much as the files are read to; what the system keeps of files comes in large pieces, which this would make rare.
    """
    size, piece = int(_size(folder)), 1 << 19
    if from_disk:
        os.sync()
        for path in _files(folder):
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if not hasattr(mmap, "MAP_POPULATE"):
        yield
        return
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE) as memory:
        for start in range(0, size - piece, piece):
            memory.madvise(mmap.MADV_DONTNEED, start + mmap.PAGESIZE, piece - mmap.PAGESIZE)
        yield


def _decoding(options: argparse.Namespace, folder: str) -> dict[str, float]:
    from keras import ops

    lm, (served, _) = _model(options), _load(folder)
    arrays, tensors = _inputs(1, PROMPT), _tensors(1, PROMPT)
    length = ops.convert_to_tensor(PROMPT + options.new_tokens, "int32")

    def saved_model(count: int) -> Any:
        if count > 1:
            return served.signatures["generate_tokens"](**tensors)
        return served.signatures["prefill"](**tensors, cache_length=length)

    def generate(count: int) -> Any:
        return lm.generate(arrays, max_new_tokens=count, stop_token_ids=None)

    found: dict[str, list[float]] = {"saved_model": [], "generate": []}
    for _ in range(REPEATS + 1):
        for name, write in (("saved_model", saved_model), ("generate", generate)):
            one, many = (seconds(functools.partial(write, count)) for count in (1, options.new_tokens))
            found[name].append((many - one) / (options.new_tokens - 1))
    return {name: statistics.median(times[1:]) for name, times in found.items()}  # the first compiled, or optimized


def _scoring(folder: str) -> float:
    served, inputs = _load(folder)[0], _tensors(ROWS, LENGTH)

    def score() -> Any:
        return served.signatures["score"](**inputs)

    score()
    return repeated(score, REPEATS)


def _scoring_keras_hub(folder: str) -> float:
    from keras import ops

    served, inputs = _load(folder)[0], _tensors(ROWS, LENGTH)

    def score() -> Any:
        logits = served.serve(inputs)[:, :-1]
        chosen = ops.take_along_axis(logits, inputs["token_ids"][:, 1:, None], axis=-1)[..., 0]
        return chosen - ops.logsumexp(logits, axis=-1)

    score()
    return repeated(score, REPEATS)


def _inputs(rows: int, length: int) -> dict[str, Any]:
    import numpy as np

    token_ids = np.random.default_rng(0).integers(3, 1000, (rows, length)).astype("int32")
    return {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}


def _tensors(rows: int, length: int) -> dict[str, Any]:
    from keras import ops

    return {name: ops.convert_to_tensor(array) for name, array in _inputs(rows, length).items()}
