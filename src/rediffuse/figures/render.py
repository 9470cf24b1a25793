"""From a figure of matplotlib to a picture."""

from __future__ import annotations

import io

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

# Decorates what draws a figure: the bytes must not depend on the user's matplotlibrc.
default_style = matplotlib.style.context("default")


def plain(name: str) -> str:
    """Return a `legible` name, for example of a class, as matplotlib text: without formulas."""
    return name.replace("$", r"\$")


def render(figure: Figure) -> NDArray[np.uint8]:
    """Return the pixels, uint8 (height, width, 3)."""
    pixels = io.BytesIO()
    figure.savefig(pixels, format="rgba")
    wide, high = figure.canvas.get_width_height()
    return np.frombuffer(pixels.getvalue(), np.uint8).reshape(high, wide, 4)[:, :, :3]
