"""`benchmarks generate`: that every contender runs the same model, and that the figures are what they are called."""

import argparse
import dataclasses
import mmap

import gguf
import keras
import numpy as np
import pytest

from keras_gemma2.benchmarks import folder_to_gguf, generate, generate_child, machine, processes
from keras_gemma2.benchmarks.generate_cases import CASES, Settings, prefill_operations
from keras_gemma2.benchmarks.generate_keras_hub import KerasHub
from keras_gemma2.benchmarks.generate_ours import Ours
from keras_gemma2.benchmarks.generate_table import COLUMNS, TITLES, header
from keras_gemma2.benchmarks.generate_transformers import Transformers
from keras_gemma2.benchmarks.load import write_random_folder
from keras_gemma2.checkpoints.safetensors_file import open_safetensors
from keras_gemma2.config import Gemma2Config

LAYERS = 2
SETTINGS = Settings(Gemma2Config(num_layers=LAYERS, **generate.NARROW), shrink=16, repeats=1)
PROMPTS = [[2, 900, 1700, 11, 3000], [2, 44, 2100]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("benchmark") / "model")
    write_random_folder(path, LAYERS, generate.NARROW)
    return path


@pytest.fixture(scope="module")
def ours(folder):
    return Ours(folder, "float32")


def test_all_contenders_run_the_same_model(folder, ours):
    firsts = ours.generate(PROMPTS, 1)
    token_ids = np.array([PROMPTS[0]])
    logits = ours._lm({"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)})
    assert firsts[0] == int(keras.ops.convert_to_numpy(logits)[0, -1].argmax())
    peers = [KerasHub(folder, "float32"), *([Transformers(folder, "float32")] if keras.backend.backend() == "torch" else [])]
    for peer in peers:
        assert peer.generate(PROMPTS, 1) == firsts, peer
        # Every weight once, the tied embedding too; each of 4 bytes.
        assert peer.weight_bytes == ours.weight_bytes == 4 * SETTINGS.config.parameter_count()
    for peer in (ours, *peers[1:]):  # told to stop at what comes first, it does, whatever room there is
        assert peer.generate(PROMPTS[:1], 30, room=35, stop=firsts[0]) == firsts[:1]


@pytest.mark.parametrize("case", CASES)
def test_cases_of_ours(folder, ours, monkeypatch, case):
    monkeypatch.setattr(generate_child, "_imported", lambda who: lambda *arguments: ours)  # what it has compiled serves again
    row = generate_child.measure("ours", case, folder, "float32", SETTINGS)
    # Of a narrow model on a busy machine, the difference of two calls may come out negative.
    positive = set(row) - {"token", "growth", "total"}
    assert all(row[name] > 0 for name in positive), row
    assert row["weights"] == 4 * SETTINGS.config.parameter_count()
    row |= {"read": 1e9, "product": 1e9, "batch": 1, "wall": 1.0}
    assert all(column(row) for _, column in COLUMNS[case]) and case in TITLES


def test_the_cache_is_counted_as_it_is_allocated(ours):
    # One layer is local with a window of 4096, one global: three quarters of two full ones, and one slot more in each.
    row = CASES["cache"](ours, dataclasses.replace(SETTINGS, shrink=1))
    a_slot = 2 * 4 * 32 * 4  # keys and values, heads, head_dim, bytes
    assert row["full"] == 2 * 8192 * a_slot
    assert 12288 * a_slot <= row["bytes"] <= 12290 * a_slot


@pytest.mark.backend_free
def test_operations_of_a_prompt_by_hand():
    # 2 x (rows x columns) for each token and kernel: query, key, value, output, gate, up, down.
    kernels = 256 * 256 + 128 * 256 + 128 * 256 + 256 * 256 + 3 * 512 * 256
    pairs = 1 + 2 + 3  # of query and key, in 3 tokens; each costs a score and a weighted value in every head
    expected = 2 * (LAYERS * (3 * kernels + pairs * 2 * 8 * 32) + 4096 * 256)
    assert prefill_operations(SETTINGS.config, 3) == expected


@pytest.mark.backend_free
@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0), ("int8", 1 / 127), ("int4", 1 / 7)])
def test_the_gguf_file_holds_the_folder(folder, dtype, tolerance):
    import contextlib

    folder_to_gguf.write_gguf(folder, dtype)
    reader = gguf.GGUFReader(folder_to_gguf.gguf_path(folder, dtype))
    found = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA2, LAYERS)
    with contextlib.ExitStack() as stack:
        expected = open_safetensors(f"{folder}/model.safetensors", stack)
        assert len(found) == len(expected) == 2 + 11 * LAYERS
        for name, tensor in expected.items():
            stored = found[names.get_name(name, try_suffixes=(".weight",))]
            wanted = tensor[:].astype("float32") + name.endswith("norm.weight")
            assert stored.shape == wanted.shape
            # A block's scale is its largest number over 127, or over 8; half of it is lost, at most a whole one at int4's end.
            assert np.abs(stored - wanted).max() <= tolerance * np.abs(wanted).max() * (wanted.ndim > 1), name
    value = reader.fields["gemma2.attention.sliding_window"].contents()
    assert value == 4096 and reader.fields["gemma2.block_count"].contents() == LAYERS


