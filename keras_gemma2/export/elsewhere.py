"""Writes a SavedModel of a preset: `python -m keras_gemma2.export.elsewhere PLACE FOLDER`, with TensorFlow as Keras's backend.

A model of another backend is carried here as files in PLACE: `preset/`, `settings.json` and, if one is active, `adapter/`.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    from keras_gemma2 import Gemma2CausalLM
    from keras_gemma2.export.saved_model import settings_from_config, write

    place, folder = sys.argv[1:]
    with open(os.path.join(place, "settings.json"), encoding="utf-8") as file:
        settings = settings_from_config(json.load(file))
    lm = Gemma2CausalLM.from_preset(os.path.join(place, "preset"))
    adapter = os.path.join(place, "adapter")
    if os.path.isdir(adapter):
        lm.load_adapter(adapter)
    write(lm, folder, settings)


if __name__ == "__main__":
    main()
