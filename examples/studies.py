"""Repeat studies of the Gemma 2 report (arXiv 2408.00118) in small: each trains a few small models and writes a table and a plot.

    python examples/studies.py heads          grouped-query against multi-head attention
    python examples/studies.py depth          deep against wide
    python examples/studies.py caps           soft caps on and off
    python examples/studies.py window         perplexity against the inference window, of the embedded preset; trains nothing
    python examples/studies.py distillation   students of three sizes that learn from a teacher, against students of the text alone
    python examples/studies.py rate           which learning rate the others take, on one seed and on other text

Each writes `studies_NAME.png` and its section of `README.md` into `--output`. A finished run is kept in `--runs`: a study that
was stopped goes on with what is missing, and studies share the runs that they have in common.

On CPUs PyTorch is the fastest backend for models this small, with one thread a process where others use the machine as well:
`KERAS_BACKEND=torch OMP_NUM_THREADS=1`.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import studies_report as report
import studies_runs as runs

import keras_gemma2

VOCABULARY_SIZE = 4096  # of the embedded preset
MEDIUM: dict[str, Any] = {
    "vocabulary_size": VOCABULARY_SIZE,
    "num_layers": 6,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 96,
    "intermediate_dim": 256,
    "head_dim": 24,
    "sliding_window_size": 32,
}
MULTI_HEAD = MEDIUM | {"num_key_value_heads": 4, "intermediate_dim": 224}  # the feed-forward pays for keys and values
WIDE = MEDIUM | {"num_layers": 2, "hidden_dim": 144, "intermediate_dim": 336, "head_dim": 36}
NO_CAPS = MEDIUM | {"attention_logit_soft_cap": None, "final_logit_soft_cap": None}
SMALL = MEDIUM | {"num_layers": 4, "hidden_dim": 48, "intermediate_dim": 128, "head_dim": 12}
LARGE = MEDIUM | {"hidden_dim": 128, "intermediate_dim": 352, "head_dim": 32}
RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2)
WINDOWS = (128, 96, 64, 32, 16, 8)
WINDOW_CONTEXT = 512  # what the embedded preset was trained on


class Arm(NamedTuple):
    """One side of a comparison: a name for the table, one for files, a configuration."""

    label: str
    name: str
    config: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two arms, and what the report says of the second against the first."""

    title: str
    arms: tuple[Arm, Arm]
    expects: str  # "better", "no worse"
    claim: str


COMPARISONS = {
    "heads": Comparison(
        "Grouped-query against multi-head attention, at equal parameters",
        (Arm("multi-head, 4 key/value heads", "multi_head", MULTI_HEAD), Arm("grouped-query, 2 key/value heads", "medium", MEDIUM)),
        "no worse",
        "The report's 9B has 50.3 with multi-head and 50.8 with grouped-query attention (mean of four benchmarks, more is better): "
        "few changes, and grouped-query attention is cheaper.",
    ),
    "depth": Comparison(
        "Deep against wide, at equal parameters",
        (Arm("wide, 2 layers of 144", "wide", WIDE), Arm("deep, 6 layers of 96", "medium", MEDIUM)),
        "better",
        "The report's 9B has 50.8 wide and 52.0 deep (mean of four benchmarks, more is better). Parameters are counted here with "
        "the embedding, of which a wide model has more and a deep one less.",
    ),
    "caps": Comparison(
        "Soft caps off and on",
        (Arm("no caps", "no_caps", NO_CAPS), Arm("caps of 50 (attention) and 30 (logits)", "medium", MEDIUM)),
        "no worse",
        "The report caps attention scores at 50 and logits at 30, and gives no figure for it: the caps should cost nothing.",
    ),
}


STUDENTS = (Arm("small", "small", SMALL), Arm("medium", "medium", MEDIUM), Arm("large", "large", LARGE))


# --- the studies ----------------------------------------------------------------------------------------------------------


