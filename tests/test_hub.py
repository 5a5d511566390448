"""Model hubs: addresses, the files asked for, caches without a network, and what each refusal says."""

import contextlib
import errno
import io
import json
import os
import re
import shutil
import socket
import sys
import tarfile
import time
import warnings
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
import transformers
from hub_server import COMMIT, OTHER_COMMIT, running_hub
from oracle import BASE, hugging_face_folder, hugging_face_logits, hugging_face_model
from vocabulary import train_vocabulary

from keras_gemma2 import Gemma2Backbone, Gemma2CausalLM, Gemma2CausalLMPreprocessor, Gemma2Tokenizer, cli
from keras_gemma2.checkpoints.reading import find_source
from keras_gemma2.errors import CheckpointError, HubError
from keras_gemma2.presets import hub, registry

IDS = np.random.default_rng(5).integers(0, 97, (2, 11))
NAME, HF = "google/gemma-2-2b", "hf://google/gemma-2-2b"
HANDLE = "google/gemma-2/transformers/tiny"
KAGGLE = f"kaggle://{HANDLE}/2"
NEEDS = (hub.CONFIG, hub.TOKENIZER, hub.WEIGHTS)
HUB_PAGE, KAGGLE_PAGE = "https://huggingface.co/google/gemma-2-2b", "https://www.kaggle.com/models/google/gemma-2"
pytest.importorskip("huggingface_hub")
pytest.importorskip("kagglehub")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a Hugging Face repository of Gemma 2 holds: two shards, a tokenizer, and much that is not read."""
    folder = tmp_path_factory.mktemp("repository")
    hugging_face_model(vocab_size=600).save_pretrained(folder, max_shard_size="150KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    (folder / "tokenizer.model").write_bytes(train_vocabulary())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 107]}))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_text(json.dumps({"file": name}))  # contents differ, or the cache would share one download
    for name in ("README.md", "pytorch_model.bin", "flax_model.msgpack", "optimizer.pt", "original/model.safetensors", "x.gguf"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not to be read")
    return folder


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A running stand-in that all three libraries take for their hub, with empty caches and no credentials."""
    from huggingface_hub import constants
    from kagglesdk import kaggle_env

    # It searches every frame of the stack, which is deep under pytest, before each request.
    monkeypatch.setattr("kagglehub.clients.get_user_agent", lambda: "kagglehub")
    with running_hub() as hub_server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        point_hugging_face_to(monkeypatch, hub_server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.LOCAL, hub_server.url)
        monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "LOCALHOST")
        monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path / "kaggle"))
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path))
        for name in ("HF_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_API_TOKEN", "HTTP_PROXY", "http_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        yield hub_server


def point_hugging_face_to(monkeypatch, url):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


def unreachable_url():
    """A port of this machine on which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def cut_off(monkeypatch, server):
    """A function that takes the network away."""
    from kagglesdk import kaggle_env

    def cut():
        url = unreachable_url()
        point_hugging_face_to(monkeypatch, url)
        monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.LOCAL, url)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", url)
        if "modelscope_hub" in sys.modules:
            sys.modules["modelscope_hub"].set_default_config(None)
        server.requests.clear()

    return cut


def logits(lm):
    return keras.ops.convert_to_numpy(lm({"token_ids": IDS, "padding_mask": np.ones_like(IDS)}))


def held(where):
    """Files in a folder and below, without the library's own records."""
    names = {str(path.relative_to(where)) for path in Path(where).rglob("*") if path.is_file()}
    return {name for name in names if not name.startswith("._")}


SMALL = {"config.json", "generation_config.json"}
TOKENIZER = SMALL | {"tokenizer.model", "tokenizer_config.json"}


def shards(folder):
    return {path.name for path in folder.glob("model*safetensors*")}


# What is asked for ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [HF, KAGGLE], ids=["hf", "kaggle"])
def test_only_the_files_that_are_needed_are_downloaded(server, folder, where):
    server.models = {NAME: folder, f"{HANDLE}/2": folder}
    for need, expected in zip(NEEDS, (SMALL, TOKENIZER, TOKENIZER | shards(folder))):
        path = hub.fetch(where, need)
        assert held(path) == expected and set(server.asked) == expected
        assert find_source(where, path).config.vocabulary_size == 600
    assert len(server.asked) == len(set(server.asked))  # nothing twice


@pytest.mark.parametrize("where", [HF, KAGGLE, "kaggle://google/gemma-2/transformers/tiny"], ids=["hf", "kaggle", "unversioned"])
def test_all_four_classes_load_from_a_hub(server, folder, where):
    server.models = {NAME: folder, f"{HANDLE}/1": None, f"{HANDLE}/2": folder}
    assert Gemma2Backbone.from_preset(where, load_weights=False).config.hidden_dim == BASE["hidden_size"]
    assert set(server.asked) == SMALL
    tokenizer = Gemma2Tokenizer.from_preset(where)
    preprocessor = Gemma2CausalLMPreprocessor.from_preset(where)
    assert set(server.asked) == TOKENIZER
    assert tokenizer.vocabulary_size() == 600 and preprocessor.tokenizer.end_of_turn_token_id in tokenizer.stop_token_ids
    lm = Gemma2CausalLM.from_preset(where)
    expected = hugging_face_logits(transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"), IDS)
    assert np.abs(logits(lm) - expected).max() <= 2e-5 * np.ptp(expected)  # as in test_parity
    again = Gemma2Backbone.from_preset(where)
    for ours, theirs in zip(again.variables, lm.backbone.variables):
        np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (ours, theirs)))
    assert set(server.asked) == TOKENIZER | shards(folder) and len(server.asked) == len(set(server.asked))


