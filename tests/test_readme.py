"""The README against the repository: its figures are those of the committed run, its links lead somewhere."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
INSTRUMENT = "fashion-mnist-cnn-v1"


def metrics(name):
    return json.loads((ROOT / f"metrics/{name}.json").read_text())


def cells(label):
    """The cells of the one table row whose first cell begins so."""
    [row] = [line for line in README.splitlines() if line.startswith(f"| {label}")]
    return [cell.strip() for cell in row.strip("|").split("|")[1:]]


def test_scores_are_those_of_the_committed_run():
    reference, vae, ddpm = (metrics(name)[INSTRUMENT] for name in ("reference", "vae", "ddpm"))
    floor = reference["floor"]
    assert cells("Fréchet distance") == [f"{floor['fd']:.3f}", f"{vae['fd']:.2f}", f"{ddpm['fd']:.2f}"]
    assert cells("KID") == [f"{floor['kid']:.5f}", f"{vae['kid']:.4f}", f"{ddpm['kid']:.4f}"]
    assert cells("inception score") == ["", f"{vae['is']:.2f}", f"{ddpm['is']:.2f}"]
    for name in ("precision", "recall"):
        assert cells(name) == [f"{score[name]:.3f}" for score in (floor, vae, ddpm)]
    assert cells("drawn as the class")[2] == f"{ddpm['label_accuracy']:.3f}"


def test_likelihoods_are_those_of_the_committed_run():
    vae = metrics("train_vae")
    test = vae["test"]
    assert cells("negative ELBO") == [f"{test['elbo']:.1f} = {test['reconstruction']:.1f} + {test['kl']:.1f}"]
    assert cells("bound with 100") == [f"{vae['iwae_100']:.1f}"]
    assert cells("active latent") == [str(vae["active_units"])]


def test_the_default_run_is_as_good_as_it_must_be():
    assert metrics("train_vae")["test"]["elbo"] <= 245
    assert metrics("reference")[INSTRUMENT]["accuracy"] >= 0.92
    assert metrics("ddpm")[INSTRUMENT]["fd"] < metrics("vae")[INSTRUMENT]["fd"]


def test_links_lead_to_files():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing


def test_the_commands_of_the_readme_are_those_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:`|^    )make (\w+)", README, re.MULTILINE))
    assert {"repro", "test", "ui"} <= targets
    assert all(f"\n{target}:" in makefile for target in targets)
