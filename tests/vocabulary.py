"""A tiny vocabulary with Gemma's special pieces, trained on the spot.

The real vocabulary has 256,000 pieces and a licence of its own. This one is
made by the same trainer with the same settings, takes some milliseconds, and
gives the pieces with a meaning the ids they have in the real one.
"""

import functools
import io
import random

import sentencepiece

# Written for this file; long enough for words and pieces of words.
_TEXT = """\
A tokenizer cuts a text into pieces and gives each piece a number. Common
words are one piece; rare words are cut into smaller pieces, and what is in no
piece at all is written byte by byte. The model reads the numbers, and only
the numbers: it never sees a letter. So the text "the quick brown fox jumps
over the lazy dog" is some ten numbers long, and so is its answer. Spaces are
part of the text as well. A program, for one, is full of them; cut them one by
one and half of a page is spaces. Therefore runs of spaces, of tabs and of new
lines are pieces too. Digits 0 1 2 3 4 5 6 7 8 9 are always cut one by one.
"""

_LONGEST_RUN = 31

# What tokenizers get wrong: spaces are eaten, characters are normalized away,
# spelled-out pieces are mistaken for tokens.
HARD_TEXTS = (
    "",
    " ",
    "  leading",
    "trailing  ",
    "a  b   c",
    "\t\tdef f():\n\t\t\treturn 1\n\n\n",
    "\r\n\x0b\x0c\x85\u2028",
    "\u00a0\u3000\u200b\u200d\ufeff",
    "\0 in the middle \0",
    "\x01\x7f",
    "e\u0301 \u00e9 \ufb01 \u2460",
    "\u65e5\u672c\u8a9e",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467",
    "\ufffd\ufffe\uffff\U0010ffff",
    "<bos>",
    "a <eos><pad><unk> b",
    "<mask><2mass>[@BOS@]<unused0>",
    "<start_of_turn>user\nhi<end_of_turn>\n",
    "<0x41><0x00>",
    "2024",
    " " * 100 + "\n" * 100 + "\t" * 100,
)


def gemma_like_pieces() -> list[str]:
    """The pieces that are set before training, in order, from id 4 on.

    Returns:
        The strings of ids 4 to 199: `<start_of_turn>` is 106, one new line
        is 108, and two spaces are 139, as in Gemma's vocabulary.
    """
    runs = range(1, _LONGEST_RUN + 1)
    return [
        "<mask>",
        "<2mass>",
        "[@BOS@]",
        *(f"<unused{index}>" for index in range(99)),
        "<start_of_turn>",
        "<end_of_turn>",
        *("\n" * run for run in runs),
        *("\u2581" * run for run in runs if run > 1),
        *("\t" * run for run in runs),
    ]


@functools.cache
def train_vocabulary(without: str | None = None) -> bytes:
    """Trains the tiny vocabulary.

    Args:
        without: A special piece to leave out, such as `"<end_of_turn>"` or
            `"<bos>"`, for a vocabulary that is not Gemma's.

    Returns:
        A serialized SentencePiece model of 600 pieces.
    """
    frame = {
        name: "[x]" if piece == without else piece
        for name, piece in {
            "pad_piece": "<pad>",
            "eos_piece": "<eos>",
            "bos_piece": "<bos>",
            "unk_piece": "<unk>",
        }.items()
    }
    pieces = [p for p in gemma_like_pieces() if p != without]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXT.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=600,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        user_defined_symbols=pieces,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
        **frame,
    )
    return model.getvalue()


def random_texts(seed: int, count: int) -> list[str]:
    """Texts of up to 12 characters from all of Unicode, but U+2581.

    Args:
        seed: Of the random numbers.
        count: How many texts.

    Returns:
        The texts; half of their characters are ASCII, many of those white
        space.
    """
    draw = random.Random(seed)
    ranges = ((0, 0x7F), (0x20, 0x20), (0x09, 0x0A), (0x80, 0xD7FF))
    ranges += ((0xE000, 0xFFFF), (0x10000, 0x10FFFF))

    def character() -> str:
        return chr(draw.randint(*draw.choice(ranges)))

    texts = (
        "".join(character() for _ in range(draw.randint(0, 12)))
        for _ in range(count)
    )
    return [text.replace("\u2581", "_") for text in texts]
