"""The row in MLflow: one per experiment, complete, never doubled, and never in the way of a stage."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from servers import tracking_server

from rediffuse.commands.ui import ui
from rediffuse.params import Params, flatten, load_params
from rediffuse.runtime.errors import UserError
from rediffuse.tracking.identity import identify
from rediffuse.tracking.results import image_name, legal, read_curve_points, read_metrics
from rediffuse.tracking.row import Run, stage_run
from rediffuse.tracking.store import connect, experiment_id, repository_root, tracking_uri
from rediffuse.training.curves import write_curve

PROJECT = Path(__file__).resolve().parents[1]
FOREIGN = ("DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV", "MLFLOW_TRACKING_URI", "REDIFFUSE_TRACKING", "RANK")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_store: Path) -> Path:
    """A repository with one commit and an empty store, as working directory; its name needs escaping in an URI."""
    root = tmp_path / "my repository"
    (root / ".dvc").mkdir(parents=True)
    (root / ".mlflow").mkdir()
    shutil.copy(empty_store, root / ".mlflow" / "mlflow.db")
    shutil.copy(PROJECT / "params.yaml", root)
    (root / ".gitignore").write_text("/.mlflow/\n/.dvc/tmp/\n__pycache__/\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "start")
    for name in FOREIGN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def params() -> Params:
    return load_params(PROJECT / "params.yaml")


def git(root: Path, *arguments: str) -> str:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    return subprocess.run(["git", *who, *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def client(root: Path) -> Any:
    return connect(f"sqlite:///{root}/.mlflow/mlflow.db")


def rows(root: Path) -> list[Any]:
    found = client(root).get_experiment_by_name("rediffuse")
    return list(client(root).search_runs([found.experiment_id])) if found else []


def only_row(root: Path) -> Any:
    (row,) = rows(root)
    return row


def numbers(row: Any) -> dict[str, float]:
    """The row's metrics without those that time and machine decide."""
    return {name: value for name, value in row.data.metrics.items() if not name.startswith(("seconds/", "system/"))}


def history(root: Path, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client(root).get_metric_history(only_row(root).info.run_id, name)]


def images(root: Path) -> list[str]:
    return [Path(item.path).name for item in client(root).list_artifacts(only_row(root).info.run_id, "images")]


def start_python(root: Path, code: str, **environment: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT / "src"), **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", code], cwd=root, env=environment, stdout=pipe, stderr=pipe, text=True)


def log_numbers(run: Run, values: dict[str, float]) -> None:
    """Numbers as a stage logs them: from files of metrics."""
    files: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        stem, _, key = name.partition("/")
        files.setdefault(stem, {})[key] = value
    with tempfile.TemporaryDirectory() as folder:
        for stem, numbers in files.items():
            Path(folder, f"{stem}.json").write_text(json.dumps(numbers))
        run.log_results(Path(folder))


def stop_stage(stage: str, params: Params, error: BaseException, log: Callable[[Run], object]) -> None:
    """A stage that logs and then ends with the error."""
    with stage_run(stage, params) as run:
        log(run)
        raise error


# One row per experiment


def test_stages_of_one_experiment_share_one_row(repository: Path, params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "it's-ours")
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", git(repository, "rev-parse", "HEAD"))
    with stage_run("train_ddpm", params) as run:
        log_numbers(run, {"train_ddpm/loss": 0.5})
        assert only_row(repository).info.status == "RUNNING"
        assert only_row(repository).data.tags["stage.train_ddpm.status"] == "running"
    with stage_run("sample_ddpm", params):
        pass
    row = only_row(repository)
    assert row.info.run_name == "it's-ours"
    assert row.info.status == "FINISHED"
    assert row.data.tags["stage.train_ddpm.status"] == row.data.tags["stage.sample_ddpm.status"] == "finished"
    assert row.data.tags["mlflow.source.git.commit"] == row.data.tags["dvc.baseline"] == git(repository, "rev-parse", "HEAD")
    assert row.data.tags["dvc.exp_name"] == "it's-ours"
    assert {name for name in row.data.metrics if not name.startswith("system/")} == {
        "train_ddpm/loss",
        "seconds/train_ddpm",
        "seconds/sample_ddpm",
    }
    assert row.data.params == {name: str(value) for name, value in flatten(params).items()}


