"""The pipeline as a user runs it, and kills it: a fresh checkout, real DVC and MLflow.  Only the models are
tiny, and of Fashion-MNIST there are the first images.
"""

import base64
import hashlib
import io
import json
import re
import shutil
import struct
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from browser import dump, needs_browser
from PIL import Image
from toy_pipeline import environment, run

from rediffuse.figures.scores import Spread
from rediffuse.sources.fashion_mnist import FILES
from rediffuse.tracking.store import connect

ROOT = Path(__file__).parents[1]
INSTRUMENT = "fashion-mnist-cnn-v1"
STAGES = [
    *("prepare", "reference", "train_vae", "encode", "train_ddpm", "sample_vae", "sample_ddpm"),
    *("evaluate_vae", "evaluate_ddpm", "report"),
]
IMAGES = {"train": 1200, "test": 400}
N = 128  # images in a sample set
TINY = {
    "vae": {"channels": [8, 16], "hidden": 32, "kl_warmup": 500},
    "ddpm": {"width": 8, "T": 50},
    "data": {"validation": 200},
    "reference": {"instruments": [INSTRUMENT, "random-conv-v1"]},
    "sample": {"n": N, "seeds": [1, 2]},
    "evaluate": {"kid_subsets": 10, "kid_subset_size": 64, "accuracy_images": 500},
}
SHORT = {"images": 2560, "batch": 64, "lr_warmup": 640, "log_every": 640}
SHORT |= {"validate_every": 1280, "checkpoint_every": 640}
# In metrics/report, and in a row of MLflow, by key.
PICTURES = {
    *("ddpm~noising", "ddpm~denoising", "vae~latent", "vae~interpolation", "vae~reconstructions"),
    *(f"vae~{name}" for name in ("samples", "scores", "classes", "neighbours")),
    *(f"ddpm~{name}" for name in ("samples", "scores", "classes", "neighbours")),
}

pytestmark = pytest.mark.slow


def stages_run(output):
    """The stages that DVC says it ran, in order."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def copy_checkout(folder):
    """Copy what git tracks here.  Results of the full run belong to other parameters."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("metrics/") and name != "dvc.lock":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def place_images(folder, splits):
    """Write the first images of each split as published files, and their hashes into the code."""
    source, raw = folder / "src/rediffuse/sources/fashion_mnist.py", folder / "data/raw"
    raw.mkdir(parents=True)
    for name, published in FILES.items():
        split = "train" if name.startswith("train") else "test"
        part = splits[split].take(np.arange(IMAGES[split]))
        array = part.images[:, 0] if "images" in name else part.labels.astype(np.uint8)
        header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        (raw / name.removesuffix(".gz")).write_bytes(content := header + array.tobytes())
        source.write_text(source.read_text().replace(published, hashlib.sha256(content).hexdigest()))


def kill_in_training(folder):
    """Kill `dvc repro`, and the stage that it runs, when the DDPM has its first checkpoint."""
    command = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment()}
    process = subprocess.Popen(["dvc", "repro"], cwd=folder, **command)
    end = time.monotonic() + 400
    while not list(folder.glob(".dvc/tmp/checkpoints/ddpm-*.pt")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        each.kill()
    process.wait()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, fashion_mnist):
    """A copy of the working tree in which `dvc repro` was killed and repeated.  The results are committed."""
    folder = tmp_path_factory.mktemp("pipeline") / "checkout"
    copy_checkout(folder)
    place_images(folder, fashion_mnist)
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
    kill_in_training(folder)
    done = run(folder, "dvc", "repro")
    assert stages_run(done.stdout) == STAGES[STAGES.index("train_ddpm") :]
    run(folder, "git", "add", ".")
    run(folder, "git", "commit", "-qm", "results")
    return folder


def rows(checkout):
    """A client, and the rows in the order in which they were made."""
    client = connect(f"sqlite:///{checkout}/.mlflow/mlflow.db")
    table = client.get_experiment_by_name("rediffuse").experiment_id
    return client, client.search_runs([table], order_by=["attributes.start_time ASC"])


