"""Judge images that any other tool has drawn, with the instruments, floors and settings of the checkout."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rediffuse.params import Params, flatten, load_params
from rediffuse.runtime.errors import UserError
from rediffuse.tracking.store import checkout_root

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from rediffuse.evaluation.record import Record

JUDGED = "metrics/judged"  # NAME/MODEL.json and NAME/evaluation/MODEL.json are as those of the stages
SHOWN = 40  # images in the picture of the row


def judge(source: str, *, name: str, model: str) -> tuple[Path, Record]:
    """Judge images, write the record and its headline, and make a row in MLflow.  Return folder and headline.

    source: a folder of images, or a .npy file, uint8 (N, C, H, W), (N, H, W, C), or (N, H, W) of grey images.
    They are cut into sets of sample.n, in their order.  model: the one that they are compared with, vae or
    ddpm.  Raises UserError for images that do not fit, a folder without the results of `reference`, and a
    name that cannot be a folder's.
    """
    from rediffuse.evaluation.judgement import Judgement
    from rediffuse.evaluation.record import RealImages, load_record
    from rediffuse.images.image_set import load_images
    from rediffuse.images.pixels import ROUNDING
    from rediffuse.images.sample_sets import Samples, SampleSets
    from rediffuse.runtime.device import autocast, device, make_deterministic
    from rediffuse.runtime.files import write_json

    if name in ("", "workspace") or name.startswith((".", "-")) or set(name) & set("/\\:"):
        raise UserError(f"--name must be a name for a folder, without / \\ and :, got {name!r}")
    root = checkout_root()
    params = load_params(root / "params.yaml")
    reference = load_record(root / "metrics/evaluation/reference.json")
    if not params.reference.instruments:
        raise UserError("reference.instruments must name an instrument to judge with, got [] (params.yaml)")
    real = RealImages(*(load_images(root / "data/pixels", part) for part in ("train", "validation", "test")))
    images, n = load_foreign(Path(source), real.test.shape), params.sample.n
    if len(images) < n:
        raise UserError(
            f"{source} holds {len(images):,} images, and the floor and the models were measured in sets of"
            f" {n:,} (sample.n): give at least as many"
        )
    make_deterministic()
    sets = [Samples(images[start : start + n]) for start in range(0, len(images) - n + 1, n)]
    sampling = {"n": n, "seeds": list(range(1, len(sets) + 1)), "source": "judged", "rounding": ROUNDING}
    judgement = Judgement(params, SampleSets(sets, sampling, None), real, reference, root / "data/reference")
    measured = judgement.measure(model, device(), autocast(device(), params.precision))
    assert measured is not None  # there is one process
    record, headline = measured
    folder = root / JUDGED / name
    files = [folder / f"{model}.json", folder / "evaluation" / f"{model}.json"]
    for path, content in zip(files, (headline, record), strict=True):
        write_json(path, content)
    _make_row(root, name, model, files, params, images[:SHOWN])
    return folder, headline


def load_foreign(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return the images of another tool, uint8 (N, C, H, W) = (N, *shape).

    Raises UserError for another type or size: they are neither converted nor resized, which would be a part
    of what is judged.
    """
    from rediffuse.images.files import load_npy
    from rediffuse.sources.folder import find_images
    from rediffuse.sources.reading import read_all

    if path.is_dir():
        import numpy as np

        found = find_images(path, split_folders=False).images
        problems = path.with_name(f"{path.name}-unreadable.txt")
        read = read_all(found, partial(_read, shape=shape), "reading", problems, str(path))
        return np.stack([image for _, image in read])
    if path.suffix != ".npy":
        raise UserError(f"{path} must be a folder of images or a .npy file")
    images = load_npy(path, "give a folder of images, or an array that numpy.save wrote", mmap_mode="r")
    if images.dtype != "uint8":
        raise UserError(
            f"{path} holds {images.dtype}, not uint8 (0 to 255): numbers in [0, 1] must be multiplied by 255,"
            " those in [-1, 1] taken as (x + 1) * 127.5, then rounded and clipped"
        )
    if images.ndim == 3 and shape[0] == 1:
        images = images[:, None]
    if images.shape[1:] == (*shape[1:], shape[0]) != shape:
        images = images.transpose(0, 3, 1, 2)
    if images.shape[1:] != shape:
        wanted = ", ".join(map(str, shape))
        raise UserError(
            f"{path} holds an array {list(images.shape)}, and images of data.set are [N, {wanted}]: draw them"
            " in this size"
        )
    return images


def _read(image: Image.Image, *, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return an image as uint8 (C, H, W); a grey image may be stored in colour."""
    from rediffuse.sources.decode import decode

    (channels, height, width), size = shape, image.size
    if size != (width, height):
        raise ValueError(f"it has {size[0]} x {size[1]} pixels, and images of data.set {width} x {height}")
    colour = decode(image, (3, height, width))
    if channels == 3:
        return colour
    if (colour != colour[:1]).any():
        raise ValueError("it is in colour, and images of data.set are grey")
    return colour[:1]


def _make_row(
    root: Path, name: str, model: str, files: list[Path], params: Params, shown: NDArray[np.uint8]
) -> None:
    """Make the row of the judged images; where that fails, say so."""
    from rediffuse.figures.grid import grid
    from rediffuse.images.files import to_pil
    from rediffuse.tracking.attempts import create, find, place_of
    from rediffuse.tracking.identity import Identity, digest_of, one_line
    from rediffuse.tracking.store import connect, experiment_id, row_lock, tracking_uri, warn
    from rediffuse.tracking.writer import RowWriter

    identity = Identity(digest_of(["judged", name]), name, {"mlflow.source.name": "rediffuse judge"})
    uri = tracking_uri(root)
    try:
        with row_lock(root):
            client = connect(uri)
            experiment = experiment_id(client, uri, root)
            before = find(client, experiment, identity.key)
            row = create(client, experiment, identity, place_of(root), replaces=before)
        writer = RowWriter(client, row)
        # In place of the description of a `dvc repro`, which says how to rebuild it.
        about = f"Images of another tool, judged by `rediffuse judge --name {name}`."
        writer.set_tags({"mlflow.note.content": about})
        groups = ("data.", "reference.", "evaluate.", "sample.n")
        writer.set_params({key: value for key, value in flatten(params).items() if key.startswith(groups)})
        writer.log_results(files)
        writer.log_image(f"{model}/samples", 0, to_pil(grid(shown, 10, scale=2).transpose(2, 0, 1)))
        writer.set_status("FINISHED")
    except Exception as error:  # MLflow raises what its database, server or file system raise
        warn(f"the record is written, but no row of MLflow: {one_line(error)}")
