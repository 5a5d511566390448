"""Meshes of 8 virtual devices against one device, on JAX."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import spread

from keras_gemma2 import Gemma2Backbone, Gemma2CausalLM
from keras_gemma2.config import NAMED_SIZES
from keras_gemma2.distribution import RECIPES, join_processes, layout_map, make_distribution, make_mesh, model_sizes

LAYERS, WIDTH, VOCABULARY = 2, 64, 256  # of spread.py
CLOSE = 1e-5  # float32 sums in another order; values are of order 1


def asked(*questions):
    """What `spread.py` answers, in one process with 8 virtual devices."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "KERAS_BACKEND": "jax"}
    script = str(Path(__file__).with_name("spread.py"))
    command = [sys.executable, script, json.dumps(questions)]
    done = subprocess.run(command, env={**os.environ, **flags}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check_equal(results, bound=CLOSE):
    for mesh, found in results.items():
        assert found.pop("greedy") == 0, mesh
        for name, value in found.items():
            assert value <= bound, (mesh, name, found)


@pytest.mark.parametrize("heads", [4, 8])  # on 8 devices heads of keys are whole, or split
def test_meshes_give_what_one_device_gives(heads):
    check_equal(asked(("equality", heads))[0])


def test_fully_sharded_and_adapters():
    sharded, adapters = asked(
        ("equality", 4, "float32", "fully_sharded", [[8, 1]]),
        ("equality", 4, "float32", "fully_sharded_tensor_parallel", [[2, 4]], True),
    )
    check_equal(sharded)
    check_equal(adapters)


def test_quantized():
    policies = ("int4_from_float32", "int8_from_float32")
    four, eight = asked(*(("equality", 4, policy, "tensor_parallel", [[2, 4]], False, False) for policy in policies))
    check_equal(four)
    # One device writes rows as whole numbers of two 8-bit digits (jax_quantized.py), several multiply floats.
    check_equal(eight, 2e-3)


@pytest.mark.parametrize("heads", [4, 8])
def test_decode_step_gathers_no_weight_and_sums_twice_a_layer(heads):
    for (batch, model), found in zip([(4, 2), (1, 8)], asked(*(("decode_step", heads, *mesh) for mesh in ((4, 2), (1, 8))))):
        rows = 8 // batch
        counts = found["collectives"]
        streams = (f"all-reduce f32[{rows},{WIDTH}]", f"all-reduce f32[{rows},1,{WIDTH}]")
        sums = sum(n for name, n in counts.items() if name in streams)
        assert sums == 2 * LAYERS + 1, counts  # and one for the embedding
        # What is gathered are logits, which the host is given; the loop over caches asks once how far they are filled.
        others = [name for name in counts if name.split()[0] != "all-reduce"]
        assert set(others) <= {f"all-gather f32[{n},{VOCABULARY}]" for n in (rows, 8)}, counts
        assert sum(n for name, n in counts.items() if "all-reduce" in name) <= sums + 1, counts
        whole = 0 if heads % model == 0 else 2 * LAYERS * heads * 16 * WIDTH * 4  # keys' and values' matrices
        for name, total_of_whole in (("weights", whole), ("optimizer", 2 * whole)):
            total, first = found[name]
            split = total - total_of_whole
            assert first == pytest.approx(split / model + total_of_whole, rel=0.1), (name, model)
        cached, first = found["caches"]
        assert first * (8 if heads % model == 0 else batch) == cached
        # The program's own arguments are what lies on a device, tokens and positions among them.
        assert found["arguments"] == pytest.approx(found["weights"][1] + first, rel=0.1)


def test_presets_are_read_and_saved_on_other_meshes():
    found = asked(("saved", 4))[0]
    for name, value in found.items():
        if name.endswith("part"):
            assert value == (1 if "None" in name else 1 / 8)
        else:
            assert value <= CLOSE, name


def test_what_cannot_be_split_is_refused_with_the_sizes_that_can():
    found = asked(("errors",))[0]
    assert "num_query_heads=12" in found["heads"] and "1, 2, 4." in found["heads"]
    assert "hidden_dim=60" in found["hidden"] and "1, 2, 3, 4, 5, 6, 10, 12" in found["hidden"]
    assert "make a batch of 3" in found["rows"] and "a multiple of 4" in found["rows"]
    assert "8 rows of `validation_data` with batch_size=3" in found["validation"]
    assert "Batch 0 of `x`" in found["stream"] and "Received: 6 rows" in found["stream"]
    assert "there are 8" in found["too many"] and "8x1, 4x2, 2x4, 1x8" in found["too many"] and "=16" in found["too many"]


def test_meshes_and_maps():
    mesh = make_mesh("data_parallel")  # of the one device that there is
    assert tuple(mesh.shape) == (1, 1) and tuple(mesh.axis_names) == ("batch", "model")
    with pytest.raises(ValueError, match="`recipe` must be one of"):
        make_mesh("tensor")
    with pytest.raises(ValueError, match="`model` must be 1 with recipe='fully_sharded'"):
        make_mesh("fully_sharded", model=2)
    with pytest.raises(ValueError, match="`batch` must be a positive integer"):
        make_mesh(batch=0)
    with pytest.raises(ValueError, match="`batch` or `model` must be given"):
        make_mesh("fully_sharded_tensor_parallel")
    with pytest.raises(ValueError, match="`model_parallel_dim_name` must be one of the mesh's axes"):
        Gemma2Backbone.get_layout_map(mesh, "heads")
    with pytest.raises(ValueError, match="must be two axes"):
        layout_map(mesh, "batch", "batch")
    with pytest.raises(TypeError, match="`mesh` must be a"):
        layout_map("2x4")
    assert model_sizes(NAMED_SIZES["gemma2_2b"]) == [1, 2, 4, 8]
    assert model_sizes(NAMED_SIZES["gemma2_27b"]) == [1, 2, 4, 8, 16, 32]


def test_every_matrix_has_a_layout(tiny):
    backbone = Gemma2Backbone(**tiny)
    layouts = layout_map(make_mesh("data_parallel"), fully_sharded=True)
    for variable in backbone.weights:
        assert (layouts[variable.path] is None) == (len(variable.shape) == 1), variable.path


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_device_is_a_mesh(recipe, tiny):
    sizes = {"batch": 1} if recipe == "fully_sharded_tensor_parallel" else {}
    with make_distribution(recipe, **sizes).scope():
        backbone = Gemma2Backbone(**tiny)
    assert backbone.token_embedding.embeddings.shape == (tiny["vocabulary_size"], tiny["hidden_dim"])
    assert keras.distribution.distribution() is None


def two_processes(mesh, folder, **variables):
    """Exit codes, outputs and errors of two `spread_process.py`."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "KERAS_BACKEND": "jax"}
    script = str(Path(__file__).with_name("spread_process.py"))
    commands = [[sys.executable, script, str(port), str(index), *map(str, mesh), str(folder)] for index in range(2)]
    options = {"env": {**os.environ, **flags, **variables}, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **options) for command in commands]
    try:
        outputs, errors = zip(*(process.communicate(timeout=240) for process in processes))
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs, errors


def test_processes_that_differ_are_told(tmp_path):
    for name in ("of_0", "of_1"):
        spread.made(4).export_to_transformers(tmp_path / name, max_shard_size=100_000)
    lost = sorted((tmp_path / "of_1").glob("*.safetensors"))[1]
    lost.unlink()
    codes, outputs, errors = two_processes((2, 4), tmp_path, SPREAD_FAULTS="1")
    assert codes == [0, 0], "\n".join(error[-2000:] for error in errors)
    for index, output in enumerate(outputs):
        found = json.loads(output.splitlines()[-1])
        assert "must make the same model" in found["config"] and "'num_key_value_heads': 8" in found["config"]
        assert lost.name in found["file"] and found["file"].startswith("OtherProcessError: Process 1 of 2") == (index == 0)


@pytest.mark.parametrize("mesh", [(2, 4), (1, 8)])  # each process has its own rows, or both have parts of all matrices
def test_two_processes_hold_one_model(mesh, tmp_path):
    int8 = spread.made(4, "int8_from_float32")
    int8.save_to_preset(tmp_path / "int8")
    lm = spread.made(4)
    lm.export_to_transformers(tmp_path / "start")
    tuned = spread.made(4)
    tuned.enable_lora(4)
    for number, variable in enumerate(tuned.trainable_variables):
        variable.assign(np.random.default_rng(number).normal(0, 0.3, variable.shape))
    tuned.save_adapter(tmp_path / "adapter")
    codes, outputs, errors = two_processes(mesh, tmp_path)
    assert not any(codes), "\n".join(error[-2000:] for error in errors)
    found = [json.loads(output.splitlines()[-1]) for output in outputs]

    def greedy(model):
        return np.asarray(model.generate(spread.prompts(), max_length=30, stop_token_ids=None)["token_ids"]).tolist()

    for name, model in (("start", lm), ("int8", int8)):
        expected = greedy(model)
        assert found[0][f"{name} greedy"] == found[1][f"{name} greedy"] == expected
        weights = sum(path.stat().st_size for path in (tmp_path / name).iterdir() if path.suffix in (".safetensors", ".h5"))
        for one in found:
            # Matrices are split between the processes in one half each; norms and other files are read by both.
            assert one[f"{name} read"] < (0.5 if mesh == (1, 8) else 0.6) * weights + 120_000, (name, weights)
    x, labels, sample_weight = spread.ordered()
    lm.compile(optimizer=keras.optimizers.Adam(1e-3))
    losses = lm.fit(x, labels, sample_weight=sample_weight, batch_size=8, epochs=3, shuffle=False, verbose=0).history["loss"]
    for one in found:
        assert np.abs(np.subtract(one["losses"], losses)).max() <= CLOSE
        assert np.abs(np.subtract(one["losses again"], losses[2:])).max() <= CLOSE
        assert one["again"] == found[0]["again"]
    if mesh == (2, 4):
        for others in asked(("resumed", 4, str(tmp_path / "run"), [[4, 2], [1, 8]]))[0]:
            assert np.abs(np.subtract(others, losses[2:])).max() <= CLOSE
    assert "Process 1 of 2 has failed: CheckpointError" in found[0]["no room"] and "cannot be written" in found[1]["no room"]
    assert all("must restore the same checkpoint" in one["other steps"] and "step 1" in one["other steps"] for one in found)
    assert "Process 1 of 2 has failed: MissingFileError" in found[0]["no run"] and "/none" in found[1]["no run"]
    assert "no_folder" in found[0]["refused"] and "The first process could not write" in found[1]["refused"]
    assert "Process 1 of 2 has failed: MissingFileError" in found[0]["no adapter"] and "/none" in found[1]["no adapter"]
    lm.load_adapter(tmp_path / "adapter")
    assert found[0]["adapted"] == found[1]["adapted"] == greedy(lm) != found[0]["again"]
    lm.delete_adapter("default")
    for name in ("saved", "exported"):
        again = Gemma2CausalLM.from_preset(tmp_path / name, preprocessor=None)
        assert np.abs(np.asarray(again(x)) - np.asarray(lm(x))).max() <= CLOSE, name


@pytest.mark.parametrize(
    "values, said",
    [
        (("localhost:1", "2", None), "JOB_ADDRESSES and KERAS_DISTRIBUTION_NUM_PROCESSES are set .*PROCESS_ID not: set all"),
        (("localhost:1", "two", "0"), "NUM_PROCESSES must be a whole number. Received: 'two'"),
        (("localhost:1", "2", "2"), "PROCESS_ID must be from 0 to .* Received: 2, of 2"),
    ],
)
def test_what_joining_needs(values, said, monkeypatch):
    for name, value in zip(("JOB_ADDRESSES", "NUM_PROCESSES", "PROCESS_ID"), values):
        if value is not None:
            monkeypatch.setenv(f"KERAS_DISTRIBUTION_{name}", value)
    with pytest.raises(RuntimeError, match=said):
        join_processes()


def test_joining_without_a_launcher():
    command = [sys.executable, "-c", "from keras_gemma2.distribution import join_processes; join_processes()"]
    done = subprocess.run(command, env={**os.environ, "KERAS_BACKEND": "jax"}, capture_output=True, text=True, timeout=100)
    assert done.returncode and "RuntimeError: Several processes are to be joined, and nothing says where they are" in done.stderr


EXAMPLE = Path(__file__).parents[1] / "examples" / "distributed_finetune.py"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Count {i}", "response": f"It is {i}."}) + "\n" for i in range(8)))
    return path


def example(rows, output, recipe, devices, **variables):
    """The example, which makes an epoch of one step, as a process that is under way."""
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "KERAS_BACKEND": "jax"}
    options = ["--data", str(rows), "--output", str(output), "--recipe", recipe, "--length", "32", "--timeout", "20"]
    command = [sys.executable, str(EXAMPLE), *options, "--batch-size", "8", "--epochs", "3", "--learning-rate", "1e-3"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**os.environ, **flags, **variables}, **pipes)


def two_examples(rows, output):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    names = ("JOB_ADDRESSES", "NUM_PROCESSES", "PROCESS_ID")
    variables = [dict(zip((f"KERAS_DISTRIBUTION_{name}" for name in names), (f"localhost:{port}", "2", str(i)))) for i in range(2)]
    return [example(rows, output, "fully_sharded", 1, **one) for one in variables]


def ended(process):
    output, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors[-3000:]
    return [float(line.split()[-1]) for line in output.splitlines() if line.startswith("epoch")]


def test_the_example(rows, tmp_path):
    losses = ended(example(rows, tmp_path / "one", "data_parallel", 2))
    assert losses[2] < losses[1] < losses[0]
    lm = Gemma2CausalLM.from_preset("gemma2_mini_en")
    lm.load_adapter(tmp_path / "one")

    # The same with two processes, one of which is killed after an epoch.
    processes = two_examples(rows, tmp_path / "two")
    try:
        first = next((line for line in processes[0].stdout if line.startswith("epoch")), "")  # other lines are the network's
        assert first.startswith("epoch 1"), processes[0].communicate(timeout=60)[1][-3000:]
        processes[1].kill()
        output, errors = processes[0].communicate(timeout=120)
        assert processes[0].returncode != 0 and ("Connection closed by peer" in errors or "heartbeat" in errors), errors[-2000:]
        begun = [float(line.split()[-1]) for line in (first + output).splitlines() if line.startswith("epoch")]
        processes = two_examples(rows, tmp_path / "two")
        found = begun + ended(processes[0])
        ended(processes[1])
    finally:
        for process in processes:
            process.kill()
    assert len(begun) < 3 and found == pytest.approx(losses, abs=2e-4)  # printed with four digits
    again = Gemma2CausalLM.from_preset("gemma2_mini_en")
    again.load_adapter(tmp_path / "two")
    texts = ["Count 3It is 3."]
    assert np.abs(np.concatenate(again.score(texts)) - np.concatenate(lm.score(texts))).max() <= 1e-4
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
