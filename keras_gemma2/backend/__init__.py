"""What the three backends do differently, behind one set of function names.

`jax.py`, `tensorflow.py` and `torch.py` expose the same functions; the one of the running Keras backend is chosen here,
once. All other code of the package uses `keras.ops`.
"""

import importlib

import keras

SUPPORTED = ("jax", "tensorflow", "torch")
FUNCTIONS = (
    "linear",
    "quantized_linear",
    "take_rows",
    "tensor_from_row_blocks",
    "untouched_tensor",
    "assign_row_blocks",
    "release",
    "track_variables",
    "numpy_row_blocks",
    "check_alike",
    "empty_cache",
    "is_spread",
    "local_groups",
    "own_region",
    "stored_like",
    "together",
    "whole_array",
    "writing",
    "write_slots",
    "read_slots",
    "write_rows",
    "attention_scores",
    "step_block",
    "is_asynchronous",
    "cache_dtype",
    "attention_dtype",
    "on_accelerator",
    "is_concrete",
    "compile_function",
    "repeated",
    "no_gradients",
    "label_terms",
    "sums_in_chunks",
    "frozen_sums_in_chunks",
    "FROZEN_CHUNKS",
    "with_gradient",
    "add_block",
    "CompilesSteps",
    "recomputed",
    "gated_gelu",
    "counted_peak",
)

if keras.backend.backend() not in SUPPORTED:
    raise ImportError(
        f"keras_gemma2 runs on the Keras backends {', '.join(SUPPORTED)}. Received: {keras.backend.backend()!r}. "
        "Set the environment variable KERAS_BACKEND, or `backend` in ~/.keras/keras.json, to one of them."
    )

_module = importlib.import_module(f"keras_gemma2.backend.{keras.backend.backend()}")

linear = _module.linear
quantized_linear = _module.quantized_linear
take_rows = _module.take_rows
tensor_from_row_blocks = _module.tensor_from_row_blocks
untouched_tensor = _module.untouched_tensor
assign_row_blocks = _module.assign_row_blocks
release = _module.release
track_variables = _module.track_variables
numpy_row_blocks = _module.numpy_row_blocks
check_alike = _module.check_alike
empty_cache = _module.empty_cache
is_spread = _module.is_spread
local_groups = _module.local_groups
own_region = _module.own_region
stored_like = _module.stored_like
together = _module.together
whole_array = _module.whole_array
writing = _module.writing
write_slots = _module.write_slots
read_slots = _module.read_slots
write_rows = _module.write_rows
attention_scores = _module.attention_scores
step_block = _module.step_block
is_asynchronous = _module.is_asynchronous
cache_dtype = _module.cache_dtype
attention_dtype = _module.attention_dtype
on_accelerator = _module.on_accelerator
is_concrete = _module.is_concrete
compile_function = _module.compile_function
repeated = _module.repeated
no_gradients = _module.no_gradients
label_terms = _module.label_terms
sums_in_chunks = _module.sums_in_chunks
frozen_sums_in_chunks = _module.frozen_sums_in_chunks
FROZEN_CHUNKS = _module.FROZEN_CHUNKS
with_gradient = _module.with_gradient
add_block = _module.add_block
CompilesSteps = _module.CompilesSteps
recomputed = _module.recomputed
gated_gelu = _module.gated_gelu
counted_peak = _module.counted_peak
