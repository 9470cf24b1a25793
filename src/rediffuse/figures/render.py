"""From a figure of matplotlib to a picture."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rediffuse.figures.grid import shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plain(name: str) -> str:
    """A name, of a class for instance, as matplotlib writes it: no mathematics between dollars, on one line, and not too long."""
    return shortened(name).replace("$", r"\$")


def render(figure: Figure) -> NDArray[np.uint8]:
    """The pixels, uint8 (height, width, 3)."""
    pixels = io.BytesIO()
    figure.savefig(pixels, format="rgba")
    wide, high = figure.canvas.get_width_height()
    return np.frombuffer(pixels.getvalue(), np.uint8).reshape(high, wide, 4)[:, :, :3]