def test_plain_repro_has_a_row_per_commit_and_parameters(repository: Path, params: Params) -> None:
    first = identify(repository, flatten(params))
    assert first.name == f"repro-{git(repository, 'rev-parse', '--short=7', 'HEAD')}-{first.tags['rediffuse.params'][:8]}"
    assert identify(repository, flatten(params)) == first
    other = identify(repository, {**flatten(params), "ddpm.T": 1000})
    git(repository, "commit", "-q", "--allow-empty", "-m", "next")
    later = identify(repository, flatten(params))
    assert len({first.key, other.key, later.key}) == len({first.name, other.name, later.name}) == 3


def test_an_experiment_is_its_baseline_and_name(repository: Path, params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_EXP_NAME", "again")
    keys = []
    for baseline, value in (("a" * 40, 500), ("b" * 40, 500), ("a" * 40, 1000)):
        monkeypatch.setenv("DVC_EXP_BASELINE_REV", baseline)
        keys.append(identify(repository, {**flatten(params), "ddpm.T": value}).key)
    assert keys[0] == keys[2] != keys[1]


def test_code_that_differs_from_the_commit_makes_another_row_and_can_be_applied_again(repository: Path, params: Params) -> None:
    for name in ("metrics/ddpm.json", "dvc.lock", "params.yaml", "README.md"):  # what the pipeline writes, or does not read
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text("{}")
    clean = identify(repository, flatten(params))
    assert clean.tags["git.dirty"] == "false" and not clean.code_diff
    (repository / "src").mkdir()
    (repository / "src" / "model.py").write_text("a = 1\n")
    (repository / "src" / "weights.bin").write_bytes(bytes(range(256)))
    (repository / "src" / "__pycache__").mkdir()
    (repository / "src" / "__pycache__" / "model.pyc").write_bytes(b"x")
    new = identify(repository, flatten(params))
    assert new.tags["git.dirty"] == "true" and new.name.startswith(f"{clean.name}-") and new.key != clean.key
    assert "src" in git(repository, "status", "--porcelain") and not git(repository, "diff", "--cached", "--name-only")
    git(repository, "add", "src")
    git(repository, "commit", "-q", "-m", "model")
    assert not identify(repository, flatten(params)).code_diff
    (repository / "src" / "model.py").unlink()
    changed = identify(repository, flatten(params))
    for identity, commit, files in ((new, "HEAD~1", {"model.py", "weights.bin"}), (changed, "HEAD", {"weights.bin"})):
        clone = repository.parent / f"clone of {commit}"
        git(repository.parent, "clone", "-q", str(repository), str(clone))
        git(clone, "checkout", "-q", commit)
        subprocess.run(["git", "apply", "--binary"], cwd=clone, input=identity.code_diff, check=True)
        assert {path.name for path in (clone / "src").iterdir()} == files
        assert (clone / "src" / "weights.bin").read_bytes() == bytes(range(256))


def test_repository_without_a_commit_still_has_a_name(repository: Path, params: Params) -> None:
    shutil.rmtree(repository / ".git")
    assert identify(repository, flatten(params)).name.startswith("repro-nocommit-")


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


def test_store_is_of_the_parent_repository_in_a_temporary_workspace(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = repository / ".dvc" / "tmp" / "exps" / "tmp1"
    (workspace / ".dvc").mkdir(parents=True)
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("DVC_ROOT", str(repository))
    assert repository_root() == repository
    uri = tracking_uri(repository_root())
    assert uri == f"sqlite:///{repository}/.mlflow/mlflow.db"
    store = connect(uri)
    location = store.get_experiment(experiment_id(store, uri, repository)).artifact_location
    assert location == (repository / ".mlflow" / "artifacts").as_uri()


@pytest.mark.parametrize("chosen", ["http://127.0.0.1:5000", "postgresql://user@host/rows", "sqlite:////somewhere/rows.db"])
def test_tracking_uri_of_the_user_wins(repository: Path, monkeypatch: pytest.MonkeyPatch, chosen: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", chosen)
    assert tracking_uri(repository) == chosen


@pytest.mark.parametrize("chosen", ["sqlite:///mlflow.db", "mlruns", "./mlruns"])
def test_relative_tracking_uri_is_refused_aloud(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], chosen: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", chosen)
    assert tracking_uri(repository) == f"sqlite:///{repository}/.mlflow/mlflow.db"
    assert chosen in capsys.readouterr().err


def test_nothing_is_left_in_the_working_directory(repository: Path, params: Params) -> None:
    with stage_run("prepare", params) as run:
        run.log_results()
    assert git(repository, "status", "--porcelain") == ""
    assert {path.name for path in repository.iterdir()} == {".dvc", ".git", ".gitignore", ".mlflow", "params.yaml"}
    logged = client(repository).list_artifacts(only_row(repository).info.run_id, "recipe")
    described = {"recipe/environment"}  # where the process has imported torch
    assert {item.path for item in logged} - described == {"recipe/files.json", "recipe/params.yaml"}


# What is logged, and that logging it again changes nothing


def test_replayed_points_are_not_doubled(repository: Path, params: Params) -> None:
    points = [(images, 1 / (3 + images)) for images in range(0, 5000, 100)]
    with pytest.raises(KeyboardInterrupt):
        stop_stage(
            "train_ddpm", params, KeyboardInterrupt(), lambda run: [run.log_curve(seen, {"ddpm/loss": loss}) for seen, loss in points[:30]]
        )
    assert only_row(repository).info.status == "FAILED"
    curves = Path("metrics/plots/train_ddpm/curves.csv")
    with stage_run("train_ddpm", params) as run:
        for seen, loss in points[20:]:  # from the last checkpoint on
            run.log_curve(seen, {"ddpm/loss": loss})
        write_curve(curves, [{"images": seen, "loss": loss} for seen, loss in points])
        run.log_results(curves)
    assert sorted(history(repository, "ddpm/loss")) == points
    assert only_row(repository).data.metrics["ddpm/loss"] == points[-1][1]


def test_more_points_than_a_batch_are_all_logged_in_time_order(repository: Path, params: Params) -> None:
    with stage_run("train_vae", params) as run:
        for seen in range(1201):
            run.log_curve(seen, {"vae/loss": float(-seen), "vae/kl": 1.0})
    points = client(repository).get_metric_history(only_row(repository).info.run_id, "vae/loss")
    assert [point.step for point in sorted(points, key=lambda point: point.timestamp)] == list(range(1201))


def test_stage_that_failed_goes_on_in_its_row_keeps_equal_numbers_and_replaces_others(repository: Path, params: Params) -> None:
    with pytest.raises(RuntimeError):
        stop_stage("evaluate_ddpm", params, RuntimeError(), lambda run: log_numbers(run, {"ddpm/fd": 9.0, "ddpm/is": 2.0}))
    with stage_run("evaluate_ddpm", params) as run:
        log_numbers(run, {"ddpm/fd": 3.0, "ddpm/is": 2.0})
    assert only_row(repository).data.metrics["ddpm/fd"] == 3.0
    assert history(repository, "ddpm/is") == [(0, 2.0)]


# Attempts


def attempt(stage: str, params: Params, value: float) -> None:
    with stage_run(stage, params) as run:
        log_numbers(run, {f"{stage}/value": value})


def test_running_everything_again_is_a_new_attempt_below_which_the_old_one_is_folded(repository: Path, params: Params) -> None:
    for value in (1.0, 2.0, 3.0):
        for stage in ("prepare", "train_vae"):
            attempt(stage, params, value)
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
        stop_stage("train_ddpm", params, RuntimeError("no luck"), lambda run: None)
    other = params.model_copy(update={"seed": 7})
    attempt("train_ddpm", other, 1.0)
    attempt("evaluate_ddpm", other, 2.0)
    old, new = sorted(rows(repository), key=lambda row: row.data.tags["rediffuse.attempt"])
    assert (old.data.params["seed"], new.data.params["seed"]) == ("1", "7")
    assert old.data.tags["rediffuse.superseded"] == "true" and old.info.status == "FAILED"
    assert numbers(new) == {"train_ddpm/value": 1.0, "evaluate_ddpm/value": 2.0} and new.info.run_name == "again"


def test_another_checkout_that_writes_to_the_same_store_has_a_row_of_its_own(
    repository: Path, params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{repository}/.mlflow/mlflow.db")
    clone = repository.parent / "clone"
    git(repository.parent, "clone", "-q", str(repository), str(clone))
    (clone / ".dvc").mkdir(exist_ok=True)
    with stage_run("train_vae", params) as run:
        log_numbers(run, {"a/x": 1.0})
        with contextlib.chdir(clone):  # while the first is running
            attempt("train_vae", params, 2.0)
            attempt("evaluate_vae", params, 2.0)
        log_numbers(run, {"a/x": 2.0})
    attempt("evaluate_vae", params, 1.0)
    ours, theirs = sorted(rows(repository), key=lambda row: row.info.start_time)
    assert ours.data.tags["rediffuse.key"] == theirs.data.tags["rediffuse.key"]
    assert numbers(ours) == {"a/x": 2.0, "evaluate_vae/value": 1.0}
    assert numbers(theirs) == {"train_vae/value": 2.0, "evaluate_vae/value": 2.0}
    assert {row.data.tags["rediffuse.superseded"] for row in (ours, theirs)} == {"false"}


def test_metrics_file_gives_numbers_by_nested_name(tmp_path: Path) -> None:
    path = tmp_path / "ddpm.json"
    path.write_text(
        json.dumps({"n": 10, "exact": True, "instrument": "cnn", "cnn-v1": {"fd": 1.5, "kid": {"mean": -0.25}}, "seeds": [4, 5]})
    )
    assert read_metrics(path) == {
        "ddpm/n": 10.0,
        "ddpm/cnn-v1/fd": 1.5,
        "ddpm/cnn-v1/kid/mean": -0.25,
        "ddpm/seeds/0": 4.0,
        "ddpm/seeds/1": 5.0,
    }


def test_curves_read_back_as_they_were_logged(tmp_path: Path) -> None:
    path = tmp_path / "metrics" / "plots" / "train_vae" / "curves.csv"
    write_curve(path, [{"images": 64, "loss": 0.1}, {"images": 128, "loss": 1 / 3, "validation": 2e-17}])
    assert list(read_curve_points(path)) == [(64, {"vae/loss": 0.1}), (128, {"vae/loss": 1 / 3, "vae/validation": 2e-17})]


def test_full_record_is_kept_as_a_file_and_gives_no_numbers(repository: Path, params: Params) -> None:
    record = Path("metrics/evaluation/ddpm.json")
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"scores": {"fd": 1.5}}))
    classes = Path("metrics/plots/evaluate_ddpm/classes.csv")
    classes.parent.mkdir(parents=True)
    classes.write_text("class,fd\nbag,1.5\n")
    with stage_run("evaluate_ddpm", params) as run:
        run.log_results(record, classes)
    row = only_row(repository)
    assert numbers(row) == {}
    assert [file.path for file in client(repository).list_artifacts(row.info.run_id, "metrics/evaluation")] == [str(record)]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("metrics/plots/train_ddpm/images/noising.png", ("ddpm/noising", 0)),
        ("/home/plots/me/metrics/plots/sample_vae/samples.png", ("vae/samples", 0)),
        ("metrics/plots/reference/real.png", ("reference/real", 0)),
        ("metrics/plots/sample_vae/walk/3000.png", ("vae/walk", 3000)),
        ("metrics/plots/train_ddpm/7.png", ("ddpm/7", 0)),
        ("metrics/report/vae/latent.png", ("vae/latent", 0)),
        ("metrics/report/ddpm/steps/40.png", ("ddpm/steps", 40)),
    ],
)
def test_pictures_are_named_after_model_and_file(path: str, name: tuple[str, int]) -> None:
    assert image_name(Path(path)) == name


