"""The HTTP interface: OpenAI's completions over an engine.

Source: OpenAI's API reference, for paths, bodies and errors.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import math
import random
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from keras_gemma2.chat import ChatFormat, read_messages
from keras_gemma2.generation.sampler import Sampler
from keras_gemma2.serving.bodies import Bodies, error_body, token_text, usage
from keras_gemma2.serving.choices import Choices, EngineError, Piece, TimeLimitError
from keras_gemma2.serving.engine import ClosedError, Engine, QueueFullError
from keras_gemma2.serving.jobs import Job
from keras_gemma2.serving.metrics import CONTENT_TYPE, Metrics
from keras_gemma2.serving.page import NAMES, add_page
from keras_gemma2.serving.schema import ChatCompletionRequest, CompletionRequest, ErrorResponse

PATHS = frozenset((*NAMES, "/health", "/ready", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions"))
SHORT_TEXT = 4096  # characters, of which tokens are made in a millisecond or two
RETRY_AFTER = 2  # seconds that a client is told to wait where the queue is full


@dataclasses.dataclass(frozen=True)
class Served:
    """What an app serves.

    Args:
        engine: that runs the jobs.
        preprocessor: of the model, whose tokenizer has a vocabulary.
        name: of the model without adapters.
        adapters: names of the adapters, each a model of its own to clients.
        length: tokens of a request and its answer, at most.
        time_limit: seconds of a request; None for no limit.
        metrics: of the engine, given at `/metrics`; None for none.
    """

    engine: Engine
    preprocessor: Any
    name: str
    adapters: tuple[str, ...] = ()
    length: int = 1024
    time_limit: float | None = 600.0
    metrics: Metrics | None = None


class RefusedError(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: what is wrong and how to mend it.
        param: which field.
        code: OpenAI's name of the error, if it has one.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def make_app(served: Served) -> FastAPI:
    """An ASGI application.

    Args:
        served: what it serves; its engine is started and closed by whoever made it.

    Example:
        >>> uvicorn.run(make_app(Served(engine, lm.preprocessor, "gemma2_mini_en")))
    """
    app = FastAPI(title="keras_gemma2", docs_url=None, redoc_url=None)
    check_characters = functools.partial(_check_characters, served.length, _most_characters(served.preprocessor.tokenizer))
    _add_errors(app)
    add_page(app)
    failures: dict[int | str, dict[str, Any]] = {
        "4XX": {"model": ErrorResponse, "description": "The request is refused; the message says why and how to mend it."},
        "5XX": {"model": ErrorResponse, "description": "The server is busy, about to end, or at fault."},
    }
    answers = {200: {"content": {"application/json": {}, "text/event-stream": {}}, "description": "As OpenAI's."}, **failures}

    @app.get("/health", responses={503: {"description": "It has failed and must be started again."}})
    async def health() -> JSONResponse:
        has_failed = served.engine.has_failed
        return JSONResponse({"status": "failed" if has_failed else "ok"}, 503 if has_failed else 200)

    @app.get("/ready", responses={503: {"description": "Not yet, or no more."}})
    async def ready() -> JSONResponse:
        is_ready = served.engine.is_ready
        return JSONResponse({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)

    if served.metrics is not None:
        metrics = served.metrics

        @app.get("/metrics", response_class=PlainTextResponse)
        async def counts() -> Response:
            return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        names = (served.name, *served.adapters)
        about = {"object": "model", "created": 0, "owned_by": "keras_gemma2"}
        return {"object": "list", "data": [{"id": name, **about} for name in names]}

    @app.post("/v1/completions", responses=answers)
    async def completions(body: CompletionRequest, request: Request) -> Any:
        if isinstance(body.prompts[0], str):
            for text in body.prompts:
                check_characters(len(text), "prompt")
            rows = await _aside(sum(map(len, body.prompts)), lambda: served.preprocessor.prompt_ids(body.prompts))
            prompts = [[int(token_id) for token_id in row] for row in rows]
        else:
            prompts = [list(ids) for ids in body.prompts]
        return await _answer(served, body, prompts, request, chat=False)

    @app.post("/v1/chat/completions", responses=answers)
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Any:
        roles = {"developer": "system"}
        messages = [{"role": roles.get(message.role, message.role), "content": message.text} for message in body.messages]
        characters = sum(len(message["content"].strip()) for message in messages)
        check_characters(characters, "messages")
        chat_format = ChatFormat(served.preprocessor.tokenizer)
        try:
            prompt = await _aside(characters, lambda: chat_format.conversation(read_messages(messages)))
        except (TypeError, ValueError) as error:
            raise RefusedError(400, str(error), "messages") from error
        return await _answer(served, body, [prompt], request, chat=True)

    return app


# One request ------------------------------------------------------------------------------------------------------------


def _most_characters(tokenizer: Any) -> float:
    """Characters that a token can stand for at most: those of the longest piece, where nothing is dropped and bytes are pieces."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.proto)
    normalizer = model.normalizer_spec
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces or not model.trainer_spec.byte_fallback:
        return math.inf
    return max(len(piece.piece) for piece in model.pieces)


def _check_characters(length: int, most: float, count: int, param: str) -> None:
    """Refuses a text of which only the number of characters need be known: making tokens of it would hold everybody up."""
    if count > length * most:
        raise RefusedError(
            400,
            f"The prompt has {count} characters, which cannot be as few as {length} tokens, this server's limit. Shorten it.",
            param,
            "context_length_exceeded",
        )


async def _aside(characters: int, read: Callable[[], Any]) -> Any:
    """What `read` makes of texts: in a thread if they are long, as the connections' would let nobody's tokens pass meanwhile."""
    return await run_in_threadpool(read) if characters > SHORT_TEXT else read()


