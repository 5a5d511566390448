"""The errors of reading and writing checkpoints: one family, so that a caller can catch all of them."""

from __future__ import annotations

import inspect
import os

LONGEST_MESSAGE = 2000  # characters


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written as asked; the message names the file or key, and the mend.

    Example:
        >>> try:
        ...     Gemma2CausalLM.from_preset(folder)
        ... except CheckpointError as error:
        ...     print(error)
    """

    def __init__(self, message: str) -> None:
        # What stands in a damaged file, and so in a message about it, can be of any length.
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[: LONGEST_MESSAGE // 2]} [...] {message[-LONGEST_MESSAGE // 2 :]}"
        super().__init__(message)


class MissingFileError(CheckpointError, FileNotFoundError):
    """A file that a checkpoint must have is not there."""

    __str__ = CheckpointError.__str__  # OSError's would print an errno that there is not


class HubError(CheckpointError):
    """A model hub gave no files: no access, no network, no such model. The message names the step to take."""


class OtherProcessError(CheckpointError):
    """Another of the processes that hold a model between them has failed; the message says which, and why."""


class ProcessesDifferError(ValueError):
    """Processes that are to hold one model between them make several; raised on all of them."""


def callers_level() -> int:
    """The `stacklevel` of the first frame outside this package, where a warning is of use."""
    package = os.path.dirname(os.path.abspath(__file__))
    frames = inspect.stack(context=0)[1:]
    return 1 + next((i for i, frame in enumerate(frames) if not os.path.abspath(frame.filename).startswith(package)), 0)