def test_picture_elsewhere_has_no_name() -> None:
    with pytest.raises(ValueError, match="below metrics/plots"):
        image_name(Path("plots/samples.png"))


def test_names_and_values_are_made_to_fit_mlflow(repository: Path, params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    assert legal("sample_ddpm/fd+ü (%)") == "sample_ddpm/fd__ ___"
    odd = {"data.set": "x" * 7000, "data.f*lter": [1, 2]}
    monkeypatch.setattr("rediffuse.tracking.row.flatten", lambda _: odd)
    for _ in range(2):
        with pytest.raises(ValueError, match="é"):
            stop_stage("sample_ddpm", params, ValueError("é" * 9000), lambda run: log_numbers(run, {"x/a@b%c": 1.0, "x/" + "n" * 300: 2.0}))
    row = only_row(repository)
    assert row.data.params == {"data.set": "x" * 5997 + "...", "data.f_lter": "[1, 2]"}
    assert numbers(row) == {"x/a_b_c": 1.0, "x/" + "n" * 248: 2.0}
    assert row.data.tags["stage.sample_ddpm.error"] == "ValueError: " + "é" * (8000 - 15) + "..."


def test_pictures_stand_in_the_image_grid_once(repository: Path, params: Params) -> None:
    folder = Path("metrics/report/ddpm")
    (folder / "steps").mkdir(parents=True)
    picture = np.random.default_rng(0).integers(0, 256, (30, 600), dtype=np.uint8)
    for shade, end in ((picture, pytest.raises(RuntimeError)), (255 - picture, contextlib.nullcontext())):
        Image.fromarray(shade).save(folder / "samples.png")
        Image.fromarray(shade).save(folder / "steps" / "40.png")
        with end, stage_run("sample_ddpm", params) as run:
            run.log_results(folder)
            if shade is picture:
                raise RuntimeError
    names = images(repository)
    assert len(names) == 4
    # As MLflow's UI takes the names apart: key+step+N+timestamp+N+id, a PNG and a WebP marked "compressed" for each.
    parsed = [(name.rpartition(".")[0].split("+"), name.rpartition(".")[2]) for name in names]
    assert all(parts[1] == "step" and parts[3] == "timestamp" and int(parts[4]) > 0 for parts, _ in parsed)
    shown = {(parts[0].replace("~", "/"), int(parts[2]), parts[-1] == "compressed", kind) for parts, kind in parsed}
    kinds = [(False, "png"), (True, "webp")]
    assert shown == {(key, step, *kind) for key, step in (("ddpm/samples", 0), ("ddpm/steps", 40)) for kind in kinds}
    assert only_row(repository).data.tags["mlflow.loggedImages"] == "True"
    for name in names:
        path = client(repository).download_artifacts(only_row(repository).info.run_id, f"images/{name}", str(repository / ".dvc"))
        with Image.open(path) as logged:
            np.testing.assert_array_equal(np.asarray(logged.convert("L")), 255 - picture)


# Never in the way


def test_failed_stage_is_failed_in_the_row_and_recovers(repository: Path, params: Params) -> None:
    with pytest.raises(RuntimeError, match="out of luck"):
        stop_stage("train_vae", params, RuntimeError("out of luck"), lambda run: run.log_curve(1, {"vae/loss": 2.0}))
    row = only_row(repository)
    assert row.info.status == "FAILED"
    assert row.data.tags["stage.train_vae.status"] == "failed"
    assert row.data.tags["stage.train_vae.error"] == "RuntimeError: out of luck"
    assert numbers(row) == {"vae/loss": 2.0}
    with pytest.raises(SystemExit), stage_run("train_vae", params):
        sys.exit(0)
    row = only_row(repository)
    assert row.info.status == "FINISHED"
    assert row.data.tags["stage.train_vae.status"] == "finished"
    assert row.data.tags["stage.train_vae.error"] == ""


def test_terminated_stage_is_failed_in_the_row(repository: Path) -> None:
    code = (
        "import time\nfrom rediffuse.params import load_params; from rediffuse.tracking.row import stage_run\n"
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


def run_everything(params: Params) -> bool:
    """A stage that logs everything; whether its body came to the end."""
    picture, metrics = Path("metrics/report/ddpm/x.png"), Path("metrics/ddpm.json")
    picture.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4)).save(picture)
    metrics.write_text('{"fd": 1.0}')
    with stage_run("evaluate_ddpm", params, complete=True) as run:
        for step in range(3):
            run.log_curve(step, {"ddpm/loss": 1.0})
        run.log_results(metrics, picture)
        return True
    return False


