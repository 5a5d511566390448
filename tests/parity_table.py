"""Prints the parity table of the README: `python tests/parity_table.py`.

One row a configuration of test_parity.py, one column a backend: max |logit difference| to transformers in float32, as a
share of the logits' range. One process a backend.
"""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path


def measure() -> dict[str, float]:
    """The running backend's figure for each row."""
    import numpy as np
    from oracle import hugging_face_folder, hugging_face_logits
    from test_parity import ROWS, load, our_logits

    warnings.simplefilter("ignore")
    token_ids = np.random.default_rng(3).integers(0, 97, (2, 23))
    figures = {}
    for name, (overrides, _) in ROWS.items():
        folder, model = hugging_face_folder(**overrides)
        expected = hugging_face_logits(model, token_ids)
        figures[name] = float(np.abs(our_logits(load(folder), token_ids) - expected).max() / np.ptp(expected))
    return figures


def main() -> None:
    if "--child" in sys.argv:
        print(json.dumps(measure()))
        return
    columns = {}
    for backend in ("jax", "tensorflow", "torch"):
        environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [sys.executable, __file__, "--child"]
        result = subprocess.run(
            command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
        columns[backend] = json.loads(result.stdout.splitlines()[-1])
    print("| configuration | " + " | ".join(columns) + " |")
    print("|---|" + "---|" * len(columns))
    for name in columns["jax"]:
        print(f"| {name} | " + " | ".join(f"{figures[name]:.1e}" for figures in columns.values()) + " |")


if __name__ == "__main__":
    main()
