"""PyTorch in two processes: equal to one; what is refused; a process that is gone; the example."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import keras
import pytest

from keras_gemma2 import Gemma2CausalLM, processes

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "distributed_finetune.py"


def start(script, *arguments, interval=0.1):
    """`torchrun` of two processes, at a port that is free; it looks after them each so many seconds."""
    options = ["--standalone", "--nproc-per-node", "2", "--monitor-interval", str(interval)]
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def run(script, *arguments):
    """What all processes print; they must end well."""
    process = start(script, *arguments)
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0, text
    return text


def test_two_processes():
    names = ["steps", "uneven_steps", "adapters_and_packed_rows", "different_models", "sharded"]  # starting them takes the longest
    text = run(HERE / "torch_processes.py", *names)
    assert [text.count(f"passed {name}") for name in names] == [2] * len(names)


@pytest.mark.parametrize("name", ["killed", "fewer_batches"])
def test_a_process_that_is_gone(name):
    begin = time.monotonic()
    process = start(HERE / "torch_processes.py", name, interval=5)  # or torchrun ends the other before it can speak
    text = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and time.monotonic() - begin < 60
    assert "Process 0 of 2 has lost the others" in text and "passed" not in text


def test_what_is_refused():
    with pytest.raises(ValueError, match="`timeout` must be a positive number"):
        processes.join_processes(0)
    with pytest.raises(RuntimeError, match="RANK.*are not set. Start the script with `torchrun"):
        processes.join_processes()
    with pytest.raises(TypeError, match="`model` must be a `Gemma2CausalLM`"):
        processes.data_parallel(keras.Sequential())
    assert (processes.process_index(), processes.process_count()) == (0, 1)


# The example ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    rows = [{"prompt": f"Number {number}:", "response": f" {'abcdefghijklmnop'[number]} comes next."} for number in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def losses(text):
    return [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith("epoch")]


def test_the_example(data, tmp_path):
    arguments = ["--data", str(data), "--length", "16", "--learning-rate", "0.003", "--epochs", "3", "--steps", "1", "--output"]
    expected = losses(run(EXAMPLE, *arguments, str(tmp_path / "adapter")))
    assert len(expected) == 3 and float(expected[2]) < float(expected[0])
    lm, text = Gemma2CausalLM.from_preset("gemma2_mini_en"), "Number 3: d comes next."
    before = lm.score(text).sum()
    lm.load_adapter(tmp_path / "adapter")  # which one process does
    assert lm.score(text).sum() > before

    # All weights, by a run that is interrupted.
    process = start(EXAMPLE, *arguments, str(tmp_path / "whole"), "--lora-rank", "0")
    found = []
    while not found:
        line = process.stdout.readline()
        assert line, "it ended before it was interrupted"
        found += losses(line)
    process.terminate()  # torchrun ends the processes that it started
    process.communicate(timeout=60)
    assert float(found[0]) == pytest.approx(float(expected[0]), abs=1e-4), "factors change nothing before the first step"
    found += losses(run(EXAMPLE, *arguments, str(tmp_path / "whole"), "--lora-rank", "0"))
    assert float(found[-1]) < float(found[0])
    assert Gemma2CausalLM.from_preset(tmp_path / "whole").score(text).sum() > before
