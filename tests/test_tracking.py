"""Rows, found and written by stages that run in this process."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from toy_pipeline import enter, numbers

from rediffuse.commands.ui import ui
from rediffuse.params import Params, flatten, load_params
from rediffuse.tracking.identity import identify
from rediffuse.tracking.results import image_name, legal, read_curve_points, read_metrics
from rediffuse.tracking.row import stage_run
from rediffuse.tracking.store import connect, tracking_uri
from rediffuse.training.curves import write_curve

PROJECT = Path(__file__).resolve().parents[1]
# What the stages of these tests declare.
STAGES = """
stages:
  prepare: {cmd: "true", metrics: [metrics/prepare.json]}
  train_vae: {cmd: "true", metrics: [metrics/train_vae.json]}
  train_ddpm:
    cmd: "true"
    metrics: [{metrics/train_ddpm.json: {cache: false}}]
    plots: [metrics/plots/train_ddpm]
  evaluate_vae: {cmd: "true", metrics: [metrics/vae.json]}
  evaluate_ddpm:
    cmd: "true"
    outs: [data/x]
    metrics: [metrics/ddpm.json]
    plots: [metrics/evaluation/ddpm.json, metrics/plots/evaluate_ddpm, metrics/report/ddpm]
"""
METRICS = {"evaluate_vae": "vae", "evaluate_ddpm": "ddpm"}  # of a stage; otherwise its own name


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> Path:
    """A repository with one commit and an empty store, as working directory.

    Its name needs escaping in a URI.
    """
    root = tmp_path / "my repository"
    (root / ".dvc").mkdir(parents=True)
    (root / ".mlflow").mkdir()
    shutil.copy(empty_store, root / ".mlflow" / "mlflow.db")
    shutil.copy(PROJECT / "params.yaml", root)
    (root / "dvc.yaml").write_text(STAGES)
    (root / ".gitignore").write_text("/.mlflow/\n/.dvc/tmp/\n__pycache__/\n/metrics/\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "start")
    enter(root, monkeypatch)
    return root


@pytest.fixture
def params() -> Params:
    return load_params(PROJECT / "params.yaml")


def git(root: Path, *arguments: str) -> str:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    command = ["git", *who, *arguments]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def client(root: Path) -> Any:
    return connect(f"sqlite:///{root}/.mlflow/mlflow.db")


def rows(root: Path) -> list[Any]:
    found = client(root).get_experiment_by_name("rediffuse")
    return list(client(root).search_runs([found.experiment_id])) if found else []


def only_row(root: Path) -> Any:
    (row,) = rows(root)
    return row


def history(root: Path, name: str) -> list[tuple[int, float]]:
    points = client(root).get_metric_history(only_row(root).info.run_id, name)
    return [(point.step, point.value) for point in points]


def start_python(root: Path, code: str, **environment: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT / "src"), **environment}
    pipe, command = subprocess.PIPE, [sys.executable, "-c", code]
    return subprocess.Popen(command, cwd=root, env=environment, stdout=pipe, stderr=pipe, text=True)


def run_stage(stage: str, params: Params, values: dict[str, float]) -> None:
    """Run a stage that writes its metrics."""
    with stage_run(stage, params):
        path = Path(f"metrics/{METRICS.get(stage, stage)}.json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(values))


def stop_stage(
    stage: str, params: Params, error: BaseException, curves: Mapping[int, dict[str, float]]
) -> None:
    """Run a stage that logs points of curves and ends with the error."""
    with stage_run(stage, params) as run:
        for seen, values in curves.items():
            run.log_curve(seen, values)
        raise error


# One row per experiment


def test_stages_of_one_experiment_share_one_row(
    repository: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = git(repository, "rev-parse", "HEAD")
    monkeypatch.setenv("DVC_EXP_NAME", "it's-ours")
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", head)
    run_stage("train_ddpm", params, {"loss": 0.5})
    run_stage("prepare", params, {})
    row = only_row(repository)
    assert (row.info.run_name, row.info.status) == ("it's-ours", "FINISHED")
    assert row.data.tags["stage.train_ddpm.status"] == row.data.tags["stage.prepare.status"] == "finished"
    assert row.data.tags["mlflow.source.git.commit"] == row.data.tags["dvc.baseline"] == head
    ours = {name for name in row.data.metrics if not name.startswith("system/")}
    assert ours == {"train_ddpm/loss", "seconds/train_ddpm", "seconds/prepare"}
    assert row.data.params == {name: str(value) for name, value in flatten(params).items()}


def test_a_row_is_a_commit_and_parameters_or_an_experiment_of_a_baseline(
    repository: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = identify(repository, flatten(params))
    assert identify(repository, flatten(params)) == first
    other = identify(repository, {**flatten(params), "ddpm.T": 1000})
    git(repository, "commit", "-q", "--allow-empty", "-m", "next")
    later = identify(repository, flatten(params))
    assert len({first.key, other.key, later.key}) == len({first.name, other.name, later.name}) == 3
    monkeypatch.setenv("DVC_EXP_NAME", "again")
    keys = []
    for baseline, value in (("a" * 40, 500), ("b" * 40, 500), ("a" * 40, 1000)):
        monkeypatch.setenv("DVC_EXP_BASELINE_REV", baseline)
        keys.append(identify(repository, {**flatten(params), "ddpm.T": value}).key)
    assert keys[0] == keys[2] != keys[1]
    monkeypatch.delenv("DVC_EXP_NAME")
    shutil.rmtree(repository / ".git")
    assert identify(repository, flatten(params)).name.startswith("repro-nocommit-")


def test_code_that_differs_from_the_commit_makes_another_row_and_is_kept_as_a_patch(
    repository: Path, params: Params
) -> None:
    for name in ("dvc.lock", "params.yaml", "README.md"):  # the pipeline writes it, or it is no code
        (repository / name).write_text("{}")
    clean = identify(repository, flatten(params))
    assert clean.tags["git.dirty"] == "false" and not clean.code_diff
    (repository / "src" / "__pycache__").mkdir(parents=True)
    (repository / "src" / "__pycache__" / "model.pyc").write_bytes(b"x")
    (repository / "src" / "weights.bin").write_bytes(bytes(range(256)))
    new = identify(repository, flatten(params))
    assert new.tags["git.dirty"] == "true" and new.key != clean.key and new.name.startswith(f"{clean.name}-")
    assert not git(repository, "diff", "--cached", "--name-only")  # the user's index is untouched
    clone = repository.parent / "clone"
    git(repository.parent, "clone", "-q", str(repository), str(clone))
    subprocess.run(["git", "apply", "--binary"], cwd=clone, input=new.code_diff, check=True)
    assert [path.name for path in (clone / "src").iterdir()] == ["weights.bin"]
    assert (clone / "src" / "weights.bin").read_bytes() == bytes(range(256))


def test_two_processes_at_once_make_one_row_each_time_and_one_store(repository: Path) -> None:
    (repository / ".mlflow" / "mlflow.db").unlink()
    code = (
        "import os, time, pathlib, mlflow.store.tracking.sqlalchemy_store\n"
        "from rediffuse.params import load_params; from rediffuse.tracking.row import stage_run\n"
        "params = load_params(); os.environ['DVC_EXP_BASELINE_REV'] = 'a' * 40\n"
        "for i in range(4):\n"
        "    print('ready', flush=True)\n"
        "    while not pathlib.Path(f'.dvc/go{i}').exists(): time.sleep(0.002)\n"
        "    os.environ['DVC_EXP_NAME'] = f'e{i}'\n"
        "    with stage_run(os.environ['STAGE'], params): pass\n"
    )
    both = [start_python(repository, code, STAGE=stage) for stage in ("train_vae", "train_ddpm")]
    for attempt in range(4):
        for process in both:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        (repository / ".dvc" / f"go{attempt}").touch()
    for process in both:
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0 and "tracking is off" not in said
    assert sorted(row.info.run_name for row in rows(repository)) == ["e0", "e1", "e2", "e3"]
    assert {row.info.status for row in rows(repository)} == {"FINISHED"}


# Where rows are kept


def test_tracking_uri_of_the_user_wins_unless_it_is_relative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for chosen in ("http://127.0.0.1:5000", "postgresql://u@h/rows", "sqlite:////x/rows.db"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", chosen)
        assert tracking_uri(tmp_path) == chosen
    for chosen in ("sqlite:///mlflow.db", "mlruns", "./mlruns"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", chosen)
        assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/.mlflow/mlflow.db"
        assert chosen in capsys.readouterr().err


def test_rows_keep_their_files_when_the_checkout_is_moved(
    repository: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stage("evaluate_vae", params, {"fd": 1.0})
    run_id = only_row(repository).info.run_id
    moved = repository.parent / "moved_50%"
    monkeypatch.chdir(repository.parent)
    repository.rename(moved)
    monkeypatch.chdir(moved)
    path = client(moved).download_artifacts(run_id, "metrics/vae.json", str(moved / ".dvc"))
    assert json.loads(Path(path).read_text()) == {"fd": 1.0}
    run_stage("evaluate_ddpm", params, {"fd": 2.0})
    for row in rows(moved):
        assert client(moved).list_artifacts(row.info.run_id, "metrics")
    assert not repository.exists()


# What is logged, and that logging it again changes nothing


def test_replayed_points_are_not_doubled(repository: Path, params: Params) -> None:
    points = [(images, 1 / (3 + images)) for images in range(0, 5000, 100)]
    early = {seen: {"ddpm/loss": loss} for seen, loss in points[:30]}
    with pytest.raises(KeyboardInterrupt):
        stop_stage("train_ddpm", params, KeyboardInterrupt(), early)
    assert only_row(repository).info.status == "FAILED"
    with stage_run("train_ddpm", params) as run:
        for seen, loss in points[20:]:  # from the last checkpoint on
            run.log_curve(seen, {"ddpm/loss": loss})
        curve = [{"images": seen, "loss": loss} for seen, loss in points]
        write_curve(Path("metrics/plots/train_ddpm/curves.csv"), curve)
    assert sorted(history(repository, "ddpm/loss")) == points
    assert only_row(repository).data.metrics["ddpm/loss"] == points[-1][1]


def test_more_points_than_a_batch_are_all_logged_in_time_order(repository: Path, params: Params) -> None:
    with stage_run("train_vae", params) as run:
        for seen in range(1201):
            run.log_curve(seen, {"vae/loss": float(-seen), "vae/kl": 1.0})
    points = client(repository).get_metric_history(only_row(repository).info.run_id, "vae/loss")
    assert [point.step for point in sorted(points, key=lambda point: point.timestamp)] == list(range(1201))


def test_names_and_values_are_made_to_fit_mlflow(
    repository: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert legal("sample_ddpm/fd+ü (%)") == "sample_ddpm/fd__ ___"
    odd = {"data.set": "x" * 7000, "data.f*lter": [1, 2]}
    monkeypatch.setattr("rediffuse.tracking.row.flatten", lambda _: odd)
    with pytest.raises(ValueError, match="é"):
        stop_stage("train_vae", params, ValueError("é" * 9000), {0: {"x/a@b%c": 1.0, "x/" + "n" * 300: 2.0}})
    row = only_row(repository)
    assert row.data.params == {"data.set": "x" * 5997 + "...", "data.f_lter": "[1, 2]"}
    assert numbers(row) == {"x/a_b_c": 1.0, "x/" + "n" * 248: 2.0}
    assert row.data.tags["stage.train_vae.error"] == "ValueError: " + "é" * (8000 - 15) + "..."


def test_metrics_file_gives_numbers_by_nested_name(tmp_path: Path) -> None:
    path = tmp_path / "ddpm.json"
    nested = {"cnn-v1": {"fd": 1.5, "kid": {"mean": -0.25}}, "seeds": [4, 5]}
    path.write_text(json.dumps({"n": 10, "exact": True, "instrument": "cnn"} | nested))
    expected = {"n": 10.0, "cnn-v1/fd": 1.5, "cnn-v1/kid/mean": -0.25, "seeds/0": 4.0, "seeds/1": 5.0}
    assert read_metrics(path) == {f"ddpm/{name}": value for name, value in expected.items()}


def test_curves_and_pictures_are_named_after_model_and_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics" / "plots" / "train_vae" / "curves.csv"
    write_curve(path, [{"images": 64, "loss": 0.1}, {"images": 128, "loss": 1 / 3, "validation": 2e-17}])
    last = {"vae/loss": 1 / 3, "vae/validation": 2e-17}
    assert list(read_curve_points(path)) == [(64, {"vae/loss": 0.1}), (128, last)]
    assert image_name(Path("metrics/report/vae/latent.png")) == "vae/latent"
    assert image_name(Path("/home/plots/me/metrics/plots/sample_vae/samples.png")) == "vae/samples"
    with pytest.raises(ValueError, match="below metrics/plots"):
        image_name(Path("metrics/report/samples.png"))


def test_pictures_records_and_tables_of_a_stage(repository: Path, params: Params) -> None:
    shades = np.random.default_rng(0).integers(0, 256, (2, 30, 600), dtype=np.uint8)
    for folder in ("report/ddpm", "evaluation", "plots/evaluate_ddpm"):
        Path("metrics", folder).mkdir(parents=True)
    Path("metrics/evaluation/ddpm.json").write_text(json.dumps({"scores": {"fd": 1.5}}))
    Path("metrics/plots/evaluate_ddpm/classes.csv").write_text("class,fd\nbag,1.5\n")
    picture = Path("metrics/report/ddpm/samples.png")
    with stage_run("evaluate_ddpm", params, complete=True) as run:
        Image.fromarray(shades[0]).save(picture)
        run._open_row().log_results([picture])
        Image.fromarray(shades[1]).save(picture)  # it replaces the first
    row = only_row(repository)
    assert numbers(row) == {}  # a full record is a file, a table by class is no curve
    names = [Path(item.path).name for item in client(repository).list_artifacts(row.info.run_id, "images")]
    # MLflow's pages parse the names: key+step+N+timestamp+N+id, a PNG and a WebP marked "compressed".
    assert sorted(name.rpartition(".")[2] for name in names) == ["png", "webp"]
    for name in names:
        parts = name.rpartition(".")[0].split("+")
        assert parts[:4] == ["ddpm~samples", "step", "0", "timestamp"] and int(parts[4]) > 0
        assert (parts[-1] == "compressed") == name.endswith(".webp")
        path = client(repository).download_artifacts(row.info.run_id, f"images/{name}", ".dvc")
        with Image.open(path) as logged:
            np.testing.assert_array_equal(np.asarray(logged.convert("L")), shades[1])
    assert row.data.tags["mlflow.loggedImages"] == "True"
    (record,) = client(repository).list_artifacts(row.info.run_id, "metrics/evaluation")
    assert record.path == "metrics/evaluation/ddpm.json"


# Attempts


def test_running_everything_again_is_a_new_attempt_below_which_the_old_one_is_folded(
    repository: Path, params: Params
) -> None:
    for value in (1.0, 2.0, 3.0):
        for stage in ("prepare", "train_vae"):
            run_stage(stage, params, {"value": value})
    first, second, last = sorted(rows(repository), key=lambda row: row.data.tags["rediffuse.attempt"])
    assert last.data.tags["rediffuse.superseded"] == "false" and "mlflow.parentRunId" not in last.data.tags
    assert last.info.run_name.startswith("repro-") and "attempt" not in last.info.run_name
    for number, row in ((1, first), (2, second)):
        assert row.data.tags["rediffuse.superseded"] == "true"
        assert row.data.tags["mlflow.parentRunId"] == last.info.run_id
        assert row.info.run_name == f"{last.info.run_name} (attempt {number})"
        assert numbers(row) == {"prepare/value": float(number), "train_vae/value": float(number)}
    assert numbers(last) == {"prepare/value": 3.0, "train_vae/value": 3.0}


def test_an_experiment_tried_again_with_other_parameters_is_a_new_attempt(
    repository: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "again")
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", git(repository, "rev-parse", "HEAD"))
    with pytest.raises(RuntimeError):
        stop_stage("train_ddpm", params, RuntimeError("no luck"), {})
    other = params.model_copy(update={"seed": 7})
    run_stage("train_ddpm", other, {"value": 1.0})
    old, new = sorted(rows(repository), key=lambda row: row.data.tags["rediffuse.attempt"])
    assert (old.data.params["seed"], new.data.params["seed"]) == ("1", "7")
    assert old.data.tags["rediffuse.superseded"] == "true" and old.info.status == "FAILED"
    assert numbers(new) == {"train_ddpm/value": 1.0} and new.info.run_name == "again"


def test_another_checkout_that_writes_to_the_same_store_has_a_row_of_its_own(
    repository: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{repository}/.mlflow/mlflow.db")
    clone = repository.parent / "clone"
    git(repository.parent, "clone", "-q", str(repository), str(clone))
    (clone / ".dvc").mkdir(exist_ok=True)
    with stage_run("train_vae", params) as run:
        run.log_curve(1, {"vae/x": 1.0})
        run._open_row()
        with contextlib.chdir(clone):  # while the first is running
            run_stage("train_vae", params, {"value": 2.0})
    run_stage("evaluate_vae", params, {"value": 1.0})
    ours, theirs = sorted(rows(repository), key=lambda row: row.info.start_time)
    assert ours.data.tags["rediffuse.key"] == theirs.data.tags["rediffuse.key"]
    assert numbers(ours) == {"vae/x": 1.0, "vae/value": 1.0}
    assert numbers(theirs) == {"train_vae/value": 2.0}
    assert {row.data.tags["rediffuse.superseded"] for row in (ours, theirs)} == {"false"}


# Never in the way


def test_failed_stage_goes_on_in_its_row_and_other_numbers_replace_the_former(
    repository: Path, params: Params
) -> None:
    points = {0: {"vae/fd": 9.0, "vae/is": 2.0}, 1: {"vae/loss": 2.0}}
    with pytest.raises(RuntimeError, match="out of luck"):
        stop_stage("evaluate_vae", params, RuntimeError("out of luck"), points)
    row = only_row(repository)
    assert (row.info.status, row.data.tags["stage.evaluate_vae.status"]) == ("FAILED", "failed")
    assert row.data.tags["stage.evaluate_vae.error"] == "RuntimeError: out of luck"
    assert numbers(row) == {"vae/loss": 2.0, "vae/fd": 9.0, "vae/is": 2.0}
    Path("metrics").mkdir()
    Path("metrics/vae.json").write_text('{"fd": 3.0, "is": 2.0}')
    with pytest.raises(SystemExit), stage_run("evaluate_vae", params):
        sys.exit(0)
    row = only_row(repository)
    assert (row.info.status, row.data.tags["stage.evaluate_vae.status"]) == ("FINISHED", "finished")
    assert row.data.tags["stage.evaluate_vae.error"] == ""
    assert row.data.metrics["vae/fd"] == 3.0 and history(repository, "vae/is") == [(0, 2.0)]


def test_terminated_stage_is_failed_in_the_row(repository: Path) -> None:
    code = (
        "import time\nfrom rediffuse.params import load_params\n"
        "from rediffuse.tracking.row import stage_run\n"
        "with stage_run('train_ddpm', load_params()) as run:\n"
        "    run.log_curve(5, {'ddpm/loss': 1.0}); print('training', flush=True); time.sleep(60)\n"
    )
    process = start_python(repository, code)
    assert process.stdout is not None and process.stdout.readline() == "training\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    row = only_row(repository)
    assert (row.info.status, row.data.tags["stage.train_ddpm.status"]) == ("FAILED", "failed")
    assert numbers(row) == {"ddpm/loss": 1.0}


@pytest.fixture
def deaf_server() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    "broken", ["server down", "server deaf", "store cannot be made", "not a database", "not a repository"]
)
def test_stage_goes_on_without_a_store(
    repository: Path,
    params: Params,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    deaf_server: str,
    broken: str,
) -> None:
    if broken == "server down":
        with socket.create_server(("127.0.0.1", 0)) as server:
            closed = server.getsockname()[1]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{closed}")
    elif broken == "server deaf":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", deaf_server)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    elif broken == "store cannot be made":
        shutil.rmtree(".mlflow")
        Path(".mlflow").touch()
    elif broken == "not a database":
        Path(".mlflow/mlflow.db").write_bytes(b"something else" * 100)
    else:
        monkeypatch.setattr("rediffuse.tracking.row.repository_root", lambda: Path("/proc/nowhere"))
    began = time.monotonic()
    with stage_run("evaluate_ddpm", params, complete=True) as run:
        for step in range(3):
            run.log_curve(step, {"ddpm/loss": 1.0})
        run.log_model(3, None)
    assert time.monotonic() - began < 10
    said = capsys.readouterr().err
    assert said.count("tracking is off for the rest of stage evaluate_ddpm") == 1
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("switch", [{"REDIFFUSE_TRACKING": "off"}, {"RANK": "1"}])
def test_switched_off_or_in_a_second_process_of_training_nothing_is_imported_or_written(
    repository: Path, switch: dict[str, str]
) -> None:
    shutil.rmtree(".mlflow")
    code = (
        "import sys\nfrom rediffuse.params import load_params; from rediffuse.tracking.row import stage_run\n"
        "with stage_run('train_ddpm', load_params(), complete=True) as run:\n"
        "    run.log_curve(1, {'a': 1.0}); run.log_model(1, None)\n"
        "print(sorted({'mlflow', 'dvc', 'torch'} & set(sys.modules)))\n"
    )
    process = start_python(repository, code, **switch)
    assert process.communicate(timeout=30) == ("[]\n", "")
    assert not Path(".mlflow").exists()


# `rediffuse ui`


def test_pages_come_from_a_server_that_is_started_or_from_the_one_that_is_named(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client(repository).create_experiment("another")  # the number in the address is that of ours
    started = list[list[str]]()
    monkeypatch.setattr("os.execv", lambda path, command: started.append(command))
    page = "experiments/2/runs?workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey=compare"
    ui(5001)
    assert capsys.readouterr().out.strip().endswith(f"http://127.0.0.1:5001/#/{page}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@rows.example.org/")
    monkeypatch.setattr("rediffuse.commands.ui.experiment_id", lambda *_: "2")  # as the server says
    ui(5001)
    assert capsys.readouterr().out.strip().endswith(f" https://rows.example.org/#/{page}")
    (command,) = started
    assert f"sqlite:///{repository}/.mlflow/mlflow.db" in command and "127.0.0.1" in command