def numbers(checkout):
    return {path.name: json.loads(path.read_text()) for path in sorted((checkout / "metrics").glob("*.json"))}


def pictures(client, row):
    """The keys of the row's pictures, with the step of those that are not of the end."""
    names = [Path(file.path).name.split("+") for file in client.list_artifacts(row.info.run_id, "images")]
    return {key + (f" at {step}" if step != "0" else "") for key, _, step, *_ in names}


def test_results_are_complete_and_plausible(checkout):
    found = numbers(checkout)
    assert list(found) == ["ddpm.json", "reference.json", "train_ddpm.json", "train_vae.json", "vae.json"]
    for model in ("vae", "ddpm"):
        score = found[f"{model}.json"][INSTRUMENT]
        assert (
            score["fd"] > found["reference.json"][INSTRUMENT]["fd"]
        )  # models this small are far from the data
        assert 1 <= score["is"] <= 10
        samples = checkout / "data/samples" / model
        sets = [np.load(samples / str(seed) / "images.npy") for seed in (1, 2)]
        assert all(images.shape == (N, 1, 28, 28) and images.dtype == np.uint8 for images in sets)
        assert not (sets[0] == sets[1]).all()
        assert (samples / "1/labels.npy").exists() == (model == "ddpm")
    assert np.load(checkout / "data/samples/vae/reconstructions/images.npy").shape == (N, 1, 28, 28)
    assert np.load(checkout / "data/samples/ddpm/1/labels.npy").tolist() == [i % 10 for i in range(N)]
    made = {path: f"{path.parent.name}~{path.stem}" for path in (checkout / "metrics").rglob("*.png")}
    assert set(made.values()) == PICTURES and len(made) == len(PICTURES)


def test_full_records_say_what_a_comparison_must_know(checkout):
    """Instrument and hash, N, reference and hash, sampler, seeds, and the rows between floor and ceiling."""
    folder = checkout / "metrics/evaluation"
    names = ("reference", "vae", "ddpm")
    reference, vae, ddpm = (json.loads((folder / f"{name}.json").read_text()) for name in names)
    manifest = json.loads((checkout / "data/pixels/manifest.json").read_text())
    weights = (checkout / f"src/rediffuse/evaluation/weights/{INSTRUMENT}.safetensors").read_bytes()
    for record in (vae, ddpm):
        sampling = record["sampling"]
        assert sampling["n"] == N and sampling["seeds"] == [1, 2] and sampling["rounding"]
        assert record["reference"]["sha256"] == manifest["splits"]["test"]["sha256"]["images"]
        assert record["settings"] == reference["settings"]
        part = record["instruments"][INSTRUMENT]
        assert part["instrument"]["sha256"] == hashlib.sha256(weights).hexdigest()
        assert len(part["scores"]["fd"]["values"]) == len(record["instruments"]) == 2
    sampling = ddpm["sampling"]
    assert (sampling["sampler"], sampling["steps"]) == ("sde-dpm-solver++", 5) and sampling["ema_half_life"]
    assert {"accuracy_score", "label_accuracy"} <= set(ddpm)
    for part in reference["instruments"].values():
        floor = part["rows"]["real"]["fd"]["mean"]
        assert all(floor < part["rows"][name]["fd"] for name in ("pixel_marginals", "noise", "mean_image"))
    # The training set posing as a generator has a perfect distance, and is caught.
    posing = reference["memorisation"]["train"]
    assert (posing["duplicates"], posing["authentic"]) == (1, 0)


