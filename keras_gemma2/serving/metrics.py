"""What a server has done and does, for Prometheus.

Source: Prometheus's text format and naming conventions, by its own Python client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from keras_gemma2.serving.engine import Ended, Engine
from keras_gemma2.serving.jobs import Chosen

CONTENT_TYPE = CONTENT_TYPE_LATEST
# Seconds: from a step of a small model on a GPU to a long wait in a queue.
_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
_PREFIX = "keras_gemma2_"


class Metrics:
    """Counts of one engine and of the requests to it.

    Args:
        engine: whose jobs are counted from now on; it tells one `Metrics` at a time.

    Example:
        >>> metrics = Metrics(engine)
        >>> metrics.text().decode().splitlines()[0]
        '# HELP keras_gemma2_requests_total Requests answered.'
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._registry = engine, CollectorRegistry()
        self._requests = Counter(_PREFIX + "requests", "Requests answered.", ("path", "status"), registry=self._registry)
        self._ended = Counter(_PREFIX + "answers", "Answers that ended, by why.", ("reason",), registry=self._registry)
        self._tokens = Counter(_PREFIX + "generated_tokens", "Tokens generated.", registry=self._registry)
        self._first = self._histogram("time_to_first_token_seconds", "From a request's arrival to its first token.")
        self._next = self._histogram("time_between_tokens_seconds", "From one token of an answer to its next.")
        self._registry.register(self)
        engine.observe = self._observed

    def _histogram(self, name: str, about: str) -> Histogram:
        return Histogram(_PREFIX + name, about, buckets=_BUCKETS, registry=self._registry)

    def _observed(self, what: Chosen | Ended, seconds: float, is_first: bool) -> None:
        if isinstance(what, Ended):
            self._ended.labels(what.reason).inc()
        elif what.token_id is not None:
            self._tokens.inc()
            (self._first if is_first else self._next).observe(seconds)

    def collect(self) -> Iterator[Any]:
        """What the engine itself keeps; Prometheus's client calls it."""
        run, reused = self._engine.prompt_tokens
        about = "Tokens of prompts, run or reused from caches."
        prompts = CounterMetricFamily(_PREFIX + "prompt_tokens", about, labels=("source",))
        prompts.add_metric(["run"], run)
        prompts.add_metric(["reused"], reused)
        yield prompts
        yield GaugeMetricFamily(_PREFIX + "running", "Answers being written.", self._engine.running)
        yield GaugeMetricFamily(_PREFIX + "waiting", "Answers in the queue.", self._engine.waiting)
        yield GaugeMetricFamily(_PREFIX + "compiled_shapes", "Sizes of compiled code used.", len(self._engine.batch.shapes))

    def text(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return generate_latest(self._registry)

    def counting(self, app: Callable, paths: frozenset[str]) -> Callable:
        """An ASGI application whose answers are counted; those to other paths than these as "other"."""

        async def counted(scope: Any, receive: Any, send: Any) -> None:
            async def watching(message: Any) -> None:
                if message["type"] == "http.response.start":
                    path = scope["path"] if scope["path"] in paths else "other"
                    self._requests.labels(path, str(message["status"])).inc()
                await send(message)

            await app(scope, receive, watching)

        return counted