def trained(
    args: argparse.Namespace, data: runs.Data, arm: Arm, seed: int, recipe: runs.Recipe, part: str = "test"
) -> dict[str, Any]:
    """The result of one training run from scratch, made now or kept from before."""
    settings = {"objective": "scratch", "config": arm.config, **dataclasses.asdict(recipe), "seed": seed, "part": part}

    def make() -> dict[str, Any]:
        lm = runs.train(arm.config, recipe, data, seed)
        return {"parameters": lm.count_params(), **runs.held_out(lm, data, part, recipe.context)}

    return runs.run_once(args.runs, f"{arm.name}-seed{seed}", settings | {"data": data.digest}, make)


def compare(args: argparse.Namespace, name: str) -> None:
    """Trains both arms of a comparison on each seed."""
    study, recipe = COMPARISONS[name], args.recipe
    data = runs.load_data(recipe, args.corpus, args.cache)
    # Seed by seed, so that a study that is stopped early has both sides of what it has.
    results = [[trained(args, data, arm, seed, recipe) for arm in study.arms] for seed in args.seeds]
    arms = [report.ArmResult(arm.label, arm.config, column) for arm, column in zip(study.arms, zip(*results))]
    section = report.comparison_section(name, study.title, study.claim, study.expects, arms, recipe, args.seeds)
    report.write(args.output, name, section, report.comparison_plot(study.title, arms))


