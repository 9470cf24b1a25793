"""A team: two clones with their own experiments, rows on a real `mlflow server` with a real PostgreSQL behind
it, data on a remote that speaks S3's protocol (moto's server), all on 127.0.0.1.
"""

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from servers import CREDENTIALS, TrackingServer, postgresql, s3, tracking_server
from toy_pipeline import enter, numbers, rows, run

from rediffuse.params import flatten, load_params
from rediffuse.tracking.row import stage_run
from rediffuse.tracking.store import connect
from rediffuse.tracking.sync import sync

pytestmark = pytest.mark.slow

LOST = "tracking is off for the rest of stage"
LONGEST_WAIT = 10.5  # seconds: two requests of 4 s, and the pause between them
EXPERIMENTS = {"ours": ("larger", 1000), "theirs": ("smaller", 200)}  # of each clone: name and ddpm.T
REMOTE = """[core]
    remote = storage
['remote "storage"']
    url = s3://team/rediffuse
    endpointurl = {endpoint}
"""


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    with postgresql() as uri:
        yield uri


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of everything, and of the server."""
    return tmp_path_factory.mktemp("team")


@pytest.fixture(scope="module")
def server(database: str, folder: Path) -> Iterator[TrackingServer]:
    with tracking_server(database, folder) as started:
        yield started


@pytest.fixture(scope="module")
def team(untracked: Path, server: TrackingServer, folder: Path) -> Iterator[dict[str, Path]]:
    """The clones, each with an experiment that ran at the same time as the other's."""
    clones = {who: folder / who for who in EXPERIMENTS}
    ours, theirs, variables = clones["ours"], clones["theirs"], {"MLFLOW_TRACKING_URI": server.uri}
    shutil.copytree(untracked, ours, symlinks=True)
    with s3("team") as endpoint:
        (ours / ".dvc/config").write_text(REMOTE.format(endpoint=endpoint))
        run(ours, "git", "commit", "-q", "-a", "-m", "DVC remote")
        run(ours, "git", "clone", "-q", "--bare", ".", str(folder / "team.git"))
        run(ours, "git", "remote", "add", "origin", str(folder / "team.git"))
        run(ours, "dvc", "push", **CREDENTIALS)
        run(ours, "git", "clone", "-q", str(folder / "team.git"), str(theirs))
        assert not (theirs / "data/pixels").exists()
        done = run(theirs, "dvc", "repro", "--pull", **CREDENTIALS, **variables)
        assert "Running stage" not in done.stdout and (theirs / "data/pixels/images.npy").exists()

        def experiment(who: str) -> str:
            name, T = EXPERIMENTS[who]
            return run(clones[who], "dvc", "exp", "run", "-n", name, "-S", f"ddpm.T={T}", **variables).stderr

        with ThreadPoolExecutor() as pool:
            assert LOST not in "".join(pool.map(experiment, clones))
        run(ours, "dvc", "exp", "push", "origin", "larger", **CREDENTIALS)
        run(theirs, "dvc", "exp", "pull", "origin", "larger", **CREDENTIALS)
        yield clones


def rows_of(server: TrackingServer) -> dict[str, Any]:
    client = connect(server.uri)
    found = client.search_runs([client.get_experiment_by_name("rediffuse").experiment_id])
    assert len({row.info.run_name for row in found}) == len(found)
    return {row.info.run_name: row for row in found}


def expected(T: int) -> dict[str, float]:
    return {"train_ddpm/loss": T / 20, "ddpm/loss": T / 20, "ddpm/fd": T / 20 + 3}


