"""`from_preset`, `save_to_preset` and `export_to_transformers` for the package's public classes."""

from __future__ import annotations

import os
from typing import Any

from keras_gemma2.staging import CHECKPOINT_FILES, MODEL_FILES, TOKENIZER_FILES, replacing_folder

FORMATS = ("keras_gemma2", "keras_hub")


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
                backbone, or of the class.

        Raises:
            CheckpointError: a `ValueError`, for an unknown name (the message lists near ones), a folder without a model, a
                damaged one, or one of another model; a `HubError` among them, with the step to take, if a hub gives no files.
            TypeError: if `preset` is no string or path, or `load_weights` no bool.

        Example:
            >>> lm = Gemma2CausalLM.from_preset("gemma2_mini_en")
        """
        from keras_gemma2.presets.load import load_object  # presets import the models, so not at module level

        if not isinstance(load_weights, bool):
            raise TypeError(f"`load_weights` must be True or False. Received: {load_weights!r}. A dtype is passed as `dtype=`.")
        return load_object(cls, super().from_preset, preset, load_weights, kwargs)

    def save_to_preset(self, preset_dir: str | os.PathLike[str], format: str = "keras_gemma2", **kwargs: Any) -> None:
        """Saves to a folder that `from_preset` reads.

        The folder changes in one step, when all files are complete (`staging.replacing_folder` says how). Files of an older
        checkpoint go, files that belong to none stay.

        Args:
            preset_dir: the folder; made if missing.
            format: "keras_gemma2" for this package's classes, or "keras_hub" for those of keras-hub (models only), which
                `keras_hub.models.GemmaCausalLM.from_preset` reads.
            **kwargs: as the keras-hub base class takes them (`max_shard_size` in GB, for models).

        Raises:
            ValueError: for an unknown format.
            CheckpointError: if the folder cannot be written.

        Example:
            >>> lm.save_to_preset("./my_gemma2")
        """
        if format not in FORMATS:
            raise ValueError(f"`format` must be one of {FORMATS}. Received: {format!r}.")
        backbone, tokenizer, owned = _parts(self)
        if format == "keras_hub":
            preprocessor = getattr(self, "preprocessor", None)
            arguments = None if preprocessor is None else preprocessor.get_config()
            _save_for_keras_hub(backbone, tokenizer, arguments, preset_dir, owned, **kwargs)
            return
        with replacing_folder(preset_dir, _bytes(backbone), owned) as staging:
            super().save_to_preset(staging, **kwargs)

    def export_to_transformers(
        self,
        path: str | os.PathLike[str],
        dtype: str | None = None,
        max_shard_size: str | int = "5GB",
        config_dtype: str | None = None,
    ) -> None:
        """Writes a Hugging Face folder, for transformers, vLLM, TGI, Axolotl and llama.cpp's converter.

        The folder changes in one step, as with `save_to_preset`. A backbone is written as the whole causal language model,
        since its output projection is its embedding. A tokenizer or preprocessor writes the tokenizer's files alone, beside
        a model that is there.

        transformers reads `"<bos>"` and other special pieces in a text as tokens, where `Gemma2Tokenizer` sees the
        characters they are spelled with. All other texts have the same ids.

        Args:
            path: the folder; made if missing.
            dtype: "float32", "float16" or "bfloat16" of the stored weights; default the model's.
            max_shard_size: largest size of one file, as bytes or a text such as "5GB" (decimal).
            config_dtype: the dtype that readers load the weights in by default; `dtype` unless given.

        Raises:
            ValueError: for a wrong `dtype` or `max_shard_size`.
            CheckpointError: if the folder cannot be written, or a weight does not fit the dtype's range.

        Example:
            >>> lm.export_to_transformers("./my_gemma2_hf", dtype="bfloat16")
            >>> transformers.AutoModelForCausalLM.from_pretrained("./my_gemma2_hf")
        """
        from keras_gemma2.checkpoints import hf_writer

        backbone, tokenizer, owned = _parts(self)
        if backbone is None:
            hf_writer.export_tokenizer(tokenizer, path, owned)
        else:
            hf_writer.export_model(backbone, tokenizer, path, dtype, max_shard_size, config_dtype, owned)


def _parts(thing: Any) -> tuple[Any, Any, tuple[str, ...]]:
    """The backbone and the tokenizer of an object of a public class, and which files of an older checkpoint it replaces."""
    if hasattr(thing, "named_weights"):
        return thing, None, MODEL_FILES
    if hasattr(thing, "backbone"):
        tokenizer = None if thing.preprocessor is None else thing.preprocessor.tokenizer
        return thing.backbone, tokenizer, CHECKPOINT_FILES
    return None, getattr(thing, "tokenizer", thing), TOKENIZER_FILES


def _bytes(backbone: Any) -> int:
    """How much a preset's weights take on a disk."""
    if backbone is None:
        return 0
    return backbone.config.parameter_count() * (2 if backbone.dtype_policy.variable_dtype in ("float16", "bfloat16") else 4)


def _save_for_keras_hub(
    backbone: Any,
    tokenizer: Any,
    preprocessor: dict[str, Any] | None,
    target: Any,
    owned: tuple[str, ...],
    max_shard_size: str | float | None = 10,
    **kwargs: Any,
) -> None:
    from keras_gemma2.checkpoints.keras_hub import write_folder
    from keras_gemma2.checkpoints.writing import outgoing_from_backbone

    if backbone is None:
        raise ValueError("Only models are saved in format='keras_hub'; a tokenizer goes with its `Gemma2CausalLM`.")
    if kwargs:
        raise TypeError(f"`save_to_preset` in format='keras_hub' takes `max_shard_size` only. Received: {sorted(kwargs)}.")
    weights = outgoing_from_backbone(backbone)
    proto, stop = (None, ()) if tokenizer is None else (tokenizer.proto, tokenizer.stop_token_ids)
    with replacing_folder(target, weights.nbytes, owned) as folder:
        write_folder(folder, weights, proto, stop, max_shard_size, None, preprocessor)
