"""The program `python -m keras_gemma2.benchmarks build | load | generate | quantize | train | memory | export | serve`."""

from __future__ import annotations

import argparse

from keras_gemma2.benchmarks import build, export, generate, load, memory, quantize, serve, train


def main() -> None:
    """Runs the benchmark named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m keras_gemma2.benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
    build.add_command(commands)
    load.add_command(commands)
    generate.add_command(commands)
    quantize.add_command(commands)
    train.add_command(commands)
    memory.add_command(commands)
    export.add_command(commands)
    serve.add_command(commands)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