def keras_preset(folder, weights, registered_name="keras_hub>GemmaBackbone"):
    """The files of a keras-hub preset, or of one of ours, by name; the weights are not looked into here."""
    names = ["metadata.json", "task.json", "preprocessor.json", "tokenizer.json", "assets/tokenizer/vocabulary.spm", *weights]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (folder / "config.json").write_text(json.dumps({"registered_name": registered_name, "config": {}}))
    return folder


def save_index(folder, *names):
    weight_map = {f"/layers/{i}/vars": name if i else [name, names[-1]] for i, name in enumerate(names)}
    (folder / "model.weights.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


ONE, MANY = ("model.weights.h5",), ("model_00000.weights.h5", "model_00001.weights.h5")
KERAS_HANDLE = "keras/gemma2/keras/gemma2_2b_en"


@pytest.mark.parametrize("registered_name", ["keras_hub>GemmaBackbone", "keras_gemma2>Gemma2Backbone"])
@pytest.mark.parametrize("weights", [ONE, MANY], ids=["one", "many"])
@pytest.mark.parametrize("where", ["hf://keras/gemma2_2b_en", f"kaggle://{KERAS_HANDLE}/2"], ids=["hf", "kaggle"])
def test_files_of_keras_presets(server, tmp_path, where, weights, registered_name):
    folder = keras_preset(tmp_path / "preset", weights, registered_name)
    (folder / "task.weights.h5").write_text("not read")
    if weights is MANY:
        save_index(folder, *MANY)
    server.models = {"keras/gemma2_2b_en": folder, f"{KERAS_HANDLE}/2": folder}
    config = {"config.json"}
    tokenizer = config | {"preprocessor.json", "tokenizer.json", "assets/tokenizer/vocabulary.spm"}
    everything = tokenizer | set(weights) | ({"model.weights.json"} if weights is MANY else set())
    for need, expected in zip(NEEDS, (config, tokenizer, everything)):
        assert held(hub.fetch(where, need)) == expected == set(server.asked)


@pytest.fixture(scope="module")
def saved_presets(folder, tmp_path_factory):
    """A model as a preset of this package and as one of keras-hub's, in several files; and its logits."""
    where = tmp_path_factory.mktemp("presets")
    # What keras-hub's config can express.
    model = hugging_face_model(vocab_size=600, rope_theta=10000.0, rms_norm_eps=1e-6, query_pre_attn_scalar=BASE["head_dim"])
    model.save_pretrained(where / "hf")
    shutil.copy(folder / "tokenizer.model", where / "hf")
    lm = Gemma2CausalLM.from_preset(where / "hf")
    lm.save_to_preset(where / "keras_gemma2")
    lm.save_to_preset(where / "keras_hub", format="keras_hub", max_shard_size="150KB")
    return where, hugging_face_logits(model, IDS)


@pytest.mark.parametrize(
    "where", ["hf://keras/gemma2_2b_en", f"kaggle://{KERAS_HANDLE}/2", "gemma2_2b_en"], ids=["hf", "kaggle", "name"]
)
@pytest.mark.parametrize("kind", ["keras_gemma2", "keras_hub"])
def test_keras_presets_load_from_a_hub(server, saved_presets, kind, where):
    served, expected = saved_presets
    server.models = {"keras/gemma2_2b_en": served / kind, f"{KERAS_HANDLE}/2": served / kind}
    tokenizer, preprocessor = Gemma2Tokenizer.from_preset(where), Gemma2CausalLMPreprocessor.from_preset(where)
    assert tokenizer.vocabulary_size() == 600 == preprocessor.tokenizer.vocabulary_size()
    assert not [name for name in server.asked if "weights" in name]
    backbone, lm = Gemma2Backbone.from_preset(where), Gemma2CausalLM.from_preset(where)
    assert np.abs(logits(lm) - expected).max() <= 2e-5 * np.ptp(expected)  # as in test_parity
    assert lm.preprocessor.tokenizer.vocabulary_size() == 600 and len(backbone.variables) == len(lm.backbone.variables)
    assert len(server.asked) == len(set(server.asked)) and not {"task.json", "metadata.json", "README.md"} & set(server.asked)


@pytest.mark.parametrize("where", [HF, KAGGLE], ids=["hf", "kaggle"])
@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "a/b", "..", "x\\y", 7])
def test_an_index_names_files_of_its_own_model_only(server, folder, tmp_path, where, name):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "outside").write_text("secret")
    index = {"weight_map": {"model.norm.weight": name}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    server.models = {NAME: copy, f"{HANDLE}/2": copy}
    with pytest.raises(CheckpointError, match="only files of its own folder"):
        hub.fetch(where, hub.WEIGHTS)
    assert not {"outside", "passwd"} & {Path(name).name for name in server.asked}


def test_one_file_safetensors_and_tokenizer_json_alone(server, folder, tmp_path):
    copy = shutil.copytree(hugging_face_folder()[0], tmp_path / "copy")
    shutil.copy(folder / "tokenizer.json", copy)
    (copy / "pytorch_model.bin").write_bytes(b"pickle")
    server.models = {NAME: copy, f"{HANDLE}/2": copy}
    for where in (HF, KAGGLE):
        assert held(hub.fetch(where, hub.WEIGHTS)) == SMALL | {"model.safetensors", "tokenizer.json"}


def listing(tmp_path, *names, config=None):
    folder = tmp_path / "listing"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


HF_CONFIG = {"model_type": "gemma2"}


def test_pickles_are_fetched_where_nothing_else_is(server, tmp_path):
    index = {"weight_map": {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}}
    one = listing(tmp_path / "one", "pytorch_model.bin", "training_args.bin", config=HF_CONFIG)
    many = listing(tmp_path / "many", *index["weight_map"].values(), "training_args.bin", config=HF_CONFIG)
    (many / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    server.models = {"a/one": one, "a/many": many}
    assert held(hub.fetch("hf://a/one", hub.TOKENIZER)) == {"config.json"}
    assert held(hub.fetch("hf://a/one", hub.WEIGHTS)) == {"config.json", "pytorch_model.bin"}
    assert held(hub.fetch("hf://a/many", hub.WEIGHTS)) == held(many) - {"training_args.bin"}


def test_split_gguf(server, tmp_path):
    parts = [f"q8/gemma-q8-{i:05}-of-00002.gguf" for i in (1, 2)]
    server.models = {"a/split": listing(tmp_path / "split", *parts), NAME: listing(tmp_path / "two", *parts, "x.gguf")}
    path = Path(hub.fetch("hf://a/split", hub.CONFIG))
    assert path.name == "gemma-q8-00001-of-00002.gguf" and set(server.asked) == set(parts)
    with pytest.raises(CheckpointError, match=r"2 GGUF models.*'q8/gemma-q8-00001-of-00002.gguf', 'x.gguf'\]"):
        hub.fetch(HF, hub.CONFIG)
    path = Path(hub.fetch(f"{HF}/{parts[1]}", hub.CONFIG))
    assert [part.name for part in sorted(path.parent.iterdir())] == [Path(part).name for part in parts]


def test_gguf(server, tmp_path):
    names = ("gemma-2-2b-Q4_K_M.gguf", "gemma-2-2b-f16.gguf")
    server.models[NAME] = listing(tmp_path, *names, "README.md")
    with pytest.raises(CheckpointError, match=r"2 GGUF models.*'hf://google/gemma-2-2b/FILE.gguf'.*Q4_K_M.gguf', '.*f16.gguf'"):
        hub.fetch(HF, hub.CONFIG)
    assert server.asked == []
    for revision in ("", "@main", f"@{COMMIT}"):
        path = hub.fetch(f"{HF}{revision}/{names[0]}", hub.WEIGHTS)
        assert Path(path).read_text() == names[0] == Path(path).name
    assert server.asked == [names[0]]
    with pytest.raises(CheckpointError, match="no such file.*f16"):
        hub.fetch(f"{HF}/missing.gguf", hub.CONFIG)
    (server.models[NAME] / names[0]).unlink()
    assert hub.fetch(HF, hub.TOKENIZER).endswith(names[1])
    server.models["google/both"] = listing(tmp_path / "both", *names, config=HF_CONFIG)
    assert held(hub.fetch("hf://google/both", hub.CONFIG)) == {"config.json"}


def test_gemma_pytorch_and_flax_are_fetched_whole(server, tmp_path):
    ckpt = listing(tmp_path / "a", "model.ckpt", "tokenizer.model", "README.md", config={"architecture": "2b"})
    flax = listing(tmp_path / "b", "2b/_METADATA", "2b/d/0", "2b/manifest.ocdbt", "tokenizer.model", "README.md")
    server.models = {"google/ckpt": ckpt, "google/flax": flax}
    assert held(hub.fetch("hf://google/ckpt", hub.WEIGHTS)) == {"config.json", "model.ckpt", "tokenizer.model"}
    assert held(hub.fetch("hf://google/flax", hub.WEIGHTS)) == {"2b/_METADATA", "2b/d/0", "2b/manifest.ocdbt", "tokenizer.model"}
    server.models["google/gemma-2/pyTorch/2b/1"] = server.models["google/gemma-2/pytorch/2b/1"] = ckpt
    assert held(hub.fetch("kaggle://google/gemma-2/pyTorch/2b/1", hub.CONFIG)) == held(ckpt)


@pytest.mark.parametrize(
    "names, config, message",
    [
        (("README.md", "model.onnx"), HF_CONFIG, "has no weights. Read are .*model.onnx"),
        (("README.md",), None, "has no weights. Read are .*README.md"),
        (("model.safetensors",), None, "has weights but no config.json"),
        (("adapter_config.json", "adapter_model.safetensors"), None, "is a LoRA adapter.*merged model"),
        (("adapter_config.json", "adapter_model.safetensors"), HF_CONFIG, "is a LoRA adapter.*base model"),
        (("a.ckpt", "b.ckpt"), {}, "several checkpoints.*a.ckpt.*b.ckpt"),
        (("2b/_METADATA", "9b/_METADATA"), None, "several checkpoints.*2b/_METADATA"),
    ],
)
def test_models_without_files_that_are_read(server, tmp_path, names, config, message):
    server.models[NAME] = listing(tmp_path, *names, config=config)
    with pytest.raises(CheckpointError, match=message):
        hub.fetch(HF, hub.WEIGHTS)


def test_tokenizer_json_is_fetched_where_it_alone_has_the_last_tokens(server, folder, tmp_path):
    tuned = shutil.copytree(folder, tmp_path / "tuned")
    (tuned / "config.json").write_text(json.dumps({**json.loads((tuned / "config.json").read_text()), "vocab_size": 602}))
    server.models = {NAME: tuned, "google/explained": shutil.copytree(tuned, tmp_path / "explained")}
    (tmp_path / "explained" / "added_tokens.json").write_text(json.dumps({"<x>": 600, "<y>": 601}))
    assert held(hub.fetch(HF, hub.TOKENIZER)) == TOKENIZER | {"tokenizer.json"}
    assert held(hub.fetch("hf://google/explained", hub.TOKENIZER)) == TOKENIZER | {"added_tokens.json"}


def test_revisions(server, folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [9]}))
    server.models = {NAME: folder, f"{NAME}@v1.0": other, f"{NAME}@refs/pr/3": other}
    for revision in ("", "@main", f"@{COMMIT}"):
        assert registry.resolve(HF + revision).stop_token_ids == (1, 107)
    for revision in ("@v1.0", f"@{OTHER_COMMIT}", "@refs/pr/3"):
        assert registry.resolve(HF + revision).stop_token_ids == (9,)
    server.requests.clear()
    assert registry.resolve(f"{HF}@{OTHER_COMMIT}").stop_token_ids == (9,)
    assert server.requests == []  # a commit never changes
    with pytest.raises(HubError, match=rf"no revision 'google/gemma-2-2b@v9'.*{HUB_PAGE}"):
        hub.fetch(f"{HF}@v9", hub.CONFIG)