def test_two_clones_at_once_have_a_complete_row_each_on_the_server_in_the_database_and_in_its_files(
    team: dict[str, Path], server: TrackingServer, database: str, folder: Path
) -> None:
    found = rows_of(server)
    assert found.keys() == {name for name, _ in EXPERIMENTS.values()}
    with psycopg.connect(database) as connection:
        for who, (name, T) in EXPERIMENTS.items():
            row = found[name]
            assert row.info.status == "FINISHED" and row.data.params["ddpm.T"] == str(T)
            assert numbers(row) == expected(T)
            run_id = [row.info.run_id]
            (count,) = connection.execute("SELECT count(*) FROM params WHERE run_uuid = %s", run_id)
            assert count == (len(flatten(load_params(team[who] / "params.yaml"))),)
            points = "SELECT step, value FROM metrics WHERE run_uuid = %s AND key = 'ddpm/loss' ORDER BY step"
            assert list(connection.execute(points, run_id)) == [(10, T / 10), (20, T / 20)]
            # MLflow gives the address mlflow-artifacts:, never the folder, so that no other machine looks for
            # it on its own disk.
            assert row.info.artifact_uri.startswith("mlflow-artifacts:/")
            (files,) = folder.glob(f"artifacts/*/{row.info.run_id}/artifacts")
            assert (files / "metrics/ddpm.json").read_text() == f'{{"fd": {T / 20 + 3}}}'
            assert (files / "recipe/params.yaml").read_bytes() == (team[who] / "params.yaml").read_bytes()
            assert next((files / "images").glob("ddpm~noising*.png"))
            local = {".mlflow", "mlruns", "mlartifacts", "mlflow.db"}
            assert local.isdisjoint(entry.name for entry in team[who].iterdir())


def test_rows_of_a_colleague_are_found_and_left_as_they_are(
    team: dict[str, Path], server: TrackingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a clone of another user with the experiment pulled, `sync` makes no second row and signs none."""
    enter(team["ours"], monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    sync(every=True)
    before = rows_of(server)
    monkeypatch.chdir(team["theirs"])
    monkeypatch.setenv("LOGNAME", "colleague")  # where the name of the user is read from first
    assert {outcome.name: outcome.what for outcome in sync(every=True)}["larger"] == "unchanged"
    after = rows_of(server)
    assert after.keys() == before.keys() and after["larger"].data.tags == before["larger"].data.tags


def test_a_store_of_ones_own_gets_the_row_of_a_pulled_experiment(
    team: dict[str, Path], server: TrackingServer, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(team["theirs"], monkeypatch)
    Path(".mlflow").mkdir()
    shutil.copy(empty_store, ".mlflow/mlflow.db")
    assert {outcome.what for outcome in sync(every=True)} == {"made"}
    row, original = rows(team["theirs"])["larger"], rows_of(server)["larger"]
    assert numbers(row) == numbers(original) == expected(1000)
    assert row.data.params == original.data.params and row.info.status == "FINISHED"
    for tag in ("rediffuse.key", "rediffuse.params", "dvc.baseline", "dvc.exp_name", "dvc.exp_rev"):
        assert row.data.tags[tag] == original.data.tags[tag]
    assert {outcome.what for outcome in sync(every=True)} == {"unchanged"}


def test_server_killed_in_mid_stage_costs_one_line_and_sync_adds_what_was_missed(
    team: dict[str, Path],
    server: TrackingServer,
    database: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    enter(team["ours"], monkeypatch)
    with tracking_server(database, folder) as doomed:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", doomed.uri)
        with stage_run("train_ddpm", load_params()) as stage:
            stage.log_curve(10, {"ddpm/loss": 100.0})
            stage._open_row().flush()
            doomed.kill()
            began = time.monotonic()
            stage.log_curve(20, {"ddpm/loss": 50.0})
        assert time.monotonic() - began < LONGEST_WAIT
    assert capsys.readouterr().err.count(LOST) == 1
    (name,) = rows_of(server).keys() - {name for name, _ in EXPERIMENTS.values()}
    assert name.startswith("repro-") and rows_of(server)[name].info.status == "RUNNING"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    assert {outcome.name: outcome.what for outcome in sync(every=True)}[name] == "completed"
    row = rows_of(server)[name]
    assert row.info.status == "FINISHED" and row.data.tags["stage.train_ddpm.status"] == "finished"
    assert numbers(row) == expected(1000)
    points = connect(server.uri).get_metric_history(row.info.run_id, "ddpm/loss")
    assert sorted((point.step, point.value) for point in points) == [(10, 100.0), (20, 50.0)]
