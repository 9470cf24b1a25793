"""Rows of experiments as people run them, and rows completed from DVC's state alone: real DVC, a real store,
small stages.
"""

import contextlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from toy_pipeline import STAGES, enter, numbers, rows, run

from rediffuse.runtime.errors import UserError
from rediffuse.tracking.git import experiments
from rediffuse.tracking.lineage import lineage_of_checkout
from rediffuse.tracking.store import connect, experiment_id
from rediffuse.tracking.sync import Outcome, sync
from rediffuse.tracking.views import MOST, PRIMARY, PRIMARY_GREATER, TAG, update_experiment, view_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def explored(untracked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy repository with an untracked experiment."""
    root = tmp_path_factory.mktemp("explored") / "repository"
    shutil.copytree(untracked, root, symlinks=True)
    run(root, "dvc", "exp", "run", "--temp", "-n", "far", "-S", "ddpm.T=1000", REDIFFUSE_TRACKING="off")
    return root


@pytest.fixture
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy as working directory: of `untracked`, or of the fixture that the test names."""
    root = tmp_path / "repository"
    origin = request.getfixturevalue(getattr(request, "param", "untracked"))
    shutil.copytree(origin, root, symlinks=True)
    enter(root, monkeypatch)
    return root


with_experiment = pytest.mark.parametrize("root", ["explored"], indirect=True)


def edit(root: Path, old: str, new: str, name: str = "params.yaml") -> None:
    text = (root / name).read_text()
    assert old in text
    (root / name).write_text(text.replace(old, new))


def files(root: Path, row: Any) -> dict[str, bytes]:
    """The row's artifacts, pictures by key."""
    folder = root / ".mlflow" / "artifacts" / row.info.run_id / "artifacts"
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {
        path.partition("+")[0] + (Path(path).suffix if "+" in path else ""): content
        for path, content in found.items()
    }


def statuses(row: Any) -> list[str]:
    return [row.data.tags.get(f"stage.{stage}.status", "") for stage in STAGES]


def outcomes(**how: bool) -> dict[str, str]:
    return {outcome.name: outcome.what for outcome in sync(**how)}


def expected(T: int) -> dict[str, float]:
    return {"train_ddpm/loss": T / 20, "ddpm/loss": T / 20, "ddpm/fd": T / 20 + 3}


def check_curve(root: Path, row: Any) -> None:
    client, T = connect(f"sqlite:///{root}/.mlflow/mlflow.db"), int(row.data.params["ddpm.T"])
    points = client.get_metric_history(row.info.run_id, "ddpm/loss")
    assert sorted((point.step, point.value) for point in points) == [(10, T / 10), (20, T / 20)]


def check_unchanged(root: Path) -> None:
    """A sync that changes nothing leaves every file of the store alone."""

    def content() -> dict[str, tuple[int, bytes]]:
        there = [path for path in (root / ".mlflow").rglob("*") if path.is_file()]
        times = [path.stat().st_mtime_ns if "artifacts" in path.parts else 0 for path in there]
        return {str(path): (at, path.read_bytes()) for path, at in zip(there, times, strict=True)}

    before = content()
    assert set(outcomes(every=True).values()) <= {"unchanged"}
    assert content() == before


# As people run them


def test_two_workers_of_the_queue_and_a_plain_repro_make_one_complete_row_each(root: Path) -> None:
    run(root, "dvc", "exp", "run", "--queue", "-n", "queued", "-S", "ddpm.T=100,200")
    edit(root, "T: 500 ", "T: 600 ")
    # The workers go on after it, and would hold pipes open.  There is no store yet: all three race for it.
    run(root, "sh", "-c", "dvc queue start -j 2 >/dev/null 2>&1")
    assert "tracking is off" not in run(root, "dvc", "repro").stderr
    end = time.monotonic() + 200
    while len(experiments(root)) < 2:
        assert time.monotonic() < end, run(root, "dvc", "queue", "status").stdout
        time.sleep(0.2)
    run(root, "dvc", "queue", "stop")
    found = rows(root)
    (plain,) = (name for name in found if name.startswith("repro-"))
    values = {"queued-1": 100, "queued-2": 200, plain: 600}
    for _ in ("by the stages", "by sync"):
        assert found.keys() == values.keys()
        for name, T in values.items():
            row = found[name]
            assert (row.info.status, statuses(row)) == ("FINISHED", ["cached", "finished", "finished"])
            assert row.data.params["ddpm.T"] == str(T) and row.data.tags["rediffuse.attempt"] == "1"
            assert numbers(row) == expected(T)
            check_curve(root, row)
            assert "images/ddpm~noising.png" in files(root, row)
        sync()
        found = rows(root)
    assert all(found[name].data.tags["dvc.exp_rev"] for name in ("queued-1", "queued-2"))
    assert not list(root.glob(".dvc/tmp/exps/tmp*/.mlflow"))


def test_killed_experiment_goes_on_in_its_row_and_a_cached_one_names_where_its_results_come_from(
    root: Path,
) -> None:
    (root / "stop").touch()
    killed = run(root, "dvc", "exp", "run", "-n", "first", "-S", "ddpm.T=1000", check=False)
    row = rows(root)["first"]
    assert killed.returncode != 0 and row.info.status == "RUNNING"
    assert Outcome("first", row.info.run_id, "killed") in sync()
    row = rows(root)["first"]
    assert (row.info.status, statuses(row)) == ("KILLED", ["", "killed", ""])

    (root / "stop").unlink()
    below = root / "notes"  # a stage that is run from a subfolder writes into the same store
    below.mkdir()
    command = ("exp", "run", "-n", "first", "-S", "../params.yaml:ddpm.T=1000", "../dvc.yaml")
    run(below, "dvc", *command, TOY_TORCH="1")
    assert not list(below.iterdir())
    again = rows(root)["first"]
    assert again.info.run_id == row.info.run_id and again.info.status == "FINISHED"
    assert statuses(again) == ["cached", "finished", "finished"]
    assert "dvc.exp_rev" not in again.data.tags and again.data.tags["rediffuse.state"]
    assert outcomes() == {"first": "completed"}  # the files are the experiment's, so they make no second row
    first, (((baseline, _), commit),) = rows(root)["first"], experiments(root).items()
    assert first.data.tags["dvc.exp_rev"] == commit
    assert first.data.tags["dvc.baseline"] == baseline == run(root, "git", "rev-parse", "HEAD").stdout.strip()
    committed = run(root, "git", "show", f"{commit}:dvc.lock").stdout
    assert files(root, first)["recipe/dvc.lock"].decode() == committed

    run(root, "git", "checkout", "-q", "--", ".")
    run(root, "dvc", "checkout")
    assert "Running stage" not in run(root, "dvc", "exp", "run", "-n", "second", "-S", "ddpm.T=1000").stdout
    assert rows(root).keys() == {"first"} and outcomes()["second"] == "made"
    second = rows(root)["second"]
    assert numbers(first) == numbers(second) == expected(1000)
    assert first.data.params == second.data.params
    assert (second.info.status, statuses(second)) == ("FINISHED", ["cached"] * 3)
    assert second.data.tags["stage.train_ddpm.origin_run"] == first.info.run_id
    environment = "stage.train_ddpm.environment"
    assert second.data.tags[environment] == first.data.tags[environment]
    logged = [files(root, row) for row in (first, second)]
    for name in ("images/ddpm~noising.png", "metrics/ddpm.json"):
        assert logged[0][name] == logged[1][name]
    check_unchanged(root)


def test_row_of_half_a_pipeline_is_completed_though_the_rest_was_committed_first(root: Path) -> None:
    edit(root, "T: 500 ", "T: 600 ")
    run(root, "dvc", "repro", "train_ddpm")
    assert list(outcomes().values()) == ["completed"]
    run(root, "dvc", "repro")
    run(root, "git", "commit", "-q", "-a", "-m", "results")
    ((name, row),) = rows(root).items()
    lock = (root / "dvc.lock").read_bytes()
    assert files(root, row)["recipe/dvc.lock"] != lock
    assert outcomes() == {name: "completed"}
    assert list(rows(root)) == [name] and files(root, row)["recipe/dvc.lock"] == lock
    assert sync() == []
    check_unchanged(root)


def test_stage_that_writes_the_same_bytes_again_completes_the_row(root: Path) -> None:
    edit(root, "deps: [raw.txt, stage.py]", "deps: [raw.txt, stage.py, notes.txt]", "dvc.yaml")
    (root / "notes.txt").write_text("1")
    assert run(root, "dvc", "repro").stdout.count("Running stage") == 1
    ((name, first),) = rows(root).items()
    assert first.data.tags["rediffuse.state"] and "images/ddpm~noising.png" in files(root, first)
    run(root, "dvc", "repro", "-f", "-s", "prepare")
    second = rows(root)[name]
    assert second.info.run_id != first.info.run_id and second.data.tags["rediffuse.attempt"] == "2"
    for row in (first, second):
        assert numbers(row) == expected(500) and statuses(row) == ["finished", "cached", "cached"]


# From what DVC knows


def test_results_that_were_made_without_tracking_get_their_row_once(root: Path) -> None:
    (root / ".mlflow").write_text("not a folder")
    with pytest.raises(UserError, match="rediffuse sync"):
        sync()
    (root / ".mlflow").unlink()
    (outcome,) = sync()
    assert outcome.what == "made" and outcome.name.startswith("repro-")
    row = rows(root)[outcome.name]
    assert (row.info.status, statuses(row)) == ("FINISHED", ["cached"] * 3)
    assert numbers(row) == expected(500) and row.data.params["ddpm.T"] == "500"
    check_curve(root, row)
    assert len({row.data.tags[f"stage.{stage}.key"] for stage in STAGES}) == 3
    recipe = ("params.yaml", "dvc.yaml", "dvc.lock")
    logged = files(root, row)
    assert set(logged) == {
        *(f"recipe/{name}" for name in recipe),
        *("metrics/train_ddpm.json", "metrics/ddpm.json", "metrics/evaluation/ddpm.json"),
        *("images/ddpm~noising.png", "images/ddpm~noising.webp"),
    }
    assert all(logged[f"recipe/{name}"] == (root / name).read_bytes() for name in recipe)
    (entry,) = row.inputs.dataset_inputs
    assert entry.dataset.name == "toy" and f"md5: {entry.dataset.digest}" in (root / "dvc.lock").read_text()
    assert f"rediffuse rebuild {row.info.run_id}" in row.data.tags["mlflow.note.content"]
    check_unchanged(root)
    run(root, "git", "commit", "-q", "--allow-empty", "-m", "next")
    assert sync() == [] and list(rows(root)) == [outcome.name]


def test_a_stage_counts_only_if_all_before_it_are_up_to_date(root: Path) -> None:
    def up_to_date() -> list[str]:
        return list(lineage_of_checkout(root).results)

    assert up_to_date() == STAGES
    edit(root, "T: 500 ", "T: 600 ")
    assert up_to_date() == ["prepare"]  # the evaluation agrees with its inputs: they are stale
    edit(root, "T: 600 ", "T: 500 ")
    (root / "metrics" / "ddpm.json").write_text("{}")
    assert up_to_date() == ["prepare", "train_ddpm"]
    assert sync() == [] and rows(root) == {}


@with_experiment
def test_experiment_whose_data_are_elsewhere_gets_what_there_is(root: Path, tmp_path: Path) -> None:
    cache = root / ".dvc" / "cache"
    shutil.move(cache, tmp_path / "cache")
    what = outcomes()["far"]
    assert what.startswith("made") and "train_ddpm" in what and "dvc exp pull" in what
    row = rows(root)["far"]
    assert numbers(row) == expected(1000)
    assert not any(name.startswith("images/") for name in files(root, row))
    shutil.move(tmp_path / "cache", cache)
    assert outcomes()["far"] == "completed"
    assert "images/ddpm~noising.png" in files(root, row)
    check_unchanged(root)


@with_experiment
def test_only_experiments_on_the_commit_in_hand_unless_all_are_asked_for(root: Path) -> None:
    run(root, "git", "commit", "-q", "--allow-empty", "-m", "next")
    assert "far" not in outcomes() and outcomes(every=True)["far"] == "made"


@with_experiment
@pytest.mark.parametrize(
    ("names", "old", "new", "words"),
    [
        (["stage.py"], "import json", "import  json", "stage.py differs"),
        (
            ["dvc.yaml", "dvc.lock"],
            "raw.txt",
            "data/digits",
            "data/digits is in no commit (`git add data/digits.dvc` and commit before `dvc exp run`)",
        ),
    ],
    ids=["code edited by hand", "data that no commit has"],
)
def test_experiment_that_does_not_agree_with_its_lock_says_why(
    root: Path, names: list[str], old: str, new: str, words: str
) -> None:
    (((baseline, name), commit),) = experiments(root).items()
    run(root, "git", "checkout", "-q", "-f", "--detach", commit)
    for edited in names:
        edit(root, old, new, edited)
    run(root, "git", "commit", "-q", "-a", "-m", "by hand")
    run(root, "git", "update-ref", f"refs/exps/{baseline[:2]}/{baseline[2:]}/{name}", "HEAD")
    run(root, "git", "checkout", "-q", "-f", "main")
    (root / "data" / "digits.dvc").write_text("outs:\n- path: digits\n")
    assert outcomes()["far"] == f"skipped: stage prepare does not agree with its dvc.lock: {words}"


# The page that compares rows


def charts(client: Any, experiment: str) -> tuple[list[str], dict[str, str]]:
    """The scores that the page shows, and the tags of the experiment."""
    update_experiment(client, experiment)
    tags = client.get_experiment(experiment).tags
    state = json.loads(json.loads(tags[TAG])["state"])
    return [chart["metricKey"] for chart in state["compareRunCharts"] if chart["type"] == "BAR"], tags


def test_page_and_primary_metric_follow_the_instruments_of_the_rows(
    empty_store: Path, tmp_path: Path
) -> None:
    uri = f"sqlite:///{shutil.copy(empty_store, tmp_path / 'rows.db')}"
    client = connect(uri)
    experiment = experiment_id(client, uri, tmp_path)
    row = client.create_run(experiment).info.run_id
    client.log_metric(row, "seconds/prepare", 1.0)
    shown, tags = charts(client, experiment)
    assert shown == [] and PRIMARY not in tags
    for name in ("ddpm/mnist-cnn-v1/fd", "ddpm/mnist-cnn-v1/recall"):
        client.log_metric(row, name, 1.5)
    shown, tags = charts(client, experiment)
    assert shown == ["ddpm/mnist-cnn-v1/fd", "ddpm/mnist-cnn-v1/recall"]
    assert tags[PRIMARY] == "ddpm/mnist-cnn-v1/fd" and tags[PRIMARY_GREATER] == "False"
    for number in range(6):
        client.log_metric(row, f"vae/folder-cnn-v{number}/fid", 2.0)
    shown, tags = charts(client, experiment)
    assert shown[2:] == [f"vae/folder-cnn-v{number}/fid" for number in range(MOST - 1)]
    client.log_metric(row, "ddpm/ratio_to_real", 3.0)
    shown, tags = charts(client, experiment)
    assert shown[:2] == ["ddpm/ratio_to_real", "ddpm/mnist-cnn-v1/fd"] and tags[PRIMARY] == shown[0]
    saved = json.dumps(json.loads(tags[TAG]) | {"updatedAt": 1})  # as MLflow's pages save it
    client.set_experiment_tag(experiment, TAG, saved)
    client.set_experiment_tag(experiment, PRIMARY, "ddpm/mnist-cnn-v1/recall")
    client.log_metric(row, "ddpm/other-v1/fd", 2.0)
    tags = charts(client, experiment)[1]  # what the user chose stays
    assert tags[TAG] == saved and tags[PRIMARY] == "ddpm/mnist-cnn-v1/recall"


def test_page_fits_into_a_tag() -> None:
    scores = [f"{model}/{{}}/{score}" for model in ("vae", "ddpm") for score in ("fd", "precision", "recall")]
    assert len(view_of([[score.format("i" * 60 + f"-v{i}") for i in range(20) for score in scores]])) < 20_000


def test_outside_a_repository_the_remedy_is_named(tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path), pytest.raises(UserError, match="change into the checkout"):
        sync()