@pytest.mark.parametrize(
    "where",
    [
        "hf://",
        "hf://gemma",
        "hf://google/gemma 2",
        "hf://google/../x",
        "hf://../google/gemma",
        "hf://google/gemma@",
        "hf://google/gemma@a b",
        "hf://google/gemma@../x",
        "hf://google/gemma/config.json",
        "hf://google/gemma/../x.gguf",
        "hf://google/gemma@main/a/../../x.gguf",
        "hf://google/gemma\n",
        "hf://google/g\0",
        "hf://-x/y",
        "modelscope://gemma",
        "modelscope://a/b/c",
        "kaggle://google/gemma",
        "kaggle://google/gemma/keras/../1",
        "kaggle://google/gemma/keras/x/latest",
        "kaggle://google/gemma/keras/x/0",
        "kaggle://google/gemma/keras/x y/1",
        "kaggle://google/gemma/keras/x/1/config.json",
        "kaggle:///a/b/c/d",
    ],
)
def test_malformed_addresses_show_the_form(server, where):
    form = {
        "h": r"hf://owner/name\[@revision\]\[/file.gguf\]",
        "m": "modelscope://owner/name",
        "k": "kaggle://owner/model/framework/var",
    }
    with pytest.raises(CheckpointError, match=form[where[0]]) as caught:
        Gemma2CausalLM.from_preset(where)
    assert not isinstance(caught.value, HubError) and server.requests == []


