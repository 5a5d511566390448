"""Draw what happens inside a Gemma 2 while it reads a text: attention, soft caps, norms, next-token probabilities.

    python examples/look_inside.py
    python examples/look_inside.py --preset FOLDER --file my.txt --output pictures --layers 0,1,6,7

The numbers come from the model's own layers, run one after the other; the result is compared with the whole model's.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

try:
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
except ImportError as error:
    raise SystemExit("look_inside.py draws with matplotlib, which is not installed: pip install matplotlib") from error

import numpy as np
from keras import ops

import keras_gemma2
from keras_gemma2 import backend
from keras_gemma2.layers import token_positions
from keras_gemma2.layers.numerics import soft_cap

# Lincoln's address at Gettysburg, 1863 (Bliss copy; public domain). The embedded preset was not trained on it, and it is
# long enough for the window of 128 tokens to hide most of it.
GETTYSBURG = """\
Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, and dedicated \
to the proposition that all men are created equal.

Now we are engaged in a great civil war, testing whether that nation, or any nation so conceived and so dedicated, can long \
endure. We are met on a great battle-field of that war. We have come to dedicate a portion of that field, as a final resting \
place for those who here gave their lives that that nation might live. It is altogether fitting and proper that we should do this.

But, in a larger sense, we can not dedicate -- we can not consecrate -- we can not hallow -- this ground. The brave men, living \
and dead, who struggled here, have consecrated it, far above our poor power to add or detract. The world will little note, nor \
long remember what we say here, but it can never forget what they did here. It is for us the living, rather, to be dedicated \
here to the unfinished work which they who fought here have thus far so nobly advanced. It is rather for us to be here dedicated \
to the great task remaining before us -- that from these honored dead we take increased devotion to that cause for which they \
gave the last full measure of devotion -- that we here highly resolve that these dead shall not have died in vain -- that this \
nation, under God, shall have a new birth of freedom -- and that government of the people, by the people, for the people, shall \
not perish from the earth."""

MAX_TOKENS = 512  # more would be finer than a picture's pixels
WIDTH, DPI = 9.0, 150  # inches; a README shows about 900 pixels
COLORS = {"local": "#2b6cb0", "global": "#d9661f"}
GREY, PALE = "#8a8a8a", "#e9e9ec"
STYLE = {"font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
NORMS = {
    "pre_attention_norm": "before attention",
    "post_attention_norm": "after attention",
    "pre_ffw_norm": "before feed-forward",
    "post_ffw_norm": "after feed-forward",
}


# --- collect --------------------------------------------------------------------------------------------------------------


class Capped(NamedTuple):
    """Values before and after a soft cap (None: the model has no such cap)."""

    before: np.ndarray
    after: np.ndarray
    cap: float | None


@dataclasses.dataclass(frozen=True)
class Inside:
    """One text's way through a model, as float32 arrays: T tokens, L layers, N query heads, D model, V vocabulary."""

    pieces: list[str]  # T
    layer_types: tuple[str, ...]  # L
    window: int
    attention: dict[int, np.ndarray]  # chosen layers: [N, T, T], each row a query
    by_distance: np.ndarray  # [L, T]: mean weight of the key so many tokens back, over heads and queries
    scores: Capped  # of every layer, visible query-key pairs only
    logits: Capped  # [T, V]
    rms: dict[str, np.ndarray]  # each norm's input and output: [L, 2, T]; of "final_norm": [1, 2, T]
    hidden: np.ndarray  # [T, D], after the final norm
    next_probabilities: np.ndarray  # [T - 1], given to the token that does come next
    top: list[tuple[str, float]]  # likeliest tokens after the text


