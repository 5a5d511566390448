"""Draw what happens inside a Gemma 2 while it reads a text: attention, soft caps, norms, next-token probabilities.

    python examples/look_inside.py
    python examples/look_inside.py --preset FOLDER --file my.txt --output pictures --layers 0,1,6,7

The numbers come from the model's own layers, run one after the other; the result is compared with the whole model's.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

try:
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import LogLocator, NullLocator
    from PIL import Image
except ImportError as error:
    raise SystemExit("look_inside.py draws with matplotlib, which is not installed: pip install matplotlib") from error

import numpy as np
from keras import ops

import keras_gemma2
from keras_gemma2 import backend
from keras_gemma2.layers import visible_pairs
from keras_gemma2.layers.numerics import soft_cap

# Lincoln's address at Gettysburg, 1863 (Bliss copy; public domain). The embedded preset was not trained on it, and it is
# three times as long as that preset's window.
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

MAX_TOKENS = 512  # a map of more would be finer than the picture's pixels
WIDTH, DPI = 9.0, 150  # inches; a README shows about 900 pixels
COLORS = {"local": "#2b6cb0", "global": "#d9661f"}
GREY, PALE, DASHED = "#c9cdd6", "#e9e9ec", {"linestyle": (0, (4, 3)), "linewidth": 1}
STYLE = {"font.size": 9, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False, "legend.fontsize": 8}
STYLE |= {"legend.frameon": False, "figure.constrained_layout.w_pad": 0.08, "figure.constrained_layout.h_pad": 0.06}
COLUMNS = 124  # characters a line in the picture of the text
NORMS = ("pre_attention_norm", "post_attention_norm", "pre_ffw_norm", "post_ffw_norm")


# --- collect --------------------------------------------------------------------------------------------------------------


class Capped(NamedTuple):
    """Values before and after a soft cap; a cap of None is none."""

    before: np.ndarray
    after: np.ndarray
    cap: float | None


@dataclasses.dataclass(frozen=True)
class Inside:
    """One text's way through a model, as float32 arrays: T tokens, L layers, N query heads, D model, V vocabulary."""

    pieces: list[str]  # T
    layer_types: tuple[str, ...]  # L
    window: int
    attention: dict[int, np.ndarray]  # of the chosen layers: [N, T queries, T keys]
    by_distance: np.ndarray  # [L, T]: weight of the key so many tokens back, mean over heads and queries
    scores: Capped  # of all layers and heads, for the pairs of query and key that the mask lets through
    logits: Capped  # [T, V]
    rms: dict[str, np.ndarray]  # a norm's input and output, root mean square over D: [L, 2, T]; "final_norm": [1, 2, T]
    hidden: np.ndarray  # [T, D], after the final norm
    next_probabilities: np.ndarray  # [T - 1]: what each token but the first was given before it was read
    top: list[tuple[str, float]]  # the likeliest tokens after the text


def tokenize(lm: Any, text: str) -> list[int]:
    """`<bos>` and the ids of the text, cut where the model's context or the picture ends."""
    if lm.preprocessor is None:
        raise ValueError("The preset has no tokenizer, so its model cannot read text.")
    tokenizer = lm.preprocessor.tokenizer
    ids = [tokenizer.start_token_id, *(int(i) for i in tokenizer(text))]
    limit = min(MAX_TOKENS, lm.backbone.config.max_sequence_length)
    if len(ids) > limit:
        print(f"The text has {len(ids)} tokens; the first {limit} are drawn.")
    return ids[:limit]