def rate(args: argparse.Namespace, name: str) -> None:
    """A quarter more steps than the others have, at several learning rates, one seed, judged on the dev documents."""
    results = {}
    for value in RATES:
        recipe = dataclasses.replace(args.recipe, steps=5 * args.recipe.steps // 4, learning_rate=value)
        data = runs.load_data(recipe, args.corpus, args.cache)
        arm = Arm("", f"medium-rate{value:g}", MEDIUM)
        results[value] = trained(args, data, arm, args.seeds[0], recipe, part="dev")
    section = report.rate_section(results, recipe, args.seeds[0], args.recipe.learning_rate)
    report.write(args.output, name, section, report.rate_plot(results))


def window(args: argparse.Namespace, name: str) -> None:
    """The embedded preset with other sliding windows than it was trained with."""
    data = runs.load_data(dataclasses.replace(args.recipe, steps=1), args.corpus, args.cache)
    teacher = keras_gemma2.Gemma2CausalLM.from_preset(runs.PRESET)
    trained_with = teacher.backbone.config.sliding_window_size
    results = {size: embedded(args, data, teacher, size, WINDOW_CONTEXT) for size in WINDOWS}
    section = report.window_section(results, trained_with, WINDOW_CONTEXT)
    report.write(args.output, name, section, report.window_plot(results, trained_with))


def embedded(args: argparse.Namespace, data: runs.Data, lm: Any, size: int, context: int) -> dict[str, Any]:
    """Held-out figures of the embedded preset with a sliding window of `size`, in rows of `context` tokens."""
    settings = {"preset": runs.PRESET, "window": size, "context": context, "part": "test", "data": data.held_out_digest}

    def make() -> dict[str, Any]:
        backbone = keras_gemma2.Gemma2Backbone(**lm.backbone.config.to_dict() | {"sliding_window_size": size})
        backbone.set_weights(lm.backbone.get_weights())
        return {"parameters": lm.count_params(), **runs.held_out(keras_gemma2.Gemma2CausalLM(backbone), data, "test", context)}

    return runs.run_once(args.runs, f"window{size}-context{context}", settings, make)


def distillation(args: argparse.Namespace, name: str) -> None:
    """Students of three sizes, from scratch and from the embedded preset's probabilities."""
    recipe = args.recipe
    data = runs.load_data(recipe, args.corpus, args.cache)
    teacher = keras_gemma2.Gemma2CausalLM.from_preset(runs.PRESET)
    figures = embedded(args, data, teacher, teacher.backbone.config.sliding_window_size, recipe.context)
    students, results = [arm for arm in STUDENTS if arm.name in args.sizes], []
    for seed in args.seeds:
        scratch = [trained(args, data, arm, seed, recipe) for arm in students]
        results.append(list(zip(scratch, [distilled(args, data, arm, seed) for arm in students])))
    pairs = []
    for arm, column in zip(students, zip(*results)):
        labels = (f"{arm.label}, from scratch", f"{arm.label}, distilled")
        pairs.append(tuple(report.ArmResult(label, arm.config, half) for label, half in zip(labels, zip(*column))))
    title = "Distilled against from-scratch students, at equal tokens"
    how = f"Distilled students learn the teacher's probabilities of its {runs.TOP_K} likeliest tokens at each place, recorded once."
    section = report.distillation_section(title, pairs, figures, how, recipe, args.seeds)
    report.write(args.output, name, section, report.distillation_plot(title, pairs, figures))


def distilled(args: argparse.Namespace, data: runs.Data, arm: Arm, seed: int) -> dict[str, Any]:
    """The result of one distillation, made now or kept from before."""
    recipe = args.recipe
    settings = {"objective": "distilled", "teacher": runs.PRESET, "top_k": runs.TOP_K, "config": arm.config}
    settings |= {**dataclasses.asdict(recipe), "seed": seed, "part": "test", "data": data.digest}
    folder = args.runs / f"teacher-{data.digest}"

    def make() -> dict[str, Any]:
        lm = runs.distill(arm.config, recipe, seed, folder)
        return {"parameters": lm.count_params(), **runs.held_out(lm, data, "test", recipe.context)}

    return runs.run_once(args.runs, f"{arm.name}-distilled-seed{seed}", settings, make, prepare=lambda: runs.record(data, folder))


STUDIES: dict[str, Callable[[argparse.Namespace, str], None]] = {
    **dict.fromkeys(COMPARISONS, compare),
    "window": window,
    "distillation": distillation,
    "rate": rate,
}


# --- the command line -----------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    recipe = runs.Recipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("study", choices=STUDIES, metavar="NAME", help=", ".join(STUDIES))
    add("--output", type=Path, default=Path("studies"), help="folder of README.md and plots (default: %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    sizes = [arm.name for arm in STUDENTS]
    add("--sizes", nargs="+", choices=sizes, default=sizes, help="of the students of `distillation` (default: all)")
    add("--steps", type=int, default=recipe.steps, help="training steps a run (default: %(default)s)")
    add("--batch-size", type=int, default=recipe.batch_size, help="rows a step (default: %(default)s)")
    add("--context", type=int, default=recipe.context, help="tokens a row (default: %(default)s)")
    add("--learning-rate", type=float, default=recipe.learning_rate, help="the peak (default: %(default)s)")
    add("--corpus", type=Path, help="folder of .txt files; default: that of pretrain_mini.py, fetched")
    cache = Path.home() / ".cache" / "keras_gemma2"
    add("--cache", type=Path, default=cache / "corpus", help="where the default corpus is kept (default: %(default)s)")
    add("--runs", type=Path, default=cache / "studies", help="where finished runs are kept (default: %(default)s)")
    args = parser.parse_args(arguments)
    for flag in ("steps", "batch_size", "context", "learning_rate"):
        if not getattr(args, flag) > 0:
            parser.error(f"--{flag.replace('_', '-')} must be over 0. Received: {getattr(args, flag)}.")
    if args.study not in ("window", "rate") and len(set(args.seeds)) < 2:
        parser.error(f"--seeds: one seed has no spread to judge a difference by; give two or more. Received: {args.seeds}.")
    if len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds: each may be given once. Received: {args.seeds}.")
    names = ("steps", "batch_size", "context", "learning_rate")
    args.recipe = dataclasses.replace(recipe, **{name: getattr(args, name) for name in names})
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    STUDIES[args.study](args, args.study)


if __name__ == "__main__":
    main()
