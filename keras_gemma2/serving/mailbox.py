"""From the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
import collections
import weakref
from typing import Any, ClassVar


class Mailbox:
    """Brings what another thread has for queues of an event loop, and wakes the loop once for all that comes meanwhile.

    Waking it for each of a step's tokens would have both threads wait for each other.

    Example:
        >>> queue = asyncio.Queue()
        >>> mailbox = Mailbox.of(asyncio.get_running_loop())
        >>> mailbox.post(queue, "from another thread")
        >>> await queue.get()
        'from another thread'
    """

    _ALL: ClassVar[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Mailbox]] = weakref.WeakKeyDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)  # which `_ALL` would keep for ever otherwise
        self._posted: collections.deque[tuple[asyncio.Queue, Any]] = collections.deque()
        self._is_woken = False

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> Mailbox:
        """The one of a loop; to be asked for in it."""
        if loop not in cls._ALL:
            cls._ALL[loop] = cls(loop)
        return cls._ALL[loop]

    def post(self, queue: asyncio.Queue, item: Any) -> None:
        """Puts an item into a queue of the loop, soon; nothing happens where the loop has ended."""
        self._posted.append((queue, item))
        loop = self._loop()
        if not self._is_woken and loop is not None and not loop.is_closed():
            self._is_woken = True
            loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_woken = False  # before it looks: what is posted after that wakes the loop again
        while self._posted:
            queue, item = self._posted.popleft()
            queue.put_nowait(item)