def tokenize(lm: Any, text: str) -> list[int]:
    """`<bos>` and the ids of the text, cut where the model or the picture ends."""
    if lm.preprocessor is None:
        raise ValueError("The preset has no tokenizer, so the model cannot read text.")
    tokenizer = lm.preprocessor.tokenizer
    ids = [tokenizer.start_token_id, *(int(i) for i in tokenizer(text))]
    limit = min(MAX_TOKENS, lm.backbone.config.max_sequence_length)
    if len(ids) > limit:
        print(f"The text has {len(ids)} tokens; the first {limit} are drawn.")
    return ids[:limit]


def collect(lm: Any, text: str, layers: Sequence[int] | None = None) -> Inside:
    """Runs `text` through the layers of `lm` and keeps what the pictures show.

    Args:
        lm: a `Gemma2CausalLM` with a preprocessor.
        text: what the model reads.
        layers: whose attention to keep; None for the first local and the first global layer.

    Raises:
        ValueError: for a layer that the model has not, or a model without a tokenizer.
        RuntimeError: if the layers, run one by one, do not give what the model gives.
    """
    backbone, config = lm.backbone, lm.backbone.config
    layers = [config.layer_types.index(kind) for kind in COLORS if kind in config.layer_types] if layers is None else layers
    if wrong := [i for i in layers if i not in range(config.num_layers)]:
        raise ValueError(f"The model has the layers 0 to {config.num_layers - 1}. Received: --layers {wrong[0]}.")
    ids = tokenize(lm, text)
    inputs = {"token_ids": np.array([ids], "int32"), "padding_mask": np.ones((1, len(ids)), "int32")}
    attention, by_distance, scores, rms = {}, [], [], {}
    with backend.no_gradients():
        positions = token_positions(ops.convert_to_tensor(inputs["padding_mask"]))
        masks = {kind: mask(positions, inputs["padding_mask"]) for kind, mask in backbone.masks.items()}
        rotary = backbone.rotary_embedding(positions)
        x = backbone.token_embedding(ops.convert_to_tensor(inputs["token_ids"]))
        for i, (block, kind) in enumerate(zip(backbone.transformer_layers, config.layer_types, strict=True)):
            x, weights, pair = run_block(block, x, rotary, masks[kind], rms)
            by_distance.append([np.diagonal(weights, -d, 1, 2).mean() for d in range(len(ids))])
            scores.append(pair)
            if i in layers:
                attention[i] = weights
        hidden = through_norm(backbone.layer_norm, x, rms)
        check_equal("hidden states", hidden, backbone(inputs))
        logits = collect_logits(backbone.token_embedding, hidden)
    likelihoods = to_numpy(ops.log_softmax(logits.after))
    to_piece = lm.preprocessor.tokenizer.id_to_token
    return Inside(
        pieces=[to_piece(i) for i in ids],
        layer_types=config.layer_types,
        window=config.sliding_window_size,
        attention={i: attention[i] for i in layers},
        by_distance=np.array(by_distance),
        scores=Capped(*(np.concatenate(part) for part in zip(*scores, strict=True)), config.attention_logit_soft_cap),
        logits=logits,
        rms={name: np.array(values) for name, values in rms.items()},
        hidden=to_numpy(hidden)[0],
        next_probabilities=np.exp(likelihoods[np.arange(len(ids) - 1), ids[1:]]),
        top=[(to_piece(int(i)), float(np.exp(likelihoods[-1, i]))) for i in np.argsort(-likelihoods[-1])[:15]],
    )


def run_block(block: Any, x: Any, rotary: Any, mask: Any, rms: dict[str, list]) -> tuple[Any, np.ndarray, tuple]:
    """`DecoderBlock.call` step by step: the new stream, the attention `[N, T, T]`, the visible scores before and after the cap."""
    attention = block.attention
    queries, keys, values = attention._project(through_norm(block.pre_attention_norm, x, rms), *rotary)
    scores = attention._scores(queries, keys)
    capped = soft_cap(scores, attention.logit_soft_cap)
    weights = attention._masked_softmax(capped, mask)
    attended = attention.output_projection(attention._combine(weights, values))
    x = x + through_norm(block.post_attention_norm, attended, rms)  # no dropout: this is no training
    fed = block.feed_forward(through_norm(block.pre_ffw_norm, x, rms))
    x = x + through_norm(block.post_ffw_norm, fed, rms)
    heads = [to_numpy(array)[0].reshape(-1, *mask.shape[1:]) for array in (weights, scores, capped)]  # [K, G, ...] -> [N, ...]
    visible = ops.convert_to_numpy(mask)[0]  # a score that the mask hides has no effect, so it is no part of the statistics
    return x, heads[0], (heads[1][:, visible].ravel(), heads[2][:, visible].ravel())


