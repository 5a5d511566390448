"""What a fine-tuning run is told, checked before Keras or a model is loaded."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Sequence
from typing import Any

from keras_gemma2.lora import LoraSettings, check_rank

# What may differ when a run is continued: it changes no loss.
_FREE = ("output", "save_every", "tensorboard", "merge")
_QUANTIZED = (None, "int8", "int4")


@dataclasses.dataclass(frozen=True)
class FinetuneSettings:
    """The settings of a fine-tuning run.

    Args:
        preset: built-in name, hub address, folder or file, as `from_preset` takes it.
        data: a .jsonl file, as `keras_gemma2.read_jsonl` takes it.
        output: the folder of the run; made if missing.
        dtype: of the model, such as "bfloat16" or "mixed_bfloat16"; None is the preset's.
        quantize: "int8" or "int4" (QLoRA); None for floats.
        lora_rank, lora_alpha, targets, dropout, rslora: as `Gemma2CausalLM.enable_lora` takes them.
        learning_rate: of Adam, the same throughout; gradients are clipped to a norm of 1.
        epochs: passes over the data.
        batch_size: rows a step.
        accumulate: steps whose gradients are averaged before the weights change.
        length: tokens in a row at most; None is what the preset's preprocessor says. Rows are as long as the longest sample needs.
        truncate: whether longer samples are cut at their end; else they are an error.
        pack: whether samples share rows of `length` tokens.
        validation: a .jsonl file of held-out data; None holds a share of the data out.
        hold_out: that share, from 0 (none) to below 1.
        seed: of the new factors, of dropout, of what is held out, and of the order of the data.
        save_every: steps from one checkpoint to the next; one is also written after each epoch.
        gradient_checkpointing: as `Gemma2CausalLM.enable_gradient_checkpointing`.
        tensorboard: folder to write TensorBoard's event files to; None for none.
        merge: whether the merged model is written to `output`/merged, too.

    Raises:
        ValueError, TypeError: for a value outside its range, naming it.

    Example:
        >>> FinetuneSettings("gemma2_mini_en", "train.jsonl", "./tuned", lora_rank=16, targets="all", epochs=3)
    """

    preset: str
    data: str
    output: str
    dtype: str | None = None
    quantize: str | None = None
    lora_rank: int = 8
    lora_alpha: float = 16.0
    targets: str | Sequence[str] = "attention"
    dropout: float = 0.0
    rslora: bool = False
    learning_rate: float = 2e-4
    epochs: int = 1
    batch_size: int = 8
    accumulate: int = 1
    length: int | None = None
    truncate: bool = False
    pack: bool = False
    validation: str | None = None
    hold_out: float = 0.1
    seed: int = 0
    save_every: int = 100
    gradient_checkpointing: bool = False
    tensorboard: str | None = None
    merge: bool = False

    def __post_init__(self) -> None:
        for name in ("preset", "data", "output"):
            value = getattr(self, name)
            if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
                raise TypeError(f"`{name}` must be a string or a path. Received: {value!r}.")
        check_rank(self.lora_rank)
        LoraSettings({"": self.lora_rank}, {"": self.lora_alpha}, self.dropout, self.rslora)  # checks their ranges
        for name in ("epochs", "batch_size", "accumulate", "save_every", "length"):
            value = getattr(self, name)
            if value is None and name == "length":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1. Received: {value!r}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"`seed` must be an integer of at least 0. Received: {self.seed!r}.")
        if not isinstance(self.learning_rate, (int, float)) or not 0 < self.learning_rate < math.inf:
            raise ValueError(f"`learning_rate` must be a positive number. Received: {self.learning_rate!r}.")
        if not isinstance(self.hold_out, (int, float)) or not 0 <= self.hold_out < 1:
            raise ValueError(f"`hold_out` must be a share of at least 0 and below 1. Received: {self.hold_out!r}.")
        if self.quantize not in _QUANTIZED:
            raise ValueError(f"`quantize` must be 'int8', 'int4' or None. Received: {self.quantize!r}.")

    def check_preset(self) -> None:
        """Checks what needs the data's and the preset's files, but no weights.

        Raises:
            OSError: if there is no such file of data, or TensorBoard's folder is a file.
            ValueError: for an unknown preset, a target that it does not have, or a rank larger than its matrices.
        """
        from keras_gemma2.presets.registry import resolve

        for name in ("data", "validation"):
            path = getattr(self, name)
            if path is not None and not os.path.isfile(path):
                raise FileNotFoundError(f"There is no file {os.fspath(path)!r}, which `{name}` names.")
        if self.tensorboard is not None and os.path.exists(self.tensorboard) and not os.path.isdir(self.tensorboard):
            raise NotADirectoryError(f"`tensorboard` must be a folder, and {os.fspath(self.tensorboard)!r} is a file.")
        config = resolve(self.preset).config
        LoraSettings.of(config, self.lora_rank, self.lora_alpha, self.targets, self.dropout, self.rslora)
        if self.length is not None and self.length > config.max_sequence_length:
            raise ValueError(
                f"`length` must be at most the model's context, {config.max_sequence_length}. Received: length={self.length}."
            )

    def recorded(self, backend: str) -> dict[str, Any]:
        """What losses depend on, as JSON holds it: files by a hash of their content, wherever they lie.

        Args:
            backend: the name of Keras's.
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _FREE}
        values |= {name: _content(values[name]) for name in ("data", "validation")}
        values["preset"] = os.fspath(self.preset)
        values["targets"] = self.targets if isinstance(self.targets, str) else list(self.targets)
        return {"backend": backend, **values}


def _content(path: str | None) -> str | None:
    if path is None:
        return None
    with open(path, "rb") as file:
        return f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"
