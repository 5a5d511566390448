"""`verify`: the embedded preset passes, and each tampered copy fails where it was tampered with."""

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import sentencepiece
from oracle import hugging_face_folder, hugging_face_logits

from keras_gemma2 import convert
from keras_gemma2.checkpoints.source import HUGGING_FACE, Source
from keras_gemma2.cli import main
from keras_gemma2.config import NAMED_SIZES
from keras_gemma2.presets import verify_known, verify_model, verify_running
from keras_gemma2.presets.registry import EMBEDDED, EMBEDDED_FOLDER, resolve
from keras_gemma2.presets.verify import CHECKS, FAILED, NEED_MODEL, OK, SKIPPED, verify
from keras_gemma2.presets.verify_files import check_files, check_hashes
from keras_gemma2.presets.verify_subject import Subject, claim_of
from keras_gemma2.presets.verify_weights import check_config, check_vocabulary

SLOW = ("transformers", "greedy")  # of the checks that a model is loaded for


def verdicts(where, **options):
    return {result.name: result for result in verify(where, **options)}


def failures(results):
    return {name for name, result in results.items() if result.verdict == FAILED}


@pytest.fixture
def copy(tmp_path):
    """A copy of the embedded preset that says it is it, to tamper with."""
    return shutil.copytree(EMBEDDED_FOLDER, tmp_path / EMBEDDED)


@pytest.fixture(scope="module")
def loaded():
    """The embedded preset, its model loaded; for one check at a time."""
    subject = Subject(EMBEDDED, resolve(EMBEDDED), EMBEDDED)
    assert verify_model.check_model(subject).verdict == OK
    return subject


def edit_tensors(folder, change):
    path = str(folder / "model.safetensors")
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_embedded_preset_passes_every_check(capsys):
    assert main(["verify", EMBEDDED]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("ok ")] == list(CHECKS)
    assert lines[-1] == "gemma2_mini_en: 10 ok, 0 skipped, 0 FAILED"


# Tampering -----------------------------------------------------------------------------------------------------------------


