"""`examples/studies.py`: runs are made once and kept whole, tables are the runs' means, and wrong arguments are named."""

import json
import math
import pathlib
import random
import re
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))  # the examples import each other by name
import studies
import studies_report as report
import studies_runs as runs

SMALL = {"num_layers": 2, "hidden_dim": 16, "intermediate_dim": 24, "head_dim": 4, "sliding_window_size": 4}


@pytest.fixture
def flags(tmp_path):
    """A folder of text, and the flags of a study of a few steps."""
    folder = tmp_path / "texts"
    folder.mkdir()
    generator = random.Random(0)
    words = ("the", "people", "of", "these", "States", "have", "a", "whale", "ship", "and", "Congress", "shall", "hear", "it")
    text = " ".join(generator.choice(words) for _ in range(900))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    places = {"--corpus": folder, "--output": tmp_path / "output", "--runs": tmp_path / "runs"}
    sizes = {"--steps": 3, "--batch-size": 2, "--context": 16}
    return [str(item) for pair in (places | sizes).items() for item in pair]


@pytest.fixture
def trainings(monkeypatch):
    """Replaces training and evaluation: figures that depend on configuration, rate and seed. Lists the runs made."""
    made = []

    class Model:
        def __init__(self, parameters):
            self.count_params = lambda: parameters

    def train(config, recipe, data, seed):
        made.append((config, recipe, seed))
        return Model(sum(value for value in config.values() if isinstance(value, int)))

    def held_out(lm, data, part, context):
        perplexity = lm.count_params() / 100 + len(made)
        nats = {name: math.log(perplexity) for name in data.documents[part]}
        return {"perplexity": perplexity, "bits_per_byte": math.log2(perplexity) / 4, "nats_per_token": nats}

    monkeypatch.setattr(runs, "train", train)
    monkeypatch.setattr(runs, "held_out", held_out)
    return made


def results_of(tmp_path):
    return {path.stem: json.loads(path.read_text("utf-8"))["result"] for path in (tmp_path / "runs").glob("*.json")}


def check_picture(path):
    with Image.open(path) as image:
        assert min(image.size) > 100
        assert len(image.convert("RGB").getcolors(1 << 24)) > 30
    assert path.stat().st_size < 100_000


# --- on each backend ------------------------------------------------------------------------------------------------------


def test_a_comparison_trains_both_arms_on_each_seed(flags, tmp_path, monkeypatch, capsys):
    comparison = studies.COMPARISONS["heads"]
    arms = tuple(arm._replace(config=arm.config | SMALL) for arm in comparison.arms)
    monkeypatch.setitem(studies.COMPARISONS, "heads", studies.dataclasses.replace(comparison, arms=arms))
    studies.main(["heads", *flags, "--seeds", "5", "6"])
    results = results_of(tmp_path)
    assert sorted(name.rsplit("-", 1)[0] for name in results) == [f"{a}-seed{s}" for a in ("medium", "multi_head") for s in (5, 6)]
    for result in results.values():
        assert 1 < result["perplexity"] < 10_000  # random weights give 4096
        assert result["parameters"] > 4096 * 16
    assert len({result["perplexity"] for result in results.values()}) == 4
    check_picture(tmp_path / "output" / "studies_heads.png")
    assert "seeds 5, 6 draw" in " ".join(capsys.readouterr().out.split())


