"""ONNX, OpenVINO, LiteRT, StableHLO and PyTorch's programs, each in its real runtime, without Keras and this package.

Each format is tested in full on the backend that writes it; what another backend hands over is tested once.
"""

import contextlib
import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from exported import TOLERANCE, Runtime, all_bytes, small_lm

import keras_gemma2
from keras_gemma2 import Gemma2CausalLM, Gemma2CausalLMPreprocessor, Gemma2Tokenizer
from keras_gemma2.cli import main
from keras_gemma2.export import elsewhere, programs
from keras_gemma2.export.formats import FORMATS

HERE = [name for name, format in FORMATS.items() if format.backend == keras.backend.backend()]
ELSEWHERE = {"jax": "litert", "tensorflow": "stablehlo", "torch": "stablehlo"}[keras.backend.backend()]
N, PIECE = 12, 100


WIDE = {"hidden_dim": 1024, "intermediate_dim": 2048, "head_dim": 128, "num_layers": 2}


def with_(kind):
    """Formats that hold such weights; where none is written here, the one that another backend is handed the model for."""
    found = [name for name in HERE if kind in FORMATS[name].modes + FORMATS[name].dtypes]
    return found or [ELSEWHERE]


# A row of over 1,024 tokens: where `generate` reads caches in blocks, the programs read them whole.
LONG, CONTEXT = 1_100, 1_400
EMBEDDING = 4096 * 42 * 4  # bytes


def prompts(longest=LONG):
    draw = np.random.default_rng(3)
    return [[2, *draw.integers(200, 4096, n - 1).tolist()] for n in (1, 7, longest, 23)]


RUNTIMES = {name: Runtime("ran.py") for name in FORMATS}  # each by itself, as who deploys has it


def run(folder, rows, count=N, batch=4):
    """Tokens `[B, n]` and logits `[B, n, V]` of a clean process."""
    return RUNTIMES[format_of(folder)](folder, (rows, count, PIECE, batch))


def format_of(folder):
    return json.loads((folder / "export.json").read_text())["format"]


def expected_logits(lm, rows, tokens):
    """The logits of each of a row's new tokens, by the forward pass without caches."""
    found = []
    for row, new in zip(rows, tokens):
        ids = np.array([row + new.tolist()])
        hidden = lm.backbone({"token_ids": ids, "padding_mask": np.ones_like(ids)})[:, len(row) - 1 : -1]
        found.append(keras.ops.convert_to_numpy(lm.backbone.token_embedding(hidden, reverse=True))[0])
    return np.stack(found)


def generated(lm, rows, count=N):
    found = []
    for row in rows:
        inputs = {"token_ids": np.array([row]), "padding_mask": np.ones((1, len(row)), "int32")}
        out = lm.generate(inputs, max_new_tokens=count, stop_token_ids=None)["token_ids"]
        found.append(keras.ops.convert_to_numpy(out)[0, len(row) : len(row) + count])
    return np.stack(found)


def size(folder):
    """Bytes of the largest file there, which holds the weights."""
    return max((folder / name).stat().st_size for name in FORMATS[format_of(folder)].files)


def dequantized(lm):
    """A model of the floats that another's codes stand for, which `generate` rounds no activations for."""
    config = lm.backbone.config
    plain = small_lm(num_layers=config.num_layers, max_sequence_length=config.max_sequence_length)
    for name, weight in lm.backbone.named_weights().items():
        plain.backbone.named_weights()[name].assign(np.asarray(weight.numpy()))
    return plain


@pytest.fixture(scope="module", params=HERE)
def written(request, tmp_path_factory):
    """A model, and the folder that the command has exported it to, in this process, which has the format's backend."""
    lm, format, parent = small_lm(max_sequence_length=CONTEXT), request.param, tmp_path_factory.mktemp(request.param)
    lm.save_to_preset(parent / "preset")
    sizes = ["--cache-length", str(LONG + N), "--prefill-length", str(PIECE)] if format == "litert" else []
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["export", str(parent / "preset"), str(parent / "a" / "model"), "--format", format, *sizes]) == 0
    assert printed.getvalue() == f"{format} in {parent / 'a' / 'model'}\n"
    return lm, parent / "a" / "model"