@pytest.mark.parametrize("broken", ["server down", "server deaf", "store cannot be made", "not a database", "not a repository"])
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
    assert run_everything(params)
    assert time.monotonic() - began < 10
    said = capsys.readouterr().err
    assert said.count("tracking is off for the rest of stage evaluate_ddpm") == 1
    assert len(said.strip().splitlines()) == 1


def test_store_that_breaks_down_while_a_stage_runs(repository: Path, params: Params, capsys: pytest.CaptureFixture[str]) -> None:
    with stage_run("train_ddpm", params) as run:
        log_numbers(run, {"a/x": 1.0})
        with sqlite3.connect(".mlflow/mlflow.db") as database:
            for table in ("metrics", "tags"):
                database.execute(f"CREATE TRIGGER full_{table} BEFORE INSERT ON {table} BEGIN SELECT RAISE(ABORT, 'disk full'); END")
        log_numbers(run, {"b/x": 2.0})
        log_numbers(run, {"c/x": 3.0})
    said = capsys.readouterr().err
    assert said.count("tracking is off") == 1 and "disk full" in said
    assert numbers(only_row(repository)) == {"a/x": 1.0}


@pytest.mark.parametrize("switch", [{"REDIFFUSE_TRACKING": "off"}, {"RANK": "1"}])
def test_switched_off_or_in_a_second_process_of_training_nothing_is_imported_or_written(repository: Path, switch: dict[str, str]) -> None:
    shutil.rmtree(".mlflow")
    code = (
        "import sys; from pathlib import Path\nfrom rediffuse.params import load_params; from rediffuse.tracking.row import stage_run\n"
        "with stage_run('train_ddpm', load_params(), complete=True) as run:\n"
        "    run.log_curve(1, {'a': 1.0}); run.log_results(Path('x'))\n"
        "print(sorted({'mlflow', 'dvc', 'torch'} & set(sys.modules)))\n"
    )
    process = start_python(repository, code, **switch)
    assert process.communicate(timeout=30) == ("[]\n", "")
    assert not Path(".mlflow").exists()


