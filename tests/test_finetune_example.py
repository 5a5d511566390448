"""`examples/finetune_lora.py`: a small run on a folder of text, and what it writes."""

import importlib.util
import json
import pathlib
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
NOUNS = ("Congress", "Senate", "Treasury", "Army", "Navy", "Court")
VERBS = ("has received", "will consider", "must protect", "should reform")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("finetune_lora", EXAMPLES / "finetune_lora.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.backend_free
def test_a_sentence_becomes_its_words_in_order(script):
    assert script.pair("The Union, thank God, is strong.") == {
        "prompt": "Words: god is strong thank the union\nSentence:",
        "response": " The Union, thank God, is strong.",
    }
    texts = {"a": "Short one. The Union is as strong as it was. In 1812 there was a war at sea.\nPeace is what we all hope for."}
    assert script.sentences(texts) == ["Peace is what we all hope for."], "a word twice, digits, too few words"
    assert script.words_used("God is the word", {"prompt": "Words: god is strong the" + script.MARK}) == 0.75


@pytest.mark.backend_free
def test_a_small_run_writes_its_report(script, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for index in range(20):
        lines = [f"Our own {noun} {verb} many new laws in {'abcdefghijklmnopqrst'[index]}." for noun in NOUNS for verb in VERBS]
        (texts / f"{index:02}.txt").write_text(" ".join(lines))
    output = tmp_path / "out"
    small = ["--output", str(output), "--corpus", str(texts), "--samples", "48", "--held-out", "3"]
    script.main(small)
    rows = [json.loads(line) for line in (output / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 48 and all(row["prompt"].startswith("Words: ") for row in rows)
    report = (output / "finetune_lora.md").read_text()
    assert "| the preset |" in report and "of 3 |" in report and "--output FOLDER/run" in report and str(tmp_path) not in report
    assert (output / "run" / "adapter_model.safetensors").exists() and (output / "finetune_lora.png").stat().st_size < 100_000
