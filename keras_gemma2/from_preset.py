"""`from_preset`, `save_to_preset` and `presets` for the package's public classes."""

from __future__ import annotations

import os
import shutil
import tempfile
from typing import Any


class FromPreset:
    """Mixed in before a keras-hub base class: resolves our names and folders first, and writes whole folders or nothing."""

    @classmethod
    def from_preset(cls, preset: str | os.PathLike[str], load_weights: bool = True, **kwargs: Any) -> Any:
        """Loads an object of this class from a preset.

        Args:
            preset: the name of a built-in preset (`keras_gemma2.preset_names()` lists them); a folder saved by
                `save_to_preset`; or a Hugging Face folder of a Gemma 2 model (`config.json`, safetensors,
                `tokenizer.model`).
            load_weights: whether to fill the weights; False leaves them random.
            **kwargs: `dtype` (default: what the preset's config says) and other arguments of the backbone, or of the class.

        Raises:
            ValueError: for an unknown name (the message lists near ones), a folder without a model, or one of another model.

        Example:
            >>> lm = Gemma2CausalLM.from_preset("gemma2_mini_en")
        """
        from keras_gemma2.presets.load import load_object  # presets import the models, so not at module level

        return load_object(cls, super().from_preset, preset, load_weights, kwargs)

    def save_to_preset(self, preset_dir: str | os.PathLike[str], **kwargs: Any) -> None:
        """Saves to a folder that `from_preset` of this package and of keras-hub read.

        The files are written to a folder beside it and moved when all are complete.

        Args:
            preset_dir: the folder; made if missing, files of the same name in it are replaced.
            **kwargs: as the keras-hub base class takes them (`max_shard_size` in GB, for models).

        Example:
            >>> lm.save_to_preset("./my_gemma2")
        """
        target = os.path.abspath(os.fspath(preset_dir))
        os.makedirs(os.path.dirname(target), exist_ok=True)
        staging = tempfile.mkdtemp(prefix=f".{os.path.basename(target)}-", dir=os.path.dirname(target))
        try:
            super().save_to_preset(staging, **kwargs)
            move_into(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def move_into(staging: str, target: str) -> None:
    """Moves every file below one folder to the same place below another, replacing files of the same name."""
    for folder, _, names in os.walk(staging):
        destination = os.path.join(target, os.path.relpath(folder, staging))
        os.makedirs(destination, exist_ok=True)
        for name in names:
            os.replace(os.path.join(folder, name), os.path.join(destination, name))
