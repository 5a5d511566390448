"""Writing a model from another backend: a process of that backend's reads it from files beside the folder, and writes.

`python -m keras_gemma2.export.elsewhere PLACE FOLDER`: PLACE holds `preset/`, `settings.json` and, if one is active, `adapter/`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

LINES_OF_ERRORS = 12


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
    with tempfile.TemporaryDirectory(dir=os.path.dirname(folder), prefix=".exporting-") as place:
        adapters = lm.backbone.adapter_set
        if adapters.active is not None:  # as it is, and not merged: codes of 8 or 4 bits could not hold the sum
            lm.save_adapter(os.path.join(place, "adapter"))
        with adapters.only(None):
            lm.save_to_preset(os.path.join(place, "preset"))
        with open(os.path.join(place, "settings.json"), "w", encoding="utf-8") as file:
            json.dump({"format": format, "settings": settings}, file)
        # On the CPU, whatever the devices are: those may be this process's.
        hidden = {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
        command = [sys.executable, "-m", "keras_gemma2.export.elsewhere", place, folder]
        environment = {**os.environ, "KERAS_BACKEND": backend, **hidden}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = "\n".join(done.stderr.strip().splitlines()[-LINES_OF_ERRORS:])
        if "No space left on device" in done.stderr:
            raise OSError(28, f"No space left on device: the process that writes the {format} said\n{lines}")
        raise RuntimeError(f"The process that writes the {format} ended with code {done.returncode}:\n{lines}")


def main() -> None:
    from keras_gemma2 import Gemma2CausalLM
    from keras_gemma2.export import programs, saved_model

    place, folder = sys.argv[1:]
    with open(os.path.join(place, "settings.json"), encoding="utf-8") as file:
        read = json.load(file)
    lm = Gemma2CausalLM.from_preset(os.path.join(place, "preset"))
    adapter = os.path.join(place, "adapter")
    if os.path.isdir(adapter):
        lm.load_adapter(adapter)
    if read["format"] == "tf_saved_model":
        saved_model.write(lm, folder, saved_model.settings_from_config(read["settings"]))
    else:
        programs.write(lm, folder, read["format"], programs.Sizes(**read["settings"]))


if __name__ == "__main__":
    main()
