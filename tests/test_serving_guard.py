"""What a server keeps out, over real connections, and the command that starts and ends one."""

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from exported import small_preset
from http_server import PATIENCE, commanded, listening

from keras_gemma2 import Gemma2CausalLM
from keras_gemma2.serving.connections import PatientProtocol, allow_many_files
from keras_gemma2.serving.guard import Guard, Limits

pytestmark = pytest.mark.backend_free
JSON = {"Content-Type": "application/json"}
HEAD = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


async def echo(scope, receive, send):
    """Answers with the body it was given."""
    if scope["type"] == "http":
        body = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})


def guarded(**limits):
    return listening(Guard(echo, Limits(**limits)), http=PatientProtocol, log_level="error", lifespan="off")


def ask(address, method="POST", path="/v1/completions", body=b"{}", headers=JSON):
    connection = http.client.HTTPConnection(*address, timeout=PATIENCE)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


def message(answer):
    error = json.loads(answer)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["message"]


def received(raw):
    """All that a connection gives until it is closed."""
    return b"".join(iter(lambda: raw.recv(1000), b""))


def answer_of(status, address):
    """The body that a small request is refused with in the same way."""
    found = ask(address, body=b"x" * 1001)
    assert found[0] == status
    return found[1]


def test_what_comes_through():
    with guarded(body_bytes=1000) as address:
        assert ask(address, body=b"x" * 1000) == (200, b"x" * 1000)
        assert ask(address, headers={"Content-Type": "Application/JSON; charset=utf-8"})[0] == 200
        assert ask(address, "GET", body=None, headers={})[0] == 200
        assert ask(address, headers={**JSON, "Origin": "http://{}:{}".format(*address)})[0] == 200


def test_bodies_that_are_too_large():
    """Said in the header, or found in chunks; the server goes on."""
    with guarded(body_bytes=1000) as address:
        status, answer = ask(address, body=b"x" * 1001)
        assert status == 413 and "more than 1000 bytes" in message(answer)
        connection = http.client.HTTPConnection(*address, timeout=PATIENCE)
        connection.request("POST", "/", iter([b"x" * 600] * 2), JSON, encode_chunked=True)
        answer = connection.getresponse()
        assert answer.status == 413 and "more than 1000 bytes" in message(answer.read())
        connection.close()
        # Who sends all of 100 MB gets the answer too, and not a connection that is reset; who waits for it need not send them.
        assert ask(address, body=bytes(100_000_000)) == (413, answer_of(413, address))
        for more in (b"", b"Expect: 100-continue\r\n"):
            with socket.create_connection(address, PATIENCE) as raw:
                raw.sendall(HEAD + more + b"Content-Length: 100000000\r\n\r\n" + (b"" if more else b"xx"))
                assert raw.recv(100).startswith(b"HTTP/1.1 413")
        assert ask(address)[0] == 200


def test_a_body_without_end(monkeypatch):
    """One that is refused is taken for a while, and no longer."""
    monkeypatch.setattr("keras_gemma2.serving.guard.DRAINED_BYTES", 10_000_000)
    with guarded(body_bytes=1000) as address, socket.create_connection(address, PATIENCE) as raw:
        raw.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        chunk, sent = b"10000\r\n" + bytes(0x10000) + b"\r\n", 0
        with contextlib.suppress(ConnectionError):
            while sent < 1_000_000_000:
                raw.sendall(chunk)
                sent += len(chunk)
        assert 5_000_000 < sent < 1_000_000_000
        assert ask(address)[0] == 200


def test_what_is_no_http():
    with guarded() as address, socket.create_connection(address, PATIENCE) as raw:
        raw.sendall(b"hello there\r\n\r\n")
        head, _, body = received(raw).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400") and "not a request of HTTP" in message(body)
        assert ask(address)[0] == 200


def test_bodies_that_do_not_arrive():
    with guarded(body_seconds=0.2) as address, socket.create_connection(address, PATIENCE) as raw:
        raw.sendall(HEAD + b"Content-Length: 10\r\n\r\nxx")
        head, _, body = received(raw).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408") and "did not arrive within 0.2 seconds" in message(body)
        assert ask(address)[0] == 200