# Names of this package -----------------------------------------------------------------------------------------------------


def test_published_handles_are_keras_hubs_own():
    import keras_hub

    theirs = {name: entry["kaggle_handle"] for name, entry in keras_hub.models.GemmaBackbone.presets.items()}
    gemma2 = {name: handle for name, handle in theirs.items() if "gemma2" in name or "shieldgemma" in name}
    assert {name: handle for name, (_, handle) in registry.PUBLISHED.items()} == gemma2
    for size, handle in registry.PUBLISHED.values():
        assert size.removeprefix("gemma2") in handle


def test_built_in_names_come_from_kaggle(server, folder):
    """`tiny` under the handle of a built-in name; the architecture alone is known without the hub."""
    server.models["keras/gemma2/keras/gemma2_2b_en/2"] = folder
    assert registry.resolve("gemma2_2b_en").config.hidden_dim == 2304 and server.requests == []
    assert Gemma2Tokenizer.from_preset("gemma2_2b_en").vocabulary_size() == 600
    assert Gemma2CausalLM.from_preset("gemma2_2b_en").backbone.config.hidden_dim == BASE["hidden_size"]
    with pytest.raises(HubError, match="https://www.kaggle.com/models/keras/gemma2"):
        Gemma2CausalLM.from_preset("gemma2_9b_en")


