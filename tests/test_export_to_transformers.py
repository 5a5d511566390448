"""`export_to_transformers`: transformers loads the folder whole, with our logits, ids and chat format."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import keras
import ml_dtypes
import numpy as np
import pytest
import tokenizers
import transformers
from conftest import TINY
from oracle import hugging_face_folder, hugging_face_logits
from test_tokenizer import GOLDEN
from vocabulary import HARD_TEXTS, random_texts, train_vocabulary

from keras_gemma2 import Gemma2Backbone, Gemma2CausalLM, Gemma2CausalLMPreprocessor, Gemma2Tokenizer
from keras_gemma2.checkpoints.hf_config import config_from_hugging_face
from keras_gemma2.checkpoints.hf_writer import parse_size, write_folder
from keras_gemma2.checkpoints.writing import outgoing_from_backbone
from keras_gemma2.config import Gemma2Config
from keras_gemma2.errors import CheckpointError

TOLERANCE = 2e-5  # as in test_parity: float32 rounding in sums of this length, relative to the range of the logits
FRAMES = ("<bos>", "<eos>", "<pad>", "<unk>")
SOME = {  # written out by hand; the logits say that the others are in their places
    "token_embedding/embeddings": "model.embed_tokens.weight",
    "decoder_block_2/feed_forward/down/kernel": "model.layers.2.mlp.down_proj.weight",
    "decoder_block_3/post_ffw_norm/scale": "model.layers.3.post_feedforward_layernorm.weight",
    "decoder_block_1/attention/key/kernel": "model.layers.1.self_attn.k_proj.weight",
}


@pytest.fixture(scope="module")
def lm():
    """With a tokenizer, and every field another than transformers' default."""
    keras.utils.set_random_seed(5)
    preprocessor = Gemma2CausalLMPreprocessor(Gemma2Tokenizer(train_vocabulary(), extra_stop_token_ids=[11]), 32)
    backbone = Gemma2Backbone(**{**TINY, "vocabulary_size": 600, "layer_types": ["global", "local", "local", "global"]})
    draw = np.random.default_rng(6)
    for variable in backbone.variables:  # large enough that caps and windows act
        variable.assign(draw.normal(0, 0.3, variable.shape))
    return Gemma2CausalLM(backbone, preprocessor)


@pytest.fixture(scope="module")
def folder(lm, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "model"
    lm.export_to_transformers(path)
    return path


def load(folder, **options):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True, **options
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def logits(lm, ids):
    return keras.ops.convert_to_numpy(lm({"token_ids": ids, "padding_mask": np.ones_like(ids)}))


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_files(folder):
    assert sorted(os.listdir(folder)) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert os.listdir(folder.parent) == ["model"] and all(path.stat().st_mode & 0o044 for path in folder.iterdir())


def test_transformers_has_equal_logits_and_every_field(lm, folder):
    ids = np.random.default_rng(3).integers(0, 600, (2, 13))
    model = load(folder)
    expected = hugging_face_logits(model, ids)
    assert np.abs(logits(lm, ids) - expected).max() <= TOLERANCE * np.ptp(expected)
    theirs, ours = model.config, lm.backbone.config
    assert theirs.model_type == "gemma2" and theirs.architectures == ["Gemma2ForCausalLM"] and theirs.tie_word_embeddings
    assert config_from_hugging_face(theirs.to_dict()) == ours
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.bos_token_id) == (0, 1, 2)


