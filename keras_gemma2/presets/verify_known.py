"""What is known of published models, to hold a copy of one against: hashes, counts, token ids, figures, continuations.

Nothing stands here that was not computed from the files themselves or read in the source named beside it.
"""

from __future__ import annotations

import dataclasses

from keras_gemma2.config import NAMED_SIZES, Gemma2Config
from keras_gemma2.presets.registry import EMBEDDED, PUBLISHED

EMBEDDED_CONFIG = Gemma2Config(
    4096, 8, 4, 2, 192, 576, 64, query_pre_attn_scalar=48, sliding_window_size=128, max_sequence_length=512
)
# What each built-in name's architecture is.
CONFIGS: dict[str, Gemma2Config] = {EMBEDDED: EMBEDDED_CONFIG, **{name: NAMED_SIZES[size] for name, (size, _) in PUBLISHED.items()}}
# google/gemma-2-... on Hugging Face hubs, by their names here.
HUGGING_FACE_NAMES = {
    f"{theirs}-{size}{suffix}": f"{ours}_{size}_en"
    for size in ("2b", "9b", "27b")
    for theirs, suffix, ours in (
        ("gemma-2", "", "gemma2"),
        ("gemma-2", "-it", "gemma2_instruct"),
        ("shieldgemma", "", "shieldgemma"),
    )
}
PRETRAINED = tuple(f"gemma2_{size}_en" for size in ("2b", "9b", "27b"))

# Parameters with the 256,000 rows of the published vocabulary; without the embedding they are the technical report's table 2.
PARAMETER_COUNTS = {"gemma2_2b": 2_614_341_888, "gemma2_9b": 9_241_705_984, "gemma2_27b": 27_227_128_320}

# SHA-256 of the embedded preset's files; its README.md is for people and may change.
EMBEDDED_FILES = {
    "config.json": "c8cdc3b1e25cd38f88d17e54b115f3b73167012ec30d7f6536a5e0c22f3dd5a5",
    "generation_config.json": "7e058b8197bd3a907a852490f16a61bda92f2203139060e8842a99b914a513ed",
    "model.safetensors": "ada47e7211dfef98d4de73c5a23d59a557adc6b40b24f2bf28d84f7d8180117b",
    "tokenizer.model": "b083367a82740442ec607ea913b159855fb9a61ffb46ca61bab11405f60f94a0",
}
EMBEDDED_WEIGHTS = ("model.safetensors", 9_262_960)  # the file and its size in bytes
# SHA-256 of files that are known wherever they turn up. Gemma 2's vocabulary has other serializations too, so that only
# equality says something; `VOCABULARY_PIECES` is the same for all of them.
KNOWN_FILES = {"b2e3e247df1fc9ebd0b4d99dc39c03822c831e3c3a5c46781d66c7b7c50a6450": "Gemma 2's vocabulary (4,237,004 bytes)"}

# SHA-256 of all pieces in the order of their ids, each in UTF-8 with a zero byte after it.
VOCABULARY_PIECES = "b1051c84c974c2c27fc63ddca41cfd7d35c9c0e77c419f09350a272a905726a8"
EMBEDDED_PIECES = "468837a47428acd9518f386452095bd809924f1c78045f06b7bb629c36c6bfab"
VOCABULARY_SIZE = 256_000

# Token ids without <bos>, from the sentencepiece library itself: spaces and tabs in runs, digits one by one, a turn's piece.
GOLDEN_IDS: dict[str, tuple[int, ...]] = {
    "Hello world!": (4521, 2134, 235341),
    "Derinkuyu is an underground city.": (8636, 979, 78904, 603, 671, 30073, 3413, 235265),
    "2024": (235284, 235276, 235284, 235310),
    "\t" * 6 + "test": (255973, 2195),
    " " * 50 + "fifty spaces": (168, 156, 132133, 14130),
    "<start_of_turn>model\n": (106, 2516, 108),
}
EMBEDDED_GOLDEN_IDS: dict[str, tuple[int, ...]] = {
    "Hello world!": (4071, 1532, 4017, 856, 4079),
    "Derinkuyu is an underground city.": (4070, 433, 1605, 4027, 4032, 4027, 495, 529, 748, 4031, 3631, 2863, 4037),
    "2024": (4065, 4044, 4065, 4072),
    "\t" * 6 + "test": (178, 178, 178, 178, 178, 178, 4016, 533),
    " " * 50 + "fifty spaces": (168, 156, 4028, 554, 971, 697, 633, 444),
    "<start_of_turn>model\n": (106, 4029, 597, 932, 108),
    "The state of our union is": (2663, 1321, 436, 512, 650, 449, 495),
}

# Mean of the norms' scales w (of 1 + w) over all 33 norm tensors of the embedded preset.
EMBEDDED_MEAN_NORM_SCALE = 0.05496

