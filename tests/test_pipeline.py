"""The pipeline as a user runs it: a fresh checkout, real Fashion-MNIST, real DVC and MLflow; only the models
are tiny.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).parents[1]
INSTRUMENT = "fashion-mnist-cnn-v1"
STAGES = [
    *("prepare", "reference", "train_vae", "encode", "train_ddpm", "sample_vae", "sample_ddpm"),
    *("evaluate_vae", "evaluate_ddpm", "report"),
]
TINY = {
    "vae": {"channels": [8, 16], "hidden": 32, "kl_warmup": 500},
    "ddpm": {"width": 8, "T": 50},
    "data": {"validation": 30000},  # fewer training images to compare each sample with
    "sample": {"n": 256, "seeds": [1, 2]},
    "evaluate": {"kid_subsets": 10, "kid_subset_size": 64, "accuracy_images": 2000},
}
# In metrics/report, and in a row of MLflow, by key.
PICTURES = {
    *("ddpm~noising", "ddpm~denoising", "vae~latent", "vae~interpolation", "vae~reconstructions"),
    *(
        f"{model}~{name}"
        for model in ("vae", "ddpm")
        for name in ("samples", "scores", "classes", "neighbours")
    ),
}
TRAINING = {"vae~training", "ddpm~training"}  # in a row, if the model was trained for it
SHORT = {"images": 2560, "batch": 64, "lr_warmup": 640, "log_every": 640}
SHORT |= {"validate_every": 1280, "checkpoint_every": 640}

pytestmark = pytest.mark.slow


def run(checkout, *command, check=True, **variables):
    """Run a command in the checkout as in an activated .venv, without variables that steer DVC or MLflow."""
    foreign = ("DVC_", "MLFLOW_", "REDIFFUSE_", "GIT_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment |= {
        f"GIT_{who}_{what}": "test@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    done = subprocess.run(
        command, cwd=checkout, env=environment | variables, text=True, capture_output=True, timeout=600
    )
    if check and done.returncode:
        raise AssertionError(
            f"{' '.join(command)} exited with {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        )
    return done


def stages_run(output):
    """The stages that DVC says it ran, in order."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, fashion_mnist):
    """A committed checkout of the working tree with tiny models, run once by `dvc repro`."""
    folder = tmp_path_factory.mktemp("pipeline") / "checkout"
    folder.mkdir()
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, tracked):
        # Results of the full run belong to other parameters.
        if (ROOT / name).is_file() and not name.startswith("metrics/") and name != "dvc.lock":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    if (ROOT / "data/raw").is_dir():
        shutil.copytree(ROOT / "data/raw", folder / "data/raw")
    params = yaml.safe_load((folder / "recipes/fashion-mnist-cpu.yaml").read_text())
    for group, values in TINY.items():
        params[group] |= values
    for model in ("vae", "ddpm"):
        params[model]["training"] |= SHORT
    params["sample"]["ddpm"]["steps"] = 5
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    run(folder, "git", "init", "-q", ".")
    run(folder, "git", "add", ".")
    run(folder, "git", "commit", "-qm", "tiny")
    assert stages_run(run(folder, "dvc", "repro").stdout) == STAGES
    run(folder, "git", "add", ".")
    run(folder, "git", "commit", "-qm", "results")
    return folder


def rows(checkout):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{checkout}/.mlflow/mlflow.db")
    return client, client.search_runs(
        [client.get_experiment_by_name("rediffuse").experiment_id], order_by=["attributes.start_time ASC"]
    )


def numbers(checkout):
    return {path.name: json.loads(path.read_text()) for path in sorted((checkout / "metrics").glob("*.json"))}


def pictures(client, row):
    """The keys of the row's pictures."""
    return {
        Path(artifact.path).name.split("+")[0]
        for artifact in client.list_artifacts(row.info.run_id, "images")
    }


def restore(checkout):
    """Back to the committed state, and from there to that of the experiment."""
    run(checkout, "git", "checkout", "-q", "--", "params.yaml", "dvc.lock", "metrics")
    run(checkout, "dvc", "checkout")
    run(checkout, "dvc", "exp", "apply", "longer")