# Caches and no network ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def at_most(seconds):
    start = time.perf_counter()
    yield
    assert time.perf_counter() - start < seconds


@pytest.mark.parametrize("where", [HF, KAGGLE, f"kaggle://{HANDLE}"], ids=["hf", "kaggle", "unversioned"])
def test_what_was_fetched_loads_without_a_network(server, cut_off, folder, where, monkeypatch):
    server.models = {NAME: folder, f"{HANDLE}/2": folder}
    hub.fetch(where, hub.TOKENIZER)
    cut_off()
    with at_most(5), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*are those in the cache")
        for need in (hub.CONFIG, hub.TOKENIZER):
            assert find_source(where, hub.fetch(where, need)).config.hidden_dim == BASE["hidden_size"]
        with pytest.raises(HubError, match="could not be reached.*: .*[Rr]efused. Check.*pass a folder.*to a cache"):
            hub.fetch(where, hub.WEIGHTS)
    assert server.requests == []


@pytest.mark.parametrize("where", [HF, KAGGLE, f"kaggle://{HANDLE}"], ids=["hf", "kaggle", "unversioned"])
def test_a_cache_without_the_tokenizer_does_not_stand_for_one(server, cut_off, folder, where):
    server.models = {NAME: folder, f"{HANDLE}/2": folder}
    hub.fetch(where, hub.CONFIG)
    cut_off()
    with pytest.raises(HubError, match="could not be reached"):
        Gemma2Tokenizer.from_preset(where)


