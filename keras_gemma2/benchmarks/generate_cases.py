"""What `benchmarks generate` measures of one model in one process: the cases, written once for every package.

A package is an `Engine`: a loaded model that continues prompts of token ids greedily. Times between two calls of different
length, divided by the difference, leave out what both have in common: the prompt, the call, the copies.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from keras_gemma2.benchmarks.machine import repeated, seconds
from keras_gemma2.benchmarks.processes import peak_bytes, reset_peak, resident_bytes
from keras_gemma2.config import Gemma2Config

RAGGED = (16, 32, 64, 128, 192, 256, 384, 512)
SETTLE = 16  # tokens of the prompt that is run before memory is measured: lazily mapped weights are read by then


class Engine(Protocol):
    """A loaded model of one of the packages."""

    weight_bytes: int  # of all weights as they are stored, the tied embedding counted once

    def generate(self, prompts: list[list[int]], new_tokens: int, room: int | None = None, stop: int | None = None) -> list[int]:
        """Continues prompts greedily, by exactly `new_tokens` each, or with `room` to that length, until `stop` comes.

        Returns:
            The first new token of each row.
        """

    def decode_runs(self, prompts: list[list[int]], few: int, many: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Two calls that differ by `many - few` decoded tokens and in nothing else."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a case is measured with.

    Args:
        config: of the model.
        batch: rows of the decode case.
        context: tokens of its prompts.
        shrink: every length is divided by it, for trying the benchmark out.
        repeats: calls that a median is taken of.
    """

    config: Gemma2Config
    batch: int = 1
    context: int = 32
    shrink: int = 1
    repeats: int = 3

    def prompts(self, *lengths: int) -> list[list[int]]:
        """Random token ids, seeded, of the given lengths."""
        draw = np.random.default_rng(sum(lengths))
        low, high = min(1000, self.config.vocabulary_size // 2), self.config.vocabulary_size
        return [draw.integers(low, high, self.shrunk(length)).tolist() for length in lengths]

    def shrunk(self, length: int) -> int:
        return max(2, length // self.shrink)


def decode(engine: Engine, settings: Settings) -> dict[str, float]:
    """First token and seconds a token: `cold`, `first`, `prefill` (tokens/s), `token`."""
    prompts = settings.prompts(*[settings.context] * settings.batch)
    few, many = (2, 4) if settings.shrink > 1 else (4, 20)
    cold = seconds(lambda: engine.generate(prompts, 1))
    first = repeated(lambda: engine.generate(prompts, 1), settings.repeats)
    short, long = engine.decode_runs(prompts, few, many)
    short(), long()
    token = statistics.median((seconds(long) - seconds(short)) / (many - few) for _ in range(settings.repeats))
    return {"cold": cold, "first": first, "prefill": sum(map(len, prompts)) / first, "token": token}


def first_token(engine: Engine, settings: Settings) -> dict[str, float]:
    """First token of 20, with room for 1024: `cold` and `first`."""
    prompts, room = settings.prompts(20), settings.shrunk(1024)
    (token,) = engine.generate(prompts, 1)
    cold = seconds(lambda: engine.generate(prompts, room - len(prompts[0]), room, stop=token))
    first = repeated(lambda: engine.generate(prompts, room - len(prompts[0]), room, stop=token), settings.repeats)
    return {"cold": cold, "first": first}


def ragged(engine: Engine, settings: Settings) -> dict[str, float]:
    """Eight prompts of 16 to 512 tokens, 64 new ones each: `cold`, `seconds` and `rate`, new tokens a second in all."""
    prompts, new = settings.prompts(*RAGGED), settings.shrunk(64)
    cold = seconds(lambda: engine.generate(prompts, new))
    # A peer's call takes minutes; what compilation costs is little beside that.
    again = cold if cold > 60 else repeated(lambda: engine.generate(prompts, new), 1)
    return {"cold": cold, "seconds": again, "rate": len(prompts) * new / again}


def long_prompt(engine: Engine, settings: Settings) -> dict[str, float]:
    """4096 tokens and one new: `cold`, `seconds`, and `growth` of resident memory over the settled model, bytes."""
    prompts = settings.prompts(4096)
    engine.generate(settings.prompts(SETTLE), 1)
    reset_peak()
    before = resident_bytes()
    cold = seconds(lambda: engine.generate(prompts, 1))
    again = cold if cold > 60 else seconds(lambda: engine.generate(prompts, 1))
    return {"cold": cold, "seconds": again, "growth": float(peak_bytes() - before)}


def prefill(engine: Engine, settings: Settings) -> dict[str, float]:
    """512 tokens and one new: `cold`, `seconds`, and `rate`, floating point operations a second that the model needs."""
    prompts = settings.prompts(512)
    cold = seconds(lambda: engine.generate(prompts, 1))
    again = repeated(lambda: engine.generate(prompts, 1), settings.repeats)
    return {"cold": cold, "seconds": again, "rate": prefill_operations(settings.config, len(prompts[0])) / again}


def whole(engine: Engine, settings: Settings) -> dict[str, float]:
    """16 tokens and 8 new, once, as a cold start has it: `seconds` after loading."""
    prompts = settings.prompts(16)
    return {"seconds": seconds(lambda: engine.generate(prompts, 8))}


def cache(engine: Any, settings: Settings) -> dict[str, float]:
    """Bytes of the cache at the whole context, batch 1, as allocated, against full caches: `bytes`, `full`; ours only."""
    config, length = settings.config, settings.shrunk(settings.config.max_sequence_length)
    held, itemsize = engine.cache_bytes(length)
    full = 2 * length * config.num_layers * config.num_key_value_heads * config.head_dim * itemsize
    return {"bytes": float(held), "full": float(full)}


def prefill_operations(config: Gemma2Config, length: int) -> int:
    """Multiplications and additions that a prompt needs: every kernel for each token, the logits of the last, attention
    to what a token may see (none of Gemma 2's windows is shorter than the prompts here)."""
    shapes = [shape for path, shape in config.weight_shapes().items() if len(shape) == 2 and "embedding" not in path]
    kernels = sum(rows * columns for rows, columns in shapes)
    pairs = length * (length + 1) // 2
    attention = 2 * config.num_layers * config.num_query_heads * config.head_dim * pairs
    return 2 * (kernels * length + config.vocabulary_size * config.hidden_dim + attention)


CASES: dict[str, Callable[[Any, Settings], dict[str, float]]] = {
    "decode": decode,
    "first_token": first_token,
    "ragged": ragged,
    "prefill_4096": long_prompt,
    "prefill_512": prefill,
    "cache": cache,
    "whole": whole,
}
