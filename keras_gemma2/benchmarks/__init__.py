"""Measurements of this package beside its peers: `python -m keras_gemma2.benchmarks`."""