def through_norm(norm: Any, x: Any, rms: dict[str, list]) -> Any:
    """Applies a norm, and notes each token's root mean square before and after it."""
    out = norm(x)
    rms.setdefault(norm.name, []).append([np.sqrt(np.mean(to_numpy(array)[0] ** 2, axis=-1)) for array in (x, out)])
    return out


def collect_logits(embedding: Any, hidden: Any) -> Capped:
    """The logits `[T, V]`; the embedding itself gives them only after the cap, so the product is repeated here."""
    table = ops.convert_to_tensor(embedding.embeddings, dtype=embedding.compute_dtype)
    before = backend.linear(ops.cast(hidden, embedding.compute_dtype), table, float32_output=True)
    after = soft_cap(before, embedding.logit_soft_cap)
    check_equal("logits", after, embedding(hidden, reverse=True))
    return Capped(to_numpy(before)[0], to_numpy(after)[0], embedding.logit_soft_cap)


def check_equal(name: str, ours: Any, theirs: Any) -> None:
    """Raises unless the recomputed values are the model's: pictures of something else would be worse than none."""
    # Half precision rounds each step, and a fused step less often; float32 differs in the last bits only.
    tolerance = 1e-4 if "float32" in str(theirs.dtype) else 0.05
    ours, theirs = to_numpy(ours), to_numpy(theirs)
    difference = np.abs(ours - theirs).max()
    if not difference <= tolerance * np.abs(theirs).max():
        raise RuntimeError(f"The {name} recomputed layer by layer differ from the model's by up to {difference:.3g}.")


def to_numpy(x: Any) -> np.ndarray:
    """float32, since numpy and matplotlib know no bfloat16."""
    return ops.convert_to_numpy(ops.cast(x, "float32"))


# --- draw -----------------------------------------------------------------------------------------------------------------


