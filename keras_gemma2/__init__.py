"""Gemma 2 for Keras 3, on JAX, TensorFlow and PyTorch.

Importing the package itself is cheap; the first use of a public name imports Keras and registers all classes with it.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that defines it; None for modules that are public themselves.
_PUBLIC = {
    "Chat": "keras_gemma2.generation.chat_session",
    "CheckpointError": "keras_gemma2.errors",
    "Distiller": "keras_gemma2.training.distiller",
    "FinetuneSettings": "keras_gemma2.finetuning.settings",
    "Gemma2Backbone": "keras_gemma2.backbone",
    "Gemma2CausalLM": "keras_gemma2.causal_lm",
    "Gemma2CausalLMPreprocessor": "keras_gemma2.preprocessor",
    "Gemma2Config": "keras_gemma2.config",
    "Gemma2Tokenizer": "keras_gemma2.tokenizer",
    "RunCheckpoint": "keras_gemma2.training.run_checkpoints",
    "Sampler": "keras_gemma2.generation.sampler",
    "TeacherRecords": "keras_gemma2.training.teacher_records",
    "chat_token_ids": "keras_gemma2.chat",
    "convert": "keras_gemma2.presets.convert",
    "finetune": "keras_gemma2.finetuning.run",
    "layers": None,
    "pack_samples": "keras_gemma2.training.packed",
    "preset_names": "keras_gemma2.presets.registry",
    "read_jsonl": "keras_gemma2.training.jsonl",
    "record_teacher": "keras_gemma2.training.recording",
    "restore_checkpoint": "keras_gemma2.training.run_checkpoints",
    "verify": "keras_gemma2.presets.verify",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'keras_gemma2' has no attribute {name!r}. Public names: {', '.join(__all__)}.")
    importlib.import_module("keras_gemma2._registration")
    module = _PUBLIC[name]
    value = (
        importlib.import_module("keras_gemma2.layers")
        if module is None
        else getattr(importlib.import_module(module), name)
    )
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
