"""`benchmarks serve`: real requests to a real server, and figures that are what they are called."""

import argparse
import re

import pytest
from exported import small_preset

from keras_gemma2.benchmarks import serve
from keras_gemma2.benchmarks.serve_client import Answer, stream

pytestmark = pytest.mark.backend_free


def test_it_prints_what_it_found(capsys):
    parser = argparse.ArgumentParser()
    serve.add_command(parser.add_subparsers())
    arguments = ["--clients", "2", "--new-tokens", "6", "--requests", "6", "--no-peer", "--preset", small_preset()]
    options = parser.parse_args(["serve", *arguments])
    options.run(options)
    printed = capsys.readouterr().out
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", printed, re.M)
    assert [row[:3] for row in rows] == [("1", str(serve.ALONE), "0"), ("2", str(2 * serve.EACH), "0")]
    assert all(int(row[3]) > 0 for row in rows)
    assert "6 requests of 1 to 24 tokens" in printed and "0 lost" in printed
    before, after = re.search(r"compiled sizes: (\d+) after the warm-up, (\d+) at the end", printed).groups()
    assert before == after != "0"


def test_the_figures():
    """Two answers by hand: 3 and 2 pieces, 5 tokens and 2, in 4 seconds; and one that was lost."""
    answers = [Answer(1.0, (1.5, 1.6, 1.8), 5), Answer(2.0, (2.1, 2.7), 2), Answer(3.0, error="429")]
    found = serve._row(answers, 4.0)
    assert (found["rate"], found["lost"], found["requests"]) == (7 / 4, 1, 3)
    assert [found[name] for name in ("first50", "first99")] == pytest.approx([300, 500])
    assert [found[name] for name in ("gap50", "gap99")] == pytest.approx([200, 600])
    with pytest.raises(SystemExit, match="No request was answered. The first: 429"):
        serve._row(answers[2:], 1.0)


def test_requests_share_no_beginning():
    texts = [body["messages"][0]["content"] for body in serve._bodies(40, 8)]
    assert len({text.split()[0] for text in texts}) == 40


def test_errors_are_lost_requests():
    assert stream(("127.0.0.1", 9), {"messages": []}).error.startswith("ConnectionRefusedError")