def test_tokens_and_logits(written):
    """Ragged rows in one batch, in pieces, with rings that turn; one copy of the weights; no path of this machine."""
    (lm, folder), rows = written, prompts()
    format = format_of(folder)
    tokens, logits = run(folder, rows, batch=1 if format == "litert" else 4)
    assert len(np.unique(tokens)) > 20 and np.array_equal(tokens, generated(lm, rows))
    assert np.abs(logits - expected_logits(lm, rows, tokens)).max() < TOLERANCE
    if format != "torch":  # whose file has a megabyte of JSON about its operations
        assert all_bytes(lm) - 4096 < size(folder) < all_bytes(lm) + EMBEDDING / 2
    for path in folder.iterdir():
        for private in (Path(keras_gemma2.__file__).parent, sys.prefix, folder.parent):
            assert str(private).encode() not in path.read_bytes(), (path.name, private)
    assert (folder / "vocabulary.spm").read_bytes() == lm.preprocessor.tokenizer.proto
    assert list(folder.parent.iterdir()) == [folder]


def test_each_formats_example(written):
    """Its text is `generate`'s."""
    lm, folder = written
    command = [sys.executable, str(Path(__file__).parents[1] / "examples" / "run_exported.py"), str(folder), "It is"]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    shown = subprocess.run([*command, "--tokens", "9"], capture_output=True, text=True, env=environment)
    assert shown.stdout == lm.generate("It is", max_new_tokens=9, sampler="greedy") + "\n", shown.stderr
    if format_of(folder) == "litert":  # whose sizes are fixed
        wrong = subprocess.run([*command, "--tokens", str(LONG + N)], capture_output=True, text=True, env=environment)
        assert wrong.returncode != 0 and "must fit in" in wrong.stderr


@pytest.mark.parametrize("format", HERE)
def test_codes_stay_codes(tmp_path, format):
    """The programs multiply by what the codes stand for; the embedding is stored once, a byte a weight. The model has generated
    before, by when a backend may hold codes in another order, or other things made of them, and does so after as before."""
    small_lm(num_layers=2).save_to_preset(tmp_path / "preset")
    lm, rows = Gemma2CausalLM.from_preset(tmp_path / "preset", quantize="int8"), prompts(40)
    before = generated(lm, rows)
    lm.export(tmp_path / "model", format=format)
    tokens, logits = run(tmp_path / "model", rows, batch=1 if format == "litert" else 4)
    exact = dequantized(lm)
    # XLA's products for CPUs take rows in whole numbers up to 32,000 of their largest; the others are float32's.
    assert np.abs(logits - expected_logits(exact, rows, tokens)).max() < (0.02 if format == "stablehlo" else TOLERANCE)
    if format != "stablehlo":
        assert np.array_equal(tokens, generated(exact, rows))
    codes = lm.backbone.named_weights()["token_embedding/embeddings"].codes
    held = b"".join(path.read_bytes() for path in (tmp_path / "model").iterdir() if path.suffix != ".pt2")
    assert held.count(keras.ops.convert_to_numpy(codes).tobytes()) == (format != "torch")
    assert np.array_equal(generated(lm, rows), before)


@pytest.mark.parametrize("format, mode", [(name, mode) for name in HERE for mode in FORMATS[name].modes])
def test_codes_keep_their_size(tmp_path, format, mode):
    """Of layers wide enough that no converter computes with them ahead."""
    lm = small_lm(**WIDE)
    lm.quantize(mode)
    lm.export(tmp_path / "model", format=format)
    graph = 1_800_000 if format == "litert" else 1_300_000  # what the operations take: LiteRT has them twice, PyTorch's are JSON
    total = sum(path.stat().st_size for path in (tmp_path / "model").iterdir())
    assert all_bytes(lm) < total < all_bytes(lm) + graph


