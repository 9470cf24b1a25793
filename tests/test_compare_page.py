"""MLflow's pages in a real browser: rows that stages have written can be compared there, numbers and pictures, side by side."""

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
from rediffuse.tracking.row import stage_run
from rediffuse.tracking.store import connect
from rediffuse.tracking.views import update_view

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

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason=f"no browser: none of {', '.join(PROGRAMS)} is on PATH"),
]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository in which the experiments of ROWS have run, as far as tracking sees, and one of them twice."""
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
        patch.setenv("DVC_EXP_BASELINE_REV", subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip())
        for name, (changes, score, grey) in ROWS.items():
            patch.setenv("DVC_EXP_NAME", name)
            run_stage(changes, score, grey)
            if name == "long-chain":  # again: a second attempt, which replaces the first
                run_stage(changes, score, grey)
    client = connect(f"sqlite:///{root}/.mlflow/mlflow.db")
    update_view(client, client.get_experiment_by_name("rediffuse").experiment_id)  # as the last stage does
    return root


def run_stage(changes: dict[str, dict[str, Any]], score: float, grey: int) -> None:
    """What the stages of an experiment write, logged by one of them."""
    content = yaml.safe_load((PROJECT / "params.yaml").read_text())
    for group, values in changes.items():
        content[group].update(values)
    Path("params.yaml").write_text(yaml.safe_dump(content))
    for model, factor in (("ddpm", 1.0), ("vae", 5.0)):
        picture = Path(f"metrics/plots/sample_{model}/samples.png")
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (WIDTH, HEIGHT), grey).save(picture)
        Path(f"metrics/{model}.json").write_text(json.dumps({"mnist-cnn-v1": {"fd": factor * score, "recall": 0.5}}))
    with stage_run("evaluate_ddpm", load_params()) as run:
        run.log_results(Path("metrics"))


@pytest.fixture(scope="module")
def rows(repository: Path) -> dict[str, Any]:
    """All rows by name."""
    client = connect(f"sqlite:///{repository}/.mlflow/mlflow.db")
    found = {row.info.run_name: row for row in client.search_runs([client.get_experiment_by_name("rediffuse").experiment_id])}
    assert sorted(found) == sorted([*ROWS, "long-chain (attempt 1)"])
    return found


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with tracking_server(f"sqlite:///{repository}/.mlflow/mlflow.db", tmp_path_factory.mktemp("server")) as started:
        yield started.uri


@pytest.fixture(scope="module")
def page() -> Iterator[Browser]:
    with Browser(1600, 2000, first=NO_ASSISTANT) as browser:
        yield browser


def open_page(page: Browser, server: str, rows: dict[str, Any], address: str) -> None:
    experiment = rows["first-try"].info.experiment_id
    page.open(server + address.format(experiment=experiment))


def test_compare_view_shows_parameters_scores_and_pictures_of_all_rows(page: Browser, server: str, rows: dict[str, Any]) -> None:
    open_page(page, server, rows, COMPARE)
    expected = len(PICTURES) * len(ROWS)
    loaded = "[...document.images].filter(image => /samples/.test(image.src) && image.naturalWidth > 0)"
    page.wait_for(f"{loaded}.length == {expected}", 60)
    page.settle(60)

    # The table of parameters, by the name of the row above each column: only what differs.
    cells = "[...document.querySelectorAll('[role=row]')].map(row => [...row.querySelectorAll('[role=cell], [role=columnheader]')]"
    lines = [[text.strip().rpartition("\n")[2] for text in line] for line in page.evaluate(cells + ".map(cell => cell.innerText))")]
    (names,) = [line[2:] for line in lines if "Compare by" in line]
    assert sorted(names) == sorted(ROWS)
    differing = {line[1]: dict(zip(names, line[2:], strict=True)) for line in lines if len(line) == 2 + len(ROWS) and "." in line[1]}
    assert differing == {
        "ddpm.T": {"first-try": "500", "long-chain": "1000", "small-latent": "500"},
        "ddpm.schedule": {"first-try": "cosine", "long-chain": "linear", "small-latent": "cosine"},
        "vae.latent_dim": {"first-try": "32", "long-chain": "32", "small-latent": "2"},
    }

    # The scores, as bars with their values.
    text = page.evaluate("document.body.textContent")
    for score in ("ddpm/mnist-cnn-v1/fd", "vae/mnist-cnn-v1/fd"):
        assert score in text
    for _, score, _ in ROWS.values():
        assert f"{score:.2f}" in text and f"{5 * score:.2f}" in text

    # The pictures: sharp, and below the name of their row, which the grey level tells.
    names = next(line[1:] for line in lines if line[:1] == ["images"])
    assert sorted(names) == sorted(ROWS)
    for key in PICTURES:
        assert pictures(page, key) == [[WIDTH, HEIGHT, ROWS[name][2]] for name in names]


def pictures(page: Browser, key: str) -> list[list[int]]:
    """Width, height and grey level of the pictures of this name that the page has loaded, from left to right."""
    return page.evaluate(
        f"""[...document.images].filter(image => image.src.includes(encodeURIComponent({key.replace("/", "~")!r}))).map(image => {{
            const canvas = document.createElement('canvas');
            canvas.getContext('2d').drawImage(image, 0, 0);
            return [image.naturalWidth, image.naturalHeight, canvas.getContext('2d').getImageData(9, 9, 1, 1).data[0]];
        }})"""
    )


def test_table_shows_one_row_per_experiment(page: Browser, server: str, rows: dict[str, Any]) -> None:
    open_page(page, server, rows, TABLE)
    page.wait_for("document.body.innerText.includes('first-try')", 60)
    page.settle(60)
    text = page.text()
    assert f"{len(ROWS) + 1} matching runs" in text  # the older attempt is there, folded below the row that replaced it
    assert all(name in text for name in ROWS)
    assert "attempt 1" not in text


def test_compare_button_leads_to_all_parameters_and_metrics(page: Browser, server: str, rows: dict[str, Any]) -> None:
    ids = json.dumps([rows[name].info.run_id for name in ROWS], separators=(",", ":"))
    open_page(page, server, rows, f"/#/compare-runs?runs={ids}&experiments=[%22{{experiment}}%22]")
    page.wait_for("document.body.innerText.includes('Comparing 3 Runs')", 60)
    page.settle(60)
    text = " ".join(page.text().split())
    assert "Run Name: first-try long-chain small-latent" in text
    assert "ddpm.T 500 1000 500" in text
    for model, values in (("ddpm", "1.72 1.91 2.53"), ("vae", "8.6 9.55 12.65")):  # the names stand in a table of their own
        assert f"{model}/mnist-cnn-v1/fd" in text and values in text