def test_results_are_complete_and_plausible(checkout):
    found = numbers(checkout)
    assert list(found) == ["ddpm.json", "reference.json", "train_ddpm.json", "train_vae.json", "vae.json"]
    floor = found["reference.json"][INSTRUMENT]["fd"]
    for model in ("vae", "ddpm"):
        score = found[f"{model}.json"][INSTRUMENT]
        assert score["fd"] > floor  # models this small are far from the data
        assert 1 <= score["is"] <= 10
        samples = checkout / "data/samples" / model
        sets = [np.load(samples / str(seed) / "images.npy") for seed in (1, 2)]
        assert {images.shape for images in sets} == {(256, 1, 28, 28)} and {
            images.dtype for images in sets
        } == {np.dtype(np.uint8)}
        assert not (sets[0] == sets[1]).all()
        assert (samples / "1/labels.npy").exists() == (model == "ddpm")
    assert np.load(checkout / "data/samples/vae/reconstructions/images.npy").shape == (256, 1, 28, 28)
    assert np.load(checkout / "data/samples/ddpm/1/labels.npy").tolist() == [
        index % 10 for index in range(256)
    ]
    made = {f"{path.parent.name}~{path.stem}" for path in (checkout / "metrics").rglob("*.png")}
    assert (
        made
        == PICTURES
        == {f"{path.parent.name}~{path.stem}" for path in (checkout / "metrics/report").rglob("*.png")}
    )


def test_full_records_say_what_a_comparison_must_know(checkout):
    """Instrument and hash, N, reference and hash, rounding, sampler, seeds, and the rows between floor and
    ceiling.
    """
    reference, vae, ddpm = (
        json.loads((checkout / f"metrics/evaluation/{name}.json").read_text())
        for name in ("reference", "vae", "ddpm")
    )
    manifest = json.loads((checkout / "data/pixels/manifest.json").read_text())
    weights = (checkout / f"src/rediffuse/evaluation/weights/{INSTRUMENT}.safetensors").read_bytes()
    for record in (vae, ddpm):
        assert (
            record["sampling"]["n"] == 256
            and record["sampling"]["seeds"] == [1, 2]
            and record["sampling"]["rounding"]
        )
        assert record["reference"]["sha256"] == manifest["splits"]["test"]["sha256"]["images"]
        assert record["settings"] == reference["settings"]
        part = record["instruments"][INSTRUMENT]
        assert part["instrument"]["sha256"] == hashlib.sha256(weights).hexdigest()
        assert len(part["scores"]["fd"]["values"]) == 2
        assert len(record["instruments"]) == 2
    assert (
        ddpm["sampling"]["sampler"] == "sde-dpm-solver++"
        and ddpm["sampling"]["steps"] == 5
        and ddpm["sampling"]["ema_half_life"]
    )
    assert (
        ddpm["instruments"][INSTRUMENT]["classes"]["by"] == "label"
        and vae["instruments"][INSTRUMENT]["classes"]["by"] == "predicted"
    )
    assert {"accuracy_score", "label_accuracy"} <= set(ddpm) and "accuracy_score" not in vae
    assert "reconstructions" in vae["instruments"][INSTRUMENT]
    for part in reference["instruments"].values():
        fd = {
            name: row["fd"] if name != "train" else row["fd"]["mean"]
            for name, row in part["rows"].items()
            if "fd" in row
        }
        assert (
            fd["train"] < fd["pixel_marginals"]
            and fd["train"] < fd["noise"]
            and fd["train"] < fd["mean_image"]
        )
    assert (
        reference["memorisation"]["train"]["duplicates"] == 1
    )  # the training set posing as a generator: a perfect distance, and caught
    assert reference["memorisation"]["train"]["authentic"] == 0


def test_two_models_are_compared(checkout):
    done = run(checkout, "rediffuse", "compare", "workspace:vae", "workspace:ddpm")
    assert "fd" in done.stdout and INSTRUMENT in done.stdout


def test_a_second_repro_runs_nothing_and_status_is_clean(checkout):
    assert stages_run(run(checkout, "dvc", "repro").stdout) == []
    assert run(checkout, "dvc", "status", "-q", check=False).returncode == 0
    assert run(checkout, "git", "status", "--porcelain").stdout == ""


def test_repro_leaves_one_row_with_parameters_metrics_curves_and_pictures(checkout):
    client, found = rows(checkout)
    row = found[0]
    assert row.info.run_name.startswith("repro-")
    assert row.info.status == "FINISHED"
    assert row.data.params["ddpm.T"] == "50"
    for model in ("vae", "ddpm"):
        fd = numbers(checkout)[f"{model}.json"][INSTRUMENT]["fd"]
        assert row.data.metrics[f"{model}/{INSTRUMENT}/fd"] == fd
    steps = [point.step for point in client.get_metric_history(row.info.run_id, "ddpm/loss")]
    assert steps == [640, 1280, 1920, 2560]
    assert pictures(client, row) == PICTURES | TRAINING
    files = [Path(file.path).name for file in client.list_artifacts(row.info.run_id, "images")]
    slider = {name.split("+")[2] for name in files if name.startswith("ddpm~training+step+")}
    assert slider == {"1280", "2560"}
    records = {Path(file.path).name for file in client.list_artifacts(row.info.run_id, "metrics/evaluation")}
    assert records == {"reference.json", "vae.json", "ddpm.json"}


