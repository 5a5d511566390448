"""Feeds mutated checkpoints to the readers and counts what they do: `python tests/fuzz.py [--cases N] [--only FORMAT]`.

Each reader gets valid files (`fuzz_seeds`) that were damaged at random. It must read them or refuse them with a
`CheckpointError`: no other exception, no crash, no hang, and no more memory than the files have bytes. Cases run in a child
process, which may die or hang without ending the campaign; each is made from its number alone, so `--only FORMAT --first
NUMBER --cases 1` repeats it.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import tracemalloc
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

LARGEST_SLACK = 16 << 20  # bytes beyond those of the files: parsed JSON, one decoded block, what libraries keep
ADDRESS_SPACE = 2 << 30  # bytes beyond those in use before; an allocation of a size out of a header does not fit
TIME_LIMIT = 20  # seconds a case, after which it counts as hanging; they take milliseconds
EXTREMES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
JSON_VALUES = (
    None, True, False, 0, -1, 1, 3, 10**9, 2**31, 2**63, 10**30, 10**400, 0.5, 1e308, float("nan"), float("inf"), "", "x", "0",
    "../../x", "/etc/passwd", "..", "\0", "\ud800", "float16", [], [1], [[]], ["x", 1], {}, {"x": 1}, {"config": {}}, "a" * 5000,
)  # fmt: skip


# Mutations --------------------------------------------------------------------------------------------------------------


def mutate(files, draw):
    """A few of a checkpoint's files, damaged: {name: new content, or None for a file that is gone}."""
    changed = {}
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        name = draw.choice(_weighted(files))
        content = changed.get(name, files[name])
        if content is not None:
            changed[name] = _mutated(name, content, files, draw)
    return changed


def _weighted(files):
    """Small files as often as large ones, JSON three times as often; but not every file of a hundred chunks."""
    json_files = [name for name in files if name.endswith((".json", "_METADATA", ".zarray"))]
    return [*files, *json_files, *json_files]


def _mutated(name, content, files, draw):
    kind = draw.random()
    if kind < 0.03:
        return None
    if kind < 0.06:
        return files[draw.choice(list(files))]  # another file under this name
    if kind < 0.08:
        return b""
    if kind < 0.5:
        edited = _edited_json(name, content, draw)
        if edited is not None:
            return edited
    return _damaged(bytearray(content), draw)


def _edited_json(name, content, draw):
    """JSON with some values replaced, the header of safetensors included; None for a file without JSON."""
    is_safetensors = name.endswith(".safetensors") and len(content) > 8
    length = int.from_bytes(content[:8], "little") if is_safetensors else 0
    try:
        values = json.loads(content[8 : 8 + length] if is_safetensors else content)
    except (ValueError, RecursionError):
        return None
    for _ in range(draw.choice((1, 1, 2, 4))):
        values = _edited_value(values, draw)
    text = json.dumps(values)
    if draw.random() < 0.05:
        text = draw.choice((text.encode("utf-16").decode("latin-1"), "\ufeff" + text, "[" * 100_000, text[:-1] + ', "a": 1}'))
    data = text.encode("utf-8", "surrogatepass")
    if not is_safetensors:
        return data
    data += b" " * draw.choice((-len(data) % 8, 0))
    return len(data).to_bytes(8, "little") + data + content[8 + length :]


def _edited_value(values, draw):
    """One place in a tree of lists and dicts changed."""
    if not isinstance(values, (dict, list)) or not values or draw.random() < 0.1:
        return draw.choice(JSON_VALUES)
    values = values.copy()
    key = draw.choice(list(values)) if isinstance(values, dict) else draw.randrange(len(values))
    action = draw.random()
    if action < 0.1:
        del values[key]
    elif action < 0.2 and isinstance(values, dict):
        values[draw.choice((key + "x", "", "\ud800", "config", "dtype", "a" * 300))] = values.pop(key)
    elif action < 0.3:
        values[key] = values[draw.choice(list(values)) if isinstance(values, dict) else draw.randrange(len(values))]
    else:
        values[key] = _edited_value(values[key], draw)
    return values


def _damaged(data, draw):
    """Bytes changed, most of them where headers are: at the start, and for zip files at the end."""
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        if not data:
            data += b"\0"
        reach = min(len(data), draw.choice((64, 1000, 4000, 20_000, len(data))))
        at = draw.randrange(reach) if draw.random() < 0.75 else len(data) - 1 - draw.randrange(reach)
        action = draw.randrange(12)
        if action < 3:
            data[at] = draw.randrange(256)
        elif action < 5:
            data[at] ^= 1 << draw.randrange(8)
        elif action < 8:
            width = draw.choice((1, 2, 4, 8))
            number = draw.choice(EXTREMES) + draw.choice((0, 0, -1, 1, draw.randrange(1000)))
            data[at : at + width] = (number % (1 << 8 * width)).to_bytes(width, draw.choice(("little", "little", "big")))
        elif action == 8:
            data[at : at + draw.choice((1, 8, 64, 1000))] = b""
        elif action == 9:
            data[at:at] = draw.randbytes(draw.choice((1, 4, 8, 100)))
        elif action == 10:
            count, start = draw.choice((4, 8, 64, 512)), draw.randrange(len(data))
            data[at : at + count] = data[start : start + count]
        elif draw.random() < 0.5:
            data[at : at + draw.choice((8, 64, 1000))] = bytes([draw.choice((0, 0xFF))]) * draw.choice((8, 64, 1000))
        else:
            del data[draw.randrange(len(data)) :]
    return bytes(data)


# One case ---------------------------------------------------------------------------------------------------------------


