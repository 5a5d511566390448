"""Writing a model from another backend: a process of that backend's reads it from files beside the folder, and writes.

`main` has the arguments PLACE and FOLDER: PLACE holds `preset/`, `settings.json` and, if one is active, `adapter/`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from typing import Any

from keras_gemma2.export.failures import disk_error, disk_errors
from keras_gemma2.preprocessor import Gemma2CausalLMPreprocessor
from keras_gemma2.tokenizer import Gemma2Tokenizer

LINES_OF_ERRORS = 12
# Imports what the caller's process would, wherever that was started from.
_RUN = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); from keras_gemma2.export.elsewhere import main; main()"


def write_elsewhere(lm: Any, folder: str, backend: str, format: str, settings: dict[str, Any]) -> None:
    """Carries a model into a process of another backend, which writes it to an empty folder.

    Args:
        lm: a `Gemma2CausalLM`.
        folder: to write to.
        backend: of that process.
        format: as `Gemma2CausalLM.export` takes it.
        settings: what is fixed, as JSON has it.

    Raises:
        OSError: for a full disk.
        RuntimeError: if the process fails.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="given-") as place:
        adapters = lm.backbone.adapter_set
        if adapters.active is not None:  # as it is, and not merged: codes of 8 or 4 bits could not hold the sum
            lm.save_adapter(os.path.join(place, "adapter"))
        with adapters.only(None):
            _save_parts(lm, os.path.join(place, "preset"))
        with open(os.path.join(place, "settings.json"), "w", encoding="utf-8") as file:
            json.dump({"format": format, "settings": settings}, file)
        # On the CPU, whatever the devices are: those may be this process's.
        hidden = {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu", "KERAS_TORCH_DEVICE": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
        command = [sys.executable, "-c", _RUN, json.dumps([os.fspath(place) for place in sys.path]), place, folder]
        environment = {**os.environ, "KERAS_BACKEND": backend, **hidden}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == -signal.SIGKILL:
        raise RuntimeError(
            f"The process that writes the {format} was killed, most likely because memory ran out. Close other programs, or use "
            f"a smaller dtype. Setting KERAS_BACKEND={backend} makes one process of the two, where there is no accelerator."
        )
    if done.returncode:
        lines = "\n".join(done.stderr.strip().splitlines()[-LINES_OF_ERRORS:])
        raise disk_error(lines) or RuntimeError(f"The process that writes the {format} ended with code {done.returncode}:\n{lines}")


def _save_parts(lm: Any, preset: str) -> None:
    """Saves a model as this package's classes, which are all that the other process knows."""
    lm.backbone.save_to_preset(preset)
    given = lm.preprocessor
    if given is not None:
        tokenizer = Gemma2Tokenizer(given.tokenizer.proto, extra_stop_token_ids=given.tokenizer.extra_stop_token_ids)
        Gemma2CausalLMPreprocessor(tokenizer, add_start_token=given.add_start_token).save_to_preset(preset)


def main() -> None:
    from keras_gemma2 import Gemma2CausalLM
    from keras_gemma2.export import formats, programs, saved_model

    place, folder = sys.argv[1:]
    with open(os.path.join(place, "settings.json"), encoding="utf-8") as file:
        read = json.load(file)
    lm = Gemma2CausalLM.from_preset(os.path.join(place, "preset"))
    adapter = os.path.join(place, "adapter")
    if os.path.isdir(adapter):
        lm.load_adapter(adapter)
    with disk_errors():
        if read["format"] == "tf_saved_model":
            saved_model.write(lm, folder, saved_model.settings_from_config(read["settings"]))
        else:
            programs.write(lm, folder, read["format"], formats.Sizes(**read["settings"]))
