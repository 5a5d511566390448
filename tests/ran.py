"""Runs exported models by the example's loop, in a process of its own: `python ran.py`.

`(folder, (prompts, new tokens, tokens of a piece, rows of a batch))` on stdin, `((tokens, logits), packages that were imported
and should not be)` on stdout, pickled.
"""

import pickle
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import run_exported
from served import each_of


def main():
    for folder, (prompts, count, run_exported.PIECE, batch) in each_of(sys.stdin.buffer):
        step, about = run_exported.load(folder)
        batches = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
        tokens, logits = zip(*(run_exported.generate(step, about, rows, count) for rows in batches))
        ours = {"keras", "keras_gemma2", "keras_hub"} & {name.partition(".")[0] for name in sys.modules}
        pickle.dump(((np.concatenate(tokens), np.concatenate(logits)), ours), sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