def read_whole(folder):
    """All that loading reads, without a model."""
    import sentencepiece

    from keras_gemma2.checkpoints import reading

    source = reading.find_source("it", str(folder))
    with reading.open_weights(source) as entries:
        for entry in entries.values():
            for block in entry.row_blocks():
                reading.is_finite(block)
        reading.stored_dtype(entries)
    proto = reading.vocabulary(source)
    if proto:
        sentencepiece.SentencePieceProcessor(model_proto=proto).encode("the quick <bos> \n\n  ü", out_type=int)


class Case:
    """Runs mutated copies of one format's seed.

    Args:
        name: of the format.
        folder: with the seed; its files are changed and put back.
    """

    def __init__(self, name, folder):
        self.name, self.folder = name, Path(folder)
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        self.files = {str(path.relative_to(self.folder)): path.read_bytes() for path in paths}
        self.size = sum(map(len, self.files.values()))
        self.size_limit = self.size + LARGEST_SLACK

    def run(self, number):
        """What one mutated copy gave: "read", "refused", or a description of what must not happen."""
        changed = mutate(self.files, random.Random(f"{self.name} {number}"))
        try:
            for name, content in changed.items():
                if content is None:
                    (self.folder / name).unlink()
                else:
                    (self.folder / name).write_bytes(content)
            return self._outcome()
        finally:
            for name in changed:
                (self.folder / name).write_bytes(self.files[name])

    def _outcome(self):
        from keras_gemma2.errors import CheckpointError

        tracemalloc.start()
        before = _peak_resident(reset=True)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read_whole(self.folder)
            outcome = "read"
        except CheckpointError as error:
            outcome = "refused" if _is_clear(str(error), self.folder) else f"unclear message: {error}"
        except BaseException as error:  # panics of Rust libraries are no `Exception`
            outcome = f"{type(error).__module__}.{type(error).__name__}: {str(error)[:200]} at {_place(error)}"
        traced, resident = tracemalloc.get_traced_memory()[1], _peak_resident() - before
        tracemalloc.stop()
        if max(traced, resident) > self.size_limit:
            outcome = f"took {traced} bytes in Python, {resident} in all; the files have {self.size}. {outcome}"
        return outcome


def _is_clear(message, folder):
    """Names a place and is a sentence that a person can read."""
    return str(folder) in message and len(message) < 3000 and "\n" not in message


def _place(error):
    frames, found = error.__traceback__, ""
    while frames is not None:
        path = frames.tb_frame.f_code.co_filename
        found = f"{Path(path).name}:{frames.tb_lineno}" if "keras_gemma2" in path else found
        frames = frames.tb_next
    return found


def _peak_resident(reset=False):
    """Bytes; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) << 10
    return 0


# Campaigns --------------------------------------------------------------------------------------------------------------


def _child(folders, cases, first, pipe):
    """Runs cases one after another; says which before, and what came of it after."""
    formats = {name: Case(name, folder) for name, folder in folders.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for folder in folders.values():
            read_whole(folder)  # imports what the format needs
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + ADDRESS_SPACE, resource.RLIM_INFINITY))
    for i in range(first, len(cases)):
        pipe.send((i, None))
        name, number = cases[i]
        pipe.send((i, formats[name].run(number)))
    pipe.close()


def campaign(seeds, first, count, work_folder):
    """Runs as many cases of each format, in child processes.

    seeds: {format: folder of a valid checkpoint}.
    Returns {format: {outcome: numbers of the cases}}.
    """
    cases = [(name, number) for name in seeds for number in range(first, first + count)]
    outcomes = {name: {} for name in seeds}
    done = 0
    while done < len(cases):
        with tempfile.TemporaryDirectory(dir=work_folder) as work:
            folders = {name: shutil.copytree(seed, Path(work, name)) for name, seed in seeds.items()}
            done, failure = _run_until_it_fails(folders, cases, done, outcomes)
        if failure is not None:
            name, number = cases[done]
            outcomes[name].setdefault(failure, []).append(number)
            done += 1
    return outcomes


def _run_until_it_fails(folders, cases, done, outcomes):
    """Starts a child; returns how many cases are done then, and why the next one did not end (None if all are done)."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(folders, cases, done, send))
    process.start()
    send.close()
    started = False
    try:
        while done < len(cases):
            if not receive.poll(TIME_LIMIT if started else 120):
                return done, f"hangs: over {TIME_LIMIT} s"
            i, result = receive.recv()
            started = True
            if result is not None:
                name, number = cases[i]
                outcomes[name].setdefault(result, []).append(number)
                done = i + 1
    except EOFError:
        process.join()
        return done, f"the process died with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
    return done, None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=500, help="mutated checkpoints of each format")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", action="append", help="a format; several times for several")
    options = parser.parse_args()
    from fuzz_seeds import FORMATS, write_seed

    failures, tried = 0, 0
    print("| format | tried | read | refused | otherwise | seconds |\n|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as work:
        for name in options.only or FORMATS:
            seed, start = write_seed(name, Path(work, "seeds", name)), time.monotonic()
            outcomes = campaign({name: seed}, options.first, options.cases, work)[name]
            counts = {outcome: len(numbers) for outcome, numbers in outcomes.items()}
            good = [counts.pop("read", 0), counts.pop("refused", 0)]
            bad = sum(counts.values())
            tried, failures = tried + options.cases, failures + bad
            seconds = time.monotonic() - start
            print(f"| {name} | {options.cases} | {good[0]} | {good[1]} | {bad} | {seconds:.0f} |", flush=True)
            for outcome in counts:
                print(f"    {len(outcomes[outcome])} x {outcome} (case {outcomes[outcome][:3]})", file=sys.stderr, flush=True)
    print(f"{tried} mutated checkpoints, {failures} of them neither read nor refused")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
