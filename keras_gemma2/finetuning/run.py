"""`finetune`: LoRA on a .jsonl file, with a log, checkpoints and resumption."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_gemma2.finetuning.folder import MERGED, RunFolder
from keras_gemma2.finetuning.plot import write_plot
from keras_gemma2.finetuning.rows import Rows, read_rows
from keras_gemma2.finetuning.settings import FinetuneSettings
from keras_gemma2.finetuning.state import arrays_of, restore
from keras_gemma2.finetuning.tensorboard import EventFile
from keras_gemma2.training.jsonl import read_jsonl

GRADIENT_NORM = 1.0


@dataclasses.dataclass(frozen=True)
class FinetuneResult:
    """What a run came to.

    Attributes:
        folder: with the adapter, `log.csv` and `settings.json`.
        steps: how many there were.
        before: held-out loss of the preset, in nats per learned token; None where nothing is held out.
        after: that of the tuned model.
    """

    folder: str
    steps: int
    before: float | None
    after: float | None


def finetune(settings: FinetuneSettings, restart: bool = False, progress: bool = True) -> FinetuneResult:
    """Fine-tunes a preset with LoRA, and leaves the adapter in a folder.

    The folder gets `adapter_config.json` and `adapter_model.safetensors` (PEFT's format, `lm.load_adapter(folder)` reads it),
    `log.csv` (a row a step: the loss in nats per learned token; the held-out loss at step 0 and after each epoch), `settings.json`,
    `checkpoint/`, `loss.png` if matplotlib is installed, and `merged/` if asked for.

    Called again with the same settings after it was interrupted, in whatever way, it goes on from the last checkpoint, and losses
    and log become what they had been without the interruption. Python's, numpy's and the backend's global seeds are set.

    Args:
        settings: of the run.
        restart: whether to drop a run that the folder holds.
        progress: whether to draw Keras's progress bar, on stderr.

    Raises:
        OSError, ValueError, TypeError: for a missing file, malformed data (with its line), a preset, target or rank that does not
            exist, a folder that is not a run's, or that another process runs in, a run with other settings (`CheckpointError`,
            which names them), a full disk.
        FloatingPointError: if the loss is NaN or infinite; the last checkpoint stays.

    Example:
        >>> result = finetune(FinetuneSettings("gemma2_mini_en", "train.jsonl", "./tuned", lora_rank=8))
        >>> lm = Gemma2CausalLM.from_preset("gemma2_mini_en")
        >>> lm.load_adapter("./tuned")
    """
    settings.check_preset()
    folder, recorded = RunFolder(settings.output), settings.recorded(keras.backend.backend())
    folder.check(recorded, restart)
    for path in filter(None, (settings.data, settings.validation)):
        read_jsonl(path)  # what is malformed is told before a model loads
    stored = None if restart else folder.load()
    if stored is not None and _is_finished(folder, settings, stored[0]):
        return _result(folder, stored[0]["step"])
    lm = _model(settings)
    run = _Run(settings, folder, lm, *read_rows(settings, lm))
    with folder.locked():
        folder.begin(recorded, restart)
        run.train(stored, progress)
        write_plot(folder)
        lm.save_adapter(folder.path)  # after which a run counts as ended
        if settings.merge:
            lm.merge_adapter()
            lm.save_to_preset(folder.file(MERGED))
    return _result(folder, run.steps)


def _is_finished(folder: RunFolder, settings: FinetuneSettings, numbers: dict[str, int]) -> bool:
    there = [os.path.exists(folder.file(name)) for name in ("adapter_config.json", "adapter_model.safetensors")]
    merged = not settings.merge or os.path.exists(folder.file(MERGED))
    return numbers["step"] == numbers["steps"] and all(there) and merged


def _result(folder: RunFolder, steps: int) -> FinetuneResult:
    validation = [loss for _, loss in folder.losses()[1]]
    return FinetuneResult(folder.path, steps, *((validation[0], validation[-1]) if validation else (None, None)))


def _model(settings: FinetuneSettings) -> Any:
    from keras_gemma2 import Gemma2CausalLM  # registers all classes with Keras, as any use of a public name does

    lm = Gemma2CausalLM.from_preset(settings.preset, dtype=settings.dtype, quantize=settings.quantize)
    if lm.preprocessor is None:
        raise ValueError(f"The preset {settings.preset!r} has no tokenizer, which text needs.")
    keras.utils.set_random_seed(settings.seed)
    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    lm.enable_lora(settings.lora_rank, settings.lora_alpha, targets, settings.dropout, settings.rslora)
    if settings.gradient_checkpointing:
        lm.enable_gradient_checkpointing()
    optimizer = keras.optimizers.Adam(
        settings.learning_rate,
        global_clipnorm=GRADIENT_NORM,
        gradient_accumulation_steps=settings.accumulate if settings.accumulate > 1 else None,
    )
    # The mean over learned tokens: rows that are short, or of weight 0, do not make a step smaller.
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="mean_with_sample_weight")
    lm.compile(optimizer=optimizer, loss=loss)
    lm.optimizer.build(lm.trainable_variables)
    return lm


class _Run:
    """The steps of a run."""

    def __init__(self, settings: FinetuneSettings, folder: RunFolder, lm: Any, rows: Rows, held_out: Rows | None) -> None:
        self._settings, self._folder, self._lm, self._rows, self._held_out = settings, folder, lm, rows, held_out
        # The last steps, whose gradients would be accumulated and never used, are left out.
        self.steps = settings.epochs * rows.batches // settings.accumulate * settings.accumulate
        if not self.steps:
            raise ValueError(
                f"`accumulate` must be at most the steps there are, {settings.epochs * rows.batches}. Received: "
                f"accumulate={settings.accumulate}. Lower it, or `batch_size`, or raise `epochs`."
            )

    def train(self, stored: tuple[dict[str, int], dict[str, np.ndarray]] | None, progress: bool) -> None:
        """Makes the steps that are left after a checkpoint; all of them for None."""
        numbers = {"step": 0, "log": 0} if stored is None else stored[0]
        if stored is not None:
            restore(self._lm, stored[1])
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(self._folder.log(numbers["log"]))
            events = None
            if self._settings.tensorboard is not None:
                events = EventFile(self._settings.tensorboard, numbers["step"] + (stored is not None))
                stack.callback(events.close)
            if stored is None:
                self._tell(log, events, 0, None, 0)
                self._save(log, 0)
            for epoch in range(numbers["step"] // self._rows.batches, self._settings.epochs):
                self._epoch(epoch, numbers["step"], log, events, progress)

    def _epoch(self, epoch: int, done: int, log: Any, events: EventFile | None, progress: bool) -> None:
        first = epoch * self._rows.batches
        last = min(first + self._rows.batches, self.steps)
        if max(first, done) >= last:
            return
        order = self._rows.order(self._settings.seed, epoch)
        bar = _Bar(f"Epoch {epoch + 1}/{self._settings.epochs}", last - first) if progress else None
        for step in range(max(first, done) + 1, last + 1):
            x, y, weights = self._rows.batch(step - 1 - first, order)
            loss = self._step(step, epoch, x, y, weights)
            self._tell(log, events, step, loss, int(np.count_nonzero(weights)), is_last=step == last)
            if step == last or step % self._settings.save_every == 0:
                self._save(log, step)
            if bar is not None:
                bar.update(step - first, loss)

    def _step(self, step: int, epoch: int, x: Any, y: Any, weights: Any) -> float:
        # PyTorch's dropout draws from the global generator, so that each step begins with a state of its own.
        keras.utils.set_random_seed((self._settings.seed * 1_000_003 + step) % 2**32)
        self._lm.reset_metrics()
        loss = float(self._lm.train_on_batch(x, y, weights, return_dict=True)["loss"])
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss} at step {step}, in epoch {epoch + 1}. The folder {self._folder.path!r} keeps its last "
                "checkpoint. Look at the data, or begin anew with --restart and a lower --learning-rate."
            )
        return loss

    def _tell(self, log: Any, events: Any, step: int, loss: float | None, tokens: int, is_last: bool = True) -> None:
        """Writes what a step gave, and the held-out loss where one is due."""
        validation = self._evaluate() if is_last and self._held_out is not None else None
        log.row(step, -(-step // self._rows.batches), loss, tokens, validation)
        if events is not None:
            values = {"loss": loss, "validation_loss": validation}
            events.scalars(step, {name: value for name, value in values.items() if value is not None})

    def _evaluate(self) -> float:
        total = count = 0.0
        for x, y, weights in self._held_out:
            self._lm.reset_metrics()
            loss = float(self._lm.test_on_batch(x, y, weights, return_dict=True)["loss"])
            tokens = float(weights.sum())
            total, count = total + loss * tokens, count + tokens
        return total / count if count else math.nan

    def _save(self, log: Any, step: int) -> None:
        self._folder.save({"step": step, "steps": self.steps, "log": log.size()}, arrays_of(self._lm))


class _Bar:
    """Keras's progress bar, on stderr: stdout is for results."""

    def __init__(self, title: str, steps: int) -> None:
        with _on_stderr():
            print(title)
        self._bar = keras.utils.Progbar(steps, stateful_metrics=["loss"])

    def update(self, done: int, loss: float) -> None:
        with _on_stderr():
            self._bar.update(done, [("loss", loss)])


@contextlib.contextmanager
def _on_stderr() -> Iterator[None]:
    with contextlib.redirect_stdout(sys.stderr):
        yield