def test_models_can_be_ranked_by_the_primary_metric(checkout):
    client, (row, *_) = rows(checkout)
    experiment = client.get_experiment_by_name("rediffuse")
    name = experiment.tags["mlflow.experiment.primaryMetric.name"]
    assert name == f"ddpm/{INSTRUMENT}/fd"
    models = {model.name: model for model in client.search_logged_models([experiment.experiment_id])}
    (metric,) = [metric for metric in models["ddpm"].metrics if metric.key == name]
    (entry,) = row.inputs.dataset_inputs
    assert metric.value == row.data.metrics[name] and metric.run_id == row.info.run_id
    assert (metric.dataset_name, metric.dataset_digest) == (entry.dataset.name, entry.dataset.digest)
    assert any(metric.key == f"vae/{INSTRUMENT}/fd" for metric in models["vae"].metrics)


def test_the_row_is_rebuilt_exactly_in_a_fresh_clone_that_does_not_track(checkout):
    before = (checkout / "dvc.lock").read_bytes()
    row = rows(checkout)[1][0]
    done = run(checkout, "rediffuse", "rebuild", row.info.run_id)
    assert stages_run(done.stderr) == STAGES
    assert done.stdout.splitlines()[-1] == "exact"
    outputs = [out["path"] for stage in yaml.safe_load(before)["stages"].values() for out in stage["outs"]]
    compared = [line for line in done.stdout.splitlines() if line.endswith("same")]
    assert len(compared) == len(outputs) > len(STAGES) and all(
        any(out in line.split() for line in compared) for out in outputs
    )
    (row,) = rows(checkout)[1]
    assert row.data.tags["rebuild.verdict"] == "exact"
    assert (checkout / "dvc.lock").read_bytes() == before
    assert run(checkout, "git", "status", "--porcelain").stdout == ""


@pytest.fixture(scope="module")
def experiment(checkout):
    """`dvc exp run -S ddpm.T=1000 -n longer`, the results of which are in the workspace afterwards."""
    done = run(
        checkout, "dvc", "exp", "run", "-n", "longer", "-S", "ddpm.T=1000", "-S", "ddpm.training.lr=1e-5"
    )
    return stages_run(done.stdout)


def test_an_experiment_runs_only_what_depends_on_it(experiment):
    assert experiment == ["train_ddpm", "sample_ddpm", "evaluate_ddpm", "report"]


def test_an_experiment_is_compared_by_dvc(checkout, experiment):
    difference = json.loads(run(checkout, "dvc", "metrics", "diff", "--json").stdout)
    assert set(difference) == {"metrics/ddpm.json", "metrics/train_ddpm.json"}
    shown = run(checkout, "dvc", "exp", "show", "--csv").stdout
    assert "longer" in shown
    assert "1000" in shown
    run(checkout, "dvc", "plots", "diff", "HEAD")
    page = (checkout / "dvc_plots/index.html").read_text()
    assert "train_ddpm" in page
    shutil.rmtree(checkout / "dvc_plots")


def test_the_row_of_an_experiment_is_complete_though_most_stages_were_cached(checkout, experiment):
    client, found = rows(checkout)
    by_name = {row.info.run_name: row for row in found}
    assert len(by_name) == len(found) == 2
    row, base = by_name["longer"], found[0]
    assert row.data.params["ddpm.T"] == "1000"
    assert row.data.params["ddpm.training.lr"] == "1e-05"
    names, base_names = (
        {name for name in r.data.metrics if not name.startswith(("seconds/", "system/"))} for r in (row, base)
    )
    assert names == base_names
    assert row.data.metrics[f"vae/{INSTRUMENT}/fd"] == base.data.metrics[f"vae/{INSTRUMENT}/fd"]
    assert row.data.metrics[f"ddpm/{INSTRUMENT}/fd"] == numbers(checkout)["ddpm.json"][INSTRUMENT]["fd"]
    assert pictures(client, row) == PICTURES | {"ddpm~training"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "ddpm.schedule=cubic",
            "ddpm.schedule: input should be 'linear', 'cosine' or 'sigmoid', got 'cubic'",
        ),
        ("+ddpm.typo=1", "ddpm.typo is not a parameter"),
    ],
)
def test_a_wrong_parameter_is_named(checkout, experiment, override, message):
    done = run(checkout, "dvc", "exp", "run", "-S", override, check=False)
    assert done.returncode != 0
    assert f"error: {message}" in done.stderr
    assert "Traceback" not in done.stderr
    run(checkout, "git", "checkout", "-q", "--", "params.yaml", "dvc.lock", "metrics")


def test_a_failed_experiment_loses_nothing(checkout, experiment):
    restore(checkout)
    model = checkout / "data/models/ddpm/model.safetensors"
    before = model.read_bytes()
    assert run(checkout, "dvc", "exp", "run", "-S", "ddpm.T=1", check=False).returncode != 0
    restore(checkout)
    assert model.read_bytes() == before