def flip_a_byte(folder):
    """The lowest bit of one float16 weight of nine million bytes: no text shows it."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8 + struct.unpack("<Q", data[:8])[0] + 2 * 12345] ^= 1
    path.write_bytes(data)


def swap_layers(folder):
    """Two local layers: every shape and every statistic stays."""

    def swap(tensors):
        for name in [name for name in tensors if name.startswith("model.layers.2.")]:
            other = name.replace("layers.2.", "layers.4.")
            tensors[name], tensors[other] = tensors[other], tensors[name]

    edit_tensors(folder, swap)


def put_nan(folder):
    edit_tensors(folder, lambda tensors: tensors["model.layers.3.mlp.up_proj.weight"].__setitem__((5, 7), np.nan))


def store_norms_as_one_plus_w(folder):
    def shift(tensors):
        for name in tensors:
            if "norm" in name:
                tensors[name] = tensors[name] + np.float16(1)

    edit_tensors(folder, shift)


def zero_a_tensor(folder):
    edit_tensors(folder, lambda tensors: tensors["model.layers.5.self_attn.v_proj.weight"].fill(0))


def zero_one_norm(folder):
    edit_tensors(folder, lambda tensors: tensors["model.layers.5.input_layernorm.weight"].fill(0))


def change_the_cap(folder):
    edit_config(folder, final_logit_softcapping=50.0)


def swap_pieces(folder):
    from sentencepiece import sentencepiece_model_pb2

    path = folder / "tokenizer.model"
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    model.pieces[428].piece, model.pieces[436].piece = model.pieces[436].piece, model.pieces[428].piece
    path.write_bytes(model.SerializeToString())


def swap_rare_pieces(folder):
    """Two that no golden text has."""
    from sentencepiece import sentencepiece_model_pb2

    path = folder / "tokenizer.model"
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    model.pieces[50].piece, model.pieces[51].piece = model.pieces[51].piece, model.pieces[50].piece
    path.write_bytes(model.SerializeToString())


def truncate(folder):
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1000)


def lose_the_weights(folder):
    (folder / "model.safetensors").unlink()


def lose_the_stop_tokens(folder):
    (folder / "generation_config.json").unlink()


def break_the_vocabulary(folder):
    (folder / "tokenizer.model").write_bytes(b"not a model")


UNREADABLE = {"parameters", "weights", "model"}
QUICK = (zero_one_norm, swap_rare_pieces, lose_the_stop_tokens)  # no model is loaded for them, for time's sake


@pytest.mark.parametrize(
    "tamper, failed",
    [
        (flip_a_byte, {"hashes"}),
        (swap_layers, {"hashes", "perplexity"}),
        (put_nan, {"hashes", "weights", "model", "perplexity"}),
        (store_norms_as_one_plus_w, {"hashes", "weights", "perplexity"}),
        (zero_a_tensor, {"hashes", "weights", "perplexity"}),
        (zero_one_norm, {"hashes", "weights"}),
        (change_the_cap, {"hashes", "config", "perplexity"}),
        (swap_pieces, {"hashes", "vocabulary", "perplexity"}),
        (swap_rare_pieces, {"hashes", "vocabulary"}),
        (truncate, {"hashes", *UNREADABLE}),
        (lose_the_weights, {"files", *UNREADABLE}),
        (lose_the_stop_tokens, {"files"}),
        (break_the_vocabulary, {"hashes", "vocabulary", "model"}),
    ],
)
def test_a_tampered_copy_fails_where_it_was_tampered_with(copy, tamper, failed):
    tamper(copy)
    results = verdicts(copy, skip=NEED_MODEL if tamper in QUICK else SLOW)
    assert failures(results) == failed, [str(result) for result in results.values()]
    for name in failed:
        assert "Error:" not in results[name].message, "a fault of the checkpoint, in its own words"


def test_the_whole_report_of_a_tampered_copy(copy, capsys):
    """Every check runs on, and the exit code is 1. Both models read the same wrong weights, so that their logits agree."""
    swap_layers(copy)
    assert main(["verify", str(copy)]) == 1
    out = capsys.readouterr().out
    assert "ok      transformers" in out and "FAILED  greedy" in out
    assert out.splitlines()[-1] == f"{copy}: 7 ok, 0 skipped, 3 FAILED: hashes, perplexity, greedy"


def test_a_missing_shard(tmp_path):
    convert(EMBEDDED, tmp_path / "sharded", to="hf", max_shard_size="3MB")
    assert failures(verdicts(tmp_path / "sharded", skip=NEED_MODEL)) == set()
    shards = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    shards[1].unlink()
    results = verdicts(tmp_path / "sharded", skip=SLOW)
    assert failures(results) == {"files", *UNREADABLE} and shards[1].name in results["files"].message
    assert results["perplexity"].verdict == SKIPPED and "not loaded" in results["perplexity"].message


def test_what_cannot_be_read_at_all(copy, capsys):
    (copy / "config.json").write_text("{")
    assert main(["verify", str(copy)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("FAILED  files") and "not valid JSON" in lines[0]
    assert all(line.startswith("skipped") for line in lines[1:-1]) and len(lines) == 11


def test_wrong_input_is_exit_code_2(capsys, tmp_path):
    for arguments in (["gemma2_mini_em"], [EMBEDDED, "--as", "gemma2_3b_en"], [EMBEDDED, "--dtype", "float33"]):
        assert main(["verify", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
    with pytest.raises(ValueError, match="'colour'"):
        verify(EMBEDDED, skip=["colour"])


def test_quick_loads_no_model(capsys):
    assert main(["verify", EMBEDDED, "--quick"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "gemma2_mini_en: 6 ok, 4 skipped, 0 FAILED"


# Other formats and other models --------------------------------------------------------------------------------------------


def test_another_format_is_exported_for_transformers(tmp_path):
    convert(EMBEDDED, tmp_path / "ours", to="preset")
    results = verdicts(tmp_path / "ours", claim=EMBEDDED, skip=["greedy"])
    assert {name for name, result in results.items() if result.verdict == SKIPPED} == {"hashes", "greedy"}
    assert not failures(results)


def test_a_model_that_claims_nothing_is_not_said_to_be_right():
    folder, _ = hugging_face_folder()
    results = verdicts(folder)
    assert {name for name, result in results.items() if result.verdict == OK} == {
        *("files", "parameters", "weights", "model", "transformers"),
    }, [str(result) for result in results.values()]
    assert not failures(results)


def test_the_parts_of_a_claim(tmp_path):
    source = resolve(EMBEDDED)
    for where, claim in {
        "gemma2_9b_en": "gemma2_9b_en",
        "hf://google/gemma-2-9b": "gemma2_9b_en",
        "hf://google/gemma-2-9b-it@abc": "gemma2_instruct_9b_en",
        "hf://someone/gemma-2-9b": None,
        "kaggle://keras/gemma2/keras/gemma2_2b_en/2": "gemma2_2b_en",
        "kaggle://keras/gemma2/keras/gemma2_instruct_2b_en": "gemma2_instruct_2b_en",
        "kaggle://google/shieldgemma/keras/shieldgemma_27b_en/2": "shieldgemma_27b_en",
        "kaggle://someone/gemma2/keras/gemma2_2b_en/2": None,
        "weights/gemma-2-27b/": "gemma2_27b_en",
        "hub/models--google--gemma-2-2b-it/snapshots/0123abc": "gemma2_instruct_2b_en",
        "hub/models--someone--gemma-2-2b-it/snapshots/0123abc": None,
        "weights/gemma-2-27b/checkpoint-500": None,
        "weights/mini": "gemma2_mini_en",
    }.items():
        assert claim_of(where, source if claim == EMBEDDED else dataclasses.replace(source, path=str(tmp_path))) == claim, where


@pytest.mark.parametrize(
    "size, changes, claim, verdict, told",
    [
        ("gemma2_27b", {}, None, OK, "gemma2_27b"),
        ("gemma2_27b", {"query_pre_attn_scalar": 128}, None, FAILED, "query_pre_attn_scalar is 128, gemma2_27b has 144"),
        ("gemma2_9b", {"query_pre_attn_scalar": 224}, "gemma2_9b_en", FAILED, "gemma2_9b_en has 256"),
        ("gemma2_2b", {"attention_logit_soft_cap": 30.0, "final_logit_soft_cap": 50.0}, None, FAILED, "final_logit_soft_cap is 50"),
        ("gemma2_2b", {"layer_types": ("global", "local") * 13}, None, FAILED, "[global, local, ...]"),
        ("gemma2_2b", {"vocabulary_size": 256008}, None, OK, "vocabulary_size is 256008"),
        ("gemma2_2b", {"vocabulary_size": 256008}, "gemma2_2b_en", FAILED, "vocabulary_size is 256008"),
        ("gemma2_2b", {"num_layers": 4, "layer_types": None}, None, SKIPPED, "4 layers"),
    ],
)
def test_config_beside_the_published_size(size, changes, claim, verdict, told):
    config = dataclasses.replace(NAMED_SIZES[size], **changes)
    result = check_config(Subject("x", Source("x", HUGGING_FACE, config, "."), claim))
    assert result.verdict == verdict and told in result.message


# Hashes that huggingface_hub noted -----------------------------------------------------------------------------------------


def git_hash(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def test_the_git_hash_is_gits():
    assert git_hash(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"  # `echo hello | git hash-object --stdin`


def test_hashes_noted_in_a_downloaded_folder(tmp_path):
    from huggingface_hub._local_folder import write_download_metadata

    folder = Path(shutil.copytree(hugging_face_folder()[0], tmp_path / "download"))
    weights, config = folder / "model.safetensors", folder / "config.json"
    write_download_metadata(folder, weights.name, "c" * 40, hashlib.sha256(weights.read_bytes()).hexdigest())
    write_download_metadata(folder, config.name, "c" * 40, git_hash(config.read_bytes()))
    subject = Subject(str(folder), resolve(folder))
    result = check_hashes(subject)
    assert result.verdict == OK and result.message.startswith("2 files are") and "generation_config.json" in result.details[0]
    edit_config(folder, note="tampered")
    result = check_hashes(subject)
    assert result.verdict == FAILED and "config.json" in result.message and weights.name not in result.message


def test_hashes_of_a_hub_cache_are_its_blobs_names(tmp_path):
    snapshot, blobs = tmp_path / "models--me--model/snapshots/abc", tmp_path / "models--me--model/blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for name in ("config.json", "model.safetensors"):
        data = Path(hugging_face_folder()[0], name).read_bytes()
        blob = blobs / (git_hash(data) if name.endswith("json") else hashlib.sha256(data).hexdigest())
        blob.write_bytes(data)
        (snapshot / name).symlink_to(f"../../blobs/{blob.name}")
    subject = Subject(str(snapshot), resolve(snapshot))
    assert check_hashes(subject).verdict == OK and check_hashes(subject).details == ()
    with open(snapshot / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x55")
    assert check_hashes(subject).verdict == FAILED and "model.safetensors" in check_hashes(subject).message


def test_an_index_may_not_name_a_file_elsewhere(tmp_path):
    folder = shutil.copytree(hugging_face_folder()[0], tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    results = verdicts(folder, skip=SLOW)
    assert failures(results) == {"files", *UNREADABLE} and "passwd" in results["files"].message


# Single checks on one loaded model -----------------------------------------------------------------------------------------


def test_the_embedded_figure_is_transformers_too():
    import transformers

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=os.path.join(EMBEDDED_FOLDER, "tokenizer.model"))
    ids = [2, *tokenizer.encode(verify_known.TEXT)]
    model = transformers.AutoModelForCausalLM.from_pretrained(EMBEDDED_FOLDER, dtype="float32", attn_implementation="eager")
    logits = hugging_face_logits(model, [ids])[0, :-1].astype("float64")
    nats = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(ids) - 1), ids[1:]]
    bits = nats.sum() / math.log(2) / len(verify_known.TEXT.encode())
    assert abs(bits - verify_known.EMBEDDED_BITS_PER_BYTE) < 1e-5  # the figure has five digits
    for text, golden in verify_known.EMBEDDED_GOLDEN_IDS.items():
        assert tuple(tokenizer.encode(text)) == golden


def test_a_wrong_formula_is_seen_beside_transformers(loaded, monkeypatch):
    def ours(lm, token_ids, scale=1 + 1e-4):
        return verify_running.logits_of(lm, token_ids) * scale

    monkeypatch.setattr(verify_model, "float32_logits", lambda subject, ids: ours(subject.lm, ids))
    result = verify_model.check_transformers(loaded)
    assert result.verdict == FAILED and "2e-05" in result.message
    monkeypatch.setattr(verify_model, "float32_logits", lambda subject, ids: ours(subject.lm, ids, np.nan))
    assert verify_model.check_transformers(loaded).verdict == FAILED


def test_without_transformers_or_memory_the_reason_is_told(loaded, monkeypatch):
    monkeypatch.setattr(verify_running, "available_memory", lambda: 10**6)
    result = verify_model.check_transformers(loaded)
    assert result.verdict == SKIPPED and "of which 0.0 GB are free" in result.message
    result = verify_model.check_model(dataclasses.replace(loaded, lm=None))
    assert result.verdict == SKIPPED and "memory" in result.message
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "transformers" else found(name, *rest))
    result = verify_model.check_transformers(loaded)
    assert result.verdict == SKIPPED and "pip install transformers" in result.message


def test_available_memory_is_below_what_the_machine_has():
    free = verify_running.available_memory()
    assert free is None or 0 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_perplexity_is_judged_by_what_is_known(loaded, monkeypatch):
    nats = {}  # computed once, by the length of the text
    monkeypatch.setattr(
        verify_model,
        "nats",
        lambda lm, ids: nats[len(ids)] if len(ids) in nats else nats.setdefault(len(ids), verify_running.nats(lm, ids)),
    )

    def check(claim):
        return verify_model.check_perplexity(dataclasses.replace(loaded, claim=claim))

    assert check(None).verdict == SKIPPED and "1.4320" in check(None).message and "--as" in check(None).message
    assert check("gemma2_instruct_2b_en").verdict == SKIPPED
    monkeypatch.setattr(verify_model, "EMBEDDED_BITS_PER_BYTE", 1.5)
    assert check("gemma2_2b_en").verdict == OK and check(EMBEDDED).verdict == FAILED
    monkeypatch.setattr(verify_model, "EMBEDDED_BITS_PER_BYTE", 1.4)
    assert check("gemma2_2b_en").verdict == FAILED


def test_greedy_text_is_judged_by_how_the_record_was_made(loaded, monkeypatch):
    (right,) = [record for record in verify_known.CONTINUATIONS if record.model == EMBEDDED]
    text = verify_model._continue(loaded.lm, right)
    monkeypatch.setattr(verify_model, "_continue", lambda lm, record: text)  # computed once
    wrong = dataclasses.replace(right, texts=(" something else",))

    def check(*records):
        monkeypatch.setattr(verify_model, "CONTINUATIONS", records)
        return verify_model.check_greedy(loaded)

    result = check(right, wrong)
    assert result.verdict == FAILED and "1 of 2" in result.message and " something else" in result.details[0]
    assert check(right, dataclasses.replace(wrong, agreed=False)).verdict == OK
    assert check(right, dataclasses.replace(wrong, long=True)).verdict == OK
    assert check(dataclasses.replace(wrong, agreed=False)).verdict == SKIPPED
    assert check().verdict == SKIPPED


# The real vocabulary -------------------------------------------------------------------------------------------------------


@pytest.fixture
def real_vocabulary():
    path = os.environ.get("KERAS_GEMMA2_VOCABULARY")
    if not path:
        pytest.skip("Set KERAS_GEMMA2_VOCABULARY to the path of Gemma 2's SentencePiece model.")
    return path


def test_the_real_vocabulary_is_recognized(real_vocabulary, tmp_path):
    (tmp_path / "tokenizer.model").symlink_to(real_vocabulary)
    subject = Subject("x", Source("x", HUGGING_FACE, NAMED_SIZES["gemma2_2b"], str(tmp_path)), "gemma2_2b_en")
    result = check_vocabulary(subject)
    assert result.verdict == OK and "every piece at its published id" in result.message
    assert check_hashes(subject).verdict == OK and check_files(subject).verdict == OK
    subject.claim = EMBEDDED
    assert check_vocabulary(subject).verdict == FAILED


def test_recorded_continuations_have_the_tokens_asked_for(real_vocabulary):
    real = sentencepiece.SentencePieceProcessor(model_file=real_vocabulary)
    for record in verify_known.CONTINUATIONS:
        if record.model != EMBEDDED:
            prompt = real.encode(record.prompt)
            assert {len(real.encode(record.prompt + text)) for text in record.texts} == {len(prompt) + record.new_tokens}
            assert record.long == (len(prompt) > 4096)