def in_this_process(benchmark, backend, *arguments):
    return generate._child(parsed(*arguments))


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    generate.add_command(parser.add_subparsers())
    return parser.parse_args(["generate", *arguments])


def test_the_command_prints_a_row_for_each_contender(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(generate, "in_fresh_process", in_this_process)
    backend, log = keras.backend.backend(), tmp_path / "log.json"
    generate.run(
        parsed(
            "--quick",
            "--layers",
            "2",
            "--folder",
            folder,
            "--backend",
            backend,
            "--peers",
            "",
            "--case",
            "cache",
            "--json",
            str(log),
        )
    )
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert "GB/s read" in lines[1] and len(table) == 3 and table[2].startswith(f"| ours | {backend} | bfloat16 |")
    assert len({line.count("|") for line in table}) == 1
    assert log.read_text().count("\n") == 1


@pytest.mark.backend_free
def test_contenders_of_a_case(monkeypatch):
    monkeypatch.setattr(machine, "has_accelerator", lambda: False)
    peers = list(generate.PEERS)
    options = parsed("--backend", "jax")
    ours = ("ours", "jax", "float32")
    rows = list(generate._contenders(options, "first_token", peers))
    assert rows == [ours, ("keras_hub", "jax", "float32"), ("transformers", "torch", "float32"), ("llama_cpp", "", "float32")]
    assert ("keras_hub", "jax", "float32") not in generate._contenders(options, "ragged", peers)
    assert ("keras_hub", "jax", "float32") in generate._contenders(parsed("--backend", "jax", "--case", "ragged"), "ragged", peers)
    assert list(generate._contenders(options, "cache", peers)) == [("ours", "jax", "bfloat16")]
    int8 = [row[0] for row in generate._contenders(options, "decode", peers) if row[2] == "int8"]
    assert int8 == ["ours", "llama_cpp"]
    monkeypatch.setattr(machine, "has_accelerator", lambda: True)
    assert "transformers_static" in [row[0] for row in generate._contenders(options, "first_token", peers)]


@pytest.mark.backend_free
def test_peers_that_are_missing_are_named_with_their_pip_install(monkeypatch, capsys):
    monkeypatch.setitem(generate.PEERS, "llama_cpp", ("no_such_package", "cyllama gguf"))
    assert generate._installed("keras_hub, llama_cpp") == ["keras_hub"]
    assert "llama_cpp is skipped; to measure it, pip install cyllama gguf" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="must be among keras_hub, transformers, llama_cpp.*Received: vllm"):
        generate._installed("vllm")


@pytest.mark.backend_free
def test_a_peak_counts_from_where_it_is_reset():
    with mmap.mmap(-1, 1 << 27) as block:  # 128 MiB that go back to the system, which an array's may not
        block.write(bytes(1 << 27))
    high = processes.peak_bytes()
    processes.reset_peak()
    assert processes.peak_bytes() < high - (1 << 26)
    assert machine.host_read_rate(1 << 20) > 0 and set(COLUMNS) == set(CASES) == set(TITLES)
    assert header("cache").splitlines()[0] == "| who | backend | dtype | bytes | full caches, bytes | share |"


def test_export_prints_what_it_found(monkeypatch, capsys):
    from keras_gemma2.benchmarks import export

    found = {
        "make": {"weights": 2e6, "size": 2.1e6, "seconds": 3.0},
        "make_keras_hub": {"size_keras_hub": 3e6},
        "read": {"read": 2.0},
        "read_disk": {"read_disk": 2.0},
        "load_disk": {"load_disk": 1.0},
        "load": {"load": 1.0},
        "decode": {"saved_model": 0.25, "generate": 0.5},
        "score": {"score": 2.0},
        "score_keras_hub": {"score_keras_hub": 8.0},
    }
    asked = []

    def child(benchmark, backend, flag, step, *arguments):
        assert (benchmark, backend, flag) == ("export", "tensorflow", "--child")
        asked.append(step)
        times = asked.count(step)  # of loads, the median counts
        return {name: value * times if step in ("load", "load_disk") else value for name, value in found[step].items()}

    monkeypatch.setattr(export, "in_fresh_process", child)
    parser = argparse.ArgumentParser()
    export.add_command(parser.add_subparsers())
    for arguments, steps in (([], 25), (["--no-peers"], 23)):
        asked.clear()
        options = parser.parse_args(["export", *arguments])
        options.run(options)
        printed = capsys.readouterr().out
        assert len(asked) == steps
        assert "| decoding, s a token | 0.2500 | `lm.generate` on tensorflow | 0.5000 | 0.500 |" in printed
        assert "| loading again, s | 3.00 | reading its files again | 2.00 | 1.500 |" in printed
        assert ("keras-hub" in printed) == (steps == 25)
