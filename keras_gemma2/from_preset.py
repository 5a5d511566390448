"""`from_preset`, `save_to_preset` and `export_to_transformers` for the package's public classes."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

from keras_gemma2.errors import CheckpointError
from keras_gemma2.staging import CHECKPOINT_FILES, MODEL_FILES, TOKENIZER_FILES, folder_path, replacing_folder

FORMATS = ("keras_gemma2", "keras_hub")
HUGGING_FACE = "hugging_face"
DEFAULT_FILE_SIZE = "5GB"  # of `export_to_transformers`
LARGEST_KERAS_OBJECT = 1 << 20  # bytes of JSON; a Hugging Face tokenizer.json has the whole vocabulary in it
_HOLDS = {
    "keras_gemma2": "a preset of this package",
    "keras_hub": "a preset of keras-hub",
    HUGGING_FACE: "files of Hugging Face's format",
}


class FromPreset:
    """Mixed in before a keras-hub base class: resolves our names and folders first, and writes whole folders or nothing."""

    @classmethod
    def from_preset(cls, preset: str | os.PathLike[str], load_weights: bool = True, **kwargs: Any) -> Any:
        """Loads an object of this class from a preset.

        Args:
            preset: the name of a built-in preset (`keras_gemma2.preset_names()` lists them); a hub's address (`kaggle://...`,
                `hf://owner/name[@revision]`, `modelscope://...`); or a local folder or file in any format that this package
                reads, which is found out by its content: a preset of this package or of keras-hub, a Hugging Face folder,
                gemma_pytorch's `model.ckpt`, a Flax checkpoint, a GGUF file.
            load_weights: whether to fill the weights; False leaves them random, and downloads none.
            **kwargs: `dtype` (default: what the preset's config says, or else the stored dtype) and other arguments of the
                backbone, or of the class. `quantize`, for models, "int8" or "int4": all matrices are quantized while they are read,
                block by block, as `quantize` would do afterwards, so that memory never holds them as floats. A preset saved
                quantized comes back as it was; with a float `dtype`, as floats.

        Raises:
            CheckpointError: a `ValueError`, for an unknown name (the message lists near ones), a folder without a model, a
                damaged one, or one of another model; a `HubError` among them, with the step to take, if a hub gives no files.
            ValueError: for an unknown mode in `quantize`, or another one than that of a quantized preset or `dtype`.
            TypeError: if `preset` is no string or path, or `load_weights` no bool.

        Example:
            >>> lm = Gemma2CausalLM.from_preset("gemma2_mini_en")
            >>> lm = Gemma2CausalLM.from_preset("gemma2_mini_en", dtype="bfloat16", quantize="int8")
        """
        from keras_gemma2.presets.load import load_object  # presets import the models, so not at module level

        if not isinstance(load_weights, bool):
            raise TypeError(f"`load_weights` must be True or False. Received: {load_weights!r}. A dtype is passed as `dtype=`.")
        return load_object(cls, super().from_preset, preset, load_weights, kwargs)

    def save_to_preset(self, preset_dir: str | os.PathLike[str], format: str = "keras_gemma2", **kwargs: Any) -> None:
        """Saves to a folder that `from_preset` reads.

        The folder changes in one step, when all files are complete (`staging.replacing_folder` says how). Files of an older
        checkpoint go, files that belong to none stay. A backbone, tokenizer or preprocessor replaces its own part alone, and
        is not saved beside a part in another format: they have file names in common.

        Where an adapter is active, the weights are written with it added (quantized ones quantized anew), and the model stays as it
        is. `save_adapter` writes the adapter alone.

        Args:
            preset_dir: the folder; made if missing, `~` expanded.
            format: "keras_gemma2" for this package's classes, or "keras_hub" for those of keras-hub (models only), which
                `keras_hub.models.GemmaCausalLM.from_preset` reads. The first keeps quantized weights as they are; the second gets
                the floats they stand for.
            **kwargs: `max_shard_size`, for models: the largest size of one file, in GB of 1024 ** 3 bytes or a text such as
                "500MB"; None for no limit. Default 10.

        Raises:
            ValueError: for an unknown format or a wrong `max_shard_size`.
            TypeError: if `preset_dir` is no path, or for another argument.
            CheckpointError: if the folder cannot be written, or keeps a part in another format.

        Example:
            >>> lm.save_to_preset("./my_gemma2")
        """
        if format not in FORMATS:
            raise ValueError(f"`format` must be one of {FORMATS}. Received: {format!r}.")
        backbone, tokenizer, owned = _parts(self)
        if backbone is None and kwargs:
            raise TypeError(f"`{type(self).__name__}.save_to_preset` takes `preset_dir` and `format` only. Received: {[*kwargs]}.")
        if "max_shard_size" in kwargs:
            kwargs["max_shard_size"] = _gigabytes(kwargs["max_shard_size"])
        from keras_gemma2 import backend  # imports a framework
        from keras_gemma2.layers.low_rank import merged_on_save  # models import this module

        with backend.writing([] if backbone is None else backbone.variables) as is_writer:
            if not is_writer:
                return
            target = folder_path(preset_dir, "preset_dir")
            _refuse_mixture(target, format, owned)
            if format == "keras_hub":
                preprocessor = getattr(self, "preprocessor", None)
                arguments = None if preprocessor is None else preprocessor.get_config()
                _save_for_keras_hub(backbone, tokenizer, arguments, target, owned, **kwargs)
                return
            with replacing_folder(target, weights_bytes(backbone), owned) as staging, merged_on_save():
                super().save_to_preset(staging, **kwargs)

    def export_to_transformers(
        self,
        path: str | os.PathLike[str],
        dtype: str | None = None,
        max_shard_size: str | int = DEFAULT_FILE_SIZE,
        config_dtype: str | None = None,
    ) -> None:
        """Writes a Hugging Face folder, for transformers, vLLM, TGI, Axolotl and llama.cpp's converter.

        The folder changes in one step, as with `save_to_preset`. A backbone is written as the whole causal language model,
        since its output projection is its embedding. A tokenizer or preprocessor writes the tokenizer's files alone, beside
        a model in the same format that is there.

        Where an adapter is active, the weights are written with it added, and the model stays as it is.

        The chat template written is Gemma's; `convert` keeps one that a Hugging Face source has of its own.

        transformers reads `"<bos>"` and other special pieces in a text as tokens, where `Gemma2Tokenizer` sees the
        characters they are spelled with. All other texts have the same ids.

        Args:
            path: the folder; made if missing, `~` expanded.
            dtype: "float32", "float16" or "bfloat16" of the stored weights; default the model's. Quantized weights are written as
                the floats they stand for.
            max_shard_size: largest size of one file, as bytes or a text such as "5GB" (decimal).
            config_dtype: the dtype that readers load the weights in by default; `dtype` unless given.

        Raises:
            ValueError: for a wrong `dtype`, `config_dtype` or `max_shard_size`, or a float64 model without `dtype`.
            TypeError: if `path` is no path, or one of the others is given for a tokenizer, which has no weights.
            CheckpointError: if the folder cannot be written, keeps a part in another format (as with `save_to_preset`), or a
                weight does not fit the dtype's range.

        Example:
            >>> lm.export_to_transformers("./my_gemma2_hf", dtype="bfloat16")
            >>> transformers.AutoModelForCausalLM.from_pretrained("./my_gemma2_hf")
        """
        from keras_gemma2 import backend
        from keras_gemma2.checkpoints import hf_writer

        backbone, tokenizer, owned = _parts(self)
        if backbone is None and (dtype, max_shard_size, config_dtype) != (None, DEFAULT_FILE_SIZE, None):
            raise TypeError(
                f"`{type(self).__name__}.export_to_transformers` takes `path` only: `dtype`, `max_shard_size` and `config_dtype` "
                f"are for weights. Received: {dtype!r}, {max_shard_size!r}, {config_dtype!r}."
            )
        with backend.writing([] if backbone is None else backbone.variables) as is_writer:
            if not is_writer:
                return
            target = folder_path(path, "path")
            _refuse_mixture(target, HUGGING_FACE, owned)
            if backbone is None:
                hf_writer.export_tokenizer(tokenizer, target, owned)
            else:
                hf_writer.export_model(backbone, tokenizer, target, dtype, max_shard_size, config_dtype, owned)


def _parts(thing: Any) -> tuple[Any, Any, tuple[str, ...]]:
    """The backbone and the tokenizer of an object of a public class, and which files of an older checkpoint it replaces."""
    if hasattr(thing, "named_weights"):
        return thing, None, MODEL_FILES
    if hasattr(thing, "backbone"):
        tokenizer = None if thing.preprocessor is None else thing.preprocessor.tokenizer
        return thing.backbone, tokenizer, CHECKPOINT_FILES
    return None, getattr(thing, "tokenizer", thing), TOKENIZER_FILES


def _refuse_mixture(folder: str, written: str, owned: tuple[str, ...]) -> None:
    """Refuses to write a part of a model beside parts in another format, before anything is written.

    `config.json` and `tokenizer.json` are a Keras object in one format and something else in the other, so the folder would
    be read as neither.

    Args:
        folder: to be written to.
        written: the format.
        owned: the files that are replaced; those of another format among them do not matter.
    """
    for name in ("config.json", "tokenizer.json"):
        held = None if name in owned else _format_of(os.path.join(folder, name))
        if held not in (None, written):
            raise CheckpointError(
                f"{folder!r} holds {_HOLDS[held]}, which would not load any more beside what is to be saved "
                f"({_HOLDS[written]}). Save the whole `Gemma2CausalLM` there, which replaces all of it, or choose another folder."
            )


def _format_of(path: str) -> str | None:
    """The format that a `config.json` or `tokenizer.json` belongs to; None if it is missing, damaged or of no known one."""
    from keras_gemma2.checkpoints.source import read_json

    if not os.path.isfile(path):
        return None
    if os.path.getsize(path) > LARGEST_KERAS_OBJECT:
        return HUGGING_FACE
    try:
        values = read_json(path)
    except CheckpointError:  # nothing that a save could break
        return None
    if isinstance(name := values.get("registered_name"), str):
        return "keras_hub" if name.startswith(("keras_hub>", "keras_nlp>")) else "keras_gemma2"
    return HUGGING_FACE if "model_type" in values or "model" in values else None


def _gigabytes(max_shard_size: str | float | None) -> float | None:
    """A shard's largest size as keras-hub's savers take it."""
    from keras_gemma2.checkpoints.h5_weights import GIGABYTE, shard_bytes

    size = shard_bytes(max_shard_size)
    return None if math.isinf(size) else size / GIGABYTE


def weights_bytes(backbone: Any) -> int:
    """How much a preset's weights take on a disk."""
    if backbone is None:
        return 0
    sizes = {"int8": 1, "uint8": 1, "float16": 2, "bfloat16": 2, "float64": 8}
    return sum(math.prod(variable.shape) * sizes.get(variable.dtype, 4) for variable in backbone.weights)


def _save_for_keras_hub(
    backbone: Any,
    tokenizer: Any,
    preprocessor: dict[str, Any] | None,
    target: Any,
    owned: tuple[str, ...],
    max_shard_size: float | None = 10,
    **kwargs: Any,
) -> None:
    from keras_gemma2.checkpoints.keras_hub import write_folder
    from keras_gemma2.checkpoints.keras_objects import POLICIES, float_policy_name
    from keras_gemma2.checkpoints.writing import outgoing_from_backbone

    if backbone is None:
        raise ValueError("Only models are saved in format='keras_hub'; a tokenizer goes with its `Gemma2CausalLM`.")
    if kwargs:
        raise TypeError(f"`save_to_preset` in format='keras_hub' takes `max_shard_size` only. Received: {sorted(kwargs)}.")
    weights = outgoing_from_backbone(backbone)
    policy = float_policy_name(backbone.dtype_policy.name)
    if policy in POLICIES:  # a mixed one computes in another dtype than it stores
        weights = dataclasses.replace(weights, policy=policy)
    proto, stop = (None, ()) if tokenizer is None else (tokenizer.proto, tokenizer.stop_token_ids)
    with replacing_folder(target, weights.nbytes, owned) as folder:
        write_folder(folder, weights, proto, stop, max_shard_size, None, preprocessor)
