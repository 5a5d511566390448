"""Checkpoints of a run, by Keras's own Orbax callback, and training that goes on from them, on any mesh."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras

from keras_gemma2 import backend
from keras_gemma2.errors import CheckpointError, MissingFileError
from keras_gemma2.staging import folder_path, writable_folder
from keras_gemma2.training.stop_on_nan import variable_bytes

GROUPS = ("trainable_variables", "non_trainable_variables", "optimizer_variables")  # of Keras's tree; metrics begin anew
_MOST_NAMED = 3  # differences in an error
_NUMBERED = re.compile(r"(.*?)(?:_(\d+))?")


class RunCheckpoint(keras.callbacks.OrbaxCheckpoint):
    """`keras.callbacks.OrbaxCheckpoint`, which saves model, optimizer and seeds, each process its own part; but errors are told.

    When training begins and before each epoch's save every process looks whether it can write and has room: if one has not, all
    raise, before anything is written. (A process that fails while it writes leaves the others waiting until Orbax gives up.) An
    epoch that would not be saved, as the folder has it or a later one already, is refused before it begins. And a save that has
    failed in the background raises at the end of training, where Keras's callback says nothing. What was saved before stays.

    Frozen weights are saved, too, but for a `Distiller`'s teacher. With PyTorch or TensorFlow in several processes give it to one.

    Args:
        directory: made if missing, `~` expanded; all processes must see it.
        **kwargs: as `keras.callbacks.OrbaxCheckpoint` takes them: `save_freq` ("epoch", or steps), `max_to_keep` (1),
            `save_on_background` (True), `monitor`, `save_best_only`, ...

    Raises:
        CheckpointError: on each process, if one cannot write or, in training, has too little room, or the folder has later
            checkpoints; for an address such as gs://, which must be mounted as a folder.
        ImportError: without orbax-checkpoint.
        TypeError: if `directory` is no path.

    Example:
        >>> lm.fit(texts, epochs=5, callbacks=[RunCheckpoint("/runs/a")])
    """

    def __init__(self, directory: str | os.PathLike[str], **kwargs: Any) -> None:
        _orbax()
        folder = _folder(directory)
        with backend.together():
            writable_folder(folder)
        super().__init__(folder, **kwargs)

    def on_train_begin(self, logs: Any = None) -> None:
        super().on_train_begin(logs)
        if self.save_freq != "epoch":
            self._check(step=int(self.model.optimizer.iterations) + 1)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_begin(epoch, logs)
        if self.save_freq == "epoch":
            self._check(step=epoch)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self.save_freq == "epoch":
            self._check()
        super().on_epoch_end(epoch, logs)

    def on_train_end(self, logs: Any = None) -> None:
        with backend.together():
            self.checkpointer.wait()
        super().on_train_end(logs)

    def _check(self, step: int | None = None) -> None:
        """That there is room, and no checkpoint of this step or a later one, which Orbax would not write."""
        groups = _variables(self.model).values()
        with backend.together():
            writable_folder(self.directory, sum(variable_bytes(variable) for group in groups for variable in group))
            later = [other for other in _steps(self.directory) if step is not None and other >= step]
            if later:
                raise CheckpointError(
                    f"{self.directory!r} has checkpoints of step {step} or later ({', '.join(map(str, later))}), so that what is "
                    "trained now would not be saved. Go on from the last (`restore_checkpoint`, and `initial_epoch` of `fit`), "
                    "remove them, or choose another folder."
                )


def state_tree(model: Any, value_format: str) -> dict[str, Any]:
    """Keras's tree of what training changes, and of frozen weights beside it; of a `Distiller` the student's.

    Args:
        model: compiled.
        value_format: "backend_tensor" or "numpy_array", as `keras.Model.get_state_tree` takes it.
    """
    if value_format not in ("backend_tensor", "numpy_array"):
        raise ValueError(f"`value_format` must be 'backend_tensor' or 'numpy_array'. Received: {value_format!r}.")
    groups = {**_variables(model), "metrics_variables": model.metrics_variables}
    take = (lambda v: v.value) if value_format == "backend_tensor" else (lambda v: v.numpy())
    return {name: _nested({variable.path: take(variable) for variable in group}) for name, group in groups.items()}


def _variables(model: Any) -> dict[str, list[keras.Variable]]:
    """What is saved, but for metrics."""
    trained = getattr(model, "student", model)
    return dict(zip(GROUPS, (trained.trainable_variables, trained.non_trainable_variables, model.optimizer.variables)))


def restore_checkpoint(model: Any, directory: str | os.PathLike[str], step: int | None = None) -> int:
    """Puts a model and its optimizer back as `RunCheckpoint`, or `keras.callbacks.OrbaxCheckpoint`, has saved them.

    The mesh may be another one than that of the run, or none: each device reads its own part, and holds it twice meanwhile. The
    model must have the adapters it had, and be compiled with an optimizer of the same kind. Of several processes all must call it.

    Args:
        model: a compiled `Gemma2CausalLM` or `Distiller`.
        directory: as the callback has it; `~` is expanded.
        step: which of its checkpoints; None for the last.

    Returns:
        The step: with the callback's `save_freq="epoch"` the number of the epoch that had ended, from 0.

    Raises:
        CheckpointError: if there is no checkpoint, or none of this step; if its variables are not this model's or its optimizer's.
            With several processes on each, if one of them finds that. Nothing is changed then.
        ValueError: for a model that is not compiled; with several processes, if they choose different checkpoints.
        ImportError: without orbax-checkpoint.
        TypeError: if `directory` is no path, or `step` no whole number.

    Example:
        >>> lm.fit(texts, epochs=5, callbacks=[RunCheckpoint("/runs/a")])  # ends in epoch 3
        >>> done = restore_checkpoint(lm, "/runs/a") + 1  # in a new process, on 4 devices instead of 8
        >>> lm.fit(texts, initial_epoch=done, epochs=5)
    """
    folder = _folder(directory)
    if step is not None and (isinstance(step, bool) or not isinstance(step, int)):
        raise TypeError(f"`step` must be a whole number or None. Received: {step!r}, of type {type(step).__name__}.")
    if getattr(model, "optimizer", None) is None:
        raise ValueError("`model` must be compiled with an optimizer of the kind that the checkpoint was saved with.")
    orbax = _orbax()
    with backend.together():
        step = _step(folder, step)
        where = os.path.join(folder, str(step))
        backend.check_alike(f"step {step}", "restore the same checkpoint")
        stored = _stored(orbax, where)
    if not model.optimizer.built:  # which several processes do with each other
        model.optimizer.build(model.trainable_variables)
    with backend.together():
        places = _matched(stored, model, where)
    leaves = {path: backend.stored_like(leaf, places.get(path)) for path, leaf in stored.items()}
    with _explained(where):
        found = dict(_flat(orbax.load_checkpointables(where, {"pytree": _nested(leaves)})["pytree"]))
    for path, variable in places.items():
        variable.assign(found.pop(path))
    return step


def _folder(directory: Any) -> str:
    if isinstance(directory, str) and "://" in directory:
        raise CheckpointError(f"`directory` must be a folder. Received: {directory!r}. Mount what is there (by gcsfuse, say).")
    return folder_path(directory, "directory")


def _orbax() -> Any:
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError("Checkpoints of a run need orbax-checkpoint: pip install orbax-checkpoint") from error
    if not hasattr(orbax.checkpoint, "v1"):  # which Keras uses
        raise ImportError("Checkpoints of a run need a newer orbax-checkpoint: pip install --upgrade orbax-checkpoint")
    return orbax.checkpoint.v1


def _step(folder: str, step: int | None) -> int:
    """The step asked for, or the last there is."""
    if not os.path.isdir(folder):
        raise MissingFileError(f"There is no folder {folder!r} to take a checkpoint from.")
    steps = _steps(folder)
    if not steps:
        raise MissingFileError(f"{folder!r} has no checkpoint that `keras.callbacks.OrbaxCheckpoint` has completed.")
    if step is not None and step not in steps:
        raise MissingFileError(f"{folder!r} has no checkpoint of step {step}. There are: {', '.join(map(str, steps))}.")
    return steps[-1] if step is None else step


def _steps(folder: str) -> list[int]:
    return sorted(int(name) for name in os.listdir(folder) if name.isdigit())


def _stored(orbax: Any, where: str) -> dict[str, Any]:
    """What a checkpoint says of each array that it holds, by group and path."""
    with _explained(where):
        stored = orbax.checkpointables_metadata(where).metadata.get("pytree")
    if not isinstance(stored, Mapping) or GROUPS[0] not in stored:
        raise CheckpointError(f"{where!r} is no checkpoint of `keras.callbacks.OrbaxCheckpoint`, or a damaged one.")
    if GROUPS[2] not in stored:
        raise CheckpointError(
            f"{where!r} has weights alone (save_weights_only=True), from which training cannot go on as it was. Save without it."
        )
    return dict(_flat(stored))


def _matched(stored: Mapping[str, Any], model: Any, where: str) -> dict[str, keras.Variable]:
    """The model's variables by the paths that theirs have in a checkpoint; refuses one of other variables."""
    own = {f"{name}/{variable.path}": variable for name, group in _variables(model).items() for variable in group}
    own_paths, their_paths = _by_rank(own), _by_rank(path for path in stored if path.partition("/")[0] in GROUPS and "/" in path)
    odd = []
    for key in sorted(own_paths.keys() | their_paths.keys()):
        here = tuple(own[own_paths[key]].shape) if key in own_paths else "nothing"
        there = tuple(getattr(stored[their_paths[key]], "shape", None) or ()) if key in their_paths else "nothing"
        if here != there:
            odd.append(f"{own_paths.get(key) or their_paths[key]!r} ({there} there, {here} here)")
    if odd:
        more = f" and {len(odd) - _MOST_NAMED} more" if len(odd) > _MOST_NAMED else ""
        raise CheckpointError(
            f"The checkpoint {where!r} is of another model or optimizer. They differ in {', '.join(odd[:_MOST_NAMED])}{more}. Make "
            "the model as for the run that saved it, adapters and `compile` included."
        )
    return {their_paths[key]: own[path] for key, path in own_paths.items()}


def _by_rank(paths: Iterable[str]) -> dict[tuple[str, int], str]:
    """Paths by what they are without the numbers that Keras gives names in one process (`adam_1/iteration`), and their rank."""
    alike: dict[str, list[tuple[int, str]]] = {}
    for path in paths:
        group, name, *rest = path.split("/")
        stem, number = _NUMBERED.fullmatch(name).groups()
        alike.setdefault("/".join([group, stem, *rest]), []).append((-1 if number is None else int(number), path))
    return {(name, rank): path for name, found in alike.items() for rank, (_, path) in enumerate(sorted(found))}


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:  # what Orbax makes of damaged files
        raise CheckpointError(f"The checkpoint {where!r} cannot be read: {type(error).__name__}: {error}") from error


# Keras's trees: variables' paths, split at each "/" ---------------------------------------------------------------------


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:  # an empty one is a leaf
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *folders, name = path.split("/")
        inner = tree
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[name] = leaf
    return tree