def test_repro_leaves_one_row_with_parameters_metrics_curves_and_pictures(checkout):
    client, (row,) = rows(checkout)
    assert row.info.run_name.startswith("repro-") and row.info.status == "FINISHED"
    assert {row.data.tags[f"stage.{stage}.status"] for stage in STAGES} == {"finished"}
    assert row.data.params["ddpm.T"] == "50"
    for model in ("vae", "ddpm"):
        fd = numbers(checkout)[f"{model}.json"][INSTRUMENT]["fd"]
        assert row.data.metrics[f"{model}/{INSTRUMENT}/fd"] == fd
        points = client.get_metric_history(row.info.run_id, f"{model}/{'elbo' if model == 'vae' else 'loss'}")
        assert sorted(point.step for point in points) == [640, 1280, 1920, 2560]
    training = {f"{model}~training at {step}" for model in ("vae", "ddpm") for step in (1280, 2560)}
    assert pictures(client, row) == PICTURES | training
    records = {Path(file.path).name for file in client.list_artifacts(row.info.run_id, "metrics/evaluation")}
    assert records == {"reference.json", "vae.json", "ddpm.json"}


ACT = """
const reels = [...document.querySelectorAll(".reel")];
const places = () => Object.fromEntries(reels.map(reel => [reel.id, reel.style.backgroundPosition]));
const before = places();
for (const name of ["time", "guidance", "walk"]) {
  const slider = at(`${name}-at`);
  slider.value = 0;
  slider.dispatchEvent(new Event("input"));
}
at("samplers-at").value = 1;
at("samplers-at").dispatchEvent(new Event("input"));
at("map").dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
const after = places(), text = document.querySelector("output[for=time-at]").value;
const moved = Object.keys(after).filter(id => after[id] != before[id]);
const found = { moved, text, failures, wide: document.documentElement.scrollWidth > innerWidth };
const told = { id: "found", textContent: JSON.stringify(found) };
document.body.append(Object.assign(document.createElement("pre"), told));
"""
WATCH = """<script>const failures = [];
addEventListener("error", event => failures.push(event.message));
addEventListener("securitypolicyviolation", event => failures.push(event.blockedURI));</script>"""


def test_the_page_needs_nothing_else_and_is_in_the_row(checkout):
    page = (checkout / "metrics/report/index.html").read_text()
    assert "://" not in page and len(page) < 12e6
    assert page.count("<img") == len(re.findall(r'<img src="data:image/png;base64,[^"]+" alt="[^"]+">', page))
    for model in ("vae", "ddpm"):
        scores = json.loads((checkout / f"metrics/evaluation/{model}.json").read_text())
        assert str(Spread.of(scores["instruments"][INSTRUMENT]["scores"]["fd"])) in page
    client, (row, *_) = rows(checkout)
    kept = client.download_artifacts(row.info.run_id, "report/index.html")
    assert Path(kept).read_text() == page


def test_the_last_frame_of_the_page_is_what_the_model_draws(checkout):
    page = (checkout / "metrics/report/index.html").read_text()
    for reel in ("x_t", "x_0"):
        png = re.search(rf'id="{reel}".*?base64,([^)]+)\)', page, re.DOTALL)[1]
        sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))
        drawn = np.load(checkout / "data/samples/ddpm/1/images.npy")[:10, 0]
        np.testing.assert_array_equal(sheet[-28:], np.hstack(drawn))


@needs_browser
@pytest.mark.parametrize(("width", "height"), [(1200, 5000), (500, 8000)])
def test_the_sliders_and_the_map_of_the_page_move_its_pictures(checkout, tmp_path, width, height):
    page = (checkout / "metrics/report/index.html").read_text()
    page = page.replace('<meta charset="utf-8">', f'<meta charset="utf-8">{WATCH}')
    (tmp_path / "page.html").write_text(page.replace("</script>\n</html>", f"{ACT}</script>\n</html>"))
    shown = dump(f"file://{tmp_path}/page.html", tmp_path, width=width, height=height)
    found = json.loads(re.search(r'<pre id="found">(.*?)</pre>', shown)[1])
    reels = {"real", "x_t", "x_0", "samplers", "guidance", "decoded", "walk"}
    assert set(found["moved"]) == reels and found["text"] == "t = 50 of 50"
    assert found["failures"] == [] and not found["wide"]