def shown(port: int, capsys: pytest.CaptureFixture[str]) -> str:
    """What `rediffuse ui` prints."""
    ui(port)
    return capsys.readouterr().out.strip()


def test_pages_of_a_local_store_come_from_a_server_that_is_started(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client(repository).create_experiment("another")
    started = list[list[str]]()
    monkeypatch.setattr("os.execv", lambda path, command: started.append(command))
    page = "experiments/2/runs?workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey=compare"
    assert shown(5001, capsys) == f"Charts and pictures: http://127.0.0.1:5001/#/{page}"
    (command,) = started
    assert command[1:4] == ["-m", "mlflow", "server"]
    options = dict(itertools.pairwise(command))
    assert options["--backend-store-uri"] == f"sqlite:///{repository}/.mlflow/mlflow.db"
    assert (options["--host"], options["--port"], options["--workers"]) == ("127.0.0.1", "5001", "1")
    assert options["--default-artifact-root"] == str(repository / ".mlflow" / "artifacts") and "--no-serve-artifacts" in command
    assert os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"


def test_pages_of_a_server_are_its_own(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.execv", lambda *_: pytest.fail("nothing is started"))
    with tracking_server(f"sqlite:///{repository}/.mlflow/mlflow.db", tmp_path) as server:
        connect(server.uri).create_experiment("another")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{server.uri}/")
        assert shown(5001, capsys).startswith(f"Charts and pictures: {server.uri}/#/experiments/2/runs?")
    with pytest.raises(UserError, match="cannot be shown"):
        ui(5001)
