"""From any checkpoint to another format, tensor by tensor: no model is built, no backend imported."""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from keras_gemma2.checkpoints import formats
from keras_gemma2.checkpoints.source import HUGGING_FACE, KERAS, KERAS_HUB, Source
from keras_gemma2.errors import CheckpointError
from keras_gemma2.presets import hub
from keras_gemma2.presets.registry import resolve
from keras_gemma2.staging import replacing_folder

# What `to` may be: the kind written, and the module whose `write_folder` writes it.
TARGETS = {
    "hf": (HUGGING_FACE, "keras_gemma2.checkpoints.hf_writer"),
    "preset": (KERAS, "keras_gemma2.checkpoints.keras_preset"),
    "keras_hub": (KERAS_HUB, "keras_gemma2.checkpoints.keras_hub"),
}
DEFAULT_SHARD_SIZES = {"hf": "5GB", "preset": "10GB", "keras_hub": "10GB"}  # as the formats' own libraries have it


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str = "hf",
    dtype: str | None = None,
    max_shard_size: str | None = None,
    progress: bool = False,
) -> None:
    """Writes a checkpoint in another format, holding one tensor in memory at a time.

    Each weight keeps the dtype it is stored in unless `dtype` says otherwise; quantized ones become floats. The target appears
    when it is complete, and not at all if something fails.

    Args:
        source: anything `from_preset` takes: a name, a hub's address, a folder or a file.
        target: the folder to write. A checkpoint in it is replaced, other files stay. It cannot be the source.
        to: "hf" (transformers, vLLM, llama.cpp's converter, ...), "preset" (this package) or "keras_hub" (keras-hub's
            `GemmaCausalLM`).
        dtype: "float32", "float16" or "bfloat16" of the stored weights; default the source's (for quantized ones, what
            `from_preset` loads them in).
        max_shard_size: largest size of one file, as a text such as "500MB"; default 5GB for "hf", else 10GB.
        progress: whether to draw a progress bar on stderr.

    Raises:
        CheckpointError: if the source cannot be read, or not be expressed in the target's format.
        ValueError: for an unknown `to`, `dtype` or `max_shard_size`.

    Warns:
        UserWarning: for weights with values that are not finite, and for what a format has no place for.

    Example:
        >>> convert("gemma2_mini_en", "./mini", to="hf", dtype="bfloat16")
    """
    from keras_gemma2.checkpoints import reading, writing

    shard = _checked(to, dtype, max_shard_size)
    found = resolve(source, hub.CONFIG)
    if to == "keras_hub":
        _check_expressible(found)
    found = resolve(source, hub.WEIGHTS)
    if os.path.realpath(found.path) == os.path.realpath(os.path.expanduser(target)):
        raise CheckpointError(f"`target` cannot be the source itself, {found.path!r}. Choose another folder.")
    write_folder = importlib.import_module(TARGETS[to][1]).write_folder
    with reading.open_weights(found) as entries:
        policy = dtype or _policy(found, to)
        weights = writing.outgoing_from_entries(entries, found.config, dtype, policy, found.name)
        proto = formats.vocabulary(found)
        extra = {"extra": _settings(found)} if to == "hf" else {"preprocessor": found.preprocessor}
        with replacing_folder(target, weights.nbytes) as folder, _bar(weights.nbytes, progress) as advance:
            write_folder(folder, weights, proto, found.stop_token_ids, shard, advance, **extra)


def _checked(to: str, dtype: str | None, max_shard_size: str | None) -> str:
    """The shard size to write with; wrong arguments are refused before anything is downloaded."""
    from keras_gemma2.checkpoints import h5_weights, hf_writer, writing

    if to not in TARGETS:
        raise ValueError(f"`to` must be one of {sorted(TARGETS)}. Received: {to!r}.")
    if dtype is not None:
        writing.stored(dtype)
    shard = DEFAULT_SHARD_SIZES[to] if max_shard_size is None else max_shard_size
    (hf_writer.parse_size if to == "hf" else h5_weights.shard_bytes)(shard)
    return shard


def _check_expressible(found: Source) -> None:
    from keras_gemma2.checkpoints.keras_hub import backbone_arguments

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # given when it is written
        backbone_arguments(found.config)


def _settings(found: Source) -> dict[str, Any]:
    """The chat template and generation settings of a Hugging Face folder."""
    from keras_gemma2.checkpoints.hf import extra_settings

    return extra_settings(found) if found.kind == HUGGING_FACE else {}


def _policy(found: Source, to: str) -> str | None:
    """The dtype policy that the source's floats are loaded in. Hugging Face's configs have no mixed ones."""
    from keras_gemma2.checkpoints.keras_objects import float_policy_name

    name = found.dtype.get("config", {}).get("name") if isinstance(found.dtype, dict) else float_policy_name(found.dtype)
    return None if to == "hf" and str(name).startswith("mixed") else name


@contextlib.contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[int], None] | None]:
    if not show:
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc="converting") as bar:
        yield bar.update