def test_keys():
    with guarded(api_key="sesame é") as address:
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}, {"Authorization": "sesame é"}):
            status, answer = ask(address, headers={**JSON, **given})
            assert status == 401 and "API key is missing or wrong" in message(answer)
        right = {"Authorization": "Bearer sesame é".encode()}
        assert ask(address, headers={**JSON, **right})[0] == 200
        assert ask(address, "GET", "/health", None, {})[0] == 200
        assert ask(address, "GET", "/v1/models", None, {})[0] == 401


def test_headers_that_do_not_arrive(monkeypatch):
    """Nothing at all, byte by byte, and a second request of a connection; who is in time is answered."""
    monkeypatch.setattr("keras_gemma2.serving.connections.HEADER_SECONDS", 0.5)
    whole = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    with guarded() as address:
        with socket.create_connection(address, PATIENCE) as silent:
            assert silent.recv(100) == b""
        with socket.create_connection(address, PATIENCE) as slow:
            slow.settimeout(0.05)
            start, ended = time.monotonic(), False
            while not ended and time.monotonic() < start + PATIENCE:
                with contextlib.suppress(TimeoutError):
                    try:
                        slow.sendall(b"G")
                        ended = slow.recv(100) == b""
                    except (BrokenPipeError, ConnectionResetError):
                        ended = True
            assert ended
        with socket.create_connection(address, PATIENCE) as again:
            again.sendall(whole)
            assert again.recv(1000).startswith(b"HTTP/1.1 200")
            again.sendall(whole[:20])
            while received := again.recv(1000):
                assert b"HTTP/1.1" not in received  # the rest of the first answer
            time.sleep(0.1)
        with socket.create_connection(address, PATIENCE) as late:
            time.sleep(0.2)
            late.sendall(whole)
            assert late.recv(1000).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"Content-Type": "text/plain"}, 415),  # what a page of another origin can send unasked
        ({}, 415),
        ({**JSON, "Origin": "https://example.com"}, 403),
        ({**JSON, "Origin": "null"}, 403),
        ({**JSON, "Origin": "http://[::1"}, 403),
        ({**JSON, "Host": "evil.example:8000"}, 403),
        ({**JSON, "Host": "[::1"}, 403),
        ({**JSON, "Host": "localhost:1"}, 200),
        ({**JSON, "Host": "[::1]:8000"}, 200),
    ],
)
def test_other_origins_and_names(headers, status):
    with guarded(hosts=frozenset({"localhost", "127.0.0.1", "::1"})) as address:
        found, answer = ask(address, headers=headers)
        assert found == status and (status == 200 or message(answer))


# The command ------------------------------------------------------------------------------------------------------------