def draw_attention(inside: Inside, name: str) -> Figure:
    """A map of each chosen layer (mean over heads), and below, for all layers, the weight by distance."""
    rows = -(-len(inside.attention) // 2)
    figure = Figure((WIDTH, 4.0 * rows + 2.5), layout="constrained")
    grid = figure.add_gridspec(rows + 1, 2, height_ratios=[4.0] * rows + [2.1])
    norm, axes = LogNorm(1e-4, 1, clip=True), []
    for cell, (layer, weights) in zip(np.ndindex(rows, 2), inside.attention.items(), strict=False):
        axes.append(figure.add_subplot(grid[cell]))
        image = draw_map(axes[-1], weights.mean(0), norm, f"layer {layer}, {inside.layer_types[layer]}", inside)
    bar = figure.colorbar(image, ax=axes, label="attention weight (log scale)", extend="min", shrink=0.8, aspect=30)
    bar.outline.set_visible(False)
    draw_distances(figure.add_subplot(grid[-1, :]), inside)
    figure.suptitle(f"Who looks at whom: attention in {name}, mean over {len(weights)} heads")
    return figure


def draw_map(axes: Any, weights: np.ndarray, norm: LogNorm, title: str, inside: Inside) -> Any:
    """One layer's attention; pairs that the mask hides have the weight 0 and stay pale."""
    length, window, is_local = len(weights), inside.window, title.endswith("local")
    palette = matplotlib.colormaps["magma"].with_extremes(bad=PALE)
    image = axes.imshow(np.ma.masked_equal(weights, 0), palette, norm, interpolation="nearest")
    axes.set(xlabel="key: token looked at (position)", ylabel="query: token that looks (position)")
    axes.set_title(f"{title}: sees " + (f"the last {window} tokens" if is_local else "every earlier token"))
    if length > window:
        edge = np.array([window, length]) - 0.5
        axes.plot(edge - window, edge, color="black" if is_local else "white", linestyle=(0, (4, 3)), linewidth=1)
        axes.text(0.97, 0.95, f"dashed: {window} tokens back", ha="right", va="top", transform=axes.transAxes)
    return image


def draw_distances(axes: Any, inside: Inside) -> None:
    """The mean weight by distance, a line for each layer."""
    for kind, color in COLORS.items():
        layers = [i for i, layer_type in enumerate(inside.layer_types) if layer_type == kind]
        for shade, layer in zip(np.linspace(1.0, 0.35, len(layers)), layers, strict=True):
            line = np.ma.masked_equal(inside.by_distance[layer], 0)
            axes.plot(line, color=color, alpha=shade, linewidth=1.1, label=f"{layer} {kind}")
    if len(inside.pieces) > inside.window:
        axes.axvline(inside.window - 0.5, color=GREY, linestyle=(0, (4, 3)), linewidth=1)
    axes.set(yscale="log", xlabel="distance from query back to key (tokens)", ylabel="mean weight (log scale)")
    axes.set_title("Weight by distance, every layer: the local ones end at the window, the global ones go on")
    axes.legend(title="layer", ncols=2, fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.margins(x=0.01)


def draw_caps(inside: Inside, name: str) -> Figure:
    """Histograms of attention scores and final logits before and after their soft caps."""
    figure = Figure((WIDTH, 3.6), layout="constrained")
    panels = zip(figure.subplots(1, 2), (("attention scores", inside.scores), ("final logits", inside.logits)), strict=True)
    for axes, (what, values) in panels:
        reach = 1.08 * max(np.abs(values.before).max(), values.cap or 0)
        bins = np.linspace(-reach, reach, 121)
        axes.hist(values.before.ravel(), bins, color="#c9cdd6", label=f"before: {span(values.before)}")
        label = f"after: {span(values.after)}"
        axes.hist(values.after.ravel(), bins, histtype="step", color=COLORS["local"], linewidth=1.3, label=label)
        for sign in (-1, 1) if values.cap else ():
            axes.axvline(sign * values.cap, color="#c22f3d", linestyle="--", label=f"cap ±{values.cap:g}" if sign > 0 else None)
        axes.set(yscale="log", xlabel=f"{what[:-1].removeprefix('final ')} (no unit)", ylabel="count per bin (log scale)")
        axes.set_title(f"{values.before.size:,} {what}")
        axes.set_ylim(top=axes.get_ylim()[1] * 60)  # room for the legend
        axes.legend(fontsize=8, loc="upper center", ncols=1)
    figure.suptitle(f"What the soft caps do in {name}")
    return figure


def span(values: np.ndarray) -> str:
    """The range of values, for a legend."""
    return f"{values.min():.1f} to {values.max():.1f}".replace("-", "−")


def draw_norms(inside: Inside, name: str) -> Figure:
    """The residual stream along the depth, and below, what each of a layer's four norms makes of its input."""
    figure = Figure((WIDTH, 6.4), layout="constrained")
    grid = figure.add_gridspec(2, 4, height_ratios=[1, 1.15])
    draw_stream(figure.add_subplot(grid[0, :]), inside)
    first = None
    for column, (norm, title) in enumerate(NORMS.items()):
        first = axes = figure.add_subplot(grid[1, column], sharey=first)
        before, after = np.median(inside.rms[norm], axis=-1).T
        for layer, kind in enumerate(inside.layer_types):
            arrow = {"arrowstyle": "-|>", "color": COLORS[kind], "shrinkA": 0, "shrinkB": 0, "linewidth": 1.3}
            axes.annotate("", (layer, after[layer]), (layer, before[layer]), arrowprops=arrow)
        axes.scatter(range(len(before)), before, s=14, color=[COLORS[kind] for kind in inside.layer_types])
        axes.set(yscale="log", xlabel="layer", title=f"norm {title}")
        axes.tick_params(labelleft=column == 0)
        axes.grid(axis="y", color=PALE)
    figure.axes[1].set_ylabel("RMS, median token (log scale)")
    figure.suptitle(f"Size of the activations in {name} (root mean square over the channels of a token)")
    return figure


def draw_stream(axes: Any, inside: Inside) -> None:
    """The residual stream as it enters each attention and each feed-forward, and leaves the last layer."""
    entering = [inside.rms["pre_attention_norm"][:, 0], inside.rms["pre_ffw_norm"][:, 0]]
    stream = np.concatenate([np.stack(entering, 1).reshape(-1, len(inside.pieces)), inside.rms["final_norm"][0, :1]])
    depth = np.arange(len(stream)) / 2
    low, middle, high = np.percentile(stream, (5, 50, 95), axis=-1)
    axes.fill_between(depth, low, high, color="#c9cdd6", linewidth=0, label="5th to 95th percentile of the tokens")
    axes.plot(depth, middle, "o-", color="black", markersize=3.5, linewidth=1.2, label="median token")
    axes.plot(depth, stream[:, 0], "o:", color="#8b3fa0", markersize=3, linewidth=1, label=inside.pieces[0])
    axes.set(xlabel="layers passed (halves: after that layer's attention)", ylabel="RMS", title="Residual stream")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left", fontsize=8)


def draw_tokens(inside: Inside, name: str) -> Figure:
    """The text, each token colored by its probability; below, what comes next, and the surprise along the text."""
    columns, line_height = 124, 0.175  # characters; inches
    places = place(inside.pieces, columns)
    text_height = line_height * (places[-1][0] + 1)
    figure = Figure((WIDTH, text_height + 4.4), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[text_height + 0.9, 3.5])
    draw_text(upper, inside, places, columns)
    bars, line = lower.subplots(1, 2, width_ratios=[1, 1.7])
    draw_top(bars, inside)
    draw_surprise(line, inside)
    figure.suptitle(f"What {name} expects: the probability given to each token before it is read")
    return figure


def draw_text(figure: Any, inside: Inside, places: list[tuple[int, int]], columns: int) -> None:
    """The text on tiles; the first token is expected by nothing and stays pale."""
    axes, norm, palette = figure.subplots(), LogNorm(1e-4, 1, clip=True), matplotlib.colormaps["RdYlBu"]
    axes.set(xlim=(0, columns), ylim=(places[-1][0] + 1, 0))
    axes.axis("off")
    for (line, column), piece, probability in zip(places, inside.pieces, [None, *inside.next_probabilities], strict=True):
        shade = None if probability is None else float(norm(probability))
        color, is_dark = (PALE, False) if shade is None else (palette(shade), not 0.12 < shade < 0.88)
        axes.add_patch(Rectangle((column, line), len(piece), 0.9, color=color, linewidth=0))
        ink = {"color": "white" if is_dark else "black", "family": "monospace", "fontsize": 7.6}
        text = piece.replace("▁", " ").replace("\n", "⏎")
        axes.text(column, line + 0.46, text, va="center", parse_math=False, **ink)  # a "$" in the text is no formula
    label = "probability of the token, given all before it (log scale)"
    colors = ScalarMappable(norm, palette)
    figure.colorbar(colors, ax=axes, label=label, location="bottom", extend="min", aspect=60, shrink=0.6).outline.set_visible(False)


def place(pieces: list[str], columns: int) -> list[tuple[int, int]]:
    """Line and column of each piece; lines end where they are full, and where the text's do."""
    places, line, column = [], 0, 0
    for piece in pieces:
        if column and column + len(piece) > columns:
            line, column = line + 1, 0
        places.append((line, column))
        line, column = (line + 1, 0) if piece.endswith("\n") else (line, column + len(piece))
    return places


def draw_top(axes: Any, inside: Inside) -> None:
    """The likeliest next tokens as bars."""
    names = [piece.replace("▁", "␣").replace("\n", "⏎") for piece, _ in inside.top]
    values = 100 * np.array([probability for _, probability in inside.top])
    bars = axes.barh(range(len(values)), values, color=COLORS["local"])
    axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=7.5)
    axes.set_yticks(range(len(values)))
    axes.set_yticklabels(names, family="monospace", fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="probability (%)", title=f"After the text: the {len(values)} likeliest tokens (␣ is a space)")


def draw_surprise(axes: Any, inside: Inside) -> None:
    """Bits of surprise at each token, with a running mean."""
    bits = -np.log2(np.maximum(inside.next_probabilities, 1e-38))
    positions, width = np.arange(1, len(bits) + 1), min(32, len(bits))
    axes.plot(positions, bits, ".", color="#b4bac6", markersize=3.5, label="each token")
    mean = np.convolve(bits, np.ones(width) / width, mode="valid")
    axes.plot(positions[width - 1 :], mean, color=COLORS["global"], label=f"mean of the last {width}")
    guess = np.log2(inside.logits.before.shape[-1])
    axes.axhline(guess, color=GREY, linestyle="--", linewidth=1, label=f"a blind guess: {guess:.1f}")
    axes.set(xlabel="token (position)", ylabel="surprise: −log2 probability (bits)")
    axes.set(title=f"Surprise along the text: {bits.mean():.2f} bits a token", ylim=(0, 1.45 * max(guess, bits.max())))
    axes.legend(fontsize=8, ncols=3, loc="upper center", columnspacing=1, handlelength=1.4)


PICTURES = {"attention": draw_attention, "caps": draw_caps, "norms": draw_norms, "tokens": draw_tokens}


def draw(inside: Inside, folder: Path, name: str) -> list[Path]:
    """Writes the four pictures, each named `look_inside_*.png`, and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"look_inside_{picture}.png" for picture in PICTURES]
    with matplotlib.rc_context(STYLE):
        for path, draw_picture in zip(paths, PICTURES.values(), strict=True):
            draw_picture(inside, name).savefig(path, dpi=DPI)
    return paths


# --- command line ---------------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with the text read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gemma2_mini_en", help="built-in name or folder (default: %(default)s)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", help="what the model reads (default: Lincoln's Gettysburg Address)")
    source.add_argument("--file", type=Path, help="read the text from this UTF-8 file")
    parser.add_argument("--output", type=Path, default=Path("look_inside"), help="folder for the pictures (default: %(default)s)")
    parser.add_argument("--layers", help="whose attention to draw, as in 0,1 (default: the first local and the first global)")
    parser.add_argument("--dtype", help="float32, bfloat16, ... (default: what the preset says)")
    options = parser.parse_args(arguments)
    try:
        if options.file is not None:
            options.text = options.file.read_text(encoding="utf-8")
        options.layers = [int(layer) for layer in options.layers.split(",")] if options.layers else None
    except OSError as error:
        parser.error(f"--file {options.file}: {error.strerror}")
    except UnicodeDecodeError:
        parser.error(f"--file {options.file} is not UTF-8 text")
    except ValueError:
        parser.error(f"--layers takes numbers with commas between, as in 0,1; got {options.layers!r}")
    options.text = GETTYSBURG if options.text is None else options.text
    if not options.text.strip():
        parser.error("the text is empty; give at least one word")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    try:
        lm = keras_gemma2.Gemma2CausalLM.from_preset(options.preset, dtype=options.dtype)
        inside = collect(lm, options.text, options.layers)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"look_inside.py: {error}") from error
    for path in draw(inside, options.output, Path(options.preset).name):
        print(path)


if __name__ == "__main__":
    main()
