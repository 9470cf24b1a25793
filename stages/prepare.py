"""Make the image set: published files -> train, validation and test as uint8 arrays.  Run by `dvc repro`; see dvc.yaml."""

from rediffuse.data.fashion_mnist import ABOUT, load_fashion_mnist
from rediffuse.data.images import save_images
from rediffuse.data.splits import describe, hold_out
from rediffuse.params import load_params
from rediffuse.tracking.row import stage_run
from stages import run_stage


def main() -> None:
    params = load_params()
    with stage_run("prepare", params):
        published = load_fashion_mnist()
        train, validation = hold_out(published["train"], params.data.validation, seed=params.seed)
        splits = {"train": train, "validation": validation, "test": published["test"]}
        save_images("data/prepared", splits, describe(splits, ABOUT))


if __name__ == "__main__":
    run_stage(main)
