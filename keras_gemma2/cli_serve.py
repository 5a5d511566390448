"""`keras-gemma2 serve`: its options, and the server's process."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

LOOPBACK = ("localhost", "127.0.0.1", "::1")
LENGTH = 4096  # tokens of a request, if the model's context has so many


def add_options(add: Callable[..., Any], number: Callable[..., Any], backends: tuple[str, ...], default_preset: str) -> None:
    """Gives a parser the command's options.

    Args:
        add: the parser's `add_argument`.
        number: `number(kind, lowest)` is the type of an option that is a number of at least so much.
        backends: names of Keras's.
        default_preset: what is served unless told otherwise.
    """
    add("--preset", default=default_preset, help="built-in name, hub address, folder or file (default: %(default)s)")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for other machines, too (default: %(default)s)")
    add("--port", type=number(int, 0), default=8000, metavar="N", help="0 for a free one (default: %(default)s)")
    add("--backend", choices=backends, help="default: KERAS_BACKEND or keras.json, as Keras itself")
    add("--dtype", help="float32, bfloat16, ... (default: what the preset says)")
    add("--quantize", choices=("int8", "int4"), help="keep the weights in fewer bits, from reading them on")
    add("--name", help="what clients call the model (default: the preset's last part)")
    add("--max-batch", type=number(int, 1), default=8, metavar="B", help="requests that run at a time (default: %(default)s)")
    help = f"tokens of a request and its answer (default: {LENGTH}, or the model's context)"
    add("--max-length", type=number(int, 2), metavar="N", help=help)
    add("--queue", type=number(int, 1), default=64, metavar="N", help="requests that may wait (default: %(default)s)")
    add("--time-limit", type=number(float, 0), default=600.0, metavar="S", help="seconds of a request (default: %(default)s)")
    add("--adapter", action="append", default=[], metavar="NAME=FOLDER", help="an adapter in PEFT's format, as a model of its own")
    add("--api-key", help="clients must send it (default: KERAS_GEMMA2_API_KEY, else none)")


def check_options(options: argparse.Namespace) -> dict[str, str]:
    """The adapters' folders by name; raises before a model is loaded.

    Raises:
        ValueError: for options that do not fit together.
        ImportError: without the packages of an HTTP server.
    """
    missing = [name for name in ("fastapi", "prometheus_client", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(name.replace("_", "-") for name in missing)
        raise ImportError(f"`serve` needs {' and '.join(missing)}, not installed. Install with: pip install {names}")
    adapters: dict[str, str] = {}
    for each in options.adapter:
        name, equals, folder = each.partition("=")
        if not (name and equals and folder) or name in adapters:
            raise ValueError(f"argument --adapter: must be NAME=FOLDER, each name once, got {each!r}")
        if not os.path.isdir(folder):
            raise ValueError(f"argument --adapter: there is no folder {folder!r}")
        adapters[name] = folder
    if model_name(options) in adapters:
        raise ValueError(f"argument --adapter: {model_name(options)!r} is the model's own name; choose another, or a --name")
    if options.port > 65535:
        raise ValueError(f"argument --port: must be at most 65535, got {options.port}")
    return adapters


SWITCH_SECONDS = 0.0002  # for which the thread of the connections may keep the one of the model waiting


def model_name(options: argparse.Namespace) -> str:
    """What clients call the model."""
    return options.name or os.path.basename(options.preset.rstrip("/")) or options.preset


def serve_command(lm: Any, options: argparse.Namespace, adapters: dict[str, str]) -> int:
    """Serves until a signal ends it; returns the exit code."""
    import uvicorn

    from keras_gemma2.serving.app import PATHS, Served, make_app
    from keras_gemma2.serving.batch import Batch
    from keras_gemma2.serving.connections import PatientProtocol, allow_many_files
    from keras_gemma2.serving.engine import Engine
    from keras_gemma2.serving.guard import Guard, Limits
    from keras_gemma2.serving.metrics import Metrics

    for name, folder in adapters.items():
        lm.load_adapter(folder, name=name)
    context = lm.backbone.config.max_sequence_length
    if options.max_length is not None and options.max_length > context:
        raise ValueError(f"argument --max-length: the model's context has {context} tokens, got {options.max_length}")
    length = options.max_length or min(LENGTH, context)

    def make_batch() -> Batch:
        batch = Batch(lm.backbone, options.max_batch, length, kept=options.max_batch, adapters=list(adapters))
        batch.warm_up()
        return batch

    print("keras-gemma2: compiling ...", file=sys.stderr, flush=True)
    engine = Engine(make_batch, options.queue)
    metrics, time_limit = Metrics(engine), options.time_limit or None
    app = make_app(Served(engine, lm.preprocessor, model_name(options), tuple(adapters), length, time_limit, metrics))
    key = options.api_key or os.environ.get("KERAS_GEMMA2_API_KEY") or None
    hosts = frozenset(LOOPBACK) if options.host in LOOPBACK else None
    guarded = metrics.counting(Guard(app, Limits(key, hosts=hosts)), PATHS)
    allow_many_files()
    config = uvicorn.Config(
        guarded, options.host, options.port, http=PatientProtocol, log_level="warning", timeout_graceful_shutdown=10
    )
    server = _server(engine, uvicorn.Server)(config)
    sys.setswitchinterval(SWITCH_SECONDS)
    engine.start()
    server.run()
    engine.close(0)
    return 0


def _server(engine: Any, base: type) -> type:
    """uvicorn's server, which lets running answers end before it does: new requests get a 503 meanwhile."""

    class Server(base):
        _closing: threading.Thread | None = None

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if self.started:
                host, port = self.servers[0].sockets[0].getsockname()[:2]
                where = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
                print(f"keras-gemma2: serving at {where}/v1, a chat page at {where}/", file=sys.stderr, flush=True)

        def handle_exit(self, sig: int, frame: Any) -> None:
            if self._closing is not None:  # asked twice: at once
                self.should_exit = self.force_exit = True
                return
            self._closing = threading.Thread(target=self._close, daemon=True)
            self._closing.start()

        def _close(self) -> None:
            engine.close()
            self.should_exit = True

    return Server
