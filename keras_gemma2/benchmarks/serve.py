"""`python -m keras_gemma2.benchmarks serve`: `keras-gemma2 serve` under one client and under many, and for long.

The server runs in a process of its own, the clients in this one, all on the same cores. Beside it, where transformers is
installed, one client of its `transformers serve` with the same model.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import importlib.util
import math
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from keras_gemma2.benchmarks.machine import device_name
from keras_gemma2.benchmarks.serve_client import Answer, stream, together

LENGTH, ALONE, EACH, SETTLED = 256, 6, 4, 200  # tokens of a request; requests of one client; of each of many; before memory is read
STARTING = 900.0  # seconds
WORDS = ("whale", "sea", "union", "states", "strong", "told", "Senate", "House", "captain", "ship", "law", "people", "night")


def add_command(commands: Any) -> None:
    """Adds `serve` to the program's commands."""
    parser = commands.add_parser("serve", help="the HTTP server under many clients")
    add = parser.add_argument
    add("--preset", default="gemma2_mini_en", help="default: %(default)s")
    add("--backend", default="jax", help="default: %(default)s")
    add("--clients", type=int, default=32, metavar="N", help="default: %(default)s")
    add("--new-tokens", type=int, default=64, metavar="N", help="default: %(default)s")
    add("--requests", type=int, default=2000, metavar="N", help="for how memory grows (default: %(default)s)")
    add("--no-peer", action="store_true", help="leave transformers' server out")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Prints the figures."""
    print(f"{options.preset} on {options.backend}, {device_name()}, answers of {options.new_tokens} tokens", flush=True)
    with _ours(options) as (address, process):
        before = _metric(address, "keras_gemma2_compiled_shapes")
        one, alone = together(address, _bodies(ALONE, options.new_tokens), 1)
        many, crowded = together(address, _bodies(options.clients * EACH, options.new_tokens), options.clients)
        print("\n".join(_table(options, _row(one, alone), _row(many, crowded))), flush=True)
        for line in _for_long(options, address, process.pid):
            print(line, flush=True)
        print(f"compiled sizes: {before} after the warm-up, {_metric(address, 'keras_gemma2_compiled_shapes')} at the end")
    if not options.no_peer and importlib.util.find_spec("transformers") is not None:
        print(_peer(options), flush=True)


def _bodies(count: int, new_tokens: int) -> list[dict[str, Any]]:
    """Requests that differ from their first word on: nothing of one is there for another."""

    def text(index: int) -> str:
        words = (WORDS[(index * 7 + place * (index % 5 + 1)) % len(WORDS)] for place in range(4 + index % 24))
        return f"{index} {' '.join(words)}"

    def body(index: int) -> dict[str, Any]:
        messages = [{"role": "user", "content": text(index)}]
        return {"messages": messages, "seed": index, "max_tokens": new_tokens, "temperature": 1.0}

    return [body(index) for index in range(count)]


def _row(answers: list[Answer], seconds: float) -> dict[str, float]:
    """Tokens a second, and in milliseconds how long the first token and the others took; the gaps are those of pieces of text."""
    good = [answer for answer in answers if answer.error is None]
    if not good:
        raise SystemExit(f"No request was answered. The first: {answers[0].error}")
    first = [1000 * (answer.pieces[0] - answer.asked) for answer in good if answer.pieces] or [0.0]
    gaps = [1000 * (b - a) for answer in good for a, b in zip(answer.pieces, answer.pieces[1:])] or [0.0]
    found = {"rate": sum(answer.tokens for answer in good) / seconds, "lost": len(answers) - len(good), "requests": len(answers)}
    for name, values in (("first", first), ("gap", gaps)):
        found |= {f"{name}50": statistics.median(values), f"{name}99": sorted(values)[math.ceil(0.99 * len(values)) - 1]}
    return found


def _table(options: argparse.Namespace, *rows: dict[str, float]) -> list[str]:
    lines = ["| clients | requests | lost | tokens/s | first token p50, p99, ms | gap p50, p99, ms |", "|---|---|---|---|---|---|"]
    for clients, row in zip((1, options.clients), rows):
        times = " | ".join(f"{row[name + '50']:.1f}, {row[name + '99']:.1f}" for name in ("first", "gap"))
        lines.append(f"| {clients} | {row['requests']} | {row['lost']} | {row['rate']:.0f} | {times} |")
    return [*lines, f"{options.clients} clients get {rows[1]['rate'] / rows[0]['rate']:.2f} times the tokens a second of one"]


def _for_long(options: argparse.Namespace, address: tuple[str, int], pid: int) -> Iterator[str]:
    """Requests of mixed lengths, and what the server's memory does meanwhile."""
    bodies = [{**body, "max_tokens": 1 + (index * 13) % 24} for index, body in enumerate(_bodies(options.requests, 1))]
    lost, seconds, sizes = 0, 0.0, []
    for start in range(0, len(bodies), SETTLED):
        answers, took = together(address, bodies[start : start + SETTLED], options.clients)
        lost, seconds = lost + sum(answer.error is not None for answer in answers), seconds + took
        sizes.append(_resident(pid))
    yield f"{len(bodies)} requests of 1 to 24 tokens in {seconds:.0f} s, {lost} lost"
    mb = ", ".join(f"{size / 1e6:.0f}" for size in sizes)
    yield f"the server's memory after each {SETTLED}, MB: {mb}; the most over the first: {max(sizes) / sizes[0]:.3f}"


