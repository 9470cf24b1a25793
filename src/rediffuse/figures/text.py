"""Names in pictures, all in one font: DejaVu Sans, which comes with matplotlib.

A font of the machine would give other bytes on another machine.  Characters that the font cannot draw are
transliterated.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from anyascii import anyascii
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from rediffuse.figures.grid import Picture
from rediffuse.images.files import to_pil

FONT = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
FONT_SIZE = 11
LONGEST = 40  # characters of a name
GLYPHS = frozenset(map(chr, FT2Font(str(FONT)).get_charmap()))
# The font has their characters, but Pillow's basic layout does not join, order or stack them.
JOINED = ("ARABIC", "EXTENDED ARABIC", "HEBREW", "LAO", "NKO")
BLANK = "\u2800\ufffc"  # printable, but without ink


def legible(names: Sequence[str]) -> list[str]:
    """Return names, for example of all classes, as short lines that the font can draw.

    Different names stay different: the second that would read "neko" becomes "neko (2)".  A name that can be
    drawn as it is does not change.
    """
    shown: dict[str, str] = {}
    last: dict[str, int] = {}  # number of each text
    for name in sorted(dict.fromkeys(names), key=lambda name: _line(name) != name):
        text = line = _line(name)
        while text in last:
            last[line] += 1
            text = f"{line} ({last[line]})"
        last[text] = 1
        shown[name] = text
    return [shown[name] for name in names]


def annotate(picture: Picture, rows: Sequence[str] = (), columns: Sequence[str] = ()) -> Picture:
    """Write names to the left of evenly spaced rows and below evenly spaced columns, in black on white.

    The names must be `legible`.
    """
    high, wide, c = picture.shape
    font = ImageFont.truetype(FONT, FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)  # Raqm is not everywhere
    left = max((int(np.ceil(font.getlength(name))) for name in rows), default=-6) + 6
    below = FONT_SIZE + 7 if columns else 0
    page = Image.new("L" if c == 1 else "RGB", (left + wide, high + below), "white")
    page.paste(to_pil(picture.transpose(2, 0, 1)), (left, 0))
    draw = ImageDraw.Draw(page)
    for i, name in enumerate(rows):
        draw.text((left - 3, (i + 0.5) * high / len(rows)), name, "black", font, anchor="rm")
    for i, name in enumerate(columns):
        x = left + (i + 0.5) * wide / len(columns)
        draw.text((x, high + below / 2), name, "black", font, anchor="mm")
    return np.asarray(page).reshape(high + below, left + wide, c)


def _line(name: str) -> str:
    """Return a name on one line, transliterated and cut to a length that fits into a picture."""
    words = [_spell(word) or _code_points(word) for word in unicodedata.normalize("NFC", name).split()]
    line = " ".join(words) or _code_points(name)
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"


def _spell(word: str) -> str:
    """Return a word without the characters that have no sound: marks, joiners, some letters."""
    return " ".join("".join(map(_draw, word)).split())


@cache
def _draw(character: str) -> str:
    return character if _drawable(character) else "".join(filter(_drawable, anyascii(character)))


def _drawable(character: str) -> bool:
    """Return whether the font draws a character well by itself."""
    return (
        character in GLYPHS
        and character.isprintable()
        and character not in BLANK
        and unicodedata.category(character)[0] != "M"
        and not unicodedata.name(character, "").startswith(JOINED)
    )


def _code_points(text: str) -> str:
    return " ".join(f"U+{ord(character):04X}" for character in text)
