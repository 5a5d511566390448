"""The tables of `benchmarks generate`: what a case's figures are called, and how they are derived from what was measured."""

from __future__ import annotations

from collections.abc import Callable

Row = dict[str, float]
Column = tuple[str, Callable[[Row], str]]

_LOAD: Column = ("load, s", lambda row: f"{row['load']:.2f}")
_MEMORY: tuple[Column, ...] = (
    ("peak growth over the imports, GB", lambda row: f"{row['total'] / 1e9:.2f}"),
    ("peak of the process, GB", lambda row: f"{row['process'] / 1e9:.2f}"),
)
_COLD: Column = ("first time, s", lambda row: f"{row['cold']:.2f}")

TITLES = {
    "decode": "Decode: {batch} x {context} tokens of prompt",
    "first_token": "First token of a 20-token prompt with room for 1024",
    "ragged": "8 prompts of 16, 32, 64, 128, 192, 256, 384 and 512 tokens, 64 new ones each",
    "prefill_4096": "Prefill of 4096 tokens, and one new token",
    "prefill_512": "Prefill of 512 tokens, and one new token",
    "cache": "Cache of one row at the whole context of 8192",
    "whole": "From a cold start: imports, loading, compiling, 16 tokens of prompt and 8 new ones",
}
# What makes a round the best: seconds, or bytes.
MAIN = {"decode": "token", "first_token": "first", "cache": "bytes", "whole": "wall"}
MAIN.update(dict.fromkeys(("ragged", "prefill_4096", "prefill_512"), "seconds"))
COLUMNS: dict[str, tuple[Column, ...]] = {
    "decode": (
        _LOAD,
        ("first token, first time, s", lambda row: f"{row['cold']:.2f}"),
        ("first token, s", lambda row: f"{row['first']:.3f}"),
        ("prefill, tokens/s", lambda row: f"{row['prefill']:.0f}"),
        ("decode, s/token", lambda row: f"{row['token']:.4f}"),
        ("tokens/s", lambda row: f"{row['batch'] / row['token']:.1f}"),
        ("weights read, GB/s", lambda row: f"{row['weights'] / row['token'] / 1e9:.1f}"),
        ("of the read rate", lambda row: f"{row['weights'] / row['token'] / row['read']:.0%}"),
        *_MEMORY,
    ),
    "first_token": (_COLD, ("then, s", lambda row: f"{row['first']:.3f}"), *_MEMORY),
    "ragged": (
        _COLD,
        ("then, s", lambda row: f"{row['seconds']:.2f}"),
        ("new tokens/s", lambda row: f"{row['rate']:.1f}"),
        *_MEMORY,
    ),
    "prefill_4096": (
        _COLD,
        ("then, s", lambda row: f"{row['seconds']:.2f}"),
        ("peak growth over the loaded model, GB", lambda row: f"{row['growth'] / 1e9:.2f}"),
        *_MEMORY,
    ),
    "prefill_512": (
        _COLD,
        ("then, s", lambda row: f"{row['seconds']:.3f}"),
        ("GFLOP/s", lambda row: f"{row['rate'] / 1e9:.0f}"),
        ("of the matrix product's", lambda row: f"{row['rate'] / row['product']:.0%}"),
        *_MEMORY,
    ),
    "cache": (
        ("bytes", lambda row: f"{row['bytes']:,.0f}"),
        ("full caches, bytes", lambda row: f"{row['full']:,.0f}"),
        ("share", lambda row: f"{row['bytes'] / row['full']:.2f}"),
    ),
    "whole": (
        ("cold start to the last token, s", lambda row: f"{row['wall']:.1f}"),
        _LOAD,
        ("generate, s", lambda row: f"{row['seconds']:.1f}"),
        *_MEMORY,
    ),
}


def header(case: str) -> str:
    """The first two lines of a case's table."""
    names = ["who", "backend", "dtype", *(name for name, _ in COLUMNS[case])]
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def line(case: str, who: str, backend: str, dtype: str, row: Row) -> str:
    """One row of a case's table."""
    return f"| {' | '.join([who, backend, dtype, *(text(row) for _, text in COLUMNS[case])])} |"
