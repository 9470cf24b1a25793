"""Make the instruments, and score real images and generators that learn almost nothing. See dvc.yaml.

It runs before any training, so that whatever the evaluation lacks is reported here.
"""

from pathlib import Path

from rediffuse.evaluation.record import RealImages
from rediffuse.evaluation.reference import Reference
from rediffuse.images.image_set import load_images, load_manifest
from rediffuse.params import load_params
from rediffuse.runtime.device import autocast, device, make_deterministic
from rediffuse.runtime.files import write_json
from rediffuse.runtime.processes import process_group
from rediffuse.tracking.row import stage_run
from stages import run_stage

IMAGES, FOLDER = Path("data/pixels"), Path("data/reference")
METRICS, RECORD = Path("metrics/reference.json"), Path("metrics/evaluation/reference.json")


@process_group()
def main() -> None:
    params = load_params()
    make_deterministic()
    real = RealImages(*(load_images(IMAGES, split) for split in ("train", "validation", "test")))
    reference = Reference(params, real)
    with stage_run("reference", params):
        on, manifest = device(), load_manifest(IMAGES)
        measured = reference.measure(FOLDER, manifest, on, autocast(on, params.precision))
        if measured is None:  # not the first process
            return
        record, headline = measured
        write_json(RECORD, record)
        write_json(METRICS, headline)


if __name__ == "__main__":
    run_stage(main)