async def _answer(served: Served, body: Any, prompts: Sequence[list[int]], request: Request, chat: bool) -> Any:
    tokenizer = served.preprocessor.tokenizer
    jobs = [job for index, prompt in enumerate(prompts) for job in _jobs(served, body, prompt, index)]
    if len(jobs) > served.engine.queue_size:
        message = f"{len(jobs)} answers are asked for at once, but the queue of this server takes {served.engine.queue_size}."
        raise RefusedError(400, f"{message} Ask for fewer at a time.", "n" if body.choices > 1 else "prompt")
    choices = Choices(served.engine, tokenizer, jobs, body.stops, served.time_limit)
    try:
        choices.submit()
    except ValueError as error:
        raise RefusedError(400, str(error), "prompt") from error
    model = served.name if body.model is None else body.model
    bodies = Bodies(chat, model, body.top, lambda token_id: token_text(tokenizer, token_id))
    count = sum(map(len, prompts))

    def counted() -> dict[str, Any]:
        return usage(count, sum(job.reused for job in jobs[:: body.choices]), choices.tokens)

    if body.stream:
        events = _events(choices, bodies, chat, counted if body.counts_usage else None)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    texts = await _unless_gone(request, _all_pieces(choices))
    return JSONResponse(bodies.whole(texts, counted()))


def _jobs(served: Served, body: Any, prompt: list[int], index: int) -> list[Job]:
    """The jobs of one prompt, one a choice."""
    if body.model not in (None, served.name, *served.adapters):
        names = ", ".join((served.name, *served.adapters))
        raise RefusedError(404, f"There is no model {body.model!r} here. There are: {names}.", "model", "model_not_found")
    room = served.length - len(prompt)
    if room < 1 or (body.asked is not None and body.asked > room):
        raise RefusedError(
            400,
            f"The prompt has {len(prompt)} tokens, and {body.asked or 1} more are asked for, but this server's limit is "
            f"{served.length} in all. Shorten the prompt, or ask for fewer tokens.",
            "messages" if isinstance(body, ChatCompletionRequest) else "prompt",
            "context_length_exceeded",
        )
    new = min(room, body.asked or body.default_tokens or room)
    temperature = 1.0 if body.temperature is None else body.temperature
    sampler = Sampler(temperature, None, body.top_p)
    seed = random.SystemRandom().getrandbits(31) if body.seed is None else body.seed + index * body.choices
    adapter = body.model if body.model in served.adapters else None
    stops = frozenset(served.preprocessor.tokenizer.stop_token_ids)
    return [Job(prompt, len(prompt) + new, sampler, seed + i, stops, adapter, body.top or 0) for i in range(body.choices)]


async def _all_pieces(choices: Choices) -> list[list[Piece]]:
    texts: list[list[Piece]] = [[] for _ in choices.jobs]
    async with contextlib.aclosing(choices.pieces()) as pieces:
        async for piece in pieces:
            texts[piece.index].append(piece)
    return texts


async def _unless_gone(request: Request, work: Any) -> Any:
    """What a coroutine returns; it is cancelled when the client goes away."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RefusedError(499, "The client went away.")
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def _events(choices: Choices, bodies: Bodies, chat: bool, counted: Any) -> AsyncIterator[str]:
    """A stream of server-sent events; an error in the middle is one of them."""
    begun: set[int] = set()
    try:
        async with contextlib.aclosing(choices.pieces()) as pieces:
            async for piece in pieces:
                if chat and piece.index not in begun:
                    begun.add(piece.index)
                    yield _event(bodies.first(piece.index))
                yield _event(bodies.chunk(piece))
        if counted is not None:
            yield _event(bodies.usage_chunk(counted()))
    except (ClosedError, EngineError, TimeLimitError) as error:
        yield _event(error_body(str(error), "server_error"))
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


# Errors -----------------------------------------------------------------------------------------------------------------


def _add_errors(app: FastAPI) -> None:
    """Answers every error in OpenAI's shape."""

    def answer(status: int, message: str, param: str | None = None, code: str | None = None, **headers: str) -> JSONResponse:
        kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
        return JSONResponse(error_body(message, kind, param, code), status, headers=headers)

    @app.exception_handler(RefusedError)
    async def refused(request: Request, error: RefusedError) -> JSONResponse:
        return answer(error.status, str(error), error.param, error.code)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # Of a field that may be of several types, what is wrong within one of them says more than that it is none of them.
        found = max(error.errors(), key=lambda each: (each["type"] not in ("string_type", "list_type"), len(each["loc"])))
        place = [str(part) for part in found["loc"][1:] if part != "str" and (isinstance(part, int) or part.isidentifier())]
        message = found["msg"].removeprefix("Value error, ")
        if not place or found["type"] == "json_invalid":
            return answer(400, message)
        return answer(400, f"`{'.'.join(place)}`: {message}", place[0])

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, str(error.detail))

    @app.exception_handler(QueueFullError)
    async def full(request: Request, error: QueueFullError) -> JSONResponse:
        return answer(429, str(error), code="rate_limit_exceeded", **{"Retry-After": str(RETRY_AFTER)})

    @app.exception_handler(ClosedError)
    async def closed(request: Request, error: ClosedError) -> JSONResponse:
        return answer(503, str(error), **{"Retry-After": str(RETRY_AFTER)})

    @app.exception_handler(TimeLimitError)
    async def late(request: Request, error: TimeLimitError) -> JSONResponse:
        return answer(504, str(error))

    @app.exception_handler(EngineError)
    async def failed(request: Request, error: EngineError) -> JSONResponse:
        return answer(500, str(error))

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        return answer(500, "The server is at fault; its log says more.")  # Starlette raises it again, for the log
