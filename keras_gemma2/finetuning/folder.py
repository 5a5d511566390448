"""The folder of a fine-tuning run: its settings, its log and its checkpoint, each of which a killed process leaves whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from keras_gemma2.errors import CheckpointError
from keras_gemma2.staging import folder_path, only_writer, replacing_folder

SETTINGS, LOG, CHECKPOINT, STATE = "settings.json", "log.csv", "checkpoint", "state.npz"
MERGED, PLOT = "merged", "loss.png"
_KIND = "keras-gemma2 finetune"
_COLUMNS = "step,epoch,loss,tokens,validation_loss\n"
_RESULTS = ("adapter_config.json", "adapter_model.safetensors", PLOT)


class RunFolder:
    """The folder of one run.

    Args:
        output: as the user gave it.

    Raises:
        CheckpointError, TypeError: if it is no path of a folder.

    Example:
        >>> folder = RunFolder("./tuned")
        >>> folder.check(settings.recorded("jax"))
    """

    def __init__(self, output: str | os.PathLike[str]) -> None:
        self.path = folder_path(output, "output")

    def file(self, *names: str) -> str:
        """The path of something in the folder."""
        return os.path.join(self.path, *names)

    # Settings -----------------------------------------------------------------------------------------------------------

    def check(self, recorded: Mapping[str, Any], restart: bool = False) -> None:
        """Checks that a run with these settings may go on, or begin, here.

        Args:
            recorded: as `FinetuneSettings.recorded` gives them.
            restart: whether a run that is here will be dropped.

        Raises:
            CheckpointError: if the folder is not that of a run, or its run had other settings; names the first that differs, and
                both values.
        """
        if os.path.lexists(self.path) and not os.path.isdir(self.path):
            raise CheckpointError(f"`output` must be a folder, and {self.path!r} is a file. Choose another name.")
        # A log alone: the run was killed before its settings were there.
        if not os.path.isdir(self.path) or set(os.listdir(self.path)) <= {LOG}:
            return
        before = self._settings()
        for name in () if restart else recorded:
            old, new = before.get(name), recorded[name]
            if old != new:
                raise CheckpointError(
                    f"{self.path!r} holds a run with {name}={old!r}, and this one has {name}={new!r}. Give the setting as it was "
                    "to continue that run, begin anew with --restart (`restart=True`), or choose another output folder."
                )

    def _settings(self) -> dict[str, Any]:
        found: Any = None
        # No such file, or not ours: told below.
        with contextlib.suppress(OSError, ValueError), open(self.file(SETTINGS), encoding="utf-8") as file:
            found = json.load(file)
        if not isinstance(found, dict) or found.get("made_by") != _KIND or not isinstance(found.get("settings"), dict):
            raise CheckpointError(
                f"{self.path!r} is not empty, and no fine-tuning run of this package is in it. Choose another output folder."
            )
        return found["settings"]

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """A context in which no other run writes to the folder; as `staging.only_writer`."""
        return only_writer(self.file(LOG))

    def begin(self, recorded: Mapping[str, Any], restart: bool = False) -> None:
        """Writes the settings; with `restart`, drops the run that is here."""
        if restart:
            shutil.rmtree(self.file(CHECKPOINT), ignore_errors=True)
            shutil.rmtree(self.file(MERGED), ignore_errors=True)
            for name in _RESULTS:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(self.file(name))
            os.truncate(self.file(LOG), 0)
        elif os.path.exists(self.file(SETTINGS)):
            return
        with replacing_folder(self.path, owned=(SETTINGS,)) as staging, open(os.path.join(staging, SETTINGS), "w") as file:
            json.dump({"made_by": _KIND, "settings": recorded}, file, indent=2)
            file.write("\n")

    # Checkpoint ---------------------------------------------------------------------------------------------------------

    def save(self, numbers: Mapping[str, int], arrays: Mapping[str, np.ndarray]) -> None:
        """Writes a checkpoint in the place of the one before, whole or not at all.

        Args:
            numbers: where the run is.
            arrays: what it has learned.

        Raises:
            CheckpointError: if the disk is full, or the folder cannot be written; the one before stays then.
        """
        needed = sum(array.nbytes for array in arrays.values())
        with replacing_folder(self.file(CHECKPOINT), needed, (STATE,)) as staging:
            np.savez(os.path.join(staging, STATE), **{f"number/{k}": np.int64(v) for k, v in numbers.items()}, **arrays)

    def load(self) -> tuple[dict[str, int], dict[str, np.ndarray]] | None:
        """The checkpoint's numbers and arrays; None where there is none.

        Raises:
            CheckpointError: if it is damaged.
        """
        path = self.file(CHECKPOINT, STATE)
        if not os.path.exists(path):
            return None
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"The checkpoint {path!r} cannot be read ({error}). Begin anew with --restart.") from error
        numbers = {name.removeprefix("number/"): int(arrays.pop(name)) for name in list(arrays) if name.startswith("number/")}
        return numbers, arrays

    @property
    def has_checkpoint(self) -> bool:
        """Whether a run is under way, or ended, here."""
        return os.path.exists(self.file(CHECKPOINT, STATE))

    # Log ----------------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def log(self, size: int) -> Iterator[Log]:
        """The log, open to be written on after its first `size` bytes; rows behind them are of steps that will be made again.

        Raises:
            CheckpointError: if it is shorter than the checkpoint knows it to have been.
        """
        path = self.file(LOG)
        have = os.path.getsize(path) if os.path.exists(path) else 0
        if have < size:
            raise CheckpointError(
                f"{path!r} has {have} bytes, and had {size} when the checkpoint was written. Put it back, or begin anew with "
                "--restart."
            )
        with open(path, "ab") as file:
            file.truncate(size)
            log = Log(file)
            if size == 0:
                log.write(_COLUMNS)
            yield log

    def losses(self) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
        """Steps and losses of the log: of training, and of validation."""
        with open(self.file(LOG), encoding="utf-8") as file:
            rows = [line.rstrip("\n").split(",") for line in file][1:]
        return tuple([(int(row[0]), float(row[column])) for row in rows if row[column]] for column in (2, 4))


class Log:
    """A log that is open."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, line: str) -> None:
        """Adds a line."""
        self._file.write(line.encode())
        self._file.flush()

    def row(self, step: int, epoch: int, loss: float | None, tokens: int, validation: float | None) -> None:
        """Adds what a step gave. Floats are written so that they are read back as they were."""
        cells = (step, epoch, loss, tokens, validation)
        self.write(",".join("" if cell is None else repr(cell) for cell in cells) + "\n")

    def size(self) -> int:
        """Bytes of the log, all of them on the disk."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size
