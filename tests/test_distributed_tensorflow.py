"""TensorFlow on several replicas: equal to one device; a worker that is gone; the example."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from keras_gemma2 import Gemma2Backbone, Gemma2CausalLM

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "distributed_finetune.py"


def start(script, *arguments, **environment):
    """A process."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": {**os.environ, **environment}}
    return subprocess.Popen([sys.executable, str(script), *arguments], **options)


def start_workers(script, *arguments):
    """Two processes that know of each other."""
    with socket.socket() as first, socket.socket() as second:
        for free in (first, second):
            free.bind(("localhost", 0))
        addresses = [f"localhost:{free.getsockname()[1]}" for free in (first, second)]
    config = [{"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}} for index in range(2)]
    return [start(script, *arguments, TF_CONFIG=json.dumps(one)) for one in config]


def text_of(process):
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0, text
    return text


def test_mirrored_strategy_equals_one_device():
    assert "passed mirrored" in text_of(start(HERE / "tensorflow_replicas.py", "mirrored"))


def test_two_workers_equal_one_device():
    for process in start_workers(HERE / "tensorflow_replicas.py", "workers"):
        assert "passed workers" in text_of(process)


def test_a_worker_that_is_gone():
    begin = time.monotonic()
    first, second = start_workers(HERE / "tensorflow_replicas.py", "killed")
    second.communicate(timeout=120)
    text = first.communicate(timeout=120)[0]
    assert first.returncode != 0 and time.monotonic() - begin < 120 and "passed" not in text
    assert "/job:worker/replica:0/task:1" in text or "Connection reset by peer" in text or "Socket closed" in text, text


def test_the_example_on_two_workers(tmp_path):
    mini = Gemma2CausalLM.from_preset("gemma2_mini_en", load_weights=False)
    config = {**mini.backbone.get_config(), "num_layers": 1, "layer_types": None, "hidden_dim": 32}
    Gemma2CausalLM(Gemma2Backbone.from_config(config), mini.preprocessor).save_to_preset(tmp_path / "small")
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"text": f"Number {number} comes next."}) + "\n" for number in range(8)))
    arguments = ["--preset", str(tmp_path / "small"), "--data", str(data), "--length", "16", "--epochs", "2"]
    arguments += ["--learning-rate", "0.01", "--output", str(tmp_path / "out")]
    chief, other = (text_of(process) for process in start_workers(EXAMPLE, *arguments))
    first, second = (float(line.rpartition(" ")[2]) for line in chief.splitlines() if line.startswith("epoch"))
    assert second < first and "epoch" not in other
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
