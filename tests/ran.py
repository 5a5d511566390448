"""Runs an exported model by the example's loop, in a process of its own: `python ran.py FOLDER`.

`(prompts, new tokens, tokens of a piece, rows of a batch)` on stdin, `(tokens, logits)` on stdout, pickled.
"""

import pickle
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import run_exported


def main():
    prompts, count, run_exported.PIECE, batch = pickle.load(sys.stdin.buffer)
    step, about = run_exported.load(sys.argv[1])
    batches = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
    tokens, logits = zip(*(run_exported.generate(step, about, rows, count) for rows in batches))
    ours = [name for name in sys.modules if name.partition(".")[0] in ("keras", "keras_gemma2", "keras_hub")]
    pickle.dump((np.concatenate(tokens), np.concatenate(logits), ours), sys.stdout.buffer)


if __name__ == "__main__":
    main()