@pytest.mark.backend_free
def test_the_window_study_changes_the_window_alone(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "WINDOWS", (128, 32, 2))
    monkeypatch.setattr(studies, "WINDOW_CONTEXT", 64)
    studies.main(["window", *flags])
    found = {int(name.split("-")[0].removeprefix("window")): result for name, result in results_of(tmp_path).items()}
    args = studies.parse_arguments(["window", *flags])
    (ids,) = runs.load_data(args.recipe, args.corpus, args.cache).documents["test"].values()
    assert 32 < len(ids) < 64  # one row, which one of the windows does not cover
    lm = studies.keras_gemma2.Gemma2CausalLM.from_preset(runs.PRESET)
    (scores,) = lm.score({"token_ids": [[2, *ids]], "padding_mask": [[1] * (len(ids) + 1)]})
    assert found[128]["perplexity"] == pytest.approx(np.exp(-scores.mean()), rel=1e-4)
    assert found[2]["perplexity"] > 1.02 * found[128]["perplexity"]
    assert len({result["perplexity"] for result in found.values()}) == 3
    assert {result["parameters"] for result in found.values()} == {lm.count_params()}
    check_picture(tmp_path / "output" / "studies_window.png")


@pytest.mark.backend_free
def test_distillation_trains_each_student_both_ways(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "STUDENTS", (studies.Arm("tiny", "tiny", studies.MEDIUM | SMALL),))
    studies.main(["distillation", *flags, "--seeds", "0", "1"])
    found = {name.rsplit("-", 1)[0]: result for name, result in results_of(tmp_path).items()}
    assert set(found) == {"window128-context16", *(f"tiny{how}-seed{seed}" for how in ("", "-distilled") for seed in (0, 1))}
    assert len({result["perplexity"] for result in found.values()}) == 5
    assert found["tiny-seed0"]["parameters"] == found["tiny-distilled-seed1"]["parameters"]
    assert [path.name.split("-")[0] for path in (tmp_path / "runs").iterdir() if path.is_dir()] == ["teacher"]
    check_picture(tmp_path / "output" / "studies_distillation.png")


# --- without a backend ----------------------------------------------------------------------------------------------------


@pytest.mark.backend_free
@pytest.mark.parametrize("name", studies.COMPARISONS)
def test_arms_differ_in_one_thing_and_have_equal_parameters(name):
    first, second = (studies.keras_gemma2.Gemma2Config(**arm.config) for arm in studies.COMPARISONS[name].arms)
    assert first != second
    assert first.parameter_count() == pytest.approx(second.parameter_count(), rel=0.005)


@pytest.mark.backend_free
def test_a_finished_run_is_not_trained_again(flags, tmp_path, trainings):
    studies.main(["heads", *flags])
    assert len(trainings) == 6
    files = {path: path.read_bytes() for path in (tmp_path / "runs").iterdir()}
    picture = (tmp_path / "output" / "studies_heads.png").read_bytes()
    studies.main(["heads", *flags])
    assert len(trainings) == 6
    assert {path: path.read_bytes() for path in (tmp_path / "runs").iterdir()} == files
    assert (tmp_path / "output" / "studies_heads.png").read_bytes() == picture
    studies.main(["depth", *flags])  # the medium arm is the one of `heads`
    assert [config["num_layers"] for config, _, _ in trainings[6:]] == [2, 2, 2]
    studies.main(["heads", *flags, "--seeds", "0", "1", "2", "3"])
    assert [seed for _, _, seed in trainings[9:]] == [3, 3]
    studies.main(["heads", *flags, "--learning-rate", "0.5"])
    assert len(trainings) == 11 + 6


