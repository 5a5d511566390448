"""From any checkpoint to another format, tensor by tensor: no model is built, no backend imported."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from keras_gemma2.checkpoints import formats
from keras_gemma2.checkpoints.source import GGUF, HUGGING_FACE, KERAS, KERAS_HUB, SIZE_ONLY, Source
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

    The weights are not changed unless `dtype` says so. The target appears when it is complete, and not at all if something
    fails.

    Args:
        source: anything `from_preset` takes: a name, a hub's address, a folder or a file.
        target: the folder to write. A checkpoint in it is replaced, other files stay.
        to: "hf" (transformers, vLLM, llama.cpp's converter, ...), "preset" (this package) or "keras_hub" (keras-hub's
            `GemmaCausalLM`).
        dtype: "float32", "float16" or "bfloat16" of the stored weights; default the source's (bfloat16 for quantized ones).
        max_shard_size: largest size of one file, as a text such as "500MB"; default 5GB for "hf", else 10GB.
        progress: whether to draw a progress bar on stderr.

    Raises:
        CheckpointError: if the source cannot be read, or not be expressed in the target's format.
        ValueError: for an unknown `to` or `dtype`.

    Example:
        >>> convert("gemma2_mini_en", "./mini", to="hf", dtype="bfloat16")
    """
    from keras_gemma2.checkpoints import reading, writing

    if to not in TARGETS:
        raise ValueError(f"`to` must be one of {sorted(TARGETS)}. Received: {to!r}.")
    if dtype is not None:
        writing.stored(dtype)
    found = resolve(source, hub.WEIGHTS)
    if found.kind == SIZE_ONLY:
        raise CheckpointError(f"The weights of {found.name!r} are not on this machine.")
    write_folder = importlib.import_module(TARGETS[to][1]).write_folder
    with reading.open_weights(found) as entries:
        stored, policy = (dtype, dtype) if dtype else _own_dtypes(found, entries)
        weights = writing.outgoing_from_entries(entries, found.config, stored, policy)
        proto = formats.vocabulary(found)
        with replacing_folder(target, weights.nbytes) as folder, _bar(weights.nbytes, progress) as advance:
            shard = DEFAULT_SHARD_SIZES[to] if max_shard_size is None else max_shard_size
            extra = {} if to == "hf" else {"preprocessor": found.preprocessor}
            write_folder(folder, weights, proto, found.stop_token_ids, shard, advance, **extra)


def _own_dtypes(found: Source, entries: dict[str, Any]) -> tuple[str, str | None]:
    """The dtype to store a source's weights in so that nothing is lost, and the one it is loaded in (None: the same).

    Quantized weights have no float dtype of their own: they are stored in what they are loaded in.
    """
    from keras_gemma2.checkpoints.writing import STORED_DTYPES

    policy = found.dtype.get("config", {}).get("name") if isinstance(found.dtype, dict) else found.dtype
    policy = policy if policy in STORED_DTYPES else None
    if policy and found.kind in (GGUF, KERAS_HUB):
        return policy, policy
    stored = {str(entry.tensor.dtype) for entry in entries.values()}
    if len(stored) == 1 and stored <= set(STORED_DTYPES):
        return stored.pop(), policy
    return policy or "float32", policy


@contextlib.contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[int], None] | None]:
    if not show:
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc="converting") as bar:
        yield bar.update