def test_generation_config_stops_at_both(folder):
    generation = transformers.GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == [1, 107, 11] and (generation.bos_token_id, generation.pad_token_id) == (2, 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_rounded_once_and_nothing_else(lm, tmp_path, dtype):
    lm.export_to_transformers(tmp_path / "out", dtype, config_dtype="float32")
    model = load(tmp_path / "out")
    assert str(model.dtype) == "torch.float32" and read(tmp_path / "out", "config.json")["torch_dtype"] == "float32"
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    stored = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    for path, variable in lm.backbone.named_weights().items():
        if path in SOME:
            expected = keras.ops.convert_to_numpy(variable).astype(stored).astype("float32")
            np.testing.assert_array_equal(state[SOME[path]], expected)
    again = Gemma2CausalLM.from_preset(tmp_path / "out")
    again.export_to_transformers(tmp_path / "again", dtype, config_dtype="float32")
    for name in os.listdir(tmp_path / "out"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name
    assert again.preprocessor.tokenizer.stop_token_ids == (1, 107, 11)


def test_the_config_asks_for_the_stored_dtype_by_default(lm, tmp_path):
    lm.backbone.export_to_transformers(str(tmp_path / "out"), dtype="bfloat16")
    assert str(load(tmp_path / "out").dtype) == "torch.bfloat16"
    backbone = Gemma2Backbone.from_preset(tmp_path / "out")
    assert backbone.dtype_policy.name == "bfloat16"
    backbone.export_to_transformers(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def test_in_files_of_a_limited_size(lm, tmp_path):
    lm.export_to_transformers(tmp_path / "out", max_shard_size="40KB")
    index, files = read(tmp_path / "out", "model.safetensors.index.json"), sorted((tmp_path / "out").glob("model-*"))
    assert len(files) > 3 and not (tmp_path / "out/model.safetensors").exists()
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors" == index["weight_map"]["model.embed_tokens.weight"]
    assert set(index["weight_map"].values()) == {path.name for path in files}
    count = lm.backbone.config.parameter_count()
    assert index["metadata"] == {"total_parameters": count, "total_size": 4 * count}
    # 600 x 42 of the embedding alone are more; all others keep to it, but for the header.
    assert all(path.stat().st_size < 40_000 + 2_000 for path in files[1:])
    model, ids = load(tmp_path / "out"), np.random.default_rng(3).integers(0, 600, (1, 7))
    expected = hugging_face_logits(model, ids)
    assert np.abs(logits(lm, ids) - expected).max() <= TOLERANCE * np.ptp(expected)
    lm.export_to_transformers(tmp_path / "out")
    assert not list((tmp_path / "out").glob("model-*")) and not (tmp_path / "out/model.safetensors.index.json").exists()


def test_sizes_are_decimal():
    sizes = {"5GB": 5 * 10**9, "200MB": 2 * 10**8, "1.5 kb": 1500, "17B": 17, "17": 17, 17: 17, "2TB": 2 * 10**12}
    assert {size: parse_size(size) for size in sizes} == sizes
    for wrong in ("5 pounds", "", "GB", "-1GB", 0, -5, True, None, 1.5, "0MB", "5GiB"):
        with pytest.raises(ValueError, match="`max_shard_size` must be bytes"):
            parse_size(wrong)


def test_wrong_arguments_write_nothing(lm, tmp_path):
    for arguments in ({"dtype": "int8"}, {"max_shard_size": "many"}, {"config_dtype": "int8"}):
        with pytest.raises(ValueError, match="must be"):
            lm.export_to_transformers(tmp_path / "out", **arguments)
    assert os.listdir(tmp_path) == []


def test_a_wrong_argument_is_named(lm, tmp_path):
    for name in ("dtype", "config_dtype"):
        for wrong in ("float64", "foo", ["float32"], 5):
            with pytest.raises(ValueError, match=f"^`{name}` must be one of"):
                lm.export_to_transformers(tmp_path / "out", **{name: wrong})
    tokenizer = lm.preprocessor.tokenizer
    for arguments in ({"dtype": "float32"}, {"max_shard_size": "1GB"}, {"config_dtype": "foo"}):
        with pytest.raises(
            TypeError, match=f"Gemma2Tokenizer.export_to_transformers` takes `path` only.*{next(iter(arguments.values()))}"
        ):
            tokenizer.export_to_transformers(tmp_path / "out", **arguments)
    for path, error in ((3, TypeError), (None, TypeError), ("", CheckpointError), ("a\0", CheckpointError)):
        with pytest.raises(error, match="`path`"):
            lm.export_to_transformers(path)
        with pytest.raises(error, match="`preset_dir`"):
            tokenizer.save_to_preset(path)
    assert os.listdir(tmp_path) == []


def test_a_float64_model_needs_a_dtype(tmp_path):
    backbone = Gemma2Backbone(**TINY, dtype="float64")
    with pytest.raises(ValueError, match="The model is float64.*Pass one as `dtype=`"):
        backbone.export_to_transformers(tmp_path / "out")
    backbone.export_to_transformers(tmp_path / "out", "float32")
    scale = load(tmp_path / "out").model.norm.weight
    assert str(scale.dtype) == "torch.float32"


def test_progress_counts_every_byte(lm, tmp_path):
    weights, written = outgoing_from_backbone(lm.backbone), []
    write_folder(str(tmp_path), weights, progress=written.append)
    assert sum(written) == weights.nbytes and len(written) >= len(weights.shapes)


def test_names_are_those_of_transformers_and_of_llama_cpp(lm, folder):
    import safetensors

    with safetensors.safe_open(folder / "model.safetensors", "numpy") as file:
        names = set(file.keys())
        assert file.metadata() == {"format": "pt"}
    assert names == set(load(folder).state_dict()) - {"lm_head.weight"}
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA2, lm.backbone.config.num_layers)
    mapped = {known.get_name(name, try_suffixes=(".weight",)) for name in names}
    assert None not in mapped and len(mapped) == len(names) == 2 + 11 * lm.backbone.config.num_layers


def test_published_sizes_have_the_published_tensor_names():
    """Names and shapes of the whole 27B, without its weights."""
    from keras_gemma2.checkpoints.hf_writer import _shards
    from keras_gemma2.checkpoints.writing import STORED_DTYPES, OutgoingWeights
    from keras_gemma2.config import NAMED_SIZES

    config = NAMED_SIZES["gemma2_27b"]
    shards = list(_shards(OutgoingWeights(config, STORED_DTYPES["bfloat16"], lambda path: iter(())), 5 * 10**9))
    shapes = config.weight_shapes()
    sizes = [sum(math.prod(shapes[path]) * 2 for path in shard.values()) for shard in shards]
    assert max(sizes) <= 5 * 10**9 and sum(sizes) == 2 * 27_227_128_320
    assert len(shards) == 12 and sum(map(len, shards)) == 508  # as many files as google/gemma-2-27b-it has


# The tokenizer ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["whole", "without added_tokens_decoder"])
def theirs(folder, request, tmp_path_factory):
    """Their tokenizer, also as other readers find it."""
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("tokenizer") / "copy")
    if request.param == "without added_tokens_decoder":
        config = read(copy, "tokenizer_config.json")
        config.pop("added_tokens_decoder")
        (copy / "tokenizer_config.json").write_text(json.dumps(config))
    return transformers.AutoTokenizer.from_pretrained(copy)


def test_token_ids_are_ours(lm, theirs):
    texts = [text for text in [*HARD_TEXTS, *random_texts(9, 300)] if not any(frame in text for frame in FRAMES)]
    ours = lm.preprocessor.tokenizer.tokenize(texts)
    assert [theirs.encode(text, add_special_tokens=False) for text in texts] == [list(ids) for ids in ours]
    assert [theirs.decode(ids) for ids in ours] == lm.preprocessor.tokenizer.detokenize(ours)
    assert theirs("the fox").input_ids == [2, *theirs.encode("the fox", add_special_tokens=False)]


def test_special_tokens(theirs):
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.bos_token_id, theirs.unk_token_id) == (0, 1, 2, 3)
    assert theirs.encode("<bos><start_of_turn>", add_special_tokens=False) == [2, 106]
    assert theirs.decode([2, 106, 107, 1], skip_special_tokens=True) == ""


