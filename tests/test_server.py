"""A team's tracking server: a real `mlflow server` with a real PostgreSQL behind it, both on 127.0.0.1.

What the rows hold is asked of MLflow, and of the database and the server's folder of files directly.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from servers import TrackingServer, postgresql, tracking_server
from toy_pipeline import enter
from tracked_project import (
    PROJECT,
    STEPS,
    Checkout,
    expected_metrics,
    finish,
    make_project,
    pictures_of,
    results_of,
    wait_for,
)

from rediffuse.params import flatten, load_params
from rediffuse.tracking.store import connect
from rediffuse.tracking.sync import sync

pytestmark = pytest.mark.slow

LOST = "tracking is off for the rest of stage"
PICTURES = {"ddpm/noising", "ddpm/scores"}
LONGEST_WAIT = 10.5  # seconds: two requests of 4 s, and the pause between them


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    with postgresql() as uri:
        yield uri


@pytest.fixture(scope="module")
def server(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    with tracking_server(database, tmp_path_factory.mktemp("server")) as started:
        yield started


@pytest.fixture(scope="module")
def project(server: TrackingServer, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """The checkout whose stages write to the server, after `dvc repro` and the experiment "larger" with
    ddpm.T=1000.
    """
    checkout = make_project(tmp_path_factory.mktemp("project") / "project", MLFLOW_TRACKING_URI=server.uri)
    said = checkout.dvc("repro")
    assert LOST not in said
    checkout.git("add", ".")
    checkout.git("commit", "-q", "-m", "results")
    said = checkout.dvc("exp", "run", "--temp", "-n", "larger", "-S", "ddpm.T=1000")
    assert LOST not in said
    return checkout


@pytest.fixture
def here(project: Checkout, server: TrackingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The project as working directory and the server as store of this process."""
    move_to(project, server, monkeypatch)