@pytest.mark.backend_free
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"settings": {}, "result": {"perplexity": 1}}'])
def test_what_is_no_whole_result_of_this_run_is_made_anew(content, flags, tmp_path, trainings):
    studies.main(["heads", *flags])
    path = sorted((tmp_path / "runs").iterdir())[0]
    whole = path.read_bytes()
    path.write_bytes(content or whole[: len(whole) // 2])
    (tmp_path / "runs" / f".{path.name}.77").write_bytes(b"{")  # of a process that was killed
    studies.main(["heads", *flags])
    assert len(trainings) == 7
    assert json.loads(path.read_text("utf-8"))["settings"] == json.loads(whole)["settings"]


@pytest.mark.backend_free
def test_the_table_has_the_means_of_the_runs(flags, tmp_path, trainings):
    studies.main(["depth", *flags, "--seeds", "3", "1"])
    readme = (tmp_path / "output" / "README.md").read_text("utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in readme.splitlines() if line.startswith("|")]
    for row, name in zip(rows[2:], ("wide", "medium"), strict=True):
        results = [result for file, result in results_of(tmp_path).items() if file.startswith(f"{name}-")]
        for cell, figure, digits in ((row[3], "perplexity", 2), (row[4], "bits_per_byte", 4)):
            values = np.array([result[figure] for result in results])
            assert len(values) == 2
            assert cell == f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"
        assert row[1] == f"{results[0]['parameters']:,}"
    check_picture(tmp_path / "output" / "studies_depth.png")


@pytest.mark.backend_free
def test_a_section_is_replaced_and_what_stands_around_it_stays(flags, tmp_path, trainings):
    readme = tmp_path / "output" / "README.md"
    readme.parent.mkdir()
    readme.write_text("# Mine\n\nabove\n", "utf-8")
    studies.main(["caps", *flags])
    studies.main(["rate", *flags])
    readme.write_text(readme.read_text("utf-8") + "\nbelow\n", "utf-8")
    first = readme.read_text("utf-8")
    studies.main(["caps", *flags, "--seeds", "7", "8"])
    second = readme.read_text("utf-8")
    assert ["seeds 7, 8 draw" in " ".join(text.split()) for text in (first, second)] == [False, True]
    for text in (first, second):
        assert text.startswith("# Mine\n\nabove\n") and text.endswith("\nbelow\n")
        assert text.count("### Soft caps") == text.count("### The learning rate") == 1


def results(*perplexities):
    return report.ArmResult("", {}, [{"perplexity": value} for value in perplexities])


@pytest.mark.backend_free
@pytest.mark.parametrize(
    ("first", "second", "expects", "says"),
    [
        ((50.0, 51.0), (40.0, 41.0), "better", "for"),
        ((40.0, 41.0), (50.0, 51.0), "better", "against"),
        ((40.0, 41.0), (50.0, 51.0), "no worse", "against"),
        ((40.0, 42.0), (40.5, 42.5), "better", "neither for nor against"),
        ((40.0, 42.0), (40.5, 42.5), "no worse", "for"),
    ],
)
def test_the_verdict_follows_from_difference_and_spread(first, second, expects, says):
    difference = report.Difference.of(results(*first), results(*second))
    assert difference.mean == pytest.approx(np.mean(second) - np.mean(first))
    assert difference.spread == pytest.approx(np.hypot(np.std(first, ddof=1), np.std(second, ddof=1)))
    assert report.verdict(difference, expects) == f"**{says}** the report"


@pytest.mark.backend_free
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sizes"], "invalid choice: 'sizes'"),
        (["heads", "--seeds", "1"], "one seed has no spread"),
        (["heads", "--seeds", "1", "2", "1"], "each may be given once"),
        (["heads", "--steps", "0"], "--steps must be over 0"),
        (["heads", "--corpus", "no/such/folder"], "no/such/folder: there is no such folder"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as raised:
        studies.main(arguments)
    assert message in capsys.readouterr().err + str(raised.value)


@pytest.mark.backend_free
def test_a_text_too_short_for_the_steps_is_named(flags, trainings):
    with pytest.raises(SystemExit, match=r"is enough for \d+ steps of new text. Received: --steps 99999"):
        studies.main(["heads", *flags, "--steps", "99999"])
    assert not trainings


@pytest.mark.backend_free
def test_committed_figures_are_complete():
    folder = pathlib.Path(studies.__file__).parent
    readme = (folder / "README.md").read_text("utf-8")
    names = re.findall("<!-- studies.py (.*) -->", readme)
    assert {*studies.COMPARISONS, "window", "rate"} <= set(names) <= set(studies.STUDIES)
    for name in names:
        assert f"<!-- end of {name} -->" in readme
        check_picture(folder / f"studies_{name}.png")
