"""One contender and one case of `benchmarks generate`, in the process that this runs in."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from keras_gemma2.benchmarks import processes
from keras_gemma2.benchmarks.generate_cases import CASES, Settings

CONTENDERS = ("ours", "ours_compiled", "keras_hub", "transformers", "transformers_static", "llama_cpp")


def measure(who: str, case: str, folder: str, dtype: str, settings: Settings) -> dict[str, float]:
    """Loads the model and measures a case.

    Returns:
        What the case does, and `load` (seconds), `weights` (bytes), `total` and `process`: the highest resident memory, over that
        after the imports and in all.
    """
    load = _imported(who)
    before, start = processes.resident_bytes(), time.perf_counter()
    engine = load(folder, dtype)
    seconds, peak = time.perf_counter() - start, processes.peak_bytes()
    figures = CASES[case](engine, settings)
    peak = max(peak, processes.peak_bytes())
    return {**figures, "load": seconds, "weights": engine.weight_bytes, "total": peak - before, "process": peak}


def _imported(who: str) -> Callable[[str, str], Any]:
    """How to load a contender, its libraries imported and its backend started."""
    if who == "llama_cpp":
        from cyllama.llama import llama_cpp

        from keras_gemma2.benchmarks.generate_llama_cpp import LlamaCpp

        del llama_cpp
        return LlamaCpp
    if who.startswith("transformers"):
        import transformers

        from keras_gemma2.benchmarks.generate_transformers import Transformers

        transformers.Gemma2ForCausalLM  # noqa: B018 - imported lazily
        return lambda folder, dtype: Transformers(folder, dtype, static=who.endswith("static"))
    import keras
    import keras_hub

    keras.ops.zeros(1)
    if who == "keras_hub":
        from keras_gemma2.benchmarks.generate_keras_hub import KerasHub

        keras_hub.models.GemmaCausalLM  # noqa: B018 - imported lazily
        return KerasHub
    from keras_gemma2 import Gemma2CausalLM
    from keras_gemma2.benchmarks.generate_ours import Ours
    from keras_gemma2.checkpoints import hf, safetensors_file, weight_map
    from keras_gemma2.presets import load

    del Gemma2CausalLM, hf, safetensors_file, weight_map, load  # what from_preset imports on first use
    return functools.partial(Ours, jit_compile=who == "ours_compiled")
