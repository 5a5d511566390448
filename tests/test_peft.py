"""Adapters against PEFT's, both ways: logits, gradients, files; and the files that are refused."""

import json
import os
import shutil

import keras
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from conftest import TINY
from keras import ops
from oracle import hugging_face_folder, hugging_face_logits, hugging_face_model

from keras_gemma2 import Gemma2Backbone, Gemma2CausalLM
from keras_gemma2.errors import CheckpointError

TOLERANCE = 2e-5  # of the range of the logits: float32 sums in another order
IDS = np.random.default_rng(5).integers(1, 97, (2, 13))
X = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EVERYTHING = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def ours():
    with pytest.warns(UserWarning, match="no tokenizer"):
        return Gemma2CausalLM.from_preset(hugging_face_folder()[0])


def logits(lm):
    return ops.convert_to_numpy(lm(X))


def assert_same_logits(found, expected):
    assert np.abs(found - expected).max() <= TOLERANCE * np.ptp(expected)


def peft_model(**config):
    """Over a fresh copy of the oracle's model, with factors large enough to change each logit."""
    model = peft.get_peft_model(hugging_face_model(), peft.LoraConfig(**{"task_type": "CAUSAL_LM", **config})).eval()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    return model


def module_name(path):
    block, _, layer = path.split("/")
    names = {"query": "self_attn.q", "key": "self_attn.k", "value": "self_attn.v", "output_projection": "self_attn.o"}
    return f"model.layers.{block.removeprefix('decoder_block_')}.{names.get(layer, f'mlp.{layer}')}_proj"


def fill(lm, seed=4):
    draw = np.random.default_rng(seed)
    for factors in lm.backbone.adapter_set.factors(lm.active_adapter).values():
        for variable in (factors.lora_a, factors.lora_b):
            variable.assign(0.3 * draw.standard_normal(variable.shape))


CONFIGS = {
    "queries and values": {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "v_proj"]},
    "all-linear, rslora": {"r": 5, "lora_alpha": 2, "target_modules": "all-linear", "use_rslora": True},
    "expression": {"r": 2, "lora_alpha": 4, "target_modules": r".*layers\.[13]\.(mlp\.down|self_attn\.k)_proj"},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "up_proj", "o_proj"],
        "rank_pattern": {"q_proj": 2, r"layers\.2\.mlp\.up_proj": 7},
        "alpha_pattern": {r"^model\.layers\.1\.self_attn\.o_proj": 11, "up_proj": 3},
    },
    "layers": {"r": 3, "lora_alpha": 9, "target_modules": ["v_proj", "gate_proj"], "layers_to_transform": [0, 2]},
    "excluded": {"r": 3, "lora_alpha": 9, "target_modules": ATTENTION, "exclude_modules": r".*\.1\.self_attn\.k_proj"},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_adapters_of_peft_load(config, tmp_path):
    model = peft_model(**config)
    model.save_pretrained(tmp_path)
    lm = ours()
    plain = logits(lm)
    lm.load_adapter(tmp_path)
    expected = hugging_face_logits(model, IDS)
    assert np.abs(expected - plain).max() > 0.5
    assert_same_logits(logits(lm), expected)
    lm.save_adapter(tmp_path / "again")
    again = peft.PeftModel.from_pretrained(hugging_face_model(), tmp_path / "again").eval()
    assert_same_logits(hugging_face_logits(again, IDS), expected)
    lm.merge_adapter()
    assert_same_logits(logits(lm), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 3, "alpha": 7},
        {"rank": 4, "alpha": 2.5, "targets": "all", "use_rslora": True, "dropout": 0.4},
        {"rank": 2, "alpha": 5, "targets": r"decoder_block_[02]/(attention/query|feed_forward/.*)"},
        {"rank": 2, "alpha": 5, "targets": ["value", "decoder_block_3/feed_forward/down"]},
    ],
    ids=["attention", "all", "expression", "list"],
)
def test_peft_reads_what_is_written(settings, tmp_path):
    lm = ours()
    plain = logits(lm)
    lm.enable_lora(**settings)
    assert np.abs(logits(lm) - plain).max() == 0  # B is zeros
    fill(lm)
    assert np.abs(logits(lm) - plain).max() > 0.5
    lm.save_adapter(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]
    model = peft.PeftModel.from_pretrained(hugging_face_model(), tmp_path).eval()
    assert_same_logits(hugging_face_logits(model, IDS), logits(lm))
    again = ours()
    again.load_adapter(str(tmp_path), name="again")
    assert again.backbone.adapter_set.settings["again"] == lm.backbone.adapter_set.settings["default"]
    assert (logits(again) == logits(lm)).all()


