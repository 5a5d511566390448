"""An exported SavedModel asked as TensorFlow Serving's clients ask: REST's shape, gRPC's messages, and a session over its graph."""

import base64
import json
import pickle
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from exported import TOLERANCE, ask, decoded, default, generate, padded, prompt_rows, small_preset

pytestmark = pytest.mark.backend_free  # other processes compute, with TensorFlow, whatever the backend here

EXAMPLE = Path(__file__).parents[1] / "examples" / "serve_saved_model.py"
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
TEXTS = ["The state of our union is", "", "Two\nlines: é 漢"]
NUMBERS = {"max_new_tokens": 6, "temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 3}
TOKENS = padded(prompt_rows(), 25)
REQUESTS = {
    "serving_default": default(TEXTS),
    "generate": generate(TEXTS, n=6, temperature=0.9, top_k=40, top_p=0.95, seed=3),
    "generate_tokens": ("generate_tokens", TOKENS),
    "score": ("score", TOKENS),
}


def export(folder, *arguments):
    command = [sys.executable, "-m", "keras_gemma2", "export", small_preset(), str(folder), "--max-new-tokens", "8", *arguments]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder of versions: one to serve, and what is no newer one."""
    folder = tmp_path_factory.mktemp("served")
    for other in ("9", "11", "old"):
        (folder / other).mkdir()
    for other in ("9", "old"):
        (folder / other / "saved_model.pb").write_bytes(b"not to be read")
    export(folder / "10")
    return folder


@pytest.fixture(scope="module")
def direct(served):
    """The SavedModel's own answers."""
    return dict(zip(REQUESTS, ask(served / "10", *REQUESTS.values())))


@pytest.fixture(scope="module")
def address(served):
    command = [sys.executable, str(EXAMPLE), str(served), "--name", "gemma2", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def send(address, body=None):
    """Status and answer; with a body a POST."""
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    try:
        with OPENER.open(address, data, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.status, json.load(error)


def predicted(address, **body):
    status, answer = send(f"{address}:predict", body)
    assert status == 200, answer
    (value,) = answer.values()
    return next(iter(answer)), value


# REST -------------------------------------------------------------------------------------------------------------------


def test_columns_with_scalars(address, direct):
    name, outputs = predicted(address, signature_name="generate", inputs={"prompts": TEXTS, **NUMBERS})
    assert name == "outputs" and outputs.keys() == {"completions", "num_tokens"}
    assert outputs["completions"] == decoded(direct["generate"]["completions"])
    assert outputs["num_tokens"] == direct["generate"]["num_tokens"].tolist()
    assert len(set(outputs["completions"])) == 3


def test_rows_of_one_input(address, direct):
    expected = decoded(direct["serving_default"]["completions"])
    assert predicted(address, instances=TEXTS) == ("predictions", expected)
    assert predicted(address, instances=[{"prompts": text} for text in TEXTS]) == ("predictions", expected)
    binary = [{"b64": base64.b64encode(text.encode()).decode()} for text in TEXTS]
    assert predicted(address, instances=binary) == ("predictions", expected)
    assert predicted(address, inputs=TEXTS) == ("outputs", expected)
    assert predicted(address, inputs={"prompts": binary}) == ("outputs", expected)
    assert predicted(f"{address}/versions/10", instances=TEXTS) == ("predictions", expected)


def test_rows_of_several(address, direct):
    rows = [{name: row.tolist() for name, row in zip(TOKENS, values)} for values in zip(*TOKENS.values())]
    name, predictions = predicted(address, signature_name="generate_tokens", instances=rows)
    assert name == "predictions" and len(predictions) == 4
    for key, expected in direct["generate_tokens"].items():
        assert [row[key] for row in predictions] == expected.tolist()


def test_scores(address, direct):
    """A single output is not wrapped."""
    columns = {name: values.tolist() for name, values in TOKENS.items()}
    name, outputs = predicted(address, signature_name="score", inputs=columns)
    real = TOKENS["padding_mask"] > 0
    assert name == "outputs" and np.shape(outputs) == (4, 25)
    assert np.abs(np.array(outputs) - direct["score"]["log_probabilities"])[real].max() < TOLERANCE


def test_status(address):
    status = {"state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
    for path in (address, f"{address}/versions/10"):
        assert send(path) == (200, {"model_version_status": [{"version": "10", **status}]})


def of_generate(**changes):
    given = {"prompts": TEXTS, **NUMBERS, **changes}
    return {"signature_name": "generate", "inputs": {name: value for name, value in given.items() if value is not None}}


def of_score(ids, mask=((1, 1),)):
    return {"signature_name": "score", "inputs": {"token_ids": ids, "padding_mask": mask}}


@pytest.mark.parametrize(
    "body, message",
    [
        (b"", "JSON Parse error"),
        (b'{"instances": ["a"]', "JSON Parse error"),
        (b'{"instances": ["\xff"]}', "JSON Parse error"),
        (b"[" * 100_000, "JSON Parse error"),
        (b'["a"]', "must be a JSON object"),
        ({"prompts": ["a"]}, "with either 'instances' or 'inputs'"),
        ({"instances": ["a"], "inputs": ["a"]}, "with either 'instances' or 'inputs'"),
        ({"instances": []}, "'instances' must be a list of at least one"),
        ({"instances": "a"}, "'instances' must be a list"),
        ({"instances": ["a", {"text": "b"}]}, "keys .'prompts'.. Received the keys .'text'"),
        ({"signature_name": "serve", "instances": ["a"]}, "'serve' not found in signature def. Known: .*'serving_default'"),
        ({"signature_name": ["score"], "instances": ["a"]}, "not found in signature def"),
        ({"signature_name": "score", "inputs": [[2, 5]]}, "keys .'padding_mask', 'token_ids'"),
        ({"signature_name": "generate", "instances": [{"prompts": "a", **NUMBERS}]}, r"of shape \(\). Received the shape \(1,\)"),
        (of_generate(seed=None), "must be an object with the keys .*'seed'"),
        (of_generate(top=1), "Received the keys .*'top'"),
        (of_generate(seed=[3]), r"`seed` must be int32 of shape \(\). Received the shape \(1,\)"),
        (of_generate(seed="3"), "`seed` must be int32 .*received '3'"),
        (of_generate(seed=3.0), "`seed` must be int32 .*received 3.0"),
        (of_generate(seed=True), "`seed` must be int32 .*received True"),
        (of_generate(seed=1 << 40), "`seed` must be int32 .*received 1099511627776"),
        (of_generate(temperature="hot"), "`temperature` must be float32 .*received 'hot'"),
        (of_generate(temperature=1e39), "`temperature` must be float32 .*received 1e.39"),
        (of_generate(temperature=10**400), "`temperature` must be float32"),
        (of_generate(prompts="a"), r"`prompts` must be string of shape \(None,\). Received the shape \(\)"),
        (of_generate(prompts=["a", 1]), "`prompts` must be string .*received 1"),
        (of_generate(prompts=["\ud800"]), "`prompts` must be string .*surrogates"),
        (of_generate(prompts=[{"b64": "?"}]), "`prompts` must be string .*base64"),
        (of_score([[2, 5], [2]]), "`token_ids` must be int32 .*non-rectangular"),
        (of_generate(max_new_tokens=0), "`max_new_tokens` must be at least 1"),  # from here on it is the graph that refuses
        (of_generate(prompts=[{"b64": "/w=="}]), "`prompts` must be UTF-8"),
        (of_score([[2, 5000]]), "`token_ids` must be from 0 to 4095"),
        (of_score([[2, 5]], [[1]]), "must have the same shape"),
    ],
)
def test_wrong_requests(address, body, message):
    """An error each, and the server goes on."""
    status, answer = send(f"{address}:predict", body)
    assert status == 400 and answer.keys() == {"error"} and re.search(message, answer["error"]), answer
    assert "Graph execution error" not in answer["error"]
    assert send(address)[0] == 200


def test_wrong_addresses(address):
    body = {"instances": ["a"]}
    for wrong in (f"{address}s", f"{address}/versions/9"):  # an older version is not served
        for status, answer in (send(wrong), send(f"{wrong}:predict", body)):
            assert status == 404 and answer["error"].startswith("Servable not found for request: /v1/models/gemma2")
    for status, answer in (send(f"{address}:predict"), send(address, body), send(f"{address}:classify", body)):
        assert status == 400 and answer["error"].startswith("Malformed request: ")


def test_large_bodies(address):
    limit = 4 << 20
    status, answer = send(f"{address}:predict", b" " * (limit + 1))
    assert status == 413 and f"at most {limit} bytes" in answer["error"]
    status, answer = send(f"{address}:predict", json.dumps({"instances": ["a"]}).encode().ljust(limit))
    assert status == 200 and len(answer["predictions"]) == 1


def test_the_example_needs_tensorflow_alone():
    imported = re.findall(r"^(?:import|from) (\w+)", EXAMPLE.read_text(), re.MULTILINE)
    assert set(imported) - sys.stdlib_module_names == {"tensorflow", "tensorflow_text"}


# gRPC and sessions ------------------------------------------------------------------------------------------------------


def test_messages(served, direct):
    command = [sys.executable, str(Path(__file__).with_name("served_messages.py")), str(served / "10")]
    chosen = ("generate", "score")  # texts, whole numbers and floats, scalars and not
    requests = [REQUESTS[signature] for signature in chosen]
    done = subprocess.run(command, input=pickle.dumps(requests), stdout=subprocess.PIPE, check=True)
    answers = pickle.loads(done.stdout)
    assert [signature for signature, _ in answers] == [*chosen]
    for signature, found in answers:
        expected = direct[signature]
        assert {name: (a.dtype, a.shape) for name, a in found.items()} == {name: (a.dtype, a.shape) for name, a in expected.items()}
        assert all(close(found[name], values) for name, values in expected.items())


def close(found, expected):
    return np.allclose(found, expected, rtol=0, atol=TOLERANCE) if expected.dtype.kind == "f" else np.array_equal(found, expected)


def run_session(command, folder, output, signature, inputs):
    """`saved_model_cli run`: a session over the loaded graph, as TensorFlow Serving has one."""
    values = ";".join(f"{name}={np.array(value).tolist()!r}" for name, value in inputs.items())
    selected = ["--dir", str(folder), "--tag_set", "serve", "--signature_def", signature]
    subprocess.run([*command, "run", *selected, "--input_exprs", values, "--outdir", str(output)], check=True)
    return {path.stem: np.load(path, allow_pickle=True) for path in output.iterdir()}


def test_the_command_line_runs_tokens(tmp_path, direct):
    folder = export(tmp_path / "1", "--signatures", "generate_tokens")
    command = [str(Path(sys.executable).with_name("saved_model_cli"))]
    found = run_session(command, folder, tmp_path / "out", "generate_tokens", TOKENS)
    assert found.keys() == {"token_ids", "padding_mask"}
    assert all(np.array_equal(found[name], values) for name, values in direct["generate_tokens"].items())


def test_the_command_line_runs_texts(tmp_path, served, direct):
    """With TensorFlow Text's operations, which it does not load by itself."""
    command = [sys.executable, "-c", "import tensorflow_text; from tensorflow.python.tools.saved_model_cli import main; main()"]
    found = run_session(command, served / "10", tmp_path / "out", *REQUESTS["generate"])
    assert found.keys() == {"completions", "num_tokens"}
    assert all(np.array_equal(found[name], values) for name, values in direct["generate"].items())
