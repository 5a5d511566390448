"""Tables, plots and plain sentences of `studies.py`. Every number comes from the results of the runs."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator, ScalarFormatter
except ImportError as error:
    raise SystemExit("studies.py draws with matplotlib, which is not installed: pip install matplotlib") from error

import numpy as np
from studies_runs import PRESET, Recipe, write_beside

import keras_gemma2

WIDTH, HEIGHT, DPI = 6.4, 3.4, 110
BLUE, ORANGE, GREY = "#2b6cb0", "#d9661f", "#8a8f99"
STYLE = {"font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
REPORTED = (1.63, 1.63, 1.64)  # perplexity of the 9B with the whole, half and a quarter of its window of 4096
FLAT = 0.01  # a rise of perplexity by less than this share is called none; the report's is 0.006

Result = dict[str, Any]


class ArmResult(NamedTuple):
    """One arm's results, a seed each."""

    label: str
    config: dict[str, Any]
    results: Sequence[Result]

    def values(self, figure: str) -> np.ndarray:
        return np.array([result[figure] for result in self.results], "float64")

    @property
    def blocks(self) -> int:
        """Parameters without the embedding."""
        return keras_gemma2.Gemma2Config(**self.config).parameter_count(embedding=False)


class Difference(NamedTuple):
    """Of the second arm's mean perplexity to the first's, beside the spread that seeds alone give it."""

    mean: float
    spread: float  # the standard deviation of the difference of two single runs

    @property
    def exceeds(self) -> bool:
        return abs(self.mean) > self.spread

    @classmethod
    def of(cls, first: ArmResult, second: ArmResult) -> Difference:
        a, b = first.values("perplexity"), second.values("perplexity")
        return cls(b.mean() - a.mean(), math.hypot(a.std(ddof=1), b.std(ddof=1)))

    def sentence(self) -> str:
        verb = "exceeds" if self.exceeds else "does not exceed"
        return f"The difference of {self.mean:+.2f} {verb} the seeds' spread of {self.spread:.2f}"


def spread(values: np.ndarray, digits: int) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"


def verdict(difference: Difference, expects: str) -> str:
    """For or against what the report leads one to expect of the second arm: "better", or "no worse"."""
    if not difference.exceeds:
        return "**for** the report" if expects == "no worse" else "**neither for nor against** the report"
    return "**for** the report" if difference.mean < 0 else "**against** the report"


# --- text -----------------------------------------------------------------------------------------------------------------


