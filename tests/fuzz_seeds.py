"""One tiny, valid checkpoint of each format, to be mutated: every reader reads all of them."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
from vocabulary import train_vocabulary

from keras_gemma2.checkpoints import hf_writer, keras_hub, keras_preset
from keras_gemma2.checkpoints.writing import OutgoingWeights
from keras_gemma2.config import Gemma2Config

# 256: blocks of k-quants have so many elements.
CONFIG = Gemma2Config(600, 2, 4, 2, 256, 512, 64, sliding_window_size=5, layer_norm_epsilon=1e-6)
SHARD = "700KB"  # the embedding has 614,400 bytes in float32, the whole model 1.5 MB


def outgoing(dtype="float32"):
    draw = np.random.default_rng(5)
    values = {path: (draw.normal(size=shape) * 0.1).astype(dtype) for path, shape in CONFIG.weight_shapes().items()}
    return OutgoingWeights(CONFIG, np.dtype(dtype), lambda path: iter([values[path]]))


def hugging_face(folder):
    hf_writer.write_folder(folder, outgoing(), train_vocabulary())


def hugging_face_sharded(folder):
    hf_writer.write_folder(folder, outgoing(), train_vocabulary(), max_shard_size=SHARD)


def tokenizer_json(folder):
    """A folder whose vocabulary is in tokenizer.json alone."""
    hugging_face(folder)
    os.remove(folder / "tokenizer.model")


def preset(folder):
    keras_preset.write_folder(folder, outgoing(), train_vocabulary())


def preset_sharded(folder):
    keras_preset.write_folder(folder, outgoing(), train_vocabulary(), max_shard_size=SHARD)


def keras_hub_preset(folder):
    keras_hub.write_folder(folder, outgoing(), train_vocabulary())


def keras_hub_sharded(folder):
    keras_hub.write_folder(folder, outgoing(), train_vocabulary(), max_shard_size=SHARD)


def keras_hub_quantized(folder):
    """int8 codes in one layer, int4 codes in the other: names and shapes as Keras stores them, numbers at random."""
    import h5py

    keras_hub_preset(folder)
    draw, path = np.random.default_rng(6), folder / "model.weights.h5"
    with h5py.File(path) as file:
        arrays = {}
        file.visititems(lambda name, item: arrays.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            if array.ndim < 2:
                file[name] = array
                continue
            rows, columns = _as_matrix(name, array.shape)
            codes = (rows, columns // 2) if "block_1" in name else array.shape
            file[name] = draw.integers(-128, 128, codes).astype(np.int8)
            scales = rows if "embedding" in name else columns
            file[name.removesuffix("0") + "1"] = draw.uniform(1, 9, scales).astype(np.float32)


def _as_matrix(name, shape):
    """Elements that a product sums over, and those that it does not."""
    if "output_dense" in name:  # [N, H, D], over N and H
        return shape[0] * shape[1], shape[2]
    return (shape[1], shape[0] * shape[2]) if len(shape) == 3 else shape


def gemma_pytorch(folder, **options):
    import torch

    state = _gemma_pytorch_state()
    torch.save({"model_state_dict": state}, folder / "model.ckpt", **options)
    _config_and_vocabulary(folder)


def gemma_pytorch_old(folder):
    """As torch saved before 1.6: no zip."""
    gemma_pytorch(folder, _use_new_zipfile_serialization=False)


def gemma_pytorch_shards(folder):
    import torch

    state = _gemma_pytorch_state()
    names = {key: f"pytorch_model-{1 + i % 2:05}-of-00002.bin" for i, key in enumerate(state)}
    for name in set(names.values()):
        torch.save({key: value for key, value in state.items() if names[key] == name}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    _config_and_vocabulary(folder)


def flax(folder, **options):
    import orbax.checkpoint

    from keras_gemma2.checkpoints.weight_map import foreign_shapes, rows_for

    tree, draw = {}, np.random.default_rng(7)
    for name, shape in foreign_shapes(CONFIG, dict(rows_for(CONFIG, "flax"))).items():
        module, _, leaf = name.rpartition("/")
        tree.setdefault(module, {})[leaf] = draw.normal(size=shape).astype(np.float32)
    with orbax.checkpoint.Checkpointer(orbax.checkpoint.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(folder / "it", tree)
    _config_and_vocabulary(folder)


def flax_plain_files(folder):
    flax(folder, use_ocdbt=False)


def gguf(folder, kind="F32"):
    from gguf_folder import write_gguf

    source = folder / "source"
    source.mkdir()
    hugging_face(source)
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**values, "intermediate_size": CONFIG.intermediate_dim}))
    write_gguf(source, folder / "model.gguf", kind)
    shutil.rmtree(source)


def _gemma_pytorch_state():
    import torch

    from keras_gemma2.checkpoints.weight_map import foreign_shapes, rows_for

    draw = np.random.default_rng(8)
    shapes = foreign_shapes(CONFIG, dict(rows_for(CONFIG, "gemma_pytorch")))
    return {name: torch.from_numpy(draw.normal(size=shape).astype(np.float32)) for name, shape in shapes.items()}


def _config_and_vocabulary(folder):
    from keras_gemma2.checkpoints.hf_config import config_to_hugging_face

    (folder / "config.json").write_text(json.dumps(config_to_hugging_face(CONFIG, "float32")))
    (folder / "tokenizer.model").write_bytes(train_vocabulary())


FORMATS = {
    "hugging_face": hugging_face,
    "hugging_face sharded": hugging_face_sharded,
    "tokenizer.json": tokenizer_json,
    "keras_gemma2": preset,
    "keras_gemma2 sharded": preset_sharded,
    "keras_hub": keras_hub_preset,
    "keras_hub sharded": keras_hub_sharded,
    "keras_hub quantized": keras_hub_quantized,
    "gemma_pytorch": gemma_pytorch,
    "gemma_pytorch shards": gemma_pytorch_shards,
    "gemma_pytorch before 1.6": gemma_pytorch_old,
    "flax": flax,
    "flax plain files": flax_plain_files,
    "gguf f32": gguf,
    "gguf q8_0": lambda folder: gguf(folder, "Q8_0"),
    "gguf q4_k": lambda folder: gguf(folder, "Q4_K"),
}


def write_seed(name, folder):
    """A valid checkpoint of one format in a new folder."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    FORMATS[name](folder)
    return folder
