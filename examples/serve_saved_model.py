"""Answer requests in TensorFlow Serving's REST shape from an exported SavedModel, with TensorFlow and TensorFlow Text alone.

It stands in for TensorFlow Serving where that is not at hand: to write a client against, or to see that an export answers. There is
no batching, reloading, gRPC or encryption. In production TensorFlow Serving itself is to be used, with the same folder and address:

    keras-gemma2 export gemma2_mini_en served/1
    docker run --rm -p 8501:8501 -v "$PWD/served:/models/gemma2" -e MODEL_NAME=gemma2 tensorflow/serving
    python examples/serve_saved_model.py served --name gemma2 --port 8501    # the stand-in

    curl http://127.0.0.1:8501/v1/models/gemma2:predict -d '{"instances": ["The state of our union is"]}'
    curl http://127.0.0.1:8501/v1/models/gemma2:predict -d '{"signature_name": "generate", "inputs": {"prompts": ["The state of"],
        "max_new_tokens": 8, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "seed": 1}}'

`instances` are rows, for signatures whose inputs all have a batch; scalars need the columns of `inputs`.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import tensorflow as tf
import tensorflow_text  # noqa: F401 - registers the operations of texts

LARGEST_BODY = 4 << 20  # bytes
ADDRESS = re.compile(r"/v1/models/([^/:]+)(?:/versions/(\d{1,18}))?(:predict)?")


class Refused(Exception):
    """A request that gets an error, and the error's status."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


