"""Servers on free ports: of the embedded preset in a thread of this process, or by a command."""

import contextlib
import re
import socket
import subprocess
import threading
import time

import uvicorn

from keras_gemma2.serving.app import PATHS, Served, make_app
from keras_gemma2.serving.batch import Batch
from keras_gemma2.serving.engine import Engine
from keras_gemma2.serving.guard import Guard
from keras_gemma2.serving.metrics import Metrics

PATIENCE = 120
LENGTH = 256


@contextlib.contextmanager
def running(lm, size=4, queue_size=64, limits=None, length=LENGTH, adapters=(), **options):
    """A server behind a guard, if there are limits: its address and its engine."""
    engine = Engine(lambda: Batch(lm.backbone, size, length, kept=1, adapters=adapters), queue_size)
    metrics = Metrics(engine)
    app = make_app(Served(engine, lm.preprocessor, "mini", adapters, length, metrics=metrics, **options))
    app = metrics.counting(app if limits is None else Guard(app, limits), PATHS)
    engine.start()
    try:
        with listening(app) as address:
            yield address, engine
    finally:
        engine.close(0)


@contextlib.contextmanager
def listening(app, **options):
    """An ASGI application on a free port: its address."""
    server = uvicorn.Server(uvicorn.Config(app, **{"log_level": "warning", **options}))
    with socket.socket() as at:
        at.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [at]}, daemon=True)
        thread.start()
        started = time.monotonic()
        while not server.started and time.monotonic() < started + PATIENCE:
            time.sleep(0.01)
        try:
            yield at.getsockname()
        finally:
            server.should_exit = True
            thread.join(PATIENCE)


@contextlib.contextmanager
def commanded(command, environment):
    """A command that serves: its process, and its address once it tells that."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        found = None
        while found is None:
            line = process.stderr.readline()
            assert line, process.wait()
            found = re.search(r"serving at http://([\d.]+):(\d+)/v1", line)
        yield process, (found[1], int(found[2]))
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
