"""Judge the images drawn from one model: `python -m stages.evaluate vae|ddpm`.  Run by `dvc repro`; see dvc.yaml."""

import argparse
import json
from pathlib import Path

import torch

from rediffuse.errors import UserError
from rediffuse.evaluation.classifier import Instrument, load_instrument
from rediffuse.evaluation.features import load_features
from rediffuse.evaluation.fidelity import check_enough, fidelity, frechet_distance, inception_score
from rediffuse.evaluation.samples import load_samples
from rediffuse.files import write_json
from rediffuse.params import load_params
from rediffuse.tracking.row import stage_run
from stages import run_stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["vae", "ddpm"])
    model = parser.parse_args().model
    params = load_params()
    instrument = load_instrument(params.reference.instrument)
    samples = load_samples(Path(f"data/samples/{model}.npz"), instrument.shape, len(instrument.classes))
    check_enough(len(samples), instrument.dimension, params.evaluate, "generated images")
    check_same_instrument(instrument)
    reference = load_features(Path("data/reference/features.safetensors"))

    with stage_run(f"evaluate@{model}", params, complete=True) as run:
        generated, real = instrument.measure(samples.images, title=f"{model} images"), reference["test"]
        score = fidelity(generated, real, params.evaluate)
        result = {
            "fd": score["fd"],
            "fd_floor": frechet_distance(reference["train"].take(slice(len(samples))), real),  # as many real training images
            "is": score["is"],
            "is_real": inception_score(real, params.evaluate.is_splits),
            "is_max": len(instrument.classes),
            "kid": score["kid"],
            "precision": score["precision"],
            "recall": score["recall"],
        }
        if samples.labels is not None:
            result["label_accuracy"] = float((generated.logits.argmax(1) == torch.from_numpy(samples.labels)).double().mean())
        metrics = Path(f"metrics/{model}.json")
        write_json(metrics, {"n": len(samples), instrument.id: result})
        run.log_metrics_file(metrics)


def check_same_instrument(instrument: Instrument) -> None:
    """Raise UserError if the reference features were measured with another instrument: the two would not be comparable."""
    path = Path("data/reference/instrument.json")
    if not path.is_file():
        raise UserError(f"{path} is missing: make it with `dvc repro reference`")
    if json.loads(path.read_text())["sha256"] != instrument.record["sha256"]:
        raise UserError(f"the reference features were measured with other weights than {instrument.id} has now: run `dvc repro reference`")


if __name__ == "__main__":
    run_stage(main)
