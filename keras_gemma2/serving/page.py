"""The chat page: some files, and nothing else of any folder."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Response

FOLDER = Path(__file__).with_name("page")
_TYPES = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}
NAMES = {"/": "index.html", "/chat.css": "chat.css", "/chat.js": "chat.js", "/events.js": "events.js", "/store.js": "store.js"}
_HEADERS = {
    # What a model writes is text to the page; were it ever taken for more, it still could not run or load anything.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Gives an app the page's files, each at a path of its own: no path of a request is ever one of a file."""
    for path, name in NAMES.items():
        app.add_api_route(path, _giving((FOLDER / name).read_bytes(), _TYPES[name.rpartition(".")[2]]), include_in_schema=False)


def _giving(content: bytes, kind: str) -> object:
    async def give() -> Response:
        return Response(content, media_type=kind, headers=_HEADERS)

    return give
