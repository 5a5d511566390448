"""Connections: many of them, none of which may hold one for nothing."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from keras_gemma2.serving.bodies import error_body

HEADER_SECONDS = 10.0


class PatientProtocol(AutoHTTPProtocol):
    """uvicorn's HTTP/1.1 with a time limit for what it has none for: a request's line and headers.

    A client that sends them byte by byte, or nothing at all (slow loris), is let go `HEADER_SECONDS` after it connected or began.
    How long a body may take is the guard's to say.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """As asyncio has it."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """As asyncio has it."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """As asyncio has it."""
        self._forget()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """uvicorn's answer to what is no HTTP, in the shape of all other errors."""
        body = json.dumps(error_body(f"This is not a request of HTTP: {msg}", "invalid_request_error")).encode()
        lines = ["HTTP/1.1 400 Bad Request", "content-type: application/json", f"content-length: {len(body)}", "connection: close"]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()

    @property
    def _has_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch(self) -> None:
        if self._has_request:
            self._forget()
        elif self._timer is None:  # more bytes do not put it off
            self._timer = asyncio.get_running_loop().call_later(HEADER_SECONDS, self._late)

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if not self._has_request:
            self.transport.close()


def allow_many_files() -> None:
    """Lets this process have as many connections as the system allows it, where that is to be had for the asking."""
    try:
        import resource
    except ImportError:  # no such limit, as on Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
