"""Speed and memory of generation, ours beside its peers', and beside what the machine allows.

A model of Gemma 2 2B's widths with random weights is written once; each contender loads it and runs each case in a process of its
own, one after the other, so that nothing else should be running. On a machine with a GPU the same command measures there
(keras-hub, transformers and ours); memory is the host's all the same.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from keras_gemma2.benchmarks import machine
from keras_gemma2.benchmarks.folder_to_gguf import TYPES, gguf_path, write_gguf
from keras_gemma2.benchmarks.generate_cases import CASES, Settings
from keras_gemma2.benchmarks.generate_child import CONTENDERS, measure
from keras_gemma2.benchmarks.generate_table import MAIN, TITLES, header, line
from keras_gemma2.benchmarks.load import write_random_folder
from keras_gemma2.benchmarks.processes import BACKENDS, NARROW, WIDTHS_2B, in_fresh_process
from keras_gemma2.config import Gemma2Config

PEERS = {  # what is imported, and what brings it
    "keras_hub": ("keras_hub", "keras-hub"),
    "transformers": ("transformers", "transformers"),
    "llama_cpp": ("cyllama", "cyllama gguf"),
}
FLOATS = ("float32", "bfloat16")
# Dtypes of each case unless `--dtype` says so; which contenders have what.
DTYPES = {"decode": tuple(TYPES), "cache": ("bfloat16",), "whole": ("bfloat16",)}
LAYERS_2B = 26
LIMITS, FOLDER = "limits", "folder"  # what a child does besides measuring a contender


def add_command(commands: Any) -> None:
    """Adds `generate` to the program's commands."""
    parser = commands.add_parser("generate", help="speed and memory of generation", description=__doc__)
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="may be repeated (default: all three)")
    parser.add_argument("--dtype", choices=tuple(TYPES), action="append", help="may be repeated (default: each case's own)")
    cases = "may be repeated (default: all that apply, without the minutes that a ragged batch takes keras-hub)"
    parser.add_argument("--case", choices=tuple(CASES), action="append", help=cases)
    parser.add_argument("--peers", default=",".join(PEERS), help="separated by commas, '' for none (default: %(default)s)")
    parser.add_argument("--ours", action=argparse.BooleanOptionalAction, default=True, help="measure this package")
    parser.add_argument("--layers", type=int, default=4, help=f"{LAYERS_2B} is the whole 2B (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="rows of the decode case (default: %(default)s)")
    parser.add_argument("--context", type=int, default=32, help="tokens of its prompts (default: %(default)s)")
    rounds = "on a machine with others on it, runs all in turn so often and prints each one's best (default: %(default)s)"
    parser.add_argument("--rounds", type=int, default=1, help=rounds)
    parser.add_argument("--folder", help="keep the random checkpoint here, or use the one that is here")
    parser.add_argument("--json", help="append what was measured to this file, a line each")
    parser.add_argument("--quick", action="store_true", help="a narrow model and short texts: tries the command, measures nothing")
    parser.add_argument("--child", choices=(*CONTENDERS, LIMITS, FOLDER), help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints a table for each case, a row for each contender."""
    if options.child:
        print(json.dumps(_child(options)))
        return
    peers = _installed(options.peers)
    with _checkpoint(options) as folder:
        limits = _limits(options)
        print(f"Gemma 2 2B's widths, {options.layers} layers, random weights; {_versions(peers)}")
        rates = f"{limits['read'] / 1e9:.1f} GB/s read, {limits['product'] / 1e9:.0f} GFLOP/s in float32 products"
        print(f"{machine.device_name()}: {rates}")
        for case in options.case or [name for name in CASES if name != "whole" or options.layers >= LAYERS_2B]:
            print(f"\n{TITLES[case].format(**vars(options))}\n\n{header(case)}", flush=True)
            contenders = list(_contenders(options, case, peers))
            for dtype in dict.fromkeys(dtype for *_, dtype in contenders):
                _print_rows(options, folder, case, [each for each in contenders if each[2] == dtype], limits)


def _contenders(options: argparse.Namespace, case: str, peers: list[str]) -> Iterator[tuple[str, str, str]]:
    """Who runs a case, on which backend, in which dtype: the rows that belong beside each other, one after the other."""
    gpu = machine.has_accelerator()
    if case == "cache":
        peers = []
    for dtype in options.dtype or DTYPES.get(case, FLOATS[:1]):
        for backend in options.backend or BACKENDS:
            if options.ours:
                yield "ours", backend, dtype
                if backend == "torch" and case == "decode" and shutil.which("g++"):
                    yield "ours_compiled", backend, dtype  # with `torch.compile`
            if "keras_hub" in peers and dtype in FLOATS and (case != "ragged" or options.case):
                yield "keras_hub", backend, dtype
        if "transformers" in peers and dtype in FLOATS:
            yield from ((who, "torch", dtype) for who in ("transformers", "transformers_static")[: 2 if gpu else 1])
        if "llama_cpp" in peers and not gpu:
            yield "llama_cpp", "", dtype


def _print_rows(
    options: argparse.Namespace, folder: str, case: str, contenders: list[tuple[str, str, str]], limits: dict[str, float]
) -> None:
    """Runs contenders in turn, as many rounds as asked for, and prints the best of each."""
    best: dict[tuple[str, str, str], dict[str, float]] = {}
    for last in [False] * (options.rounds - 1) + [True]:
        for contender in contenders:
            row = _measured(options, folder, case, *contender)
            if row and (contender not in best or row[MAIN[case]] < best[contender][MAIN[case]]):
                best[contender] = row
            if last and contender in best:
                print(line(case, *contender, {**limits, **best[contender]}), flush=True)
    if options.json:
        with open(options.json, "a", encoding="utf-8") as file:
            for (who, backend, dtype), row in best.items():
                file.write(json.dumps({"case": case, "who": who, "backend": backend, "dtype": dtype, **limits, **row}) + "\n")


def _measured(options: argparse.Namespace, folder: str, case: str, who: str, backend: str, dtype: str) -> dict[str, float] | None:
    """What one contender's process found; None, and a line that says why, if it failed."""
    if who == "llama_cpp":
        write_gguf(folder, dtype)
        _warm(gguf_path(folder, dtype))
    arguments = ["--child", who, "--case", case, "--dtype", dtype, *_shared(options), "--folder", folder]
    start = time.perf_counter()
    try:
        row = in_fresh_process("generate", backend or "torch", *arguments)
    except SystemExit as error:  # one contender's failure should not cost the others' figures
        print(f"| {who} | {backend} | {dtype} | failed: {str(error).strip().splitlines()[-1]} |", flush=True)
        return None
    return {**row, "wall": time.perf_counter() - start, "batch": options.batch}


def _child(options: argparse.Namespace) -> dict[str, float]:
    if options.child == FOLDER:
        write_random_folder(options.folder, options.layers, NARROW if options.quick else WIDTHS_2B)
        return {}
    if options.child == LIMITS:
        return machine.limits(1 << 20, 64) if options.quick else machine.limits()
    config = Gemma2Config(num_layers=options.layers, **(NARROW if options.quick else WIDTHS_2B))
    settings = Settings(config, options.batch, options.context, *((16, 1) if options.quick else ()))
    row = measure(options.child, options.case[0], options.folder, options.dtype[0], settings)
    if options.case[0] == "decode" and not machine.has_accelerator():  # a shared machine's rate changes from minute to minute
        row["read"] = machine.host_read_rate(*([1 << 20] if options.quick else []))
    return row


def _limits(options: argparse.Namespace) -> dict[str, float]:
    """The best that any of the backends, or numpy, reaches."""
    rows = [in_fresh_process("generate", b, "--child", LIMITS, *_shared(options)) for b in options.backend or BACKENDS]
    return {name: max(row[name] for row in rows) for name in rows[0]}


def _shared(options: argparse.Namespace) -> list[str]:
    numbers = [f"--{name}={getattr(options, name)}" for name in ("layers", "batch", "context")]
    return [*numbers, *(["--quick"] if options.quick else [])]


def _installed(names: str) -> list[str]:
    """The peers asked for that can be imported; says how to get the others."""
    asked = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := set(asked) - set(PEERS):
        raise SystemExit(f"--peers must be among {', '.join(PEERS)}, separated by commas. Received: {', '.join(sorted(unknown))}.")
    missing = [name for name in asked if importlib.util.find_spec(PEERS[name][0]) is None]
    for name in missing:
        print(f"{name} is skipped; to measure it, pip install {PEERS[name][1]}")
    return [name for name in asked if name not in missing]


def _versions(peers: list[str]) -> str:
    """The version of every package that is measured."""
    packages = ["keras", *(PEERS[name][1].split()[0] for name in peers)]
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)


@contextlib.contextmanager
def _checkpoint(options: argparse.Namespace) -> Iterator[str]:
    """The random checkpoint's folder, in the page cache."""
    place = None if options.folder else tempfile.mkdtemp(prefix="gemma2-generate-")
    folder = options.folder or os.path.join(place, "model")
    try:
        if not os.path.isdir(folder):
            in_fresh_process("generate", (options.backend or BACKENDS)[0], "--child", FOLDER, "--folder", folder, *_shared(options))
        for path in glob.glob(os.path.join(glob.escape(folder), "*")):
            _warm(path)
        yield folder
    finally:
        if place:
            shutil.rmtree(place)


def _warm(path: str) -> None:
    """Brings a file into the page cache."""
    with open(path, "rb") as file:
        while file.read(1 << 24):
            continue
