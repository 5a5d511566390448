"""How large the objects of a pickle are when they are written out, found without making any of them.

A pickle can put one tuple twice into another, that one twice into the next, and so on: forty steps and some hundred bytes
make a tuple whose hash takes hours, and a dict takes that hash while the file is loaded.
Format: https://docs.python.org/3/library/pickletools.html
"""

from __future__ import annotations

import pickletools
from typing import IO, Any

# Objects a pickle may stand for; every instruction makes one, and those of checkpoints share small ones only.
ALWAYS_ALLOWED, ALLOWED_PER_STEP = 1_000_000, 100
_PUT, _GET = ("BINPUT", "LONG_BINPUT", "PUT"), ("BINGET", "LONG_BINGET", "GET")
_FILLED = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")  # their first operand is changed in place
_MARK: list[int] = []


def check_size(file: IO[bytes]) -> None:
    """Reads one pickle and compares what it stands for with its length.

    Raises:
        ValueError: if it unfolds to much more, or is no pickle.
    """
    stack: list[list[int]] = []  # each object as [its size], which the memo shares
    memo: dict[int, list[int]] = {}
    try:
        for steps, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if opcode.name in _PUT or opcode.name == "MEMOIZE":
                memo[len(memo) if opcode.name == "MEMOIZE" else int(argument)] = stack[-1]
            elif opcode.name in _GET:
                stack.append(memo[int(argument)])
            elif opcode.name == "MARK":
                stack.append(_MARK)
            else:
                _step(opcode, stack)
                if stack and stack[-1] and stack[-1][0] > ALWAYS_ALLOWED + ALLOWED_PER_STEP * steps:
                    raise ValueError("it unfolds to far more objects than it has bytes")
    except (IndexError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"it is no complete pickle ({type(error).__name__})") from error


def _step(opcode: Any, stack: list[list[int]]) -> None:
    """Takes an instruction's operands from the stack and puts its results there."""
    names = [operand.name for operand in opcode.stack_before]
    taken = []
    if "mark" in names:
        while (top := stack.pop()) is not _MARK:
            taken.append(top)
        names = names[: names.index("mark")]
    taken += [stack.pop() for _ in names]
    size = 1 + sum(operand[0] for operand in taken)
    if opcode.name in _FILLED:
        taken[-1][0] = size
        stack.append(taken[-1])
    else:
        stack += [[size] for _ in opcode.stack_after]
