"""Rows that stages have written can be compared on MLflow's pages, numbers and pictures, in a browser."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from browser import NO_ASSISTANT, PROGRAMS, Browser, find_browser
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
TABLE = "/#/experiments/{experiment}/runs?workflowType=machine_learning"
COMPARE = TABLE + "&compareRunsMode=CHART&viewStateShareKey=compare"

MISSING = f"no browser: none of {', '.join(PROGRAMS)} is on PATH"
pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_browser() is None, reason=MISSING)]


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


@pytest.fixture(scope="module")
def rows(repository: Path) -> dict[str, Any]:
    client = connect(f"sqlite:///{repository}/.mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("rediffuse").experiment_id
    found = {row.info.run_name: row for row in client.search_runs([experiment])}
    assert sorted(found) == sorted([*ROWS, "long-chain (attempt 1)"])
    return found


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    store = f"sqlite:///{repository}/.mlflow/mlflow.db"
    with tracking_server(store, tmp_path_factory.mktemp("server")) as started:
        yield started.uri


@pytest.fixture(scope="module")
def page() -> Iterator[Browser]:
    with Browser(1600, 2000, first=NO_ASSISTANT) as browser:
        yield browser


def open_page(page: Browser, server: str, rows: dict[str, Any], address: str) -> None:
    experiment = rows["first-try"].info.experiment_id
    page.open(server + address.format(experiment=experiment))


def test_compare_view_shows_parameters_scores_and_pictures_of_all_rows(
    page: Browser, server: str, rows: dict[str, Any]
) -> None:
    open_page(page, server, rows, COMPARE)
    loaded = "[...document.images].filter(image => /samples/.test(image.src) && image.naturalWidth > 0)"
    page.wait_for(f"{loaded}.length == {len(PICTURES) * len(ROWS)}", 60)
    page.settle(60)

    # The table of the parameters that differ, by the name of the row above each column.
    texts = page.evaluate(
        "[...document.querySelectorAll('[role=row]')].map(row => "
        "[...row.querySelectorAll('[role=cell], [role=columnheader]')].map(cell => cell.innerText))"
    )
    lines = [[text.strip().rpartition("\n")[2] for text in line] for line in texts]
    (names,) = [line[2:] for line in lines if "Compare by" in line]
    assert sorted(names) == sorted(ROWS)
    parameters = [line for line in lines if len(line) == 2 + len(ROWS) and "." in line[1]]
    assert {line[1]: dict(zip(names, line[2:], strict=True)) for line in parameters} == {
        "ddpm.T": {"first-try": "500", "long-chain": "1000", "small-latent": "500"},
        "ddpm.schedule": {"first-try": "cosine", "long-chain": "linear", "small-latent": "cosine"},
        "vae.latent_dim": {"first-try": "32", "long-chain": "32", "small-latent": "2"},
    }

    # The scores.
    text = page.evaluate("document.body.textContent")
    assert all(f"{model}/mnist-cnn-v1/fd" in text for model in ("ddpm", "vae"))
    assert all(f"{score:.2f}" in text and f"{5 * score:.2f}" in text for _, score, _ in ROWS.values())

    # The pictures: sharp, and below the name of their row, which the grey level tells.
    names = next(line[1:] for line in lines if line[:1] == ["images"])
    for key in PICTURES:
        assert pictures(page, key) == [[WIDTH, HEIGHT, ROWS[name][2]] for name in names]


def pictures(page: Browser, key: str) -> list[list[int]]:
    """Return width, height and grey level of the loaded pictures of this name, from left to right."""
    name = f"encodeURIComponent({key.replace('/', '~')!r})"
    return page.evaluate(
        f"[...document.images].filter(image => image.src.includes({name}))"
        """.map(image => {
            const canvas = document.createElement('canvas');
            canvas.getContext('2d').drawImage(image, 0, 0);
            const grey = canvas.getContext('2d').getImageData(9, 9, 1, 1).data[0];
            return [image.naturalWidth, image.naturalHeight, grey];
        })"""
    )


def test_table_shows_one_row_per_experiment(page: Browser, server: str, rows: dict[str, Any]) -> None:
    open_page(page, server, rows, TABLE)
    page.wait_for("document.body.innerText.includes('first-try')", 60)
    page.settle(60)
    text = page.text()
    assert f"{len(ROWS) + 1} matching runs" in text  # the older attempt is folded below its replacement
    assert all(name in text for name in ROWS) and "attempt 1" not in text