def served(*arguments, **environment):
    """`keras-gemma2 serve` on a free port: its process and its address."""
    allow_many_files()  # of the tests' own, which the server inherits
    command = [sys.executable, "-m", "keras_gemma2", "serve", "--preset", small_preset(), "--port", "0", "--max-batch", "2"]
    command += ["--max-length", "128", *arguments]
    return commanded(command, {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment})


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter of a preset, and the model that has it."""
    lm, draw = Gemma2CausalLM.from_preset(small_preset(), quantize="int8"), np.random.default_rng(1)
    lm.enable_lora(rank=4, targets=["down"], name="tuned")
    for variable in lm.trainable_variables:
        variable.assign(draw.normal(0, 0.3, variable.shape))
    folder = tmp_path_factory.mktemp("adapters") / "tuned"
    lm.save_adapter(folder)
    return lm, folder


def test_the_command(adapter):
    """Codes of 8 bits, an adapter, a key; it ends on SIGTERM: what runs is answered, what comes is refused."""
    lm, folder = adapter
    options = ("--name", "mini", "--quantize", "int8", "--adapter", f"tuned={folder}")
    with served(*options, KERAS_GEMMA2_API_KEY="k") as (process, address):
        headers = {**JSON, "Authorization": "Bearer k"}
        status, answer = ask(address, "GET", "/v1/models", None, headers)
        assert status == 200 and [model["id"] for model in json.loads(answer)["data"]] == ["mini", "tuned"]
        assert ask(address, "GET", "/v1/models", None, {})[0] == 401
        assert ask(address, "GET", "/v1/models", None, {**headers, "Host": "evil.example"})[0] == 403
        texts = []
        for name in ("mini", "tuned"):
            body = {"model": name, "prompt": "The state of our union is", "max_tokens": 12, "temperature": 0}
            texts.append(json.loads(ask(address, body=json.dumps(body), headers=headers)[1])["choices"][0]["text"])
            with lm.backbone.adapter_set.only(None if name == "mini" else name):
                expected = lm.generate(body["prompt"], max_new_tokens=12, sampler="greedy", strip_prompt=True)
            # Other sizes of a batch may round activations for int8 otherwise: the answers begin alike.
            assert texts[-1][:8] == expected[:8]
        assert texts[0] != texts[1]
        stream = http.client.HTTPConnection(*address, timeout=PATIENCE)
        waiting = http.client.HTTPConnection(*address, timeout=PATIENCE)
        waiting.connect()
        body = {"prompt": "The", "max_tokens": 120, "temperature": 0, "stream": True}
        stream.request("POST", "/v1/completions", json.dumps(body), headers)
        running = stream.getresponse()
        assert running.readline().startswith(b"data: {")
        process.send_signal(signal.SIGTERM)
        statuses = set()
        with contextlib.suppress(OSError, http.client.HTTPException):  # until it listens no more
            while True:
                statuses.add(ask(address, body=json.dumps({"prompt": "a", "max_tokens": 1}), headers=headers)[0])
                time.sleep(0.01)
        rest = running.read()
        assert rest.endswith(b"data: [DONE]\n\n") and b'"finish_reason": "length"' in rest
        assert 503 in statuses and statuses <= {200, 503}
        assert process.wait(PATIENCE) == 0


def test_a_thousand_connections():
    """A thousand that say nothing, then a thousand requests at once: each is answered or told to come again; the server goes on."""
    with served("--dtype", "float32", "--queue", "16") as (_, address):
        with contextlib.ExitStack() as stack:
            for _ in range(1000):
                stack.enter_context(socket.create_connection(address, PATIENCE))
            assert ask(address, "GET", "/health", None, {})[0] == 200
        body = json.dumps({"prompt": "The", "max_tokens": 4})
        with contextlib.ExitStack() as stack:
            all_of_them = [http.client.HTTPConnection(*address, timeout=PATIENCE) for _ in range(1000)]
            for connection in all_of_them:
                stack.callback(connection.close)
                connection.connect()
            for connection in all_of_them:
                connection.request("POST", "/v1/completions", body, JSON)
            statuses = [connection.getresponse().status for connection in all_of_them]
        assert set(statuses) == {200, 429} and statuses.count(200) >= 16
        assert ask(address, body=body)[0] == 200


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--adapter", "x"], "argument --adapter: must be NAME=FOLDER"),
        (["--adapter", "x=/no/such/folder"], "there is no folder '/no/such/folder'"),
        (["--port", "70000"], "argument --port: must be at most 65535"),
        (["--max-length", "100000"], "argument --max-length: the model's context has"),
        (["--max-batch", "0"], "must be an integer of at least 1"),
        (["--preset", "no_such_preset"], "no_such_preset"),
    ],
)
def test_wrong_options(arguments, words):
    command = [sys.executable, "-m", "keras_gemma2", "serve", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and words in done.stderr


def test_a_client_that_reads_nothing():
    """Its application is told as if it had gone."""
    seen = []

    async def app(scope, receive, send):
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        except OSError as error:
            seen.append(str(error))

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        await asyncio.Event().wait()

    scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": [(b"host", b"localhost")]}
    asyncio.run(Guard(app, Limits(send_seconds=0.05))(scope, receive, send))
    assert seen == ["The client accepted nothing for 0.05 seconds."]