def _resident(pid: int) -> int:
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _metric(address: tuple[str, int], name: str) -> int:
    connection = http.client.HTTPConnection(*address, timeout=60)
    connection.request("GET", "/metrics")
    found = re.search(rf"^{name} (\S+)$", connection.getresponse().read().decode(), re.M)
    connection.close()
    if found is None:
        raise SystemExit(f"The server has no metric {name}.")
    return int(float(found[1]))


# Servers ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _ours(options: argparse.Namespace) -> Iterator[tuple[tuple[str, int], subprocess.Popen]]:
    arguments = ["--preset", options.preset, "--backend", options.backend, "--max-batch", str(options.clients)]
    command = [sys.executable, "-m", "keras_gemma2", "serve", *arguments, "--max-length", str(LENGTH)]
    with _started(command, options.backend) as started:
        yield started


@contextlib.contextmanager
def _started(command: list[str], backend: str) -> Iterator[tuple[tuple[str, int], subprocess.Popen]]:
    """A server's process at a free port: its address and the process; it answers by then."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([*command, "--port", str(address[1])], env=environment, stderr=errors, stdout=errors)
        try:
            deadline = time.monotonic() + STARTING
            while not _is_up(address):
                if process.poll() is not None or time.monotonic() > deadline:
                    errors.seek(0)
                    raise SystemExit(f"{' '.join(command)} did not start:\n{errors.read()[-3000:]}")
                time.sleep(0.2)
            yield address, process
        finally:
            process.terminate()
            process.wait(60)


def _is_up(address: tuple[str, int]) -> bool:
    """Whether it says that it is ready, or, where it has no word for that, lists its models."""
    for path in ("/ready", "/v1/models"):
        connection = http.client.HTTPConnection(*address, timeout=60)
        try:
            connection.request("GET", path)
            status = connection.getresponse().status
        except OSError:
            return False
        finally:
            connection.close()
        if status != 404:
            return status == 200
    return False


def _peer(options: argparse.Namespace) -> str:
    """One client at a time against `transformers serve` with the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        written = os.path.join(folder, "model")
        command = [sys.executable, "-m", "keras_gemma2", "convert", options.preset, written, "--quiet"]
        subprocess.run(command, env={**os.environ, "KERAS_BACKEND": options.backend}, check=True, capture_output=True)
        program = "from transformers.cli.transformers import main; main()"
        serve = [sys.executable, "-c", program, "serve", written, "--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1"]
        with _started(serve, options.backend) as (address, _):
            bodies = [{**body, "model": written} for body in _bodies(ALONE + 1, options.new_tokens)]
            stream(address, bodies[0])
            row = _row(*together(address, bodies[1:], 1))
    times = f"first token {row['first50']:.1f} ms, gap {row['gap50']:.1f} ms (p50)"
    return f"transformers' server, one client: {row['rate']:.0f} tokens/s, {row['lost']} lost, {times}"
