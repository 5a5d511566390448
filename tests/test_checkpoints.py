"""Hugging Face folders: both dialects of config.json, one file or several, and what must be refused."""

import json
import shutil
import warnings

import keras
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import transformers
from oracle import BASE, hugging_face_folder, hugging_face_logits, hugging_face_model
from vocabulary import train_vocabulary

from keras_gemma2 import Gemma2Backbone, Gemma2CausalLM
from keras_gemma2.checkpoints import hf_writer
from keras_gemma2.checkpoints.hf import extra_settings
from keras_gemma2.checkpoints.hf_config import config_from_hugging_face, config_to_hugging_face
from keras_gemma2.checkpoints.reading import find_source, open_weights
from keras_gemma2.checkpoints.weight_map import FORMATS, TABLE, foreign_shapes, rows_for
from keras_gemma2.checkpoints.writing import outgoing_from_entries
from keras_gemma2.config import NAMED_SIZES, Gemma2Config
from keras_gemma2.errors import CheckpointError

TOLERANCE = 2e-5  # as in test_parity
IDS = np.random.default_rng(1).integers(0, 97, (2, 13))


@pytest.fixture
def folder(tmp_path):
    """A copy of a small Hugging Face folder, to break."""
    source, _ = hugging_face_folder()
    return shutil.copytree(source, tmp_path / "model")


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The preset .* has no tokenizer")
        yield


def logits(lm, dtype=None):
    return keras.ops.convert_to_numpy(lm({"token_ids": IDS, "padding_mask": np.ones_like(IDS)}))


def edit_config(folder, remove=(), **changes):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for key in remove:
        values.pop(key, None)
    path.write_text(json.dumps({**values, **changes}))


def edit_tensors(folder, change):
    path = str(folder / "model.safetensors")
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def assert_loads_like(folder, model):
    expected = hugging_face_logits(model, IDS)
    assert np.abs(logits(Gemma2CausalLM.from_preset(folder)) - expected).max() <= TOLERANCE * np.ptp(expected)


def test_table_covers_every_weight_once(tiny):
    config = Gemma2Config(**tiny)
    for kind in FORMATS:
        rows = dict(rows_for(config, kind))
        assert sorted(rows) == sorted(config.weight_shapes()) and len(TABLE) == 13
        parts = {(cell.name, cell.part) for cell in rows.values()}
        assert len(parts) == len(rows), kind
        assert sum(map(np.prod, foreign_shapes(config, rows).values())) == config.parameter_count(), kind


@pytest.mark.parametrize("size", NAMED_SIZES)
def test_config_round_trip(size):
    config = NAMED_SIZES[size]
    assert config_from_hugging_face(json.loads(json.dumps(config_to_hugging_face(config, "bfloat16")))) == config


def test_transformers_4_dialect(folder):
    """rope_theta at the top, no layer_types, hidden_act, torch_dtype."""
    remove = ["rope_parameters", "layer_types", "dtype", "hidden_activation"]
    edit_config(folder, remove, rope_theta=500.0, torch_dtype="float32", hidden_act="gelu_pytorch_tanh")
    assert_loads_like(folder, hugging_face_folder()[1])


def test_epsilon_and_rope_base_come_from_the_file():
    overrides = {"rms_norm_eps": 0.07, "rope_theta": 30.0}
    path, model = hugging_face_folder(**overrides)
    config = Gemma2Backbone.from_preset(path).config
    assert (config.layer_norm_epsilon, config.rope_max_wavelength) == (0.07, 30.0)
    assert_loads_like(path, model)


def test_sharded_folder(tmp_path):
    model = hugging_face_model()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_loads_like(tmp_path, model)


def test_base_model_folder(tmp_path):
    """Saved without the task, tensors have no `model.` prefix."""
    model = hugging_face_model()
    model.model.save_pretrained(tmp_path)
    assert_loads_like(tmp_path, model)