def test_the_cache_is_told_to_be_one(server, cut_off, folder):
    server.models = {NAME: folder, f"{HANDLE}/2": folder}
    hub.fetch(HF, hub.WEIGHTS), hub.fetch(KAGGLE, hub.WEIGHTS)
    cut_off()
    with pytest.warns(UserWarning, match="hf://.*those in the cache. Hugging Face could not be reached"):
        hub.fetch(HF, hub.WEIGHTS)
    with pytest.warns(UserWarning, match="kaggle://.*those in the cache. Kaggle could not be reached"):
        hub.fetch(f"kaggle://{HANDLE}", hub.WEIGHTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hub.fetch(KAGGLE, hub.WEIGHTS)  # a version never changes


def test_offline_mode_says_so_and_uses_the_cache_silently(server, folder, monkeypatch):
    from huggingface_hub import constants

    server.models[NAME] = folder
    hub.fetch(HF, hub.TOKENIZER)
    server.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert held(hub.fetch(HF, hub.TOKENIZER)) == TOKENIZER
        with pytest.raises(HubError, match=r"switched off \(HF_HUB_OFFLINE\).*pass a folder"):
            hub.fetch(HF, hub.WEIGHTS)
        with pytest.raises(HubError, match="switched off"):
            hub.fetch("hf://google/other", hub.CONFIG)
    assert server.requests == []


def lay_out_hugging_face_cache(cache, folder, names):
    """blobs, refs and snapshots as huggingface_hub writes them (its documentation, "manage your cache")."""
    root = cache / "models--google--gemma-2-2b"
    snapshot = root / "snapshots" / COMMIT
    for made in (root / "blobs", root / "refs", snapshot):
        made.mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    for number, name in enumerate(sorted(names)):
        shutil.copy(folder / name, root / "blobs" / f"{number:040x}")
        (snapshot / name).symlink_to(Path("../../blobs") / f"{number:040x}")
    return snapshot


def test_a_cache_written_by_older_libraries(cut_off, folder, tmp_path):
    """As transformers leaves it: no list of the repository's files beside the snapshot."""
    cut_off()
    names = TOKENIZER | shards(folder)
    snapshot = lay_out_hugging_face_cache(tmp_path / "hf", folder, names)
    with at_most(5), pytest.warns(UserWarning, match="in the cache"):
        assert hub.fetch(HF, hub.WEIGHTS) == str(snapshot)
    assert hub.fetch(f"{HF}@{COMMIT}", hub.WEIGHTS) == str(snapshot)
    (snapshot / sorted(shards(folder))[0]).unlink()  # an interrupted download
    with pytest.raises(HubError, match="could not be reached"):
        hub.fetch(HF, hub.WEIGHTS)


def lay_out_kaggle_cache(cache, folder, names, marks):
    """`marks`: names of whole files, or None for a whole bundle."""
    root = cache / "models" / HANDLE
    for name in names:
        (root / "2" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / name, root / "2" / name)
    for mark in ["2.complete"] if marks is None else [f".complete/2/{name}.complete" for name in marks]:
        (root / mark).parent.mkdir(parents=True, exist_ok=True)
        (root / mark).touch()
    return str(root / "2")


@pytest.mark.parametrize("bundle", [False, True])
def test_a_cache_of_kagglehub(cut_off, folder, tmp_path, bundle):
    cut_off()
    names = {"config.json", "tokenizer.model"} | shards(folder)
    path = lay_out_kaggle_cache(tmp_path / "kaggle", folder, names, None if bundle else names)
    for need in NEEDS:
        assert hub.fetch(KAGGLE, need) == path


def test_a_file_without_kagglehubs_mark_is_not_whole(server, folder, tmp_path):
    names = TOKENIZER | shards(folder)
    path = Path(lay_out_kaggle_cache(tmp_path / "kaggle", folder, names, names - {"config.json"}))
    (path / "config.json").write_text("{")  # interrupted
    server.models[f"{HANDLE}/2"] = folder
    assert hub.fetch(KAGGLE, hub.WEIGHTS) == str(path)
    assert server.asked == ["config.json"] and find_source(KAGGLE, str(path))


# ModelScope -----------------------------------------------------------------------------------------------------------------

MODELSCOPE = "modelscope://google/gemma-2-2b"


@pytest.fixture
def modelscope(server, monkeypatch, tmp_path):
    """The real library, pointed to the stand-in."""
    modelscope_hub = pytest.importorskip("modelscope_hub")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "modelscope"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # its pauses between attempts
    modelscope_hub.set_default_config(None)  # made from the environment once a process
    yield server
    modelscope_hub.set_default_config(None)


def test_modelscope(modelscope, folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [9]}))
    modelscope.models = {NAME: folder, f"{NAME}@v1.0": other}
    for need, expected in zip(NEEDS, (SMALL, TOKENIZER, TOKENIZER | shards(folder))):
        assert held(hub.fetch(MODELSCOPE, need)) >= expected == set(modelscope.asked)
    assert Gemma2CausalLM.from_preset(MODELSCOPE).preprocessor.tokenizer.vocabulary_size() == 600
    assert registry.resolve(f"{MODELSCOPE}@v1.0").stop_token_ids == (9,)