def test_gradients_are_those_of_peft(tmp_path):
    """One step of plain descent at rate 1, and a second one: gradients are not added up."""
    model = peft_model(r=3, lora_alpha=7, target_modules=EVERYTHING)
    model.save_pretrained(tmp_path)
    lm = ours()
    lm.load_adapter(tmp_path)
    lm.compile(optimizer=keras.optimizers.SGD(0.1))
    ids = torch.tensor(IDS)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(parameters) == len(lm.trainable_variables) == 2 * 7 * 4
    first = {name: parameter.detach().numpy().copy() for name, parameter in parameters.items()}
    losses = []
    for _ in range(2):
        labels = np.roll(IDS, -1, 1)
        weights = np.ones(IDS.shape, "float32")
        weights[:, -1] = 0
        losses.append(float(lm.train_on_batch(X, labels, weights)[0]) * IDS.size / weights.sum())
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert losses[-1] == pytest.approx(loss.item(), rel=2e-5)
        with torch.no_grad():
            for parameter in parameters.values():
                # Keras divides by all tokens, PEFT's loss by those that have a next one.
                parameter -= 0.1 * parameter.grad * float(weights.sum() / IDS.size)
    assert losses[1] < losses[0]
    for path, factors in lm.backbone.adapter_set.factors("default").items():
        for factor, array in zip("AB", factors.arrays()):
            expected = parameters[f"base_model.model.{module_name(path)}.lora_{factor}.default.weight"].detach().numpy()
            change = np.abs(expected - first[f"base_model.model.{module_name(path)}.lora_{factor}.default.weight"]).max()
            # Two steps of float32 through four steep layers: 1e-4 on PyTorch and JAX, 2e-3 on TensorFlow, growing from the last
            # layer (1e-7 of the factor) to the first (1e-5). A wrong scale, or gradients added up, would be off by as much again.
            assert np.abs(array - expected).max() <= 5e-3 * change, (path, factor)


def test_half_precision_files_and_weights(tmp_path):
    """PEFT's factors stay float32 beside bfloat16 weights; files of 16 bits are widened."""
    lm = Gemma2CausalLM(Gemma2Backbone(**TINY, dtype="bfloat16"))
    lm.enable_lora(2)
    fill(lm)
    lm.save_adapter(tmp_path)
    path = str(tmp_path / "adapter_model.safetensors")
    tensors = safetensors.torch.load_file(path)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    safetensors.torch.save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, path)
    lm.load_adapter(tmp_path, "rounded")
    factors = lm.backbone.adapter_set.factors("rounded")["decoder_block_0/attention/query"]
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert factors.lora_a.dtype == "float32"
    assert (factors.arrays()[0] == tensors[key].bfloat16().float().numpy()).all()


# What is refused ----------------------------------------------------------------------------------------------------------

