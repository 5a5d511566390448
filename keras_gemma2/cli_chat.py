"""`keras-gemma2 chat`: a conversation on the terminal, or line by line out of a pipe.

stdout carries the model's answers and, on a terminal, the prompt; all else goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

PROMPT = "> "
HELP = """\
/reset      forget the conversation
/save FILE  write the conversation to a file (go on with it: --load FILE)
/help       show this
/quit       leave; so does the end of input (Ctrl-D)
//text      say /text to the model
Ctrl-C stops an answer (twice: at once), and leaves where there is none."""
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_MISTAKES = (ValueError, TypeError, OSError, FloatingPointError)


def chat_command(lm: Any, options: argparse.Namespace) -> int:
    """Runs the command with a loaded model; returns the exit code.

    Args:
        lm: a `Gemma2CausalLM` with a preprocessor.
        options: `system`, `load`, `max_new_tokens`, `temperature`, `top_k`, `top_p`, `seed` and `preset`.

    Raises:
        ValueError: where input does not come from a terminal, for the first thing that cannot be done.
    """
    from keras_gemma2 import Chat, Sampler

    settings = {
        "sampler": Sampler(temperature=options.temperature, top_k=options.top_k or None, top_p=options.top_p),
        "max_new_tokens": options.max_new_tokens or min(512, max(1, lm.backbone.config.max_sequence_length // 4)),
        "seed": options.seed,
    }
    chat = Chat.load(lm, options.load, **settings) if options.load else Chat(lm, options.system, **settings)
    interactive = sys.stdin.isatty()
    if interactive:
        _tell(f"Chat with {options.preset}. /help shows what else can be typed.")
        with contextlib.suppress(ImportError):  # Windows has none; there the terminal itself edits lines
            import readline  # noqa: F401
    return converse(chat, interactive)


def converse(chat: Any, interactive: bool) -> int:
    """Reads lines and answers them until the input ends."""
    while True:
        try:
            line = _read_line(interactive)
        except (EOFError, KeyboardInterrupt):
            if interactive:
                _tell()
            return 0
        try:
            if line.startswith("/") and not line.startswith("//"):
                if not _obey(chat, line):
                    return 0
            elif line.strip():
                _answer(chat, line.removeprefix("/") if line.startswith("//") else line)
        except _MISTAKES as error:
            if not interactive:
                raise ValueError(str(error)) from error
            _tell(" ".join(str(error).split()))


def _read_line(interactive: bool) -> str:
    if not interactive:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")
    if sys.stdout.isatty():
        return input(PROMPT)
    sys.stderr.write(PROMPT)
    sys.stderr.flush()
    return input()


def _obey(chat: Any, line: str) -> bool:
    """Does what a line with a slash says; returns whether to go on."""
    command, _, argument = line.strip().partition(" ")
    argument = argument.strip()
    if command == "/quit" and not argument:
        return False
    if command == "/reset" and not argument:
        chat.reset()
        _tell("The conversation is forgotten.")
    elif command == "/save" and argument:
        chat.save(argument)
        _tell(f"Saved to {argument}.")
    elif command == "/help" and not argument:
        _tell(HELP)
    else:
        raise ValueError(
            f"{line.strip()!r} is none of /reset, /save FILE, /help and /quit. To say it to the model, type {'/' + line!r}."
        )
    return True


def _answer(chat: Any, text: str) -> None:
    """Writes an answer as it comes; Ctrl-C ends it after the piece of text that is being made, a second one at once."""
    last, is_stopped = "", False
    try:
        with _first_interrupt_held() as is_interrupted, contextlib.closing(chat.stream(text)) as pieces:
            for piece in pieces:
                _write(piece)
                last = piece
                if is_interrupted():
                    is_stopped = True
                    break
    except KeyboardInterrupt:
        is_stopped = True
    _write("\n" if is_stopped or not last.endswith("\n") else "")
    if is_stopped:
        _tell("[stopped]")


@contextlib.contextmanager
def _first_interrupt_held() -> Iterator[Callable[[], bool]]:
    """A context in which the first Ctrl-C raises nothing; gives a function that tells whether there was one.

    An exception may come up anywhere, also where a library makes another error of it, or none.
    """
    interrupts: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():  # no handler of Python's can be set
        yield lambda: False
        return

    def hold(number: int, frame: Any) -> None:
        interrupts.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, hold)
    try:
        yield lambda: bool(interrupts)
    finally:
        signal.signal(signal.SIGINT, before)


def _write(text: str) -> None:
    """Writes to stdout at once, what its encoding lacks as `?`; a model's control characters must not steer a terminal."""
    if sys.stdout.isatty():
        text = _CONTROL_CHARACTERS.sub("\ufffd", text)
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def _tell(text: str = "") -> None:
    print(text, file=sys.stderr, flush=True)
