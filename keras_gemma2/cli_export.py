"""`keras-gemma2 export`: its options, and what it prints."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

FORMATS = ("saved_model",)


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
    add("--chat", action="store_true", help="prompts are a user's messages to be answered, in Gemma's chat format")
    help = "of the signatures whose length is fixed (default: %(default)s)"
    add("--max-new-tokens", type=number(int, 1), default=128, metavar="N", help=help)
    add("--temperature", type=number(float, 0), default=0.0, metavar="X", help="of those; 0 is greedy (default)")
    add("--top-k", type=number(int, 0), default=0, metavar="K", help="of those; 0 is off (default)")
    add("--top-p", type=probability, default=1.0, metavar="P", help="of those; 1 is off (default)")
    add("--signatures", nargs="+", metavar="NAME", help="those to write (default: all); see the README")
    add("--overwrite", action="store_true", help="replace the SavedModel in a folder that is not empty")


def export_command(options: argparse.Namespace) -> int:
    """Runs the command, in this process, whose backend is TensorFlow; returns its exit code."""
    if importlib.util.find_spec("tensorflow") is None:
        raise ValueError("A SavedModel is written by TensorFlow. Install it with: pip install tensorflow")
    from keras_gemma2 import Gemma2CausalLM, Sampler
    from keras_gemma2.export.saved_model import check_folder
    from keras_gemma2.staging import folder_path

    check_folder(folder_path(options.folder, "folder"), options.overwrite)  # before a model loads
    sampler = Sampler(options.temperature, options.top_k or None, options.top_p)
    lm = Gemma2CausalLM.from_preset(options.preset, dtype=options.dtype, quantize=options.quantize)
    if options.adapter is not None:
        lm.load_adapter(options.adapter)
    lm.export_saved_model(
        options.folder,
        max_new_tokens=options.max_new_tokens,
        sampler=sampler,
        chat=options.chat,
        signatures=options.signatures,
        overwrite=options.overwrite,
    )
    print(f"SavedModel in {options.folder}")
    return 0