def test_modelscope_without_a_network(modelscope, cut_off, folder):
    modelscope.models[NAME] = folder
    hub.fetch(MODELSCOPE, hub.TOKENIZER)
    cut_off()
    with at_most(10), pytest.warns(UserWarning, match="those in the cache. ModelScope could not be reached"):
        assert held(hub.fetch(MODELSCOPE, hub.TOKENIZER)) >= TOKENIZER
    with pytest.raises(HubError, match="could not be reached"):
        hub.fetch(MODELSCOPE, hub.WEIGHTS)


MODELSCOPE_REFUSALS = {
    401: "refused the login.*modelscope login.*MODELSCOPE_API_TOKEN",
    403: "Accept them .* on https://modelscope.cn/models/google/gemma-2-2b",
    404: "has no public model 'google/gemma-2-2b'.*https://modelscope.cn/models/google/gemma-2-2b",
    429: "Wait",
    500: "Try again later",
}


@pytest.mark.parametrize(
    "mark, status",
    # The library repeats a file's download for half a minute at 429 and 500.
    [*(("repo/files", status) for status in MODELSCOPE_REFUSALS), *(("FilePath", status) for status in (401, 403, 404))],
)
def test_modelscope_refusals(modelscope, folder, mark, status):
    modelscope.models[NAME] = folder
    modelscope.errors[mark] = (status, {"Content-Type": "application/json"}, '{"Code": 1, "Message": "refused", "Success": false}')
    with pytest.raises(HubError, match=MODELSCOPE_REFUSALS[status]):
        hub.fetch(MODELSCOPE, hub.CONFIG)


# Refusals ------------------------------------------------------------------------------------------------------------------

GATED = (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model is restricted"}, "")
GATED_LOGGED_OUT = (401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model is restricted"}, "")
BAD_TOKEN = (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "")
REFUSALS = [
    (HF, "resolve", GATED, [f"Accept them .*Gemma terms.* on {HUB_PAGE}", "hf auth login", "HF_TOKEN"]),
    (HF, "resolve", GATED_LOGGED_OUT, [f"Accept them .* on {HUB_PAGE}", "hf auth login", "HF_TOKEN"]),
    (HF, "api/models", GATED, [f"Accept them .* on {HUB_PAGE}"]),
    (HF, "api/models", BAD_TOKEN, ["refused the login", "hf auth login", "HF_TOKEN"]),
    (
        HF,
        "api/models",
        (404, {"X-Error-Code": "RepoNotFound"}, ""),
        [f"has no public model 'google/gemma-2-2b'.*{HUB_PAGE}", "private"],
    ),
    (
        HF,
        "api/models",
        (401, {"X-Error-Code": "RepoNotFound"}, ""),
        ["has no public model 'google/gemma-2-2b'", "private.*hf auth login"],
    ),
    (HF, "api/models", (403, {}, ""), [f"Accept them .* on {HUB_PAGE}"]),
    (HF, "api/models", (429, {}, ""), ["429", "Wait", "hf auth login"]),
    (HF, "api/models", (503, {}, ""), ["status 503", "Try again later"]),
    (HF, "api/models", (200, {}, "<html>Log in to the WiFi"), [f"gave no files.*{HUB_PAGE}"]),
    (KAGGLE, "Download", (401, {}, ""), ["refused the login", "KAGGLE_API_TOKEN", "KAGGLE_USERNAME and KAGGLE_KEY", "kaggle.json"]),
    (KAGGLE, "Download", (403, {}, ""), [f"Accept them .*Gemma terms.* on {KAGGLE_PAGE}", "KAGGLE_USERNAME and KAGGLE_KEY"]),
    (KAGGLE, "Download", (404, {}, ""), [f"has no public model '{HANDLE}/2'.*{KAGGLE_PAGE}", "private"]),
    (KAGGLE, "Download", (429, {}, ""), ["429", "Wait"]),
    (KAGGLE, "Download", (500, {}, ""), ["status 500", "Try again later"]),
    (f"kaggle://{HANDLE}", "GetModelInstance", (404, {}, ""), [f"has no public model '{HANDLE}'.*{KAGGLE_PAGE}"]),
    (f"kaggle://{HANDLE}", "GetModelInstance", (403, {}, ""), [f"Accept them .* on {KAGGLE_PAGE}"]),
]


@pytest.mark.parametrize("where, mark, answer, expected", REFUSALS)
def test_refusals_name_the_step_to_take(server, folder, capsys, where, mark, answer, expected):
    server.models = {NAME: folder, f"{HANDLE}/2": folder}
    server.errors[mark] = answer
    with at_most(20):
        assert cli.main(["info", where]) == 2
    out, err = capsys.readouterr()
    told = [line for line in err.splitlines() if line.startswith("keras-gemma2: ")]
    assert out == "" and len(told) == 1 and "Traceback" not in err
    for pattern in expected:
        assert re.search(pattern, told[0]), told[0]
    with pytest.raises(HubError) as caught:
        hub.fetch(where, hub.CONFIG)
    assert caught.value.__cause__ is not None and not isinstance(caught.value.__cause__, HubError)
    assert str(caught.value).count(". ") <= 3  # two sentences, and one more where the library's own words are told


def test_weights_refused_where_the_config_is_public(server, folder):
    """The files of a gated model's page may be listed, and its small files given, without its weights."""
    server.models = {NAME: folder, f"{HANDLE}/2": folder}
    server.errors = {"safetensors": GATED}
    assert registry.resolve(HF).config.vocabulary_size == 600
    for where in (HF, KAGGLE):
        with pytest.raises(HubError, match="Accept them"):
            Gemma2CausalLM.from_preset(where)


@pytest.mark.parametrize("where, variable", [(HF, "HF_HOME"), (KAGGLE, "KAGGLEHUB_CACHE")], ids=["hf", "kaggle"])
@pytest.mark.parametrize("number, message", [(errno.ENOSPC, "disk is full"), (errno.EACCES, "cache cannot be written")])
def test_disk_full_and_no_permission(server, folder, monkeypatch, where, variable, number, message):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number), "/cache")

    server.models = {NAME: folder, f"{HANDLE}/2": folder}
    monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
    monkeypatch.setattr("kagglehub.http_resolver.download_file", fail)
    with pytest.raises(HubError, match=f"{message}.*{variable}"):
        hub.fetch(where, hub.CONFIG)


