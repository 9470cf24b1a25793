"""Make the image set as uint8 arrays: train, validation and test.  Run by `dvc repro`; see dvc.yaml."""

from pathlib import Path

from rediffuse.images.image_set import load_split, replacing, save_images, save_manifest
from rediffuse.params import Data, load_params
from rediffuse.sources.folder import write_folder
from rediffuse.sources.published import load_published
from rediffuse.sources.splits import describe, hold_out
from rediffuse.tracking.row import stage_run
from stages import run_stage

FOLDER = Path("data/pixels")


def main() -> None:
    params = load_params()
    with stage_run("prepare", params):
        if params.data.set == "folder":
            prepare_folder(params.data)
        else:
            prepare_published(params.data, params.seed)


def prepare_published(data: Data, seed: int) -> None:
    published, about = load_published(data.set)
    train, validation = hold_out(published["train"], data.validation, seed=seed)
    splits = {"train": train, "validation": validation, "test": published["test"]}
    save_images(FOLDER, splits, describe(splits, about))


def prepare_folder(data: Data) -> None:
    with replacing(FOLDER) as incoming:
        classes, about = write_folder(data, incoming)
        splits = {name: load_split(incoming, name, classes) for name in ("train", "validation", "test")}
        save_manifest(incoming, describe(splits, about))


if __name__ == "__main__":
    run_stage(main)