# Abraham Lincoln's address at Gettysburg, 1863: public domain, and in no training text of the embedded preset.
TEXT = (
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, and "
    "dedicated to the proposition that all men are created equal.\n\n"
    "Now we are engaged in a great civil war, testing whether that nation, or any nation so conceived and so dedicated, can "
    "long endure. We are met on a great battle-field of that war. We have come to dedicate a portion of that field, as a "
    "final resting place for those who here gave their lives that that nation might live. It is altogether fitting and "
    "proper that we should do this.\n\n"
    "But, in a larger sense, we can not dedicate -- we can not consecrate -- we can not hallow -- this ground. The brave "
    "men, living and dead, who struggled here, have consecrated it, far above our poor power to add or detract. The world "
    "will little note, nor long remember what we say here, but it can never forget what they did here. It is for us the "
    "living, rather, to be dedicated here to the unfinished work which they who fought here have thus far so nobly "
    "advanced. It is rather for us to be here dedicated to the great task remaining before us -- that from these honored "
    "dead we take increased devotion to that cause for which they gave the last full measure of devotion -- that we here "
    "highly resolve that these dead shall not have died in vain -- that this nation, under God, shall have a new birth of "
    "freedom -- and that government of the people, by the people, for the people, shall not perish from the earth."
)
# The embedded preset on it, after <bos>. It is the bound for the published pretrained models too: a model of 2B parameters and
# 2T tokens does better than one of 4.6M and 120M. (The technical report gives a 200M student a perplexity of 21 a token,
# which would be 0.94 bits per byte of this text.)
EMBEDDED_BITS_PER_BYTE = 1.43202
# Measured on three backends: float32 within 1e-7; bfloat16 and float16 within 4e-4.
BITS_PER_BYTE_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-3, "float16": 5e-3}


@dataclasses.dataclass(frozen=True)
class Continuation:
    """A greedy continuation on record.

    Args:
        model: the built-in name of the model.
        prompt: the text continued, after `<bos>`.
        texts: what was recorded; several where it depended on the hardware.
        new_tokens: how many were asked for.
        agreed: whether several dtypes or ways to compute attention recorded the same, so that another text is a fault.
        long: whether the prompt is longer than the sliding window, which takes minutes on a CPU.
        source: where it was read.
    """

    model: str
    prompt: str
    texts: tuple[str, ...]
    new_tokens: int
    agreed: bool
    source: str
    long: bool = False


_TESTS = "transformers, tests/models/gemma2/test_modeling_gemma2.py"
CONTINUATIONS = (
    Continuation(
        EMBEDDED,
        "The state of our union is",
        (" the most important of our relations with the other powers.",),
        11,
        True,
        "float32 on JAX, TensorFlow and PyTorch",
    ),
    Continuation(
        "gemma2_9b_en",
        "Hello I am doing",
        (" a project on the 1918 flu pandemic and I am trying to find out how many",),
        20,
        True,
        f"{_TESTS}: test_model_9b_bf16, _fp16 (eager attention), _bf16_flex_attention, _flash_attn (float16)",
    ),
    Continuation(
        "gemma2_9b_en",
        "Hi today",
        (" I'm going to be talking about the history of the United States. The United States of America",),
        20,
        True,
        f"{_TESTS}: test_model_9b_bf16, _fp16 (eager attention), _bf16_flex_attention, _flash_attn (float16)",
    ),
    Continuation(
        "gemma2_2b_en",
        "A list of colors: red, blue",
        (", green, yellow, orange, purple, pink, brown, black, white, gray, silver",),
        20,
        True,
        f"{_TESTS}: test_generation_beyond_sliding_window (float16; eager, sdpa, flex and flash attention)",
    ),
    Continuation(
        "gemma2_2b_en",
        "This is a nice place. " * 800 + "I really enjoy the scenery,",
        (" the people, the food, the culture, the history, the music, the art, the architecture",),
        20,
        True,
        f"{_TESTS}: test_generation_beyond_sliding_window (float16; eager, sdpa, flex and flash attention)",
        long=True,
    ),
    Continuation(
        "gemma2_2b_en",
        "Hello I am doing",
        (
            " a project on the 1960s and I am trying to find out what the average",
            " a project for my class and I am having trouble with the code. I am trying to make a",
            " a project for my school and I need to know how to make a program that will take a number",
        ),
        20,
        False,
        f"{_TESTS}: test_model_2b_pipeline_bf16_flex_attention, test_export_static_cache (bfloat16, by hardware)",
    ),
    Continuation(
        "gemma2_2b_en",
        "Hi today",
        (" I'm going to be talking about the 10 most powerful characters in the Naruto series.",),
        20,
        False,
        f"{_TESTS}: test_model_2b_pipeline_bf16_flex_attention (bfloat16)",
    ),
)