def collect(lm: Any, text: str, layers: Sequence[int] | None = None) -> Inside:
    """Runs a text through a `Gemma2CausalLM`, layer by layer, and keeps what the pictures show.

    `layers` are those whose attention is kept; None means the first local and the first global one. Raises ValueError for a
    layer that is not there, and RuntimeError if the layers, one by one, do not give what the model gives.
    """
    backbone, config = lm.backbone, lm.backbone.config
    layers = [config.layer_types.index(kind) for kind in COLORS if kind in config.layer_types] if layers is None else layers
    if wrong := sorted(set(layers) - set(range(config.num_layers))):
        raise ValueError(f"The model has the layers 0 to {config.num_layers - 1}. Received: --layers {wrong[0]}.")
    ids, to_piece = tokenize(lm, text), lm.preprocessor.tokenizer.id_to_token
    token_ids, padding_mask = ops.convert_to_tensor([ids], "int32"), ops.ones((1, len(ids)), "int32")
    attention, by_distance, scores, rms = {}, [], [], {}
    with backend.no_gradients():
        positions = backbone.token_positions(padding_mask)
        ranges = {kind: keys(padding_mask) for kind, keys in backbone.visible_keys.items()}
        masks = {kind: visible_pairs(first, index, index) for kind, (first, index) in ranges.items()}
        rotary, x = backbone.rotary_embedding(positions), backbone.token_embedding(token_ids)
        for i, block in enumerate(backbone.transformer_layers):
            x, weights, pair = run_block(block, x, rotary, masks[config.layer_types[i]], rms)
            by_distance.append([np.diagonal(weights, -distance, 1, 2).mean() for distance in range(len(ids))])
            scores.append(pair)
            attention |= {i: weights} if i in layers else {}
        hidden = through_norm(backbone.layer_norm, x, rms)
        check_equal("hidden states", hidden, backbone({"token_ids": token_ids, "padding_mask": padding_mask}))
        logits = collect_logits(backbone.token_embedding, hidden)
    probabilities = to_numpy(ops.softmax(logits.after))
    return Inside(
        [to_piece(i) for i in ids],
        config.layer_types,
        config.sliding_window_size,
        {i: attention[i] for i in layers},
        np.array(by_distance),
        Capped(*(np.concatenate(part) for part in zip(*scores, strict=True)), config.attention_logit_soft_cap),
        logits,
        {name: np.array(values) for name, values in rms.items()},
        to_numpy(hidden)[0],
        probabilities[np.arange(len(ids) - 1), ids[1:]],
        [(to_piece(int(i)), float(probabilities[-1, i])) for i in np.argsort(-probabilities[-1])[:15]],
    )


def run_block(block: Any, x: Any, rotary: Any, mask: Any, rms: dict[str, list]) -> tuple[Any, np.ndarray, tuple]:
    """`DecoderBlock.call` in steps: the new stream, the weights `[N, T, T]`, the visible scores before and after the cap."""
    attention = block.attention
    queries, keys, values = attention._project(through_norm(block.pre_attention_norm, x, rms), *rotary)
    scores = attention._scores(queries, keys)
    capped = soft_cap(scores, attention.logit_soft_cap)
    weights = attention._masked_softmax(capped, mask)
    attended = attention.output_projection(attention._together(attention._combine(weights, values)))
    x = x + through_norm(block.post_attention_norm, attended, rms)
    x = x + through_norm(block.post_ffw_norm, block.feed_forward(through_norm(block.pre_ffw_norm, x, rms)), rms)
    weights, *pair = (to_numpy(array)[0].reshape(-1, *mask.shape[1:]) for array in (weights, scores, capped))  # K, G -> N
    visible = ops.convert_to_numpy(mask)[0]  # scores that the mask hides act on nothing, so they are no part of the statistics
    return x, weights, tuple(part[:, visible].ravel() for part in pair)


def through_norm(norm: Any, x: Any, rms: dict[str, list]) -> Any:
    """Applies a norm, and notes each token's root mean square before and after it."""
    out = norm(x)
    rms.setdefault(norm.name, []).append([np.sqrt(np.mean(to_numpy(array)[0] ** 2, axis=-1)) for array in (x, out)])
    return out


def collect_logits(embedding: Any, hidden: Any) -> Capped:
    """The logits `[T, V]`; the embedding itself gives them after the cap only, so its product is repeated here."""
    dtype = embedding.compute_dtype
    before = backend.linear(ops.cast(hidden, dtype), embedding.embeddings, dtype, float32_output=True)
    after = soft_cap(before, embedding.logit_soft_cap)
    check_equal("logits", after, embedding(hidden, reverse=True))
    return Capped(to_numpy(before)[0], to_numpy(after)[0], embedding.logit_soft_cap)


def check_equal(name: str, ours: Any, theirs: Any) -> None:
    """Raises unless the recomputed values are the model's: pictures of something else would be worse than none."""
    tolerance = 1e-4 if "float32" in str(theirs.dtype) else 0.05  # half precision rounds differently in each fused step
    ours, theirs = to_numpy(ours), to_numpy(theirs)
    difference = np.abs(ours - theirs).max()
    if not difference <= tolerance * np.abs(theirs).max():
        raise RuntimeError(f"The {name} recomputed layer by layer differ from the model's by up to {difference:.3g}.")


def to_numpy(x: Any) -> np.ndarray:
    """float32, since matplotlib knows no bfloat16."""
    return ops.convert_to_numpy(ops.cast(x, "float32"))