def test_models_can_be_ranked_by_the_primary_metric(checkout):
    client, (row, *_) = rows(checkout)
    experiment = client.get_experiment_by_name("rediffuse")
    name = experiment.tags["mlflow.experiment.primaryMetric.name"]
    assert name == "ddpm/ratio_to_real"
    models = {model.name: model for model in client.search_logged_models([experiment.experiment_id])}
    (metric,) = [metric for metric in models["ddpm"].metrics if metric.key == name]
    (entry,) = row.inputs.dataset_inputs
    assert metric.value == row.data.metrics[name] and metric.run_id == row.info.run_id
    assert (metric.dataset_name, metric.dataset_digest) == (entry.dataset.name, entry.dataset.digest)
    assert any(metric.key == f"vae/{INSTRUMENT}/fd" for metric in models["vae"].metrics)


def test_a_second_repro_runs_nothing_and_leaves_nothing_to_commit(checkout):
    assert stages_run(run(checkout, "dvc", "repro").stdout) == []
    assert run(checkout, "git", "status", "--porcelain").stdout == ""


def test_the_row_of_a_killed_run_is_rebuilt_exactly_in_a_fresh_clone_that_does_not_track(checkout):
    before = (checkout / "dvc.lock").read_bytes()
    row = rows(checkout)[1][0]
    done = run(checkout, "rediffuse", "rebuild", row.info.run_id)
    assert stages_run(done.stderr) == STAGES
    assert done.stdout.splitlines()[-1] == "exact"
    outputs = [out["path"] for stage in yaml.safe_load(before)["stages"].values() for out in stage["outs"]]
    compared = [line.split() for line in done.stdout.splitlines() if line.endswith("same")]
    assert len(compared) == len(outputs) > len(STAGES)
    assert all(any(out in line for line in compared) for out in outputs)
    (row,) = rows(checkout)[1]
    assert row.data.tags["rebuild.verdict"] == "exact"
    assert (checkout / "dvc.lock").read_bytes() == before
    assert run(checkout, "git", "status", "--porcelain").stdout == ""


def test_an_experiment_runs_only_what_depends_on_it_and_has_a_complete_row(checkout):
    done = run(checkout, "dvc", "exp", "run", "-n", "fewer", "-S", "sample.ddpm.steps=4")
    assert stages_run(done.stdout) == ["sample_ddpm", "evaluate_ddpm", "report"]
    client, (base, row) = rows(checkout)
    assert row.info.run_name == "fewer" and row.data.params["sample.ddpm.steps"] == "4"
    names, base_names = (
        {name for name in each.data.metrics if not name.startswith(("seconds/", "system/"))}
        for each in (row, base)
    )
    assert names == base_names
    assert row.data.metrics[f"vae/{INSTRUMENT}/fd"] == base.data.metrics[f"vae/{INSTRUMENT}/fd"]
    assert row.data.metrics[f"ddpm/{INSTRUMENT}/fd"] == numbers(checkout)["ddpm.json"][INSTRUMENT]["fd"]
    assert pictures(client, row) == PICTURES

    difference = json.loads(run(checkout, "dvc", "metrics", "diff", "--json").stdout)
    assert set(difference) == {"metrics/ddpm.json"}
    run(checkout, "dvc", "plots", "diff", "HEAD")
    assert "train_ddpm" in (checkout / "dvc_plots/index.html").read_text()
    shutil.rmtree(checkout / "dvc_plots")


def test_a_wrong_parameter_is_named_and_loses_nothing(checkout):
    model = checkout / "data/models/ddpm/model.safetensors"
    before = model.read_bytes()
    done = run(checkout, "dvc", "exp", "run", "-S", "ddpm.schedule=cubic", check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    message = "error: ddpm.schedule: input should be 'linear', 'cosine' or 'sigmoid', got 'cubic'"
    assert message in done.stderr
    run(checkout, "git", "checkout", "-q", "--", "params.yaml", "dvc.lock", "metrics")
    run(checkout, "dvc", "checkout")
    assert model.read_bytes() == before