class Model:
    """The newest version of a SavedModel, asked in JSON's values."""

    def __init__(self, folder: Path, name: str):
        folder = newest_version(folder)
        self.name, self.version = name, int(folder.name) if folder.name.isdecimal() else 1
        self.served = tf.saved_model.load(str(folder))

    def status(self) -> dict[str, Any]:
        state = {"state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
        return {"model_version_status": [{"version": str(self.version), **state}]}

    def predict(self, request: Any) -> dict[str, Any]:
        if not isinstance(request, dict) or ("instances" in request) == ("inputs" in request):
            raise Refused("The body must be a JSON object with either 'instances' or 'inputs'.")
        name = request.get("signature_name", "serving_default")
        if not isinstance(name, str) or name not in self.served.signatures:
            raise Refused(f"Serving signature name: {name!r} not found in signature def. Known: {sorted(self.served.signatures)}.")
        signature = self.served.signatures[name]
        specs = signature.structured_input_signature[1]
        given = named(request["inputs"], specs) if "inputs" in request else columns(request["instances"], specs)
        outputs = signature(**{key: tensor(key, given[key], spec) for key, spec in specs.items()})
        values = {key: json_values(output.numpy().tolist()) for key, output in outputs.items()}
        if "inputs" in request:
            return {"outputs": unwrapped(values)}
        return {"predictions": [unwrapped(dict(zip(values, row))) for row in zip(*values.values())]}


def newest_version(folder: Path) -> Path:
    if (folder / "saved_model.pb").is_file():
        return folder.resolve()
    versions = [path.parent for path in folder.glob("*/saved_model.pb") if path.parent.name.isdecimal()]
    if not versions:
        raise SystemExit(f"{folder} is no SavedModel, and has none in a folder whose name is a number.")
    return max(versions, key=lambda path: int(path.name))


def is_bytes(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"b64"}


def named(inputs: Any, names: Iterable[str]) -> dict[str, Any]:
    """Inputs by name; the only one of a signature may come without it."""
    if not isinstance(inputs, dict) or is_bytes(inputs):
        inputs = {name: inputs for name in names} if len([*names]) == 1 else {}
    if inputs.keys() != set(names):
        raise Refused(f"Inputs must be an object with the keys {sorted(names)}. Received the keys {sorted(inputs)}.")
    return inputs


def columns(instances: Any, names: Iterable[str]) -> dict[str, list[Any]]:
    if not isinstance(instances, list) or not instances:
        raise Refused("'instances' must be a list of at least one.")
    rows = [named(instance, names) for instance in instances]
    return {name: [row[name] for row in rows] for name in names}


def tensor(name: str, value: Any, spec: tf.TensorSpec) -> tf.Tensor:
    wanted = f"`{name}` must be {spec.dtype.name} of shape {spec.shape}"
    try:
        result = tf.constant(checked(value, spec.dtype), spec.dtype)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:  # lists of unequal lengths, too
        raise Refused(f"{wanted}: {error}") from error
    if not spec.shape.is_compatible_with(result.shape):
        raise Refused(f"{wanted}. Received the shape {result.shape}.")
    return result


def checked(value: Any, dtype: tf.DType) -> Any:
    """With bytes decoded. `tf.constant` alone would wrap large integers round and take booleans for numbers."""
    if isinstance(value, list):
        return [checked(item, dtype) for item in value]
    if dtype == tf.string and is_bytes(value):
        return base64.b64decode(value["b64"], validate=True)
    if dtype == tf.string and isinstance(value, str):
        return value.encode()
    if dtype.is_floating and type(value) in (int, float) and dtype.min <= value <= dtype.max:
        return float(value)
    if dtype.is_integer and type(value) is int and dtype.min <= value <= dtype.max:
        return value
    raise TypeError(f"received {value!r:.80}")


def json_values(values: Any) -> Any:
    if isinstance(values, list):
        return [json_values(value) for value in values]
    return values.decode(errors="replace") if isinstance(values, bytes) else values


def unwrapped(values: dict[str, Any]) -> Any:
    """TensorFlow Serving leaves the name of a single output out."""
    return next(iter(values.values())) if len(values) == 1 else values


class Handler(BaseHTTPRequestHandler):
    timeout = 60  # seconds without a byte from the client

    def __init__(self, model: Model, *arguments: Any):
        self.model = model
        super().__init__(*arguments)

    def do_GET(self) -> None:
        self.answer(lambda: self.addressed("GET").status())

    def do_POST(self) -> None:
        self.answer(lambda: self.predict(self.body()))

    def predict(self, body: bytes) -> dict[str, Any]:
        model = self.addressed("POST")
        try:
            request = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Refused(f"JSON Parse error: {error}") from error
        return model.predict(request)

    def addressed(self, method: str) -> Model:
        address = ADDRESS.fullmatch(self.path)
        if not address or bool(address[3]) != (method == "POST"):
            raise Refused(f"Malformed request: {method} {self.path}")
        if address[1] != self.model.name or int(address[2] or self.model.version) != self.model.version:
            raise Refused(f"Servable not found for request: {self.path}", 404)
        return self.model

    def body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,18}", length):
            raise Refused("The request has no valid Content-Length.", 411)
        if int(length) > LARGEST_BODY:
            raise Refused(f"The body must have at most {LARGEST_BODY} bytes. Received: {length}.", 413)
        return self.rfile.read(int(length))

    def answer(self, work: Callable[[], dict[str, Any]]) -> None:
        try:
            status, answer = 200, work()
        except Refused as error:
            status, answer = error.status, {"error": str(error)}
        except tf.errors.InvalidArgumentError as error:  # less what TensorFlow writes above the graph's own message
            status, answer = 400, {"error": error.message.rpartition("<stack traces unavailable>\n")[2]}
        except Exception as error:
            status, answer = 500, {"error": f"{type(error).__name__}: {error}"}
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        if status == 413:  # closing on a client that is still sending would lose it the answer
            self.rfile.read(4 * LARGEST_BODY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a SavedModel, or a folder of them whose names are versions")
    parser.add_argument("--name", default="model", help="the model's, in addresses (default: model)")
    parser.add_argument("--host", default="127.0.0.1", help="to listen at (default: 127.0.0.1, this machine alone)")
    parser.add_argument("--port", type=int, default=8501, help="0 picks a free one (default: 8501)")
    options = parser.parse_args()
    handler = functools.partial(Handler, Model(options.folder, options.name))
    with ThreadingHTTPServer((options.host, options.port), handler) as server, contextlib.suppress(KeyboardInterrupt):
        print("http://{}:{}/v1/models/{}".format(*server.server_address[:2], options.name), flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
