"""A TensorFlow SavedModel of a causal language model, from whatever backend."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import keras

from keras_gemma2 import backend
from keras_gemma2.export.elsewhere import write_elsewhere
from keras_gemma2.export.failures import disk_errors
from keras_gemma2.export.formats import owned_files
from keras_gemma2.export.signatures import SIGNATURES, TEXT_SIGNATURES, TOKEN_SIGNATURES, Settings, Signatures
from keras_gemma2.from_preset import weights_bytes
from keras_gemma2.generation.requests import GREEDY, check_length, read_sampler, read_stop_token_ids
from keras_gemma2.generation.sampler import Sampler
from keras_gemma2.preprocessor import Gemma2CausalLMPreprocessor
from keras_gemma2.staging import replacing_folder
from keras_gemma2.tokenizer import Gemma2Tokenizer

# What makes tokens of texts and texts of tokens, of each class.
_READING = (
    (Gemma2CausalLMPreprocessor, ("generate_preprocess", "generate_postprocess", "prompt_ids", "_pack", "_start_pattern")),
    (Gemma2Tokenizer, ("tokenize", "detokenize")),
)


def write_folder(lm: Any, target: str, settings: Settings) -> None:
    """Writes a SavedModel to a folder, which changes in one step, from whatever backend.

    Raises:
        CheckpointError: if the folder cannot be written or the disk is full.
        ImportError: where TensorFlow is missing.
        RuntimeError: if the process that writes fails.
    """
    check_installed(settings.signatures)
    size, here = weights_bytes(lm.backbone), _traces_here()
    owned = owned_files(target, ())
    with replacing_folder(target, size if here else 2 * size, owned) as staging, disk_errors():
        if here:
            write(lm, staging, settings)
        else:
            write_elsewhere(lm, staging, "tensorflow", "tf_saved_model", _settings_config(settings))


def check_installed(signatures: Sequence[str]) -> None:
    """Raises an ImportError before any work if what some signatures need is missing."""
    if importlib.util.find_spec("tensorflow") is None:
        raise ImportError("A SavedModel is written by TensorFlow, which is not installed. Install with: pip install tensorflow")
    if set(signatures) & set(TEXT_SIGNATURES) and importlib.util.find_spec("tensorflow_text") is None:
        raise ImportError(
            "Signatures of text need TensorFlow Text, which is not installed. Install with: pip install tensorflow-text, or pass "
            f"`signatures={list(TOKEN_SIGNATURES)}`."
        )


def _traces_here() -> bool:
    """Whether this process traces: TensorFlow's, on a CPU (a graph traced for a GPU reads caches in other blocks)."""
    return keras.backend.backend() == "tensorflow" and not backend.on_accelerator()


def write(lm: Any, folder: str, settings: Settings) -> None:
    """Traces the signatures and writes them to an empty folder; with TensorFlow as Keras's backend."""
    from keras_gemma2.backend.tensorflow_graph import dynamic_graph, in_parts
    from keras_gemma2.backend.tensorflow_merging import merge_duplicates

    made = Signatures(lm, settings)
    archive = keras.export.ExportArchive()
    with dynamic_graph(), in_parts(lm.backbone.token_embedding.embeddings):
        for name, (function, specs) in made.endpoints().items():
            archive.add_endpoint(name, function, input_signature=specs)
        for resource in made.text.resources if made.text else []:
            archive.track(resource)
        archive.write_out(folder, verbose=False)
    merge_duplicates(folder)


def read_settings(
    lm: Any, max_new_tokens: Any, sampler: Any, chat: bool, stop_token_ids: Any, signatures: Sequence[str] | None
) -> Settings:
    """What an export fixes, checked; the arguments and errors are those of `Gemma2CausalLM.export_saved_model`."""
    max_new_tokens = check_length("max_new_tokens", max_new_tokens, None)
    samplers, _ = read_sampler(lm, sampler, None, 1)
    chosen = samplers[0] if isinstance(samplers, list) else samplers
    if not isinstance(chosen, Sampler) or chosen.logits_processor is not None:
        what = "its `logits_processor` is Python code" if isinstance(chosen, Sampler) else "keras-hub's samplers run on the host"
        raise ValueError(
            f"`sampler` must be a keras_gemma2.Sampler without a `logits_processor`, or 'greedy', for a graph: {what}. "
            f"Received: {chosen!r}."
        )
    names = tuple(signatures) if signatures is not None else _possible(lm)
    unknown = [name for name in names if name not in SIGNATURES]
    if unknown or not names or isinstance(signatures, str):
        raise ValueError(f"`signatures` must be a list of names out of {list(SIGNATURES)}. Received: {signatures!r}.")
    if lm.preprocessor is None and (chat or set(names) & set(TEXT_SIGNATURES)):
        raise ValueError(
            "Signatures of text, and `chat`, need a model with a preprocessor. Pass `preprocessor=` to Gemma2CausalLM, or "
            f"`signatures={list(TOKEN_SIGNATURES)}`. Received: signatures={list(names)}, chat={chat}."
        )
    if set(names) & set(TEXT_SIGNATURES):
        _check_preprocessor(lm.preprocessor)
    if lm.preprocessor is None and stop_token_ids == "auto":
        stop_token_ids = None
    max_new_tokens = min(max_new_tokens, lm.backbone.config.max_sequence_length)  # there is no room for more
    return Settings(max_new_tokens, chosen, bool(chat), read_stop_token_ids(lm, stop_token_ids), names)


def _check_preprocessor(preprocessor: Any) -> None:
    """Refuses one that reads texts in a way of its own, which a graph would not follow."""
    for given, (ours, names) in zip((preprocessor, preprocessor.tokenizer), _READING):
        changed = [name for name in names if getattr(type(given), name, None) is not getattr(ours, name)]
        if changed:
            raise ValueError(
                f"Signatures of text read as {ours.__name__} does, and the Python code of another class is in no graph. Pass "
                f"`signatures={list(TOKEN_SIGNATURES)}`, and make tokens of texts before. Received: a model with a "
                f"{type(given).__name__}, whose {', '.join(f'`{name}`' for name in changed)} differ."
            )


def _possible(lm: Any) -> tuple[str, ...]:
    return TOKEN_SIGNATURES if lm.preprocessor is None else SIGNATURES


# For another process ----------------------------------------------------------------------------------------------------


def _settings_config(settings: Settings) -> dict[str, Any]:
    values = {**vars(settings)}
    values["sampler"] = settings.sampler.get_config()
    return values


def settings_from_config(config: dict[str, Any]) -> Settings:
    """The settings that another process wrote as JSON."""
    sampler = Sampler.from_config(config["sampler"]) if config["sampler"] else GREEDY
    lists = {name: tuple(config[name]) for name in ("stop_token_ids", "signatures")}
    return Settings(config["max_new_tokens"], sampler, config["chat"], **lists)