CHAT = [
    {"role": "user", "content": "  What is 2 + 2?\n"},
    {"role": "assistant", "content": " 4 "},
    {"role": "user", "content": "And\n\n3 + 3?"},
]


def test_chat_format(lm, theirs):
    expected = (
        "<bos><start_of_turn>user\nWhat is 2 + 2?<end_of_turn>\n<start_of_turn>model\n4<end_of_turn>\n"
        "<start_of_turn>user\nAnd\n\n3 + 3?<end_of_turn>\n"
    )
    assert theirs.apply_chat_template(CHAT, tokenize=False) == expected
    assert theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == expected + "<start_of_turn>model\n"
    ids = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    ours = lm.preprocessor.tokenizer.tokenize(expected.removeprefix("<bos>") + "<start_of_turn>model\n")
    assert ids == [2, *ours] and ids.count(2) == 1


def test_a_system_text_goes_in_front_of_the_first_user_turn(theirs):
    system = {"role": "system", "content": " Be brief. "}
    text = theirs.apply_chat_template([system, *CHAT[:1]], tokenize=False)
    assert text == "<bos><start_of_turn>user\nBe brief.\n\nWhat is 2 + 2?<end_of_turn>\n"


@pytest.mark.parametrize("roles", ["uu", "a", "umm", "us", "s", "sa", "x"])
def test_wrong_turns_are_refused(theirs, roles):
    names = {"u": "user", "a": "assistant", "m": "model", "s": "system", "x": "tool"}
    with pytest.raises(Exception, match="must alternate|must be followed"):
        theirs.apply_chat_template([{"role": names[role], "content": "hi"} for role in roles], tokenize=False)


