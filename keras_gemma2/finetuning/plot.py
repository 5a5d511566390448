"""The losses of a run as a picture."""

from __future__ import annotations

import importlib.util
import os

import numpy as np

from keras_gemma2.finetuning.folder import PLOT, RunFolder

_SMOOTHED = 0.05  # of all steps, the window of the running mean


def write_plot(folder: RunFolder) -> bool:
    """Draws the log of a run as `loss.png`; does nothing where matplotlib is not installed.

    Args:
        folder: of the run.

    Returns:
        Whether it was drawn.

    Example:
        >>> write_plot(RunFolder("./tuned"))
        True
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    training, validation = folder.losses()
    figure = Figure(figsize=(7, 4), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    steps, losses = np.array(training).T
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="training, each step")
    window = max(1, int(_SMOOTHED * len(losses)))
    if window > 1:
        smooth = np.convolve(losses, np.ones(window) / window, "valid")
        axes.plot(steps[window - 1 :], smooth, color="tab:blue", label=f"training, mean of {window} steps")
    if validation:
        axes.plot(*np.array(validation).T, "o:", color="tab:orange", linewidth=0.8, label="held out")
    axes.set(xlabel="step", ylabel="loss, nats per learned token")
    axes.grid(alpha=0.3)
    axes.legend()
    half_written = folder.file(f".{PLOT}")
    FigureCanvasAgg(figure).print_png(half_written)
    os.replace(half_written, folder.file(PLOT))
    return True