SHAPES = {
    "one_local_layer": {"num_layers": 1, "sliding_window_size": 1},
    "all_global": {"num_layers": 2, "layer_types": ["global"] * 2, "sliding_window_size": 500, "max_sequence_length": 48},
    "room_below_the_window": {"num_layers": 2, "sliding_window_size": 100},
}


# OpenVINO converts what is written for ONNX, whose shapes are all here.
@pytest.mark.parametrize(
    "format, shape", [(name, shape) for name in HERE for shape in SHAPES if name != "openvino" or shape == "room_below_the_window"]
)
def test_other_shapes_with_an_adapter(tmp_path, format, shape):
    """A batch, and rows by themselves; the adapter is the only one, so that this process writes."""
    lm, rows = small_lm(**SHAPES[shape]), prompts(40)
    lm.enable_lora(rank=16, targets=["query", "down"])
    draw = np.random.default_rng(1)
    for variable in lm.trainable_variables:
        variable.assign(draw.normal(0, 0.5, variable.shape))
    for batch in (4, 1) if format == "litert" else (None,):
        lm.export(tmp_path / "model", format=format, overwrite=True, **({"batch_size": batch} if batch else {}))
        for size in [batch] if batch else (4, 1):
            tokens, logits = run(tmp_path / "model", rows, 6, size)
            assert np.abs(logits - expected_logits(lm, rows, tokens)).max() < TOLERANCE
    assert len(np.unique(tokens)) > 10


@pytest.mark.parametrize("format", with_("int4"))
def test_four_bits_and_an_idle_adapter(tmp_path, format):
    """int4 codes with an adapter over them, which is not merged; one that is not active stays behind."""
    lm, rows = small_lm(num_layers=2), prompts(40)
    lm.quantize("int4")
    draw = np.random.default_rng(1)
    for name in ("idle", "used"):
        lm.enable_lora(rank=16, targets=["query", "down"], name=name)
        for variable in lm.trainable_variables:
            variable.assign(draw.normal(0, 0.5, variable.shape))
    lm.export(tmp_path / "model", format=format)
    tokens, logits = run(tmp_path / "model", rows)
    plain = dequantized(lm)
    before = expected_logits(plain, rows, tokens)
    lm.save_adapter(tmp_path / "adapter")
    plain.load_adapter(tmp_path / "adapter")
    assert np.array_equal(tokens, generated(plain, rows))
    expected = expected_logits(plain, rows, tokens)
    assert np.abs(logits - expected).max() < TOLERANCE and np.abs(before - expected).max() > 0.5
    if format == "stablehlo":
        from safetensors import safe_open

        with safe_open(tmp_path / "model" / "weights.safetensors", "numpy") as file:
            adapters = [name for name in file.keys() if "lora" in name]
        assert adapters and not [name for name in adapters if "idle" in name]


@pytest.mark.parametrize("format", with_("bfloat16"))
def test_bfloat16_stays_bfloat16(tmp_path, format):
    exact, rows = small_lm(num_layers=2), prompts(40)
    exact.save_to_preset(tmp_path / "preset")
    lm = Gemma2CausalLM.from_preset(tmp_path / "preset", dtype="bfloat16")
    lm.export(tmp_path / "model", format=format)
    assert size(tmp_path / "model") < all_bytes(lm) + (1_400_000 if format == "torch" else EMBEDDING / 4)
    tokens, logits = run(tmp_path / "model", rows)
    wanted, rounded = (expected_logits(one, rows, tokens).astype("float32") for one in (exact, lm))
    # No further from the float32 model than the backend's own bfloat16 is, but for chance.
    error, own = np.abs(logits - wanted).mean(), np.abs(rounded - wanted).mean()
    assert 0 < error < 1.5 * own


def test_from_another_backend(tmp_path):
    lm, rows = small_lm(num_layers=2), prompts(40)
    lm.export(tmp_path / "a" / "model", format=ELSEWHERE)
    tokens, logits = run(tmp_path / "a" / "model", rows, batch=1)
    assert np.array_equal(tokens, generated(lm, rows))
    assert np.abs(logits - expected_logits(lm, rows, tokens)).max() < TOLERANCE
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["model"]


