"""The committed results against what they belong to: code, parameters, README and documentation.

`make check-results` runs it, `make test` does not.  After an edit to what a stage depends on, a changed
parameter or a new result it is red until `make repro` has run, the figures of README.md and
docs/evaluation.md are corrected, and the pictures of docs/images are copied again.
"""

import json
from functools import lru_cache
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from rediffuse.params import load_params

ROOT = Path(__file__).resolve().parents[1]
every_stage = pytest.mark.parametrize("name", yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"])
README = (ROOT / "README.md").read_text()
INSTRUMENT = "fashion-mnist-cnn-v1"
IMAGENET = "efficientnet-lite0-112px"
REMEDY = "run `make repro` and commit dvc.lock and metrics"
PICTURES = [
    path for model in ("vae", "ddpm") for path in sorted((ROOT / "docs/images").glob(f"{model}-*.png"))
]


@lru_cache
def stages():
    """The stages by name, as DVC sees them."""
    with Repo(str(ROOT)) as repo:
        return {stage.name: stage for stage in repo.index.stages if getattr(stage, "name", None)}


# Code and parameters


@every_stage
def test_results_belong_to_the_code_and_the_parameters(name):
    """dvc.lock names the code and parameters that its results come from, and the numbers and curves in git.

    `dvc pull` fetches the other outputs, by their hash.
    """
    stage = stages()[name]
    assert not stage.changed_stage(), f"the command differs from dvc.lock: {REMEDY}"
    read = [dep for dep in stage.deps if not str(dep).startswith("data/")]
    written = [out for out in stage.outs if not out.use_cache]
    assert {str(item): item.status() for item in (*read, *written) if item.status()} == {}, REMEDY


def test_dvc_lock_has_no_other_stages():
    """DVC never takes out of it what dvc.yaml no longer has."""
    assert sorted(yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"]) == sorted(stages())


def test_the_recipe_for_a_cpu_is_the_default():
    assert load_params(ROOT / "recipes/fashion-mnist-cpu.yaml") == load_params(ROOT / "params.yaml")


# Figures


def metrics(name):
    return json.loads((ROOT / f"metrics/{name}.json").read_text())


def records():
    """The full records of the real images, the VAE and the DDPM."""
    return [metrics(f"evaluation/{name}") for name in ("reference", "vae", "ddpm")]


def cells(label, text=README):
    """The cells of the one table row whose first cell begins so."""
    [row] = [line for line in text.splitlines() if line.startswith(f"| {label}")]
    return [cell.strip() for cell in row.strip("|").split("|")[1:]]


def shown(spread, digits):
    return f"{spread['mean']:.{digits}f} ± {spread['std']:.{digits}f}"


def test_scores_are_those_of_the_committed_run():
    reference, vae, ddpm = records()
    places = [record["instruments"][INSTRUMENT] for record in (reference, vae, ddpm)]
    scores = [places[0]["rows"]["real"], places[1]["scores"], places[2]["scores"]]
    digits = {INSTRUMENT: (3, 3), IMAGENET: (1, 1), "random-conv-v1": (3, 2)}
    for id in reference["instruments"]:
        [name] = [name for name in digits if id.startswith(name)]
        floor = reference["instruments"][id]["rows"]["real"]["fd"]
        models = [record["instruments"][id]["scores"]["fd"] for record in (vae, ddpm)]
        found = [shown(floor, digits[name][0]), *(shown(fd, digits[name][1]) for fd in models)]
        assert cells(f"Fréchet distance, `{name}`") == found
    ratios = [metrics(model)["ratio_to_real"] for model in ("vae", "ddpm")]
    assert cells("**times as far as real images**") == ["1", *(f"**{ratio:.2f}**" for ratio in ratios)]
    assert cells("KID") == [shown(score["kid"], 4) for score in scores]
    assert cells("inception score") == [shown(score["is"], 2) for score in scores]
    for name in ("precision", "recall", "density", "coverage"):
        assert cells(name) == [shown(score[name], 3) for score in scores]
    accuracies = [shown(record["accuracy_score"], 3) for record in (reference, ddpm)]
    assert cells("accuracy on real images") == [accuracies[0], "", accuracies[1]]
    assert cells("drawn as the class")[2] == shown(ddpm["label_accuracy"], 3)
    copies = [record["memorisation"]["copies"]["mean"] for record in (vae, ddpm)]
    assert cells("copies of training")[1:] == [f"{share:.4f}" for share in copies]
    assert cells("VAE's reconstructions")[1] == f"{places[1]['reconstructions']['fd']:.2f}"


def test_floor_and_memorisation_of_the_documentation_are_those_of_the_committed_run():
    text, (reference, vae, ddpm) = (ROOT / "docs/evaluation.md").read_text(), records()
    ids = list(reference["instruments"])
    rows = [reference["instruments"][id]["rows"] for id in ids]
    assert cells("images", text) == [f"`{id}`" for id in ids]
    assert cells("real training images (the floor)", text) == [shown(row["real"]["fd"], 3) for row in rows]
    assert cells("uniform noise", text) == [f"{row['noise']['fd']:,.1f}" for row in rows]
    assert cells("the mean image", text) == [f"{row['mean_image']['fd']:,.1f}" for row in rows]
    real = reference["memorisation"]
    spreads = [record["memorisation"] for record in (vae, ddpm)]
    for name, form in (("copies", "{:.4f}"), ("authentic", "{:.3f}"), ("mann_whitney_z", "{:+.1f}")):
        values = [real["test"][name], real["train"][name], *(spread[name]["mean"] for spread in spreads)]
        assert cells(f"`{name}`", text) == [form.format(value) for value in values]


def test_likelihoods_are_those_of_the_committed_run():
    vae = metrics("train_vae")
    test = vae["test"]
    assert cells("negative ELBO") == [f"{test['elbo']:.1f} = {test['reconstruction']:.1f} + {test['kl']:.1f}"]
    assert cells("floor of the likelihood") == [f"{test['floor']:.2f}"]
    assert cells("bound with 100") == [f"{vae['iwae_100']:.1f}"]
    assert cells("active latent") == [str(vae["active_units"])]


def test_the_default_run_is_as_good_as_it_must_be():
    assert metrics("train_vae")["test"]["elbo"] <= 240
    assert metrics("evaluation/reference")["instruments"][INSTRUMENT]["instrument"]["accuracy"] >= 0.92
    assert metrics("ddpm")[INSTRUMENT]["fd"] < metrics("vae")[INSTRUMENT]["fd"]


# Pictures


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_pictures_of_the_documentation_are_those_of_the_committed_run(path):
    model, name = path.stem.split("-", 1)
    made = ROOT / f"metrics/report/{model}/{name}.png"
    if not made.parent.is_dir():
        pytest.skip("the pictures of the run are not here: `dvc pull metrics/report`, or `make repro`")
    assert path.read_bytes() == made.read_bytes(), f"copy {made} to {path}"