def move_to(checkout: Checkout, server: TrackingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(checkout.root, monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)


def rows_named(server: TrackingServer, prefix: str) -> list[Any]:
    client = connect(server.uri)
    found = client.get_experiment_by_name("rediffuse")
    return list(
        client.search_runs(
            [found.experiment_id],
            f"attributes.run_name LIKE '{prefix}%'",
            order_by=["attributes.start_time ASC"],
        )
    )


def only_row(server: TrackingServer, name: str) -> Any:
    (row,) = rows_named(server, name)
    return row


def ask(database: str, query: str, *values: object) -> list[tuple[Any, ...]]:
    with psycopg.connect(database) as connection:
        return connection.execute(query, values).fetchall()


# One process of two: stages (stage, experiment, value), each begun and held open at the same moment as the
# other's.
HELD = """
import json, os, sys, time
from pathlib import Path
from rediffuse.params import load_params
from rediffuse.tracking.row import stage_run
me, other, folder, stages = sys.argv[1], sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4])
params = load_params()
os.environ["DVC_EXP_BASELINE_REV"] = "a" * 40
def meet(point):
    (folder / f"{me}{point}").touch()
    while not (folder / f"{other}{point}").exists(): time.sleep(0.002)
for number, (stage, experiment, value) in enumerate(stages):
    os.environ["DVC_EXP_NAME"] = experiment
    meet(2 * number)
    with stage_run(stage, params) as run:
        for images in range(50):
            run.log_curve(images, {f"{stage[6:]}/loss": value + images})
        (folder / me).mkdir(exist_ok=True)
        (folder / me / f"{stage}.json").write_text(json.dumps({"end": value}))
        run._open_row().log_results([folder / me / f"{stage}.json"])
        meet(2 * number + 1)
"""
PAIRS = ["pair0", "pair1", "pair2"]


@pytest.fixture(scope="module")
def together(project: Checkout, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Two processes at once: with an experiment each, and then, three times, with another stage each of one
    experiment.
    """
    folder = str(tmp_path_factory.mktemp("together"))
    # Of stages that are not in dvc.lock: what stands there would complete the row of one that ends with these
    # outputs.
    one = [("train_vae", "left", 1000), *(("train_vae", name, 3000) for name in PAIRS)]
    two = [("train_gan", "right", 2000), *(("train_gan", name, 4000) for name in PAIRS)]
    both = [("a", "b", one), ("b", "a", two)]
    processes = [
        project.start("python", "-c", HELD, me, other, folder, json.dumps(stages))
        for me, other, stages in both
    ]
    try:
        for process in processes:
            assert LOST not in finish(process)
    finally:
        for process in processes:
            process.kill()


def test_row_is_complete_on_the_server_in_the_database_and_in_its_files(
    project: Checkout, server: TrackingServer, database: str
) -> None:
    client = connect(server.uri)
    for row, T in ((only_row(server, "repro-"), 500), (only_row(server, "larger"), 1000)):
        assert row.info.status == "FINISHED"
        assert row.data.params["ddpm.T"] == str(T)
        assert results_of(row) == expected_metrics(T)
        assert pictures_of(client, row) == PICTURES
        run_id = row.info.run_id
        assert ask(database, "SELECT count(*) FROM params WHERE run_uuid = %s", run_id) == [
            (len(flatten(load_params(PROJECT / "params.yaml"))),)
        ]
        curve = ask(
            database,
            "SELECT step, value FROM metrics WHERE run_uuid = %s AND key = 'ddpm/loss' ORDER BY step",
            run_id,
        )
        assert curve == [(images, T / (1 + images)) for images in STEPS]
        # MLflow gives the address mlflow-artifacts:, never the folder, so that no other machine looks for it
        # on its own disk.
        assert row.info.artifact_uri.startswith("mlflow-artifacts:/")
        (folder,) = server.folder.glob(f"artifacts/*/{run_id}/artifacts")
        assert (folder / "metrics" / "ddpm.json").read_text() == f'{{"fd": {T / 10}}}'
        assert {path.name for path in (folder / "recipe").iterdir()} >= {
            "params.yaml",
            "dvc.yaml",
            "dvc.lock",
        }
    assert {entry.name for entry in project.root.iterdir()}.isdisjoint(
        {".mlflow", "mlruns", "mlartifacts", "mlflow.db"}
    )


def test_two_experiments_at_once_do_not_mix(together: None, server: TrackingServer) -> None:
    client = connect(server.uri)
    for name, model, value in (("left", "vae", 1000.0), ("right", "gan", 2000.0)):
        row = only_row(server, name)
        assert row.info.status == "FINISHED" and row.data.tags[f"stage.train_{model}.status"] == "finished"
        assert results_of(row) == {f"{model}/loss": value + 49, f"train_{model}/end": value}
        points = client.get_metric_history(row.info.run_id, f"{model}/loss")
        assert sorted((point.step, point.value) for point in points) == [
            (images, value + images) for images in range(50)
        ]


def test_stages_of_one_experiment_that_start_together_share_one_row(
    together: None, server: TrackingServer
) -> None:
    rows = rows_named(server, "pair")
    assert [row.info.run_name for row in rows] == PAIRS
    for row in rows:
        assert results_of(row) == {
            "vae/loss": 3049.0,
            "train_vae/end": 3000.0,
            "gan/loss": 4049.0,
            "train_gan/end": 4000.0,
        }
        assert (
            row.data.tags["stage.train_vae.status"] == row.data.tags["stage.train_gan.status"] == "finished"
        )


def lose_server(
    project: Checkout, folder: Path, lose: Callable[[], None], *command: str, **variables: str
) -> tuple[str, float]:
    """Run the command, and lose the server while its first stage trains: what it says on stderr, and the
    seconds from then to the end of the stage.  The command must succeed.
    """
    process = project.start(*command, TOY_PAUSE=str(folder), **variables)
    try:
        wait_for(folder / "waiting")
        lose()
        (folder / "go").touch()
        _, complained = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, complained
    return complained, float((folder / "seconds").read_text())


def test_server_killed_in_mid_stage_costs_one_line_and_sync_adds_what_was_missed(
    project: Checkout, server: TrackingServer, here: None, tmp_path: Path
) -> None:
    command = ("dvc", "exp", "run", "--temp", "-n", "bereaved", "-S", "ddpm.T=2000", "train_ddpm")
    try:
        complained, seconds = lose_server(project, tmp_path, server.kill, *command)
    finally:
        server.start()
    assert [line.split(LOST)[1].split()[0] for line in complained.splitlines() if LOST in line] == [
        "train_ddpm,"
    ]
    assert seconds < LONGEST_WAIT
    row = only_row(server, "bereaved")
    assert row.info.status == "RUNNING" and set(results_of(row)) <= {
        "train_ddpm/half",
        "ddpm/loss",
    }  # the last that was heard

    assert {outcome.name: outcome.what.split()[0] for outcome in sync(every=True)}["bereaved"] == "completed"
    row = only_row(server, "bereaved")
    assert row.info.status != "RUNNING" and row.data.tags["stage.train_ddpm.status"] == "finished"
    assert results_of(row) == {
        name: value for name, value in expected_metrics(2000).items() if name != "ddpm/fd"
    }
    points = connect(server.uri).get_metric_history(row.info.run_id, "ddpm/loss")
    assert sorted((point.step, point.value) for point in points) == [
        (images, 2000 / (1 + images)) for images in STEPS
    ]
    assert {outcome.what for outcome in sync(every=True)} == {"unchanged"}


def test_server_that_takes_connections_and_no_longer_answers_costs_one_line(
    project: Checkout, server: TrackingServer, tmp_path: Path
) -> None:
    experiment = {"DVC_EXP_NAME": "stuck", "DVC_EXP_BASELINE_REV": "b" * 40}
    try:
        complained, seconds = lose_server(
            project, tmp_path, server.suspend, "python", "stages/train.py", **experiment
        )
    finally:
        server.resume()
    assert complained.count(LOST) == 1
    assert seconds < LONGEST_WAIT


def test_rows_of_a_colleague_are_found_and_left_as_they_are(
    project: Checkout, server: TrackingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a clone of another user with the experiment pulled, on the same server, `sync` makes no second row
    and signs none.
    """
    storage, bare = tmp_path / "storage", tmp_path / "team.git"
    project.dvc("remote", "add", "--local", "-d", "storage", str(storage))
    project.git("init", "-q", "--bare", "-b", "main", str(bare))
    project.git("remote", "add", "origin", str(bare))
    project.git("push", "-q", "origin", "main")
    project.dvc("exp", "push", "origin", "larger")
    project.git("clone", "-q", str(bare), str(tmp_path / "colleague"))
    colleague = Checkout(tmp_path / "colleague")
    colleague.dvc("remote", "add", "--local", "-d", "storage", str(storage))
    colleague.dvc("exp", "pull", "origin", "larger")

    move_to(project, server, monkeypatch)
    sync(every=True)
    before = {row.info.run_id: row.data.tags for row in rows_named(server, "")}
    move_to(colleague, server, monkeypatch)
    monkeypatch.setenv("LOGNAME", "colleague")  # where the name of the user is read from first
    assert [(outcome.name, outcome.what) for outcome in sync(every=True)] == [("larger", "unchanged")]
    assert {row.info.run_id: row.data.tags for row in rows_named(server, "")} == before