def test_the_template_is_in_the_config_too(folder):
    assert read(folder, "tokenizer_config.json")["chat_template"] == (folder / "chat_template.jinja").read_text()


def test_a_tokenizer_alone_leaves_the_model_there(lm, tmp_path):
    """As keras-hub's guides write a folder: the model without a preprocessor first, then the preprocessor."""
    lm.backbone.export_to_transformers(tmp_path / "out")
    before = (tmp_path / "out/model.safetensors").stat().st_ino
    assert not (tmp_path / "out/tokenizer.json").exists()
    lm.preprocessor.export_to_transformers(tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").stat().st_ino == before and (tmp_path / "out/config.json").exists()
    lm.preprocessor.tokenizer.export_to_transformers(tmp_path / "alone")
    assert sorted(os.listdir(tmp_path / "alone")) == sorted(
        ["chat_template.jinja", "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    )
    transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert Gemma2CausalLM.from_preset(tmp_path / "out").preprocessor is not None
    with pytest.raises(ValueError, match="no vocabulary"):
        Gemma2Tokenizer(None).export_to_transformers(tmp_path / "empty")


def test_a_folder_with_tokenizer_json_alone_loads(lm, folder, tmp_path):
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    load(folder).save_pretrained(tmp_path)
    assert not (tmp_path / "tokenizer.model").exists()
    texts = [*HARD_TEXTS, *random_texts(9, 100)]
    ours = Gemma2CausalLM.from_preset(tmp_path).preprocessor.tokenizer
    for a, b in zip(ours.tokenize(texts), lm.preprocessor.tokenizer.tokenize(texts)):
        assert list(a) == list(b)


def test_a_vocabulary_that_is_not_gemmas_kind_is_written_as_it_is(lm, tmp_path):
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(train_vocabulary())
    model.normalizer_spec.add_dummy_prefix = True
    tokenizer = Gemma2Tokenizer(model.SerializeToString())
    with pytest.warns(UserWarning, match=r"No tokenizer.json is written: .*dummy prefix"):
        tokenizer.export_to_transformers(tmp_path / "out")
    assert (tmp_path / "out/tokenizer.model").exists() and not (tmp_path / "out/tokenizer.json").exists()


@pytest.mark.backend_free
def test_the_real_vocabulary(tmp_path):
    path = os.environ.get("KERAS_GEMMA2_VOCABULARY")
    if not path:
        pytest.skip("Set KERAS_GEMMA2_VOCABULARY to the path of Gemma 2's `tokenizer.model` to test the real vocabulary.")
    Gemma2Tokenizer(path).export_to_transformers(tmp_path / "out")
    fast = tokenizers.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text, ids in GOLDEN:
        assert fast.encode(text, add_special_tokens=False).ids == ids == theirs.encode(text, add_special_tokens=False)
        assert theirs(text).input_ids == [2, *ids]
    assert theirs.apply_chat_template(CHAT[:1], return_dict=False)[:4] == [2, 106, 1645, 108]


# Saving presets ---------------------------------------------------------------------------------------------------------


def test_unknown_formats_are_refused(lm, tmp_path):
    with pytest.raises(ValueError, match="`format` must be one of .*'gguf'"):
        lm.save_to_preset(tmp_path / "out", format="gguf")
    with pytest.raises(ValueError, match="Only models are saved in format='keras_hub'"):
        lm.preprocessor.tokenizer.save_to_preset(tmp_path / "out", format="keras_hub")
    assert os.listdir(tmp_path) == []


def test_keras_hub_loads_its_own_format(lm, tmp_path):
    import keras_hub

    # Where keras-hub heeds the config: its blocks take 1e-6 and 1e4 whatever it says.
    size = {"rope_max_wavelength": 1e4, "layer_norm_epsilon": 1e-6, "query_pre_attn_scalar": None, "vocabulary_size": 600}
    ours = Gemma2CausalLM(Gemma2Backbone(**{**TINY, **size}), lm.preprocessor)
    ours.save_to_preset(tmp_path / "out", format="keras_hub")
    theirs = keras_hub.models.GemmaCausalLM.from_preset(str(tmp_path / "out"))
    ids = np.random.default_rng(3).integers(0, 600, (2, 13))
    difference = np.abs(logits(theirs, ids) - logits(ours, ids)).max()
    assert difference <= TOLERANCE * np.ptp(logits(ours, ids))
    assert theirs.preprocessor.sequence_length == 32
    ours.backbone.save_to_preset(tmp_path / "bare", format="keras_hub", max_shard_size=1)
    assert not (tmp_path / "bare/tokenizer.json").exists()
    with pytest.raises(TypeError, match="'dtype'"):
        ours.save_to_preset(tmp_path / "out", format="keras_hub", dtype="float16")


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.filterwarnings("ignore:Gemma 2's activations", "ignore:keras-hub 0.32 has no place", "ignore:The preset")
def test_keras_hubs_format_keeps_a_mixed_policy(tmp_path, policy):
    import keras_hub

    size = {"rope_max_wavelength": 1e4, "layer_norm_epsilon": 1e-6, "query_pre_attn_scalar": None}
    backbone = Gemma2Backbone(**{**TINY, **size}, dtype=policy)
    backbone.save_to_preset(tmp_path / "out", format="keras_hub")
    # keras-hub's loader takes Keras's policy of the moment whatever a float preset says; its class takes the config's.
    meant = keras.saving.deserialize_keras_object(read(tmp_path / "out", "config.json"))
    assert isinstance(meant, keras_hub.models.GemmaBackbone)
    theirs = keras_hub.models.GemmaBackbone.from_preset(str(tmp_path / "out"), dtype=policy)
    ours = Gemma2Backbone.from_preset(tmp_path / "out")
    assert meant.dtype_policy.name == theirs.dtype_policy.name == ours.dtype_policy.name == policy
    assert {v.dtype for v in (*theirs.variables, *ours.variables)} == {"float32"}
    assert theirs.layers[-1].compute_dtype == policy.removeprefix("mixed_")
    expected = keras.ops.convert_to_numpy(backbone.token_embedding.embeddings)
    for loaded in (theirs, ours):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(loaded.token_embedding.embeddings), expected)


WHOLE = {
    "preset": lambda lm, folder: lm.save_to_preset(folder),
    "keras_hub": lambda lm, folder: lm.save_to_preset(folder, format="keras_hub"),
    "hugging_face": lambda lm, folder: lm.export_to_transformers(folder),
}
HELD = {"preset": "a preset of this package", "keras_hub": "a preset of keras-hub", "hugging_face": "Hugging Face"}


@pytest.mark.filterwarnings("ignore:keras-hub 0.32", "ignore:The preset")
@pytest.mark.parametrize("first", WHOLE)
def test_a_part_is_not_saved_beside_another_format(lm, tmp_path, first):
    """config.json and tokenizer.json mean different things: the folder would be read as neither."""
    size = {"rope_max_wavelength": 1e4, "layer_norm_epsilon": 1e-6, "query_pre_attn_scalar": None, "vocabulary_size": 600}
    lm = Gemma2CausalLM(Gemma2Backbone(**{**TINY, **size}), lm.preprocessor)
    folder = tmp_path / "out"
    WHOLE[first](lm, folder)
    before = snapshot(folder)
    saves = [(save, part) for save in WHOLE for part in (lm.backbone, lm.preprocessor, lm.preprocessor.tokenizer)]
    for save, part in saves:
        if save == first or (save == "keras_hub" and part is not lm.backbone):  # of which only models are saved
            continue
        with pytest.raises(CheckpointError, match=f"out' holds .*{HELD[first]}.*whole `Gemma2CausalLM`.*another folder"):
            WHOLE[save](part, folder)
        assert snapshot(folder) == before
    if first != "keras_hub":  # a part of the same format is replaced as ever
        for part in (lm.backbone, lm.preprocessor, lm.preprocessor.tokenizer):
            WHOLE[first](part, folder)
    assert os.listdir(tmp_path) == ["out"]
    for save in WHOLE:  # a whole model replaces everything
        WHOLE[save](lm, folder)
        assert Gemma2CausalLM.from_preset(folder).preprocessor is not None


def test_a_part_of_another_format_that_is_replaced_whole_does_not_matter(lm, tmp_path):
    lm.backbone.export_to_transformers(tmp_path / "out")
    lm.backbone.save_to_preset(tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "metadata.json", "model.weights.h5"]
    lm.preprocessor.save_to_preset(tmp_path / "out")
    lm.preprocessor.tokenizer.export_to_transformers(tmp_path / "alone")
    lm.preprocessor.save_to_preset(tmp_path / "alone")
    assert Gemma2CausalLMPreprocessor.from_preset(tmp_path / "alone").sequence_length == 32


def snapshot(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_preset_over_another_keeps_nothing_of_it_but_foreign_files(lm, tmp_path):
    lm.export_to_transformers(tmp_path / "out", max_shard_size="40KB")
    (tmp_path / "out/README.md").write_text("mine")
    lm.save_to_preset(tmp_path / "out")
    assert sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()) == [
        "README.md",
        "assets/tokenizer/vocabulary.spm",
        "config.json",
        "metadata.json",
        "model.weights.h5",
        "preprocessor.json",
        "task.json",
        "tokenizer.json",
    ]


SAVE = """
import sys
import keras
import numpy as np
from keras_gemma2 import Gemma2Backbone
backbone = Gemma2Backbone.from_preset(sys.argv[1])
for variable in backbone.variables:
    variable.assign(np.full(variable.shape, 2.0))
print("saving", flush=True)
while True:
    backbone.save_to_preset(sys.argv[1])
"""


@pytest.mark.backend_free
def test_killed_while_it_saves_a_preset(tmp_path):
    backbone = Gemma2Backbone(**TINY)
    for variable in backbone.variables:
        variable.assign(np.ones(variable.shape))
    backbone.save_to_preset(tmp_path / "preset")
    saver = subprocess.Popen([sys.executable, "-c", SAVE, str(tmp_path / "preset")], stdout=subprocess.PIPE, text=True)
    assert saver.stdout.readline() == "saving\n"
    time.sleep(0.15)
    saver.send_signal(signal.SIGKILL)
    saver.communicate()
    values = {
        float(np.unique(keras.ops.convert_to_numpy(v)).item()) for v in Gemma2Backbone.from_preset(tmp_path / "preset").variables
    }
    assert values in ({1.0}, {2.0})
    assert all(name == "preset" or name.startswith(".preset.saving-") for name in os.listdir(tmp_path))


def test_weights_beyond_float16_are_refused_and_the_old_folder_stays(tmp_path):
    lm = Gemma2CausalLM(Gemma2Backbone.from_preset(hugging_face_folder()[0]))
    lm.export_to_transformers(tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    lm.backbone.layer_norm.scale.assign(lm.backbone.layer_norm.scale + 1e5)
    with pytest.raises(CheckpointError, match="final_norm/scale.*float16"):
        lm.export_to_transformers(tmp_path / "out", "float16")
    assert {path.name: path.read_bytes() for path in Path(tmp_path / "out").iterdir()} == before
    assert os.listdir(tmp_path) == ["out"]
    assert config_from_hugging_face(read(tmp_path / "out", "config.json")) == Gemma2Config(**TINY)