def table(heading: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def arms_table(arms: Sequence[ArmResult]) -> str:
    """A row an arm: sizes, held-out figures and cost."""
    heading = ("arm", "parameters", "without embedding", "perplexity per token", "bits per byte", "processor seconds a run")
    return table(
        heading,
        [
            (
                arm.label,
                f"{arm.results[0]['parameters']:,}",
                f"{arm.blocks:,}",
                spread(arm.values("perplexity"), 2),
                spread(arm.values("bits_per_byte"), 4),
                f"{arm.values('cpu_seconds').mean():.0f}",
            )
            for arm in arms
        ],
    )


def settings(recipe: Recipe, seeds: Sequence[int], results: Sequence[Result]) -> str:
    """How the runs were made, the same for all of them."""
    return (
        f"The same for all arms: {recipe.steps:,} steps of {recipe.batch_size} rows of {recipe.context} tokens ({recipe.tokens:,} "
        f"tokens, each row seen once), AdamW at {recipe.learning_rate:g} with warm-up and cosine decay, weight decay "
        f"{recipe.weight_decay:g}, clipping at {recipe.clipnorm:g}; seeds {', '.join(map(str, seeds))} draw the weights and the "
        f"order of the rows. The learning rate was chosen with the medium model (study `rate`), not for each arm. "
        f"Mean ± standard deviation over the seeds. {machine(results)}"
    )


def machine(results: Sequence[Result]) -> str:
    """What the results were computed on, and for how long."""
    processors = " and ".join(sorted({result["processor"] for result in results}))
    backends = " and ".join(sorted({result["backend"] for result in results}))
    seconds = sum(result["cpu_seconds"] for result in results)
    return f"Processor time in all: {seconds:,.0f} s of one core of {processors} ({backends})."


def section(name: str, title: str, *paragraphs: str) -> str:
    """A study's part of README.md: heading, command, plot and what else there is to say."""
    text = [part if part.startswith("|") else wrapped(part) for part in paragraphs]
    return "\n\n".join([f"### {title}", f"`python examples/studies.py {name}`", *text, f"![{title}](studies_{name}.png)"])


def wrapped(paragraph: str) -> str:
    """Lines as long as those of this repository's other files."""
    return textwrap.fill(paragraph, 132, break_long_words=False, break_on_hyphens=False)


def comparison_section(
    name: str, title: str, claim: str, expects: str, arms: Sequence[ArmResult], recipe: Recipe, seeds: Sequence[int]
) -> str:
    """Two arms and the verdict on them."""
    difference = Difference.of(*arms)
    figures = [spread(arm.values("perplexity"), 2) for arm in arms]
    seen = (
        f"{claim} Here, in perplexity of held-out text (less is better), {arms[0].label}: {figures[0]}; "
        f"{arms[1].label}: {figures[1]}. {difference.sentence()}: {verdict(difference, expects)}."
    )
    everything = [result for arm in arms for result in arm.results]
    return section(name, title, seen, arms_table(arms), settings(recipe, seeds, everything))


def distillation_section(
    title: str,
    pairs: Sequence[tuple[ArmResult, ArmResult]],
    teacher: Result,
    how: str,
    recipe: Recipe,
    seeds: Sequence[int],
) -> str:
    """Students from scratch beside distilled ones, a pair a size."""
    seen = [
        "The report's students of 200M, 400M and 1B have a perplexity of 23, 19 and 17 from scratch, and of 21, 17 and 15 "
        f"distilled. Here the teacher is `{PRESET}` ({teacher['parameters']:,} parameters, perplexity {teacher['perplexity']:.2f} "
        "in rows of the same length), trained on the same training documents for far longer, and never on the held-out ones."
    ]
    for scratch, distilled in pairs:
        difference = Difference.of(scratch, distilled)
        seen.append(
            f"{scratch.results[0]['parameters']:,} parameters: {spread(scratch.values('perplexity'), 2)} from scratch, "
            f"{spread(distilled.values('perplexity'), 2)} distilled. {difference.sentence()}: {verdict(difference, 'better')}."
        )
    arms = [arm for pair in pairs for arm in pair]
    everything = [result for arm in arms for result in arm.results]
    return section("distillation", title, " ".join(seen), arms_table(arms), how, settings(recipe, seeds, everything))


def rate_section(results: dict[float, Result], recipe: Recipe, seed: int, chosen: float) -> str:
    """Learning rates and the best of them."""
    best = min(results, key=lambda value: results[value]["perplexity"])
    rows = [(f"{value:g}", f"{result['perplexity']:.2f}", f"{result['bits_per_byte']:.4f}") for value, result in results.items()]
    seen = (
        f"The medium model for {recipe.steps} steps on seed {seed}, judged on the dev documents, which no other study looks at. "
        f"Best: {best:g}; the studies take {chosen:g} for all arms."
    )
    heading = ("peak learning rate", "dev perplexity", "dev bits per byte")
    return section("rate", "The learning rate", seen, table(heading, rows), machine(list(results.values())))


def window_section(results: dict[int, Result], trained: int, context: int) -> str:
    """Held-out perplexity of one model with several windows."""
    first = results[trained]
    shares = {size: result["perplexity"] / first["perplexity"] for size, result in results.items()}
    rows = []
    for size, result in results.items():
        change = document_changes(result, first)
        note = "as trained" if size == trained else f"{change.mean():+.2%} ± {change.std(ddof=1) if len(change) > 1 else 0:.2%}"
        rows.append((size, f"{result['perplexity']:.2f}", f"{result['bits_per_byte']:.4f}", note))
    seen = (
        "The report's 9B, trained with a window of 4096, has a perplexity of 1.63, 1.63 and 1.64 with windows of 4096, 2048 and "
        f"1024: nearly flat to a quarter. `{PRESET}` was trained with {trained}; nothing was trained for this study."
    )
    if trained // 4 in results:
        rise = shares[trained // 4] - 1
        side = "**for**" if rise < FLAT else "**against**"
        seen += (
            f" At a quarter, {trained // 4}, its perplexity changes by {rise:+.2%} "
            f"(the report's, of rounded figures: {REPORTED[-1] / REPORTED[0] - 1:+.2%}): {side} the report, if less than "
            f"{FLAT:.0%} is called flat. "
            f"It stays within {FLAT:.0%} down to a window of {min(size for size in shares if shares[size] - 1 < FLAT)}."
        )
    seen += f" Global layers see all tokens of a row of {context} in every case."
    count = len(first["nats_per_token"])
    heading = ("window", "perplexity per token", "bits per byte", "change, mean ± standard deviation over documents")
    where = f"Rows of {context} tokens, overlapping by half, {count} held-out documents. {machine(list(results.values()))}"
    return section("window", "Perplexity against the inference window", seen, table(heading, rows), where)


def document_changes(result: Result, first: Result) -> np.ndarray:
    """How the perplexity of each document differs from that in `first`, as a share."""
    names = list(first["nats_per_token"])
    return np.array([math.expm1(result["nats_per_token"][name] - first["nats_per_token"][name]) for name in names])


# --- plots ----------------------------------------------------------------------------------------------------------------


def png(draw: Any) -> bytes:
    """What `draw` puts on one pair of axes, as the bytes of a picture."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        draw(figure.subplots())
        content = io.BytesIO()
        figure.savefig(content, dpi=DPI, format="png")
    return content.getvalue()


def comparison_plot(title: str, arms: Sequence[ArmResult]) -> bytes:
    """Every seed's perplexity as a point, mean and standard deviation beside it."""

    def draw(axes: Any) -> None:
        for place, (arm, color) in enumerate(zip(arms, (GREY, BLUE))):
            values = arm.values("perplexity")
            axes.plot(np.full(len(values), place - 0.08), values, "o", color=color, alpha=0.6)
            axes.errorbar(place + 0.08, values.mean(), values.std(ddof=1), fmt="D", color=color, capsize=5)
            axes.annotate(spread(values, 2), (place + 0.16, values.mean()), va="center")
        axes.set(title=title, ylabel="held-out perplexity per token", xlim=(-0.5, len(arms) - 0.3))
        axes.set_xticks(range(len(arms)), [arm.label for arm in arms])
        axes.margins(y=0.25)
        axes.plot([], [], "o", color="black", alpha=0.6, label="each seed")
        axes.plot([], [], "D", color="black", label="mean ± standard deviation")
        axes.legend()

    return png(draw)


def distillation_plot(title: str, pairs: Sequence[tuple[ArmResult, ArmResult]], teacher: Result) -> bytes:
    """Perplexity against the students' size, with the seeds' spread."""

    def draw(axes: Any) -> None:
        sizes = [scratch.results[0]["parameters"] for scratch, _ in pairs]
        for arms, color, label in zip(zip(*pairs), (GREY, BLUE), ("from scratch", "distilled")):
            values = [arm.values("perplexity") for arm in arms]
            means, deviations = [v.mean() for v in values], [v.std(ddof=1) for v in values]
            axes.errorbar(sizes, means, deviations, fmt="o-", color=color, capsize=5, label=f"{label}, mean ± standard deviation")
            for size, points in zip(sizes, values):
                axes.plot(np.full(len(points), size), points, ".", color=color, alpha=0.5)
        axes.axhline(
            teacher["perplexity"], color=ORANGE, linestyle="--", label=f"the teacher, {teacher['parameters']:,} parameters"
        )
        axes.set(title=title, xlabel="parameters of the student", ylabel="held-out perplexity per token", xscale="log")
        ticks_at(axes, sizes, "{:,}")
        axes.legend()

    return png(draw)


def rate_plot(results: dict[float, Result]) -> bytes:
    """Dev perplexity against the learning rate."""

    def draw(axes: Any) -> None:
        axes.plot(list(results), [result["perplexity"] for result in results.values()], "o-", color=BLUE)
        axes.set(title="The learning rate", xlabel="peak learning rate", ylabel="dev perplexity per token", xscale="log")
        ticks_at(axes, results, "{:g}")

    return png(draw)


def window_plot(results: dict[int, Result], trained: int) -> bytes:
    """Perplexity against the window, and the report's, both as shares of that with the window trained with."""

    def draw(axes: Any) -> None:
        first = results[trained]
        sizes = list(results)
        changes = [document_changes(results[size], first) for size in sizes]
        for document in np.transpose(changes):
            axes.plot(sizes, 1 + document, color=GREY, alpha=0.35, linewidth=0.8)
        shares = [results[size]["perplexity"] / first["perplexity"] for size in sizes]
        axes.plot(sizes, shares, "o-", color=BLUE, label=f"{PRESET}: all documents")
        quarters = [trained, trained // 2, trained // 4]
        axes.plot(quarters, np.array(REPORTED) / REPORTED[0], "D--", color=ORANGE, label="report's 9B: 4096, 2048, 1024")
        axes.set(title="Perplexity against the inference window", xscale="log", xlabel=f"window (trained with {trained})")
        axes.set_ylabel("perplexity / perplexity as trained")
        ticks_at(axes, sizes, "{}")
        axes.plot([], [], color=GREY, label="one document")
        axes.legend()

    return png(draw)


def ticks_at(axes: Any, values: Any, form: str) -> None:
    """Marks these places of a logarithmic axis and no others."""
    axes.set_xticks(list(values), [form.format(value) for value in values])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ScalarFormatter())


# --- files ----------------------------------------------------------------------------------------------------------------


def write(folder: Path, name: str, text: str, picture: bytes) -> None:
    """Writes the plot, and the section into README.md between its marks, or at its end if it is not there."""
    write_beside(folder / f"studies_{name}.png", picture)
    readme = folder / "README.md"
    before = readme.read_text("utf-8") if readme.exists() else "# Studies of the Gemma 2 report, in small\n"
    begin, end = f"<!-- studies.py {name} -->", f"<!-- end of {name} -->"
    block = f"{begin}\n{text}\n{end}"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    after = pattern.sub(lambda _: block, before) if pattern.search(before) else f"{before.rstrip()}\n\n{block}\n"
    write_beside(readme, after)
    print(f"\n{text}\n\n{readme}, {folder / f'studies_{name}.png'}")