# --- draw -----------------------------------------------------------------------------------------------------------------


def draw_attention(inside: Inside, name: str) -> Figure:
    """A map of each chosen layer, mean over heads, and below the weight by distance in all layers."""
    columns = min(len(inside.attention), 2)
    rows = -(-len(inside.attention) // columns)
    figure = Figure((WIDTH, 4.1 * rows + 2.5), layout="constrained")
    grid = figure.add_gridspec(rows + 1, columns + 1, height_ratios=[4.1] * rows + [2.0], width_ratios=[1] * columns + [0.035])
    for cell, (layer, weights) in zip(np.ndindex(rows, columns), inside.attention.items(), strict=False):
        image = draw_map(figure.add_subplot(grid[cell]), weights.mean(0), inside, layer)
    figure.colorbar(image, cax=figure.add_subplot(grid[:-1, columns]), label="attention weight (log scale)", extend="min")
    draw_distances(figure.add_subplot(grid[-1, :]), inside)
    figure.suptitle(f"Attention inside {name}, mean over {len(weights)} heads")
    return figure


def draw_map(axes: Any, weights: np.ndarray, inside: Inside, layer: int) -> Any:
    """One layer's attention; pairs that the mask hides have the weight 0 and stay pale."""
    length, window, kind = len(weights), inside.window, inside.layer_types[layer]
    palette = matplotlib.colormaps["magma"].resampled(20).with_extremes(bad=PALE)  # four steps a decade
    image = axes.imshow(np.ma.masked_equal(weights, 0), palette, LogNorm(1e-5, 1, clip=True), interpolation="nearest")
    reach = "every earlier token" if kind == "global" else f"the last {window} tokens"
    axes.set(xlabel="key: the token looked at (position)", title=f"layer {layer}, {kind}: may see {reach}")
    axes.set_ylabel("query: the token that looks (position)")
    if length > window:
        edge = np.array([window, length]) - 0.5
        axes.plot(edge - window, edge, color="black" if kind == "local" else "white", **DASHED)
        beyond = np.tril(weights, -window)[window:].sum(1).mean()
        note = f"dashed: {window} tokens back;\n{beyond:.0%} of the weight of the\nqueries from {window} on is beyond"
        axes.text(0.97, 0.96, note, ha="right", va="top", transform=axes.transAxes)
    return image


def draw_distances(axes: Any, inside: Inside) -> None:
    """The mean weight by distance: the layers of the maps bold, the others thin."""
    longest = max(len(inside.pieces) - 32, 1)  # fewer than 32 queries look farther back: a mean of those is mostly noise
    lines = {}
    for layer, kind in enumerate(inside.layer_types):
        chosen = layer in inside.attention
        earlier = sum(inside.layer_types[other] == kind for other in inside.attention if other < layer)
        bold = {"linewidth": 2.0, "linestyle": ("-", ":", "--", "-.")[earlier % 4], "zorder": 3}
        look = bold if chosen else {"linewidth": 0.8, "alpha": 0.55}
        line = np.ma.masked_equal(inside.by_distance[layer, :longest], 0)
        label = f"layer {layer}, {kind}" if chosen else f"other {kind} layers"
        lines[label] = axes.plot(line, color=COLORS[kind], **look)[0]
    if longest > inside.window:
        axes.axvline(inside.window - 0.5, color="black", **DASHED)
    axes.set(yscale="log", xlabel="distance back from query to key (tokens)", ylabel="mean weight (log scale)")
    axes.set_title("Weight by distance")
    labels = sorted(lines)  # the bold ones first
    axes.legend([lines[label] for label in labels], labels, ncols=2, loc="upper right")
    axes.margins(x=0.01)


def draw_caps(inside: Inside, name: str) -> Figure:
    """Histograms of attention scores and final logits before and after their soft caps."""
    figure = Figure((WIDTH, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_capped(left, inside.scores, "attention score", f"{inside.scores.after.size:,} visible pairs, all layers and heads")
    draw_capped(right, inside.logits, "final logit", "{:,} tokens × {:,} final logits".format(*inside.logits.after.shape))
    figure.suptitle(f"What the soft caps do inside {name}")
    return figure


def draw_capped(axes: Any, values: Capped, what: str, title: str) -> None:
    """One histogram over the other, on the same bins."""
    reach = 1.08 * max(np.abs(values.before).max(), values.cap or 0)
    bins = np.linspace(-reach, reach, 121)
    before, after = (f"{x.min():.1f} to {x.max():.1f}".replace("-", "−") for x in values[:2])
    axes.hist(values.before.ravel(), bins, color=GREY, label=f"before: {before}")
    axes.hist(values.after.ravel(), bins, histtype="step", color=COLORS["local"], linewidth=1.3, label=f"after: {after}")
    for sign in (-1, 1) if values.cap else ():
        axes.axvline(sign * values.cap, color="#c22f3d", linestyle="--", label=f"cap: ±{values.cap:g}" if sign > 0 else None)
    axes.set(yscale="log", xlabel=f"{what} (no unit)", ylabel="count per bin (log scale)", title=title)
    axes.set_ylim(0.5, axes.get_ylim()[1] * 60)  # room for the legend
    axes.legend(loc="upper center")


def draw_norms(inside: Inside, name: str) -> Figure:
    """The residual stream along the depth, and below, what each of a layer's four norms makes of its input."""
    figure = Figure((WIDTH, 6.4), layout="constrained")
    grid = figure.add_gridspec(2, 4, height_ratios=[1, 1.15])
    draw_stream(figure.add_subplot(grid[0, :]), inside)
    for column, norm in enumerate(NORMS):
        axes = figure.add_subplot(grid[1, column], sharey=figure.axes[1] if column else None)
        before, after = np.median(inside.rms[norm], axis=-1).T
        for kind, color in COLORS.items():
            layers = np.flatnonzero(np.array(inside.layer_types) == kind)
            axes.vlines(layers, before[layers], after[layers], color=color, linewidth=1.2, alpha=0.6)
            axes.plot(layers, before[layers], "o", color=color, mfc="white", ms=4.5, label=f"{kind}, before the norm")
            axes.plot(layers, after[layers], "o", color=color, ms=4.5, label=f"{kind}, after the norm")
        axes.set(xlabel="layer", ylabel="" if column else "RMS, median token (log scale)", title=norm)
        axes.tick_params(labelleft=column == 0)
        scale_rms(axes)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(f"Size of the activations inside {name}: root mean square (RMS) over the channels of a token")
    return figure


def draw_stream(axes: Any, inside: Inside) -> None:
    """The residual stream as it enters each attention and each feed-forward, and leaves the last layer."""
    entering = np.stack([inside.rms[norm][:, 0] for norm in ("pre_attention_norm", "pre_ffw_norm")], 1)
    stream = np.concatenate([entering.reshape(-1, len(inside.pieces)), inside.rms["final_norm"][0, :1]])
    depth, (low, middle, high) = np.arange(len(stream)) / 2, np.percentile(stream, (5, 50, 95), axis=-1)
    axes.fill_between(depth, low, high, color=GREY, linewidth=0, label="5th to 95th percentile of the tokens")
    axes.plot(depth, middle, "o-", color="black", markersize=3.5, linewidth=1.2, label="median token")
    axes.plot(depth, stream[:, 0], "o:", color="#8b3fa0", markersize=3, linewidth=1, label=inside.pieces[0])
    axes.set(xlabel="layers passed (half: attention passed, feed-forward not yet)", ylabel="RMS (log scale)")
    axes.set_title("Residual stream")
    axes.legend(loc="upper left")
    scale_rms(axes)


def scale_rms(axes: Any) -> None:
    """A log scale with plain numbers, and whole layers."""
    axes.set_yscale("log")
    axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_locator=NullLocator())
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color=PALE)


def draw_tokens(inside: Inside, name: str) -> Figure:
    """The text, each token on a tile colored by its probability; below, the tokens likeliest to come next."""
    places = place(inside.pieces)
    lines = places[-1][0] + 1
    figure = Figure((WIDTH, 0.175 * lines + 3.5), layout="constrained")
    text, bars = figure.subplots(2, 1, height_ratios=[0.175 * lines, 1.7])
    draw_text(text, inside, places)
    names = [readable(piece, "␣") for piece, _ in inside.top]
    values = 100 * np.array([probability for _, probability in inside.top])
    bars.bar_label(bars.bar(range(len(names)), values, color=COLORS["local"]), fmt="%.1f", padding=2, fontsize=8)
    tilt = {"rotation": 30, "ha": "right"} if max(map(len, names)) > 8 else {}
    bars.set_xticks(range(len(names)), names, family="monospace", fontsize=8, parse_math=False, **tilt)
    bars.set(ylabel="probability (%)", title=f"After the text: the {len(names)} likeliest next tokens (␣ is a space)")
    bars.margins(x=0.01, y=0.15)
    bits = -np.log2(np.maximum(inside.next_probabilities, 1e-38)).mean()
    figure.suptitle(f"What {name} expects: the probability of each token before it is read ({bits:.2f} bits a token)")
    return figure


def draw_text(axes: Any, inside: Inside, places: list[tuple[int, int]]) -> None:
    """The text on tiles; the first token, which nothing precedes, stays pale."""
    norm, palette = LogNorm(1e-4, 1, clip=True), matplotlib.colormaps["RdYlBu"].resampled(16)
    axes.set(xlim=(0, COLUMNS), ylim=(places[-1][0] + 1, 0))
    axes.axis("off")
    for (line, column), piece, probability in zip(places, inside.pieces, [None, *inside.next_probabilities], strict=True):
        shade = 0.5 if probability is None else float(norm(probability))
        color = PALE if probability is None else palette(shade)
        axes.add_patch(Rectangle((column, line), len(piece) - 0.12, 0.9, color=color, linewidth=0))
        ink = {"color": "black" if 0.12 < shade < 0.88 else "white", "family": "monospace", "fontsize": 7.6}
        axes.text(column, line + 0.46, readable(piece), va="center", parse_math=False, **ink)  # a "$" starts no formula here
    label = "probability of the token, given all before it (log scale): red surprises, blue is expected"
    place_of_bar = {"location": "bottom", "extend": "min", "aspect": 60, "shrink": 0.6, "pad": 0.02}
    axes.figure.colorbar(ScalarMappable(norm, palette), ax=axes, label=label, **place_of_bar)


def readable(piece: str, space: str = " ") -> str:
    """A piece with its spaces and line ends as characters that have a shape, and as many of them."""
    return piece.replace("▁", space).replace("\n", "¶").replace("\t", "→")


def place(pieces: list[str]) -> list[tuple[int, int]]:
    """Line and column of each piece; a line ends before a word that it has no room for, and where the text's ends."""
    places, line, column = [], 0, 0
    for i, piece in enumerate(pieces):
        rest = itertools.takewhile(lambda part: not part.startswith(("▁", "\n")), pieces[i + 1 :])
        word = len(piece) + (sum(map(len, rest)) if piece.startswith("▁") else 0)
        if column and column + min(word, COLUMNS) > COLUMNS:
            line, column = line + 1, 0
        places.append((line, column))
        line, column = (line + 1, 0) if piece.endswith("\n") else (line, column + len(piece))
    return places


PICTURES = {"attention": draw_attention, "caps": draw_caps, "norms": draw_norms, "tokens": draw_tokens}


def draw(inside: Inside, folder: Path, name: str) -> list[Path]:
    """Writes the four pictures, `look_inside_*.png`, and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"look_inside_{picture}.png" for picture in PICTURES]
    with matplotlib.rc_context(STYLE):
        for path, draw_picture in zip(paths, PICTURES.values(), strict=True):
            pixels = io.BytesIO()
            draw_picture(inside, name).savefig(pixels, format="png", dpi=DPI)
            # 256 colors are a third of the bytes, and look the same.
            Image.open(pixels).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    return paths


# --- command line ---------------------------------------------------------------------------------------------------------


def file_text(path: str) -> str:
    """The text of a file, for argparse."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"cannot read {path!r} as UTF-8 text: {error}") from error


def layer_list(numbers: str) -> list[int]:
    """Numbers with commas between, for argparse."""
    try:
        return [int(number) for number in numbers.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"takes numbers with commas between, as in 0,1; got {numbers!r}") from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line (`sys.argv` if None), runs the model and writes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", default="gemma2_mini_en", help="built-in name or folder (default: %(default)s)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", default=GETTYSBURG, help="what the model reads (default: Lincoln's Gettysburg Address)")
    source.add_argument("--file", dest="text", type=file_text, metavar="FILE", help="the same, from a UTF-8 file")
    add("--output", type=Path, default=Path("look_inside"), metavar="FOLDER", help="for the pictures (default: %(default)s)")
    add("--layers", type=layer_list, help="whose attention to draw, as in 0,1 (default: the first local and the first global)")
    add("--dtype", help="float32, bfloat16, ... (default: what the preset says)")
    options = parser.parse_args(arguments)
    if not options.text.strip():
        parser.error("the text is empty; give at least one word")
    try:
        lm = keras_gemma2.Gemma2CausalLM.from_preset(options.preset, dtype=options.dtype)
        inside = collect(lm, options.text, options.layers)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    for path in draw(inside, options.output, Path(options.preset).name):
        print(path)


if __name__ == "__main__":
    main()