REFUSED = {
    "dora": ({"use_dora": True}, "use_dora"),
    "bias": ({"bias": "lora_only"}, "bias"),
    "modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    "kind": ({"peft_type": "IA3"}, "IA3"),
    "no kind": ({"peft_type": None}, "peft_type"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "replication": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
    "head": ({"target_modules": ["lm_head"]}, "lm_head"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
    "no targets": ({"target_modules": []}, "target_modules"),
    "other targets": ({"target_modules": ["c_attn"]}, "names no projection"),
    "expression": ({"target_modules": "(q_proj"}, "regular expression"),
    "rank": ({"r": 0}, "rank"),
    "no rank": ({"r": None}, "lacks 'r'"),
    "text for a rank": ({"r": "3"}, "rank"),
    "alpha": ({"lora_alpha": -1}, "alpha"),
    "dropout": ({"lora_dropout": 1.5}, "dropout"),
    "pattern": ({"rank_pattern": [3]}, "rank_pattern"),
    "another rank": ({"r": 4}, r"q_proj.lora_A.weight.*\(3, 42\).*\(4, 42\)"),
    "more targets": ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "Missing.*k_proj.lora_A.*8 in all"),
    "fewer targets": ({"target_modules": ["q_proj"]}, "Unknown.*v_proj.lora_A.*8 in all"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with an adapter of rank 3 for queries and values."""
    folder = tmp_path_factory.mktemp("adapter")
    keras.utils.set_random_seed(1)
    lm = Gemma2CausalLM(Gemma2Backbone(**TINY))
    lm.enable_lora(3, targets=["query", "value"])
    fill(lm)
    lm.save_adapter(folder)
    return folder


@pytest.fixture(scope="module")
def adapted():
    """A model with an adapter, which must be the same after each refusal."""
    keras.utils.set_random_seed(2)
    lm = Gemma2CausalLM(Gemma2Backbone(**TINY))
    lm.enable_lora(2)
    fill(lm)
    return lm, logits(lm)


def assert_refused(adapted, folder, message, error=CheckpointError):
    lm, before = adapted
    with pytest.raises(error, match=message) as raised:
        lm.load_adapter(folder)
    assert (logits(lm) == before).all() and lm.adapter_names == ["default"] and len(lm.trainable_variables) == 2 * 4 * 4
    return str(raised.value)


@pytest.mark.parametrize("change, message", REFUSED.values(), ids=REFUSED)
def test_configs_that_are_refused(change, message, written, adapted, tmp_path):
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert str(tmp_path) in assert_refused(adapted, tmp_path, message)


def test_fields_that_are_not_known_are_named(written, tmp_path):
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "of_another_year": 5}))
    lm = Gemma2CausalLM(Gemma2Backbone(**TINY))
    with pytest.warns(UserWarning, match="of_another_year"):
        lm.load_adapter(tmp_path)


KEY = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"


def changed_tensors(folder, change):
    path = str(folder / "adapter_model.safetensors")
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


TENSORS = {
    "missing": (lambda t: t.pop(KEY), r"Missing.*layers.1.self_attn.v_proj.lora_B"),
    "extra": (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(2)}), "Unknown.*lm_head"),
    "shape": (lambda t: t.update({KEY: t[KEY].T.contiguous()}), r"layers.1.self_attn.v_proj.lora_B.*\(3, 32\).*\(32, 3\)"),
    "integers": (lambda t: t.update({KEY: t[KEY].int()}), "v_proj.lora_B.*I32"),
    "nan": (lambda t: t[KEY].fill_(float("nan")), "v_proj.lora_B.*NaN"),
}


@pytest.mark.parametrize("change, message", TENSORS.values(), ids=TENSORS)
def test_tensors_that_are_refused(change, message, written, adapted, tmp_path):
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    changed_tensors(tmp_path, change)
    assert str(tmp_path) in assert_refused(adapted, tmp_path, message)


def test_damaged_files_are_refused(written, adapted, tmp_path):
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "adapter_model.safetensors"
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 100, 4, 0):
        path.write_bytes(whole[:size])
        assert_refused(adapted, tmp_path, "adapter_model.safetensors")
    path.write_bytes(b"\xff" * 8 + whole[8:])
    assert_refused(adapted, tmp_path, "adapter_model.safetensors")
    path.unlink()
    assert_refused(adapted, tmp_path, "adapter_model.safetensors is not there")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    assert_refused(adapted, tmp_path, "0.6 or later")
    (tmp_path / "adapter_config.json").write_text("{")
    (tmp_path / "adapter_model.safetensors").write_bytes(whole)
    assert_refused(adapted, tmp_path, "adapter_config.json is not valid JSON")
    assert_refused(adapted, tmp_path / "nowhere", "nowhere")
    assert_refused(adapted, 5, "path of a folder", TypeError)


def test_adapters_of_another_size_are_refused(adapted, tmp_path):
    """More layers, and wider ones."""
    for overrides, message in (({"num_layers": 5}, "Unknown.*layers.4"), ({"hidden_dim": 48}, r"\(2, 48\).*\(2, 42\)")):
        other = Gemma2CausalLM(Gemma2Backbone(**{**TINY, **overrides}))
        other.enable_lora(2)
        other.save_adapter(tmp_path)
        assert_refused(adapted, tmp_path, message)


# Writing ------------------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_folder(written, tmp_path, monkeypatch):
    from keras_gemma2.checkpoints import peft_adapter

    folder = tmp_path / "adapter"
    shutil.copytree(written, folder)
    (folder / "README.md").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(path, tensors, progress=None):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    lm = Gemma2CausalLM(Gemma2Backbone(**TINY))
    lm.enable_lora(2)
    with monkeypatch.context() as patch:
        patch.setattr(peft_adapter, "write_safetensors", full)
        with pytest.raises(CheckpointError, match="full"):
            lm.save_adapter(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(tmp_path) == ["adapter"]
    lm.save_adapter(folder)
    assert (folder / "README.md").read_text() == "mine"
    assert (folder / "adapter_model.safetensors").read_bytes() != before["adapter_model.safetensors"]
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        lm.save_adapter(tmp_path / "file")


def test_the_exported_model_is_that_of_peft_merged(tmp_path):
    """`export_to_transformers` writes the weights with the active adapter added; the model keeps it apart."""
    model = peft_model(r=3, lora_alpha=7, target_modules=EVERYTHING)
    model.save_pretrained(tmp_path / "adapter")
    lm = ours()
    lm.load_adapter(tmp_path / "adapter")
    before = logits(lm)
    lm.export_to_transformers(tmp_path / "merged")
    assert (logits(lm) == before).all() and lm.active_adapter == "default"
    merged = model.merge_and_unload()
    found = safetensors.torch.load_file(tmp_path / "merged" / "model.safetensors")
    for name, weight in merged.state_dict().items():
        if name != "lm_head.weight":
            assert (found[name] - weight).abs().max() <= 1e-6 * weight.abs().max(), name  # one rounding in another order