# What is refused --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm():
    return small_lm(num_layers=2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"format": "gguf"}, "`format` must be one of 'tf_saved_model', 'onnx', .*Received: 'gguf'"),
        ({"format": "onnx", "input_signature": [1]}, "`input_signature` is not for Gemma 2"),
        ({"format": "onnx", "batch_size": 2}, "The sizes of format='onnx' are free; only 'litert' fixes them.*'batch_size': 2"),
        ({"format": "litert", "batch_size": 0}, "`batch_size` must be an integer from 1 to 65536. Received: 0"),
        ({"format": "litert", "cache_length": 129}, "`cache_length` must be an integer from 2 to 128. Received: 129"),
        ({"format": "litert", "prefill_length": 1.5}, "`prefill_length` must be an integer from 1 to 128. Received: 1.5"),
    ],
)
def test_arguments_are_checked_first(tmp_path, lm, arguments, message):
    with pytest.raises(ValueError, match=message):
        lm.export(tmp_path / "model", **arguments)
    with pytest.raises(TypeError, match="`export` with format='onnx' has no `chat`"):
        lm.export(tmp_path / "model", format="onnx", chat=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "format, dtype, message",
    [
        ("onnx", "bfloat16", "compute in float32: its runtime has no bfloat16 .*Received a model of dtype='bfloat16'"),
        ("litert", "int8_from_bfloat16", "is for models that compute in float32"),
        ("torch", "float16", "compute in float32 or bfloat16"),
        ("litert", "int4_from_float32", "format='litert' takes weights in int8, or floats. Received: 'int4'"),
        ("onnx", "int4_from_float32", "format='onnx' takes weights in int8, or floats. Received: 'int4'"),
    ],
)
@pytest.mark.filterwarnings("ignore:Gemma 2's activations pass float16")
def test_models_that_a_runtime_has_no_arithmetic_for(tmp_path, tiny, format, dtype, message):
    lm = Gemma2CausalLM(keras_gemma2.Gemma2Backbone(**tiny, dtype=dtype), None)
    with pytest.raises(ValueError, match=message):
        lm.export(tmp_path / "model", format=format)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(tmp_path, lm, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(ImportError, match=r'is written with onnxscript, not installed here. .*pip install onnxscript$'):
        lm.export(tmp_path / "model", format="onnx")


def test_folders_that_hold_something(tmp_path, lm, monkeypatch):
    """A checkpoint's files are not an export's; one of another format goes."""
    mine = {"mine.txt", "config.json", "tokenizer.model", "model.safetensors"}
    for name in mine:
        (tmp_path / name).write_text("kept")
    with pytest.raises(keras_gemma2.CheckpointError, match="is not empty.*overwrite=True"):
        lm.export(tmp_path, format="onnx")
    assert {path.name for path in tmp_path.iterdir()} == mine

    def write(lm, folder, format, *others):
        for name in (*FORMATS[format].files, "export.json", "vocabulary.spm"):
            Path(folder, name).write_text(json.dumps({"format": format}))

    monkeypatch.setattr(programs, "write", write)
    monkeypatch.setattr(programs, "write_elsewhere", lambda lm, folder, backend, format, sizes: write(lm, folder, format))
    (tmp_path / "saved_model.pb").write_text("an older export")
    for format in ("onnx", "stablehlo", "torch"):
        lm.export(tmp_path, format=format, overwrite=True)
        theirs = {*FORMATS[format].files, "export.json", "vocabulary.spm"}
        assert {path.name for path in tmp_path.iterdir()} == mine | theirs
        assert all(json.loads((tmp_path / name).read_text()) == {"format": format} for name in theirs)
    assert all((tmp_path / name).read_text() == "kept" for name in mine)


def test_programs_are_traced_on_a_cpu(tmp_path, lm, monkeypatch):
    """One that is traced for a GPU may not run without: another process writes it."""
    asked = []
    monkeypatch.setattr(programs.backend, "on_accelerator", lambda: True)
    monkeypatch.setattr(programs, "write_elsewhere", lambda lm, folder, *others: asked.append(others[:2]))
    for format, about in FORMATS.items():
        lm.export(tmp_path / format, format=format)
        assert asked.pop() == (about.backend, format)


def test_stop_tokens_of_a_tokenizers_own_go_along(tmp_path):
    """As a checkpoint's `generation_config.json` may name them; through another process, too."""
    lm = small_lm(num_layers=1)
    tokenizer = Gemma2Tokenizer(lm.preprocessor.tokenizer.proto, extra_stop_token_ids=(300,))
    lm = Gemma2CausalLM(lm.backbone, Gemma2CausalLMPreprocessor(tokenizer))
    for format in (*HERE[:1], ELSEWHERE):
        lm.export(tmp_path / format, format=format)
        assert json.loads((tmp_path / format / "export.json").read_text())["stop_token_ids"] == [1, 107, 300]


# Disks and processes that fail ------------------------------------------------------------------------------------------

LIMITED = """
import resource, sys
from exported import small_lm
lm = small_lm(sliding_window_size=1, num_layers=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    lm.export(sys.argv[2], format=sys.argv[1])
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("format", [*HERE, *(["tf_saved_model"] if keras.backend.backend() == "tensorflow" else [])])
def test_a_disk_that_takes_no_more(tmp_path, format):
    """A limit of the system's on files, at which each writer fails in its own way, as it does on a full disk."""
    target = tmp_path / "a" / "model"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", LIMITED, format, target], env=environment, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0 and done.stdout.startswith("CheckpointError") and "File too large" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_killed_process_is_reported(tmp_path, lm, monkeypatch):
    monkeypatch.setattr(elsewhere.subprocess, "run", lambda command, **kwargs: subprocess.CompletedProcess(command, -9, "", ""))
    with pytest.raises(RuntimeError, match=f"writes the {ELSEWHERE} was killed, most likely because memory ran out"):
        lm.export(tmp_path / "model", format=ELSEWHERE)
    words = "RuntimeError: it could not: No space left on device"
    monkeypatch.setattr(elsewhere.subprocess, "run", lambda command, **kwargs: subprocess.CompletedProcess(command, 1, "", words))
    with pytest.raises(keras_gemma2.CheckpointError, match="is full"):
        lm.export(tmp_path / "model", format=ELSEWHERE)
    assert not list(tmp_path.iterdir())


# The command line and the example ---------------------------------------------------------------------------------------


@pytest.mark.backend_free  # its process takes the format's backend, whatever the one here
def test_the_command_and_the_example(tmp_path):
    """`export` of the embedded preset, and the example's text from it, which is `generate`'s."""
    target, prompt = tmp_path / "model", "The state of our union is"
    command = [sys.executable, "-m", "keras_gemma2", "export", "gemma2_mini_en", str(target), "--format", "stablehlo"]
    done = subprocess.run([*command, "--dtype", "float32"], capture_output=True, text=True, check=True)
    assert done.stdout == f"stablehlo in {target}\n"
    example = Path(__file__).parents[1] / "examples" / "run_exported.py"
    shown = subprocess.run(
        [sys.executable, str(example), str(target), prompt, "--tokens", "20"], capture_output=True, text=True, check=True
    )
    lm = Gemma2CausalLM.from_preset("gemma2_mini_en", dtype="float32")
    assert shown.stdout == lm.generate(prompt, max_new_tokens=20) + "\n"
    wrong = subprocess.run([*command, "--max-new-tokens", "3", "--overwrite"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "--max-new-tokens: is for --format saved_model, not for --format stablehlo" in wrong.stderr
    from jax import export

    assert export.deserialize((target / "model.stablehlo").read_bytes()).platforms == ("cpu", "cuda", "tpu")
    none = tmp_path / "none"
    early = [*command[:5], str(none), "--format", "onnx", "--dtype", "bfloat16"]
    wrong = subprocess.run(early, capture_output=True, text=True)
    assert wrong.returncode == 2 and "is for models that compute in float32" in wrong.stderr and not none.exists()
