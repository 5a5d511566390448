"""The container's recipe and the manifests, as far as they can be checked where nothing runs containers."""

import http.client
import importlib.util
import os
import re
import shlex
import signal
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from exported import small_preset
from http_server import PATIENCE, commanded

from keras_gemma2.distribution import RECIPES
from keras_gemma2.serving.app import PATHS

pytestmark = pytest.mark.backend_free
ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "deploy"
MANIFESTS = ("cloud_run.yaml", "kubernetes.yaml")


def instructions():
    """(name, rest) of the Dockerfile."""
    lines = [line for line in (FOLDER / "Dockerfile").read_text("utf-8").splitlines() if line and not line.startswith("#")]
    return [line.split(" ", 1) for line in lines]


def environment():
    (given,) = [rest for name, rest in instructions() if name == "ENV"]
    return dict(pair.split("=", 1) for pair in shlex.split(given))


def test_what_is_copied_and_installed_is_there():
    copied = [source for name, rest in instructions() if name == "COPY" for source in rest.split()[:-1]]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert all((ROOT / source).exists() for source in copied)
    assert {"pyproject.toml", project["readme"], *project["license-files"], "keras_gemma2"} <= set(copied)
    (extras,) = [re.search(r'"\.\[(.+?)\]"', rest)[1].split(",") for name, rest in instructions() if name == "RUN"]
    assert set(extras) <= set(project["optional-dependencies"]) and environment()["KERAS_BACKEND"] in extras


def test_its_command_serves_and_ends():
    """The very command, of the recipe's environment, but for a port that is free, the folder it is in, and a smaller model."""
    (command,) = [yaml.safe_load(rest) for name, rest in instructions() if name == "CMD"]
    programs = os.path.dirname(sys.executable)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    given = {**os.environ, **environment(), "PORT": "0", "PRESET": small_preset(), "PATH": path}
    with commanded(command, given) as (process, (host, port)):
        assert host == "0.0.0.0"
        for path in ("/ready", "/health", "/"):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
            connection.request("GET", path, headers={"Host": "keras-gemma2.example"})
            assert connection.getresponse().status == 200
            connection.close()
        process.send_signal(signal.SIGTERM)  # to the shell's process, which the server has become
        assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_fit_the_recipe(name):
    """Ports, probed paths, variables and the user are those of the Dockerfile and the server."""
    documents = list(yaml.safe_load_all((FOLDER / name).read_text("utf-8")))
    spec = documents[0]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    port = int(environment()["PORT"])
    assert [each["containerPort"] for each in container["ports"]] == [port]
    assert [rest for kind, rest in instructions() if kind == "EXPOSE"] == [str(port)]
    probes = [value["httpGet"] for key, value in container.items() if key.endswith("Probe")]
    assert len(probes) >= 2 and all(probe["path"] in PATHS and probe["port"] == port for probe in probes)
    names = {variable["name"] for variable in container["env"]}
    assert names == {"PRESET", "KERAS_GEMMA2_API_KEY"} and "PRESET" in environment()
    if name == "kubernetes.yaml":
        service = documents[1]["spec"]
        template = documents[0]["spec"]["template"]
        assert service["selector"] == template["metadata"]["labels"] == documents[0]["spec"]["selector"]["matchLabels"]
        assert service["ports"][0]["targetPort"] == port
        assert ["USER", str(spec["securityContext"]["runAsUser"])] in instructions()


def test_the_set_of_jobs_starts_the_example():
    """Its command line is one of the example's, its variables those that the processes read, its numbers agree."""
    jobs = yaml.safe_load((FOLDER / "jobset.yaml").read_text("utf-8"))
    (replicated,) = jobs["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (worker,) = pod["containers"]
    program, script, *options = worker["command"]
    path = ROOT / "examples" / script
    spec = importlib.util.spec_from_file_location(path.stem, path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    found = example.parse_arguments(options)
    assert program == "python" and found.batch_size % job["completions"] == 0 and found.recipe in RECIPES

    variables = {variable["name"]: variable.get("value") for variable in worker["env"]}
    names = [f"KERAS_DISTRIBUTION_{name}" for name in ("JOB_ADDRESSES", "NUM_PROCESSES", "PROCESS_ID")]
    source = (ROOT / "keras_gemma2" / "backend" / "jax_processes.py").read_text("utf-8")
    assert set(variables) == {"KERAS_BACKEND", "HF_TOKEN", "HF_HOME", *names} and all(f'"{name}"' in source for name in names)
    assert int(variables[names[1]]) == job["completions"] == job["parallelism"] and job["completionMode"] == "Indexed"
    host, port = variables[names[0]].split(":")
    name = jobs["metadata"]["name"]
    assert host == f"{name}-{replicated['name']}-0-0.{name}" and [int(port)] == [each["containerPort"] for each in worker["ports"]]
    (mount,), (volume,) = worker["volumeMounts"], pod["volumes"]
    assert mount["name"] == volume["name"] and str(found.output).startswith(mount["mountPath"])
