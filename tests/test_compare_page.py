"""Rows that stages have written can be compared on MLflow's pages, numbers and pictures, in a browser."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import urllib.request
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml
from browser import dump, needs_browser
from PIL import Image
from servers import tracking_server

from rediffuse.params import load_params
from rediffuse.tracking.results import result_files
from rediffuse.tracking.row import stage_run
from rediffuse.tracking.store import connect
from rediffuse.tracking.views import update_experiment

PROJECT = Path(__file__).resolve().parents[1]
FOREIGN = ("DVC_ROOT", "DVC_STAGE", "MLFLOW_TRACKING_URI", "REDIFFUSE_TRACKING", "RANK")
WIDTH, HEIGHT = 330, 300  # of the pictures: MLflow itself would show 256 pixels at most
PICTURES = ("ddpm/samples", "vae/samples")
# Name of the experiment -> (what it changes, its score, the grey level of its pictures).
ROWS: dict[str, tuple[dict[str, dict[str, Any]], float, int]] = {
    "first-try": ({}, 1.72, 40),
    "long-chain": ({"ddpm": {"T": 1000, "schedule": "linear"}}, 1.91, 120),
    "small-latent": ({"vae": {"latent_dim": 2}}, 2.53, 200),
}
PAGE = "/#/experiments/1/runs?workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey=compare"
pytestmark = [pytest.mark.slow, needs_browser]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository in which tracking has seen the experiments of ROWS run, one of them twice."""
    root = tmp_path_factory.mktemp("compare") / "repository"
    (root / ".dvc").mkdir(parents=True)
    (root / ".gitignore").write_text("/.mlflow/\n/.dvc/tmp/\n/metrics/\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for name in FOREIGN:
            patch.delenv(name, raising=False)
        shutil.copy(PROJECT / "params.yaml", root)
        git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
        for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "start"]):
            subprocess.run([*git, *command], check=True)
        head = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip()
        patch.setenv("DVC_EXP_BASELINE_REV", head)
        for name, (changes, score, grey) in ROWS.items():
            patch.setenv("DVC_EXP_NAME", name)
            run_stage(changes, score, grey)
            if name == "long-chain":  # a second attempt replaces the first
                run_stage(changes, score, grey)
    client = connect(f"sqlite:///{root}/.mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("rediffuse").experiment_id
    update_experiment(client, experiment)  # as the last stage does
    return root


def run_stage(changes: dict[str, dict[str, Any]], score: float, grey: int) -> None:
    """Write what the stages of an experiment write, and log it as one of them."""
    content = yaml.safe_load((PROJECT / "params.yaml").read_text())
    for group, values in changes.items():
        content[group].update(values)
    Path("params.yaml").write_text(yaml.safe_dump(content))
    for model, factor in (("ddpm", 1.0), ("vae", 5.0)):
        picture = Path(f"metrics/plots/sample_{model}/samples.png")
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (WIDTH, HEIGHT), grey).save(picture)
        scores = {"mnist-cnn-v1": {"fd": factor * score, "recall": 0.5}}
        Path(f"metrics/{model}.json").write_text(json.dumps(scores))
    with stage_run("evaluate_ddpm", load_params()) as run:
        run._open_row().log_results(result_files([Path("metrics")]))


def test_compare_view_shows_parameters_scores_and_pictures_of_all_rows(
    repository: Path, tmp_path: Path
) -> None:
    store = f"sqlite:///{repository}/.mlflow/mlflow.db"
    client = connect(store)
    names = {row.info.run_id: row.info.run_name for row in client.search_runs(["1"])}
    assert sorted(names.values()) == sorted([*ROWS, "long-chain (attempt 1)"])
    with tracking_server(store, tmp_path) as server:
        page = dump(server.uri + PAGE, tmp_path)
        sources = re.findall(r'src="(get-artifact[^"]*)"', page)
        addresses = [f"{server.uri}/{unescape(source)}" for source in sources]
        files = [urllib.request.urlopen(address).read() for address in addresses]

    # The parameters that differ, newest row first, and the scores.  A table's row has its own line here.
    table = re.sub(r'<[^>]*role="row"[^>]*>', "\n", page)
    text = re.sub("<[^>]+>", "", re.sub(r'<[^>]*role="(cell|columnheader)"[^>]*>', "\t", table))
    assert re.search(r"Compare by\t\S+ small-latent\t\S+ long-chain\t\S+ first-try\n", text)
    for line in (
        "ddpm.T\t500\t1000\t500",
        "ddpm.schedule\tcosine\tlinear\tcosine",
        "vae.latent_dim\t2\t32\t32",
    ):
        assert f"\n\t\t{line}" in text
    assert text.count("\t\tddpm.") == 2 and "attempt 1" not in text
    assert all(f"{model}/mnist-cnn-v1/fd" in text for model in ("ddpm", "vae"))
    assert all(f"{score:.2f}" in text and f"{5 * score:.2f}" in text for _, score, _ in ROWS.values())

    # The pictures: sharp, and of the row that the address names, which the grey level tells.
    found = set()
    for address, file in zip(addresses, files, strict=True):
        name = names[address.rpartition("run_uuid=")[2].partition("&")[0]]
        picture = re.search(r"images%2F(\w+)~(\w+)", address)
        with Image.open(io.BytesIO(file)) as image:
            assert picture and image.size == (WIDTH, HEIGHT)
            found.add((name, "/".join(picture.groups()), image.convert("L").getpixel((9, 9))))
    assert found == {(name, picture, grey) for name, (*_, grey) in ROWS.items() for picture in PICTURES}