def test_duplicate_head_is_taken_if_equal(folder):
    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    edit_tensors(folder, add)
    assert_loads_like(folder, hugging_face_folder()[1])
    edit_tensors(folder, lambda tensors: tensors["lm_head.weight"].__setitem__((96, 3), 7.0))
    with pytest.raises(ValueError, match="lm_head.weight.*differs from the embedding"):
        Gemma2CausalLM.from_preset(folder)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_dtype_default_is_the_configs(folder, stored):
    def convert(tensors):
        for name, value in tensors.items():
            tensors[name] = value.astype(ml_dtypes.bfloat16 if stored == "bfloat16" else np.float16)

    edit_tensors(folder, convert)
    edit_config(folder, ["dtype", "torch_dtype"], dtype="float32")
    assert Gemma2Backbone.from_preset(folder).dtype_policy.name == "float32"
    edit_config(folder, ["dtype"], torch_dtype="bfloat16")
    backbone = Gemma2Backbone.from_preset(folder)
    assert backbone.dtype_policy.name == "bfloat16" and {v.dtype for v in backbone.variables} == {"bfloat16"}
    assert Gemma2Backbone.from_preset(folder, dtype="float32").dtype_policy.name == "float32"
    edit_config(folder, ["dtype", "torch_dtype"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Gemma 2's activations")
        assert Gemma2Backbone.from_preset(folder).dtype_policy.name == stored


def test_load_weights_false_and_overrides(folder):
    a = Gemma2Backbone.from_preset(folder, load_weights=False, dropout=0.2, max_sequence_length=32)
    assert a.config.dropout == 0.2 and a.config.max_sequence_length == 32 and a.config.hidden_dim == BASE["hidden_size"]
    trained = Gemma2Backbone.from_preset(folder)
    difference = a.token_embedding.embeddings - trained.token_embedding.embeddings
    assert np.abs(keras.ops.convert_to_numpy(difference)).max() > 0.01


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "gemma"}, "model_type='gemma'"),
        ({"hidden_activation": "gelu"}, "`hidden_activation`.*'gelu'"),
        ({"attention_bias": True}, "`attention_bias`"),
        ({"tie_word_embeddings": False}, "`tie_word_embeddings`"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}}, "`rope_type`.*'yarn'"),
        ({"layer_types": ["sliding_attention", "chunked"] * 2}, "`layer_types`.*'chunked'"),
        ({"head_dim": 15}, "head_dim=15"),
        ({"vocab_size": 98}, r"embed_tokens.weight.*\(97, 42\).*\(98, 42\)"),
        ({"num_hidden_layers": 5, "layer_types": None}, "Missing: .*layers.4.*11 in all"),
        ({"num_hidden_layers": 3, "layer_types": None}, "Unknown: .*layers.3.*11 in all"),
    ],
)
def test_other_models_are_refused(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        Gemma2CausalLM.from_preset(folder)


TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_template_and_generation_settings_are_written_again(folder, tmp_path, place):
    (folder / place).write_text(TEMPLATE if place.endswith("jinja") else json.dumps({"chat_template": TEMPLATE}))
    settings = {"temperature": 0.6, "top_k": 5, "do_sample": True, "bad_words_ids": None, "suppress_tokens": [3, 4]}
    no_settings = {"_from_model_config": True, "eos_token_id": [1, 9], "pad_token_id": 7, "x": {"y": 1}, "nan": float("nan")}
    (folder / "generation_config.json").write_text(json.dumps({**settings, **no_settings}))
    source = find_source("it", str(folder))
    extra = extra_settings(source)
    assert extra == {"chat_template": TEMPLATE, "generation_config": settings}
    out = tmp_path / "out"
    out.mkdir()
    with open_weights(source) as entries:
        weights = outgoing_from_entries(entries, source.config, "float32")
        hf_writer.write_folder(str(out), weights, train_vocabulary(), source.stop_token_ids, extra=extra)
    assert transformers.GemmaTokenizer.from_pretrained(out).chat_template == TEMPLATE
    read = transformers.GenerationConfig.from_pretrained(out)
    assert {key: getattr(read, key) for key in settings} == settings
    assert (read.pad_token_id, read.bos_token_id) == (0, 2) and set(read.eos_token_id) == {1, 9}


def test_settings_that_are_none_are_left_out(folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": [{"name": "default", "template": "x"}]}))
    assert extra_settings(find_source("it", str(folder))) == {}
    (folder / "chat_template.jinja").write_bytes(b"x" * (2 << 20))
    with pytest.warns(UserWarning, match="chat_template.jinja is left out"):
        assert extra_settings(find_source("it", str(folder))) == {}


def test_damaged_folders_are_refused(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a complete safetensors"):
        Gemma2CausalLM.from_preset(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"No model.safetensors"):
        Gemma2CausalLM.from_preset(folder)
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside.safetensors'; only files of its own folder"):
        Gemma2CausalLM.from_preset(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        Gemma2CausalLM.from_preset(folder)
