"""Judge the images drawn from one model: `python -m stages.evaluate vae|ddpm`. See dvc.yaml."""

import argparse
from pathlib import Path

from rediffuse.evaluation.judgement import Judgement
from rediffuse.evaluation.record import RealImages, class_table, load_record
from rediffuse.images.image_set import load_images
from rediffuse.images.sample_sets import load_sets
from rediffuse.params import load_params
from rediffuse.runtime.device import autocast, device, make_deterministic
from rediffuse.runtime.files import write_csv, write_json
from rediffuse.runtime.kinds import KINDS
from rediffuse.runtime.processes import process_group
from rediffuse.tracking.row import stage_run
from stages import run_stage

IMAGES, FOLDER, RECORDS = Path("data/pixels"), Path("data/reference"), Path("metrics/evaluation")


@process_group()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=KINDS)
    model = parser.parse_args().model
    metrics, full = Path(f"metrics/{model}.json"), RECORDS / f"{model}.json"
    params = load_params()
    make_deterministic()
    reference = load_record(RECORDS / "reference.json")
    real = RealImages(*(load_images(IMAGES, split) for split in ("train", "validation", "test")))
    samples = load_sets(Path(f"data/samples/{model}"), real.test.shape, len(real.test.classes))
    judgement = Judgement(params, samples, real, reference, FOLDER)
    with stage_run(f"evaluate_{model}", params):
        measured = judgement.measure(model, device(), autocast(device(), params.precision))
        if measured is None:  # not the first process
            return
        record, headline = measured
        write_json(full, record)
        write_json(metrics, headline)
        classes = Path(f"metrics/plots/evaluate_{model}/classes.csv")
        write_csv(classes, ("class", "distance", "n"), class_table(record))


if __name__ == "__main__":
    run_stage(main)
