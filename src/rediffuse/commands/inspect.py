"""Look at images before any training: what they are, what becomes of them, which parameters fit."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rediffuse.params import DIMENSIONS, SIDES, Data

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rediffuse.sources.found import Found
    from rediffuse.sources.own import Tally
    from rediffuse.sources.survey import Survey

SIDE = 32  # suggested for images that are larger: what a CPU trains on in minutes
SMALL = 3000  # up to this many images the recipe folder-small fits
ROWS, COLUMNS = 20, 10  # of the contact sheet
SPARE = 1.25  # times as many test images as needed, because a hash divides them

# In this order: the first one that is possible gives all scores.
INSTRUMENTS = "classifier", "efficientnet-lite0", "random-conv-v1"


def inspect(path: str, sheet: Path) -> Iterator[str]:
    """Yield lines on the images at `path`, at last parameters that fit them, as YAML; write a contact sheet.

    Raises UserError as the stage prepare does.
    """
    from rediffuse.sources import own
    from rediffuse.sources.survey import survey

    data = Data(
        set="folder",
        validation=0,
        path=path,
        size=SIDE,
        fit="crop",
        channels="auto",
        background="auto",
        split_folders=True,
        validation_share=0.1,
        test_share=0.2,
        split_seed=1,
    )
    with (
        tempfile.TemporaryDirectory(prefix="rediffuse-inspect-") as scratch,
        own.find_own(data, Path(scratch, "unpacked")) as found,
    ):
        yield from found.notes
        yield from own.describe_found(found)
        looked = survey(found, data, thorough=True)
        data = data.model_copy(update=_fitting(found, looked))
        if data.size == 0:
            [(width, height)] = looked.sizes
            looked = replace(looked, shape=(looked.shape[0], height, width))
        yield from own.describe_survey(looked, data)
        tally, shown = own.Tally(), defaultdict[int | None, list[Any]](list)
        for pixels, split, label, place in own.divide(found, looked, data, Path("unreadable.txt")):
            tally.add(place, split, label)
            if (label or 0) < ROWS and len(shown[label]) < (COLUMNS if found.classes else ROWS * COLUMNS):
                shown[label].append(pixels)
        yield from own.describe_tally(tally, found.classes, looked, data)
        own.check_counts(tally)
        if found.classes:
            yield f"{len(found.classes):,} classes: {', '.join(found.classes[:ROWS])}"
        _draw(shown, found.classes, sheet)
        yield f"{sheet}: what the models will see"
        possible = _possible(tally, found.classes)
        yield from (f"instrument {name}: {why_not or 'possible'}" for name, why_not in possible.items())
        yield f"\nParameters that fit, for {_recipe(tally, looked)}:\n"
        yield yaml.safe_dump(_parameters(data, tally, looked, possible), sort_keys=False)


def _fitting(found: Found, looked: Survey) -> dict[str, Any]:
    """Return the size, and the share of test images, that suit the images."""
    one_size = len(looked.sizes) == 1
    as_they_are = one_size and all(SIDES[0] <= side <= 1.5 * SIDE for size in looked.sizes for side in size)
    wanted = SPARE * 2 * DIMENSIONS["random-conv-v1"] / max(1, len(found.images))
    share = min(0.5, max(0.2, round(wanted + 0.005, 2)))
    return {"size": 0 if as_they_are else SIDE, "test_share": share}


def _recipe(tally: Tally, looked: Survey) -> str:
    """Return the file whose other parameters suit the images."""
    if tally.total <= SMALL:
        return "recipes/folder-small.yaml"
    return "recipes/folder-colour.yaml" if looked.shape[0] == 3 else "params.yaml"


def _possible(tally: Tally, classes: Sequence[str]) -> dict[str, str]:
    """Return by name of instrument why it cannot be used; "" where it can."""
    found = {}
    for name in (*INSTRUMENTS, "inception-v3"):
        least, n = 2 * DIMENSIONS[name], tally.splits["test"]
        found[name] = "" if n >= least else f"needs {least:,} test images, there are {n:,}"
        if name == "classifier" and len(classes) < 2:
            found[name] = "needs two classes or more"
    return found


def _parameters(data: Data, tally: Tally, looked: Survey, possible: Mapping[str, str]) -> dict[str, Any]:
    instruments = [name for name in INSTRUMENTS if not possible[name]]
    test = tally.splits["test"]
    n = max([min(5000, test), *(2 * DIMENSIONS[name] for name in instruments)])
    names = ("set", "path", "size", "fit", "channels", "background", "split_folders", "test_share")
    found: dict[str, Any] = {
        "data": {name: getattr(data, name) for name in names},
        "reference": {"instruments": instruments},
        "sample": {"n": n},
        "evaluate": {"kid_subset_size": max(2, min(1000, test, n)), "is_splits": min(10, test)},
    }
    if looked.shape[0] == 3:
        found["vae"] = {"likelihood": "gaussian"}
    return found


def _draw(shown: dict[int | None, list[NDArray[np.uint8]]], classes: Sequence[str], sheet: Path) -> None:
    """Write a picture of the first images of each class, or of all."""
    import numpy as np

    from rediffuse.figures.grid import WHITE, grid, strip
    from rediffuse.figures.text import annotate, legible
    from rediffuse.images.files import save_png

    if not classes:
        save_png(grid(np.stack(shown[None]), COLUMNS), sheet)
        return
    labels = sorted(label for label in shown if label is not None)[:ROWS]
    table = np.full((len(labels), COLUMNS, *shown[labels[0]][0].shape), WHITE, np.uint8)
    for row, label in zip(table, labels, strict=True):
        row[: len(shown[label])] = shown[label]
    names = legible(classes)
    save_png(annotate(strip(table), [names[label] for label in labels]), sheet)
