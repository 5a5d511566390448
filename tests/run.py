"""Runs the whole suite on all three backends: `python tests/run.py`.

One line a backend at the end; fails if one fails or is not installed. A backend's files are shared out among `PARTS` processes, of
which two run at a time where there are cores for it: what they compiled stays in memory until they end.
Tests marked `backend_free`, whose result no backend changes, run with the first only. Arguments are handed to pytest;
`--backend NAME` (several times) picks backends, `--jobs 1` runs one after the other, as a small memory wants it.
"""

import argparse
import collections
import concurrent.futures
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
import typing
from pathlib import Path

BACKENDS = ("jax", "tensorflow", "torch")
TESTS = Path(__file__).resolve().parent
LINES_OF_FAILURES = 150
PARTS, NO_TESTS = 12, 5  # the second is pytest's exit code
HEADING = re.compile(r"=+ ([A-Za-z ]+?) =+$")
COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=BACKENDS, action="append")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))  # most of a run is one thread, compiling
    options, pytest_arguments = parser.parse_known_args()
    backends = options.backend or BACKENDS
    once = {name: [] if name == backends[0] else ["-m", "not backend_free"] for name in backends}
    named = any((TESTS / argument.partition("::")[0]).exists() for argument in pytest_arguments)
    part_names = ["0/1"] if named else [f"{i}/{PARTS}" for i in range(PARTS)]
    with tempfile.TemporaryDirectory() as exchange, concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        parts: dict[str, list] = {name: [] for name in backends}
        for part in part_names:
            for name in backends:
                parts[name].append(pool.submit(run_part, name, [*once[name], *pytest_arguments], exchange, part))
        results = [joined(name, [part.result() for part in parts[name]]) for name in backends]
    for result in results:  # once more, below everything: what failed is what a reader of a long log looks for
        print(*result.failures, sep="\n")
    for result in results:
        print(result.line)
    totals = [sum(result.counts[i] for result in results) for i in range(3)]
    print(f"tests: {totals[0]} passed, {totals[1]} failed, {totals[2]} skipped")
    return 1 if totals[1] or not totals[0] else 0


class Result(typing.NamedTuple):
    line: str
    counts: tuple[int, int, int]  # passed, failed, skipped
    failures: list[str]  # what pytest said of them, its last lines
    seconds: float


def joined(backend: str, parts: list[Result]) -> Result:
    """The result of a backend's parts."""
    failures = [line for part in parts for line in part.failures]
    passed, failed, skipped = (sum(part.counts[i] for part in parts) for i in range(3))
    seconds = sum(part.seconds for part in parts)
    verdict = "ok" if not failed else f"FAILED ({'; '.join(part.line for part in parts if part.line)})"
    line = f"{backend}: {verdict}, {passed} passed, {failed} failed, {skipped} skipped in {seconds:.0f} s of its processes"
    return Result(line, (passed, failed, skipped), failures, seconds)


def run_part(backend: str, pytest_arguments: list[str], exchange: str, part_name: str) -> Result:
    """Runs a part of a backend's files; a missing backend is a failure."""
    if importlib.util.find_spec(backend) is None:
        return Result(f"not installed (pip install {backend})", (0, 1, 0), [], 0.0)
    print(f"--- {backend}, part {part_name}", flush=True)
    start = time.monotonic()
    # From the tests' folder, so that what is imported is the installed package and not the folder beside.
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-rsfE", *pytest_arguments],
        cwd=TESTS,
        env={
            "JAX_COMPILATION_CACHE_DIR": os.path.join(exchange, "compiled"),  # what one part compiled is there for the next
            **os.environ,
            "KERAS_BACKEND": backend,
            "KERAS_GEMMA2_EXCHANGE": exchange,
            "KERAS_GEMMA2_PART": part_name,
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    last, failures, part = "", collections.deque(maxlen=LINES_OF_FAILURES), ""
    for output in process.stdout:
        print(f"{backend}: {output}", end="", flush=True)
        last = output if COUNT.search(output) else last
        heading = HEADING.match(output)
        part = heading[1] if heading else part
        if part in ("FAILURES", "ERRORS") or output.startswith(("FAILED ", "ERROR ")):
            failures.append(f"{backend}: {output.rstrip()}")
    code = process.wait()
    counts = {kind.removesuffix("s"): int(number) for number, kind in COUNT.findall(last)}
    failed = counts.get("failed", 0) + counts.get("error", 0)
    passed, skipped = counts.get("passed", 0), counts.get("skipped", 0)
    if code not in (0, NO_TESTS) and not failed:  # a crash
        failed = 1
    line = f"part {part_name}: pytest exit code {code}" if failed else ""
    return Result(line, (passed, failed, skipped), list(failures), time.monotonic() - start)


if __name__ == "__main__":
    sys.exit(main())
