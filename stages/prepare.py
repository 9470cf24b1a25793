"""Make the image set as uint8 arrays: train, validation and test.  Run by `dvc repro`; see dvc.yaml."""

from pathlib import Path

from rediffuse.images.image_set import SPLITS, ImageSet, load_split, replacing, save_images, save_manifest
from rediffuse.params import Data, load_params
from rediffuse.runtime.errors import UserError
from rediffuse.sources.own import write_own
from rediffuse.sources.published import load_published
from rediffuse.sources.splits import describe, hold_out
from rediffuse.tracking.row import stage_run
from stages import run_stage

FOLDER = Path("data/pixels")


def main() -> None:
    params = load_params()
    with stage_run("prepare", params):
        if params.data.set == "folder":
            prepare_own(params.data)
        else:
            prepare_published(params.data, params.seed)


def prepare_published(data: Data, seed: int) -> None:
    published, about = load_published(data.set)
    if data.validation >= (n := len(published["train"])):
        raise UserError(
            f"data.validation ({data.validation}) must be below the {n:,} training images of {data.set}"
            " (params.yaml)"
        )
    train, validation = hold_out(published["train"], data.validation, seed=seed)
    splits = {"train": train, "validation": validation, "test": published["test"]}
    save_images(FOLDER, splits, describe(splits, about))


def prepare_own(data: Data) -> None:
    with replacing(FOLDER) as incoming:
        classes, about = write_own(data, incoming)
        splits: dict[str, ImageSet] = {name: load_split(incoming, name, classes) for name in SPLITS}
        save_manifest(incoming, describe(splits, about))


if __name__ == "__main__":
    run_stage(main)
