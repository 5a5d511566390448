"""`keras-gemma2 export`: its options, and what it prints."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

# What `Gemma2CausalLM.export` calls each, and the backend that writes it.
FORMATS = {
    "saved_model": ("tf_saved_model", "tensorflow"),
    "onnx": ("onnx", "torch"),
    "openvino": ("openvino", "torch"),
    "litert": ("litert", "tensorflow"),
    "stablehlo": ("stablehlo", "jax"),
    "torch": ("torch", "torch"),
}


def add_options(add: Callable[..., Any], number: Callable[..., Any], probability: Callable[..., Any]) -> None:
    """Gives a parser the command's options.

    Args:
        add: the parser's `add_argument`.
        number: `number(kind, lowest)` is the type of an option that is a number of at least so much.
        probability: the type of an option over 0 and up to 1.
    """
    add("preset", help="built-in name, hub address, folder or file")
    add("folder", help="folder to write; TensorFlow Serving wants a number as its name, as in served/1")
    add("--format", choices=FORMATS, default="saved_model", help="default: %(default)s")
    add("--dtype", help="float32, bfloat16, ... (default: what the preset says)")
    add("--quantize", choices=("int8", "int4"), help="keep the weights in fewer bits")
    add("--adapter", metavar="FOLDER", help="an adapter in PEFT's format, to go along")
    add("--overwrite", action="store_true", help="replace the export in a folder that is not empty")
    chat = "saved_model: prompts are a user's messages to be answered, in Gemma's chat format"
    add("--chat", action="store_true", default=None, help=chat)
    help = "saved_model: of the signatures whose length is fixed (default: 128)"
    add("--max-new-tokens", type=number(int, 1), metavar="N", help=help)
    add("--temperature", type=number(float, 0), metavar="X", help="saved_model: of those; 0 is greedy (default)")
    add("--top-k", type=number(int, 0), metavar="K", help="saved_model: of those; 0 is off (default)")
    add("--top-p", type=probability, metavar="P", help="saved_model: of those; 1 is off (default)")
    add("--signatures", nargs="+", metavar="NAME", help="saved_model: those to write (default: all); see the README")
    add("--batch-size", type=number(int, 1), metavar="B", help="litert: rows (default: 1)")
    add("--cache-length", type=number(int, 2), metavar="N", help="litert: tokens that a row has room for (default: 1024)")
    add("--prefill-length", type=number(int, 1), metavar="N", help="litert: tokens of a prompt that run at a time (default: 64)")


_OPTIONS = {
    "saved_model": ("chat", "max_new_tokens", "temperature", "top_k", "top_p", "signatures"),
    "litert": ("batch_size", "cache_length", "prefill_length"),
}


def export_backend(options: argparse.Namespace) -> str:
    """The backend of the process that writes what is asked for; raises a ValueError for options of another format."""
    for format, names in _OPTIONS.items():
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None]
        if given and format != options.format:
            raise ValueError(f"argument {given[0]}: is for --format {format}, not for --format {options.format}")
    return FORMATS[options.format][1]


def export_command(options: argparse.Namespace) -> int:
    """Runs the command, in this process, whose backend writes the format; returns its exit code."""
    import keras

    from keras_gemma2 import Gemma2CausalLM, Sampler
    from keras_gemma2.export.formats import check_dtype, check_folder
    from keras_gemma2.export.saved_model import check_installed
    from keras_gemma2.export.signatures import SIGNATURES
    from keras_gemma2.staging import folder_path

    # Before a model loads.
    check_folder(folder_path(options.folder, "folder"), options.overwrite)
    if options.format == "saved_model":
        check_installed(options.signatures or SIGNATURES)
    else:
        policy = keras.dtype_policies.get(options.dtype or "float32")
        check_dtype(FORMATS[options.format][0], policy.compute_dtype, options.quantize, policy.name)
    names = _OPTIONS.get(options.format, ())
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if options.format == "saved_model":
        numbers = [given.pop(name, off) for name, off in (("temperature", 0.0), ("top_k", 0), ("top_p", 1.0))]
        given["sampler"] = Sampler(numbers[0], numbers[1] or None, numbers[2])
    lm = Gemma2CausalLM.from_preset(options.preset, dtype=options.dtype, quantize=options.quantize)
    if options.adapter is not None:
        lm.load_adapter(options.adapter)
    lm.export(options.folder, format=FORMATS[options.format][0], overwrite=options.overwrite, **given)
    print(f"{'SavedModel' if options.format == 'saved_model' else options.format} in {options.folder}")
    return 0
