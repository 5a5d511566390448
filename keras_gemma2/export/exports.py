"""The calls of a causal language model that write it for other runtimes: mixed into `Gemma2CausalLM`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from keras_gemma2.export.formats import check_folder, check_format, read_sizes
from keras_gemma2.export.programs import write_program
from keras_gemma2.export.saved_model import read_settings, write_folder
from keras_gemma2.staging import folder_path


class Exports:
    """`export` and `export_saved_model`."""

    def export(
        self,
        filepath: str | os.PathLike[str],
        format: str = "tf_saved_model",
        verbose: bool | None = None,
        input_signature: Any = None,
        overwrite: bool = False,
        **kwargs: Any,
    ) -> None:
        """Writes the model for another runtime, to a folder.

        | format | runtime | what is written |
        |---|---|---|
        | "tf_saved_model" | TensorFlow | a SavedModel that reads and writes text: see `export_saved_model` |
        | "onnx" | ONNX Runtime | `model.onnx`, `model.onnx.data` |
        | "openvino" | OpenVINO | `model.xml`, `model.bin` |
        | "litert" | LiteRT, once TensorFlow Lite | `model.tflite`, with the signatures `prefill` and `decode` |
        | "stablehlo" | JAX on CPU, GPU and TPU | `model.stablehlo`, `weights.safetensors` |
        | "torch" | PyTorch, by `torch.export` | `model.pt2` |

        All but the first are one function, a step of a generator's loop, over one copy of the weights:
        `(token_ids [B, T], starts [B], counts [B], caches) -> logits [B, V], new caches`. It runs the `counts` first tokens of each
        row (a prompt, a piece of one, or the token chosen last) behind the `starts` tokens that the caches hold, and gives the
        float32 logits of what follows the last of them. Caches are `[B, K, slots, H]`, zeros at first; one for n tokens has
        `min(n + 1, most_slots)` slots, with `most_slots` as `export.json` beside the model says for each; n is at least 2. B, T and
        the slots are free, but in "litert", which fixes them; "torch" writes to the caches it is given and returns logits only.
        `examples/run_exported.py` is such a loop, for each of the runtimes. `vocabulary.spm` is the vocabulary.

        Weights keep their dtype, int8 and int4 their codes; an active adapter goes along. Each format is written by the backend its
        runtime belongs to (PyTorch for ONNX and OpenVINO) on a CPU: with another backend or on an accelerator in another process,
        as `export_saved_model` says.

        Args:
            filepath: the folder, as `export_saved_model` takes it.
            format: of the table.
            verbose, input_signature: of `keras.Model.export`: the first is ignored, the second refused.
            overwrite: as `export_saved_model` takes it.
            **kwargs: for "tf_saved_model", what `export_saved_model` takes; for "litert", `batch_size` (default 1),
                `cache_length` (tokens a row may have; default 1024, or the context if that is less) and `prefill_length` (tokens of
                a row that a call of `prefill` takes; default 64, or the context).

        Raises:
            ValueError: as `export_saved_model`; for an unknown format, an `input_signature`, sizes out of range, or a model for
                which the runtime has no arithmetic: "onnx" and "litert" compute in float32; only "torch" and "stablehlo" have
                4 bits.
            CheckpointError, RuntimeError: as `export_saved_model`.
            ImportError: if what writes the format is not installed.

        Example:
            >>> lm = Gemma2CausalLM.from_preset("gemma2_mini_en")
            >>> lm.export("./served/1", max_new_tokens=64)
            >>> lm.export("./onnx", format="onnx")
        """
        if input_signature is not None:
            raise ValueError(
                f"`input_signature` is not for Gemma 2, whose exports have signatures of their own. Leave it out. "
                f"Received: {input_signature!r}."
            )
        if format == "tf_saved_model":
            self.export_saved_model(filepath, overwrite=overwrite, **kwargs)
            return
        check_format(format, self.backbone)
        target = folder_path(filepath, "filepath")
        sizes = read_sizes(self, format, **_known(kwargs, format))
        check_folder(target, overwrite)
        write_program(self, target, format, sizes)

    def export_saved_model(
        self,
        folder: str | os.PathLike[str],
        max_new_tokens: int = 128,
        sampler: Any = None,
        chat: bool = False,
        stop_token_ids: str | Sequence[int] | None = "auto",
        signatures: Sequence[str] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Writes a TensorFlow SavedModel that reads and writes text, with cached decoding in its graph.

        It runs in TensorFlow alone, with TensorFlow Text for texts: Keras and this package are not needed. Batch and lengths are
        free, up to the context. The weights are stored once, in the model's dtype or as their codes; an active adapter goes along.

        | signature | inputs | outputs |
        |---|---|---|
        | `serving_default` | `prompts` string `[B]` | `completions` string `[B]` |
        | `generate` | `prompts`; scalars `max_new_tokens`, `top_k` (0 is off), `seed` int32, `temperature` (0 is greedy), `top_p` \
float32 | `completions`, `num_tokens` int32 `[B]`, stop tokens counted |
        | `generate_tokens` | `token_ids`, `padding_mask` int32 `[B, T]` | `token_ids`, `padding_mask` int32: rows from the left, \
prompt and new tokens |
        | `score` | the same | `log_probabilities` float32 `[B, T]` of each token given those before it; 0 for the first |
        | `logits` | the same | `logits` float32 `[B, T, V]` |
        | `prefill` | the same, and `cache_length` int32, tokens to have room for | `logits` `[B, V]` of the next token, its \
`positions` int32 `[B]`, caches `keys_0`, `values_0`, ... |
        | `decode_step` | `token_ids`, `positions` int32 `[B]`, the caches | as `prefill` |

        Completions are without the prompt. Greedy ones are those of `generate` (`chat`, with `chat=True`); drawn ones follow the
        same distribution, with other draws. A wrong input is an `InvalidArgumentError` that names it.

        With JAX or PyTorch as the backend, or on an accelerator, another process writes it, which reads the weights from files
        beside the folder: for a while the disk holds them twice, and the two processes hold them once each.

        Args:
            folder: to write, with its parents; `~` is expanded. TensorFlow Serving wants it to be a number: `./served/1`.
            max_new_tokens: of `serving_default` and `generate_tokens`.
            sampler: of these two: a `keras_gemma2.Sampler`, or "greedy"; None means what `compile` was given.
            chat: whether `prompts` are a user's messages to be answered, in Gemma's chat format. Markers spelled out in them are
                plain text. Else they are texts to continue.
            stop_token_ids: as `generate` takes them.
            signatures: names of those to write; None for all that the model can have. Without the first two, TensorFlow Text is not
                needed. Without `serving_default`, the first of the table's that is written has that name as well, as TensorFlow
                Serving asks for it when a request names none.
            overwrite: whether the folder may hold something: an export in it, of whatever format, is replaced, other files stay.

        Raises:
            ValueError: for a sampler that needs Python (a `logits_processor`, keras-hub's), unknown signatures, signatures of text
                of a model without a preprocessor or with one whose reading a subclass has changed, or numbers out of range.
            CheckpointError: for a folder that is not empty or cannot be written, or a full disk. Nothing is left half-written.
            ImportError: where TensorFlow is missing, or TensorFlow Text for signatures of text.
            RuntimeError: if the other process fails, with what it said; killed for memory, most likely, if it said nothing.

        Example:
            >>> lm = Gemma2CausalLM.from_preset("gemma2_mini_en")
            >>> lm.export_saved_model("./served/1", sampler=keras_gemma2.Sampler(temperature=0.8))
            >>> served = tf.saved_model.load("./served/1")
            >>> served.signatures["serving_default"](prompts=tf.constant(["The state of our union is"]))["completions"]
        """
        target = folder_path(folder, "folder")
        settings = read_settings(self, max_new_tokens, sampler, chat, stop_token_ids, signatures)
        check_folder(target, overwrite)
        write_folder(self, target, settings)


def _known(arguments: dict[str, Any], format: str) -> dict[str, Any]:
    """The sizes among some arguments; others are refused."""
    sizes = {name: arguments.pop(name, None) for name in ("batch_size", "cache_length", "prefill_length")}
    if arguments:
        raise TypeError(f"`export` with format={format!r} has no {', '.join(f'`{name}`' for name in arguments)}.")
    return sizes