def test_a_proxy_that_is_not_there(server, monkeypatch):
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("HTTP_PROXY", unreachable_url())
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.example")
    close_session()
    try:
        with at_most(5), pytest.raises(HubError, match=r"could not be reached.*proxy \(HTTPS_PROXY\)"):
            hub.fetch(HF, hub.CONFIG)
        with at_most(5), pytest.raises(HubError, match=r"could not be reached.*proxy \(HTTPS_PROXY\)"):
            hub.fetch(KAGGLE, hub.CONFIG)
    finally:
        close_session()


@pytest.mark.parametrize("where, library", [(HF, "huggingface_hub"), (KAGGLE, "kagglehub"), ("modelscope://a/b", "modelscope")])
def test_a_missing_library_is_named(monkeypatch, where, library):
    for name in (library, "modelscope.hub.api", "modelscope.hub.snapshot_download"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setenv("KAGGLEHUB_CACHE", "nowhere")
    with pytest.raises(HubError, match=f"pip install {library}"):
        hub.fetch(where, hub.CONFIG)


# Archives ------------------------------------------------------------------------------------------------------------------


def zip_slip(path):
    """An archive whose members lead outside."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("../slipped", "/slipped", "config.json"):
                archive.writestr(name, "{}")
    else:
        with tarfile.open(path, "w:gz") as archive:
            for name in ("../slipped", "config.json"):
                member = tarfile.TarInfo(name)
                member.size = 2
                archive.addfile(member, io.BytesIO(b"{}"))
    return path


@pytest.mark.parametrize("name", ["preset.zip", "preset.tar.gz"])
def test_archives_are_never_unpacked(server, tmp_path, name):
    (tmp_path / "deep").mkdir()
    path = zip_slip(tmp_path / "deep" / name)
    with pytest.raises(CheckpointError, match="Unpack an archive first and pass its folder"):
        Gemma2CausalLM.from_preset(path)
    server.models["google/gemma-2/pytorch/2b/1"] = path.parent
    with pytest.raises(CheckpointError, match=f"holds an archive only: .*{name}. Unpack it"):
        hub.fetch("kaggle://google/gemma-2/pyTorch/2b/1", hub.WEIGHTS)
    assert not [path for path in tmp_path.rglob("*") if "slipped" in path.name] and not Path("/slipped").exists()


def test_a_file_that_kaggle_serves_as_a_zip_stays_in_its_folder(server, folder, tmp_path):
    """Kaggle compresses some single files; the library unpacks those."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    zip_slip(tmp_path / "slip.zip").rename(copy / "config.json.zip")
    (copy / "config.json").unlink()
    server.models[f"{HANDLE}/2"] = copy
    server.errors['"config.json"'] = (
        302,
        {"Location": f"{server.url}/content/{HANDLE.replace('/', '%2F')}%2F2/config.json.zip"},
        "",
    )
    with pytest.raises(CheckpointError):
        registry.resolve(KAGGLE)
    assert not [path for path in tmp_path.rglob("*") if "slipped" in path.name]
