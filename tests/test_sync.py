"""Rows completed from DVC's state alone: a real pipeline of DVC with small stages, a real store, no stage
that logs in time.
"""

import contextlib
import json
import shutil
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

NUMBERS = {
    "train_ddpm/loss": 25.0,
    "ddpm/loss": 25.0,
    "ddpm/fd": 28.0,
}  # of the default parameters: T = 500, neighbours = 3

pytestmark = pytest.mark.slow


@pytest.fixture
def repository(untracked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as working directory."""
    root = Path(shutil.copytree(untracked, tmp_path / "repository", symlinks=True))
    enter(root, monkeypatch)
    return root


def files(root: Path, row: Any) -> dict[str, bytes]:
    """The row's artifacts, pictures by key."""
    folder = root / ".mlflow" / "artifacts" / row.info.run_id / "artifacts"
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {
        path.partition("+")[0] + (Path(path).suffix if "+" in path else ""): content
        for path, content in found.items()
    }


def statuses(row: Any) -> dict[str, str]:
    tags = row.data.tags
    return {stage: tags.get(f"stage.{stage.replace('@', '_')}.status", "") for stage in STAGES}


def content(root: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of the store, with the time of its last change: what a sync that changes nothing leaves
    alone.
    """
    return {
        str(path): (path.stat().st_mtime_ns if "artifacts" in path.parts else 0, path.read_bytes())
        for path in (root / ".mlflow").rglob("*")
        if path.is_file()
    }


def check_unchanged(root: Path) -> None:
    before = content(root)
    assert {outcome.what for outcome in sync(every=True)} <= {"unchanged"}
    assert content(root) == before


def test_results_that_were_made_without_tracking_get_their_row_once(repository: Path) -> None:
    (outcome,) = sync()
    assert outcome.what == "made" and outcome.name.startswith("repro-")
    row = rows(repository)[outcome.name]
    assert row.info.status == "FINISHED"
    assert row.data.params["ddpm.T"] == "500"
    assert numbers(row) == NUMBERS
    assert set(statuses(row).values()) == {"cached"}
    assert (
        len({row.data.tags[f"stage.{stage}.key"] for stage in ("prepare", "train_ddpm", "evaluate_ddpm")})
        == 3
    )
    logged = files(repository, row)
    assert set(logged) == {
        *(f"recipe/{name}" for name in ("params.yaml", "dvc.yaml", "dvc.lock")),
        *("metrics/train_ddpm.json", "metrics/ddpm.json", "metrics/evaluation/ddpm.json"),
        *("images/ddpm~noising.png", "images/ddpm~noising.webp"),
    }
    for name in ("params.yaml", "dvc.yaml", "dvc.lock"):
        assert logged[f"recipe/{name}"] == (repository / name).read_bytes()
    (entry,) = row.inputs.dataset_inputs
    lock = (repository / "dvc.lock").read_text()
    assert (
        entry.dataset.name == "toy"
        and entry.dataset.digest.endswith(".dir")
        and f"md5: {entry.dataset.digest}" in lock
    )
    assert f"rediffuse rebuild {row.info.run_id}" in row.data.tags["mlflow.note.content"]
    check_unchanged(repository)


def test_row_follows_its_results_into_the_commit_that_holds_them(repository: Path) -> None:
    (made,) = sync()
    run(repository, "git", "commit", "-q", "--allow-empty", "-m", "next")
    assert sync() == []
    assert list(rows(repository)) == [made.name]


def test_row_of_a_plain_repro_is_completed_though_its_results_were_committed_first(repository: Path) -> None:
    text = (repository / "params.yaml").read_text()
    (repository / "params.yaml").write_text(text.replace("T: 500 ", "T: 600 "))
    run(repository, "dvc", "repro")
    run(repository, "git", "commit", "-q", "-a", "-m", "results")
    ((name, row),) = rows(repository).items()
    lock = (repository / "dvc.lock").read_bytes()
    assert files(repository, row)["recipe/dvc.lock"] != lock
    assert [(outcome.name, outcome.what) for outcome in sync()] == [(name, "completed")]
    assert list(rows(repository)) == [name] and files(repository, row)["recipe/dvc.lock"] == lock
    assert sync() == []
    check_unchanged(repository)


def test_row_of_half_a_pipeline_is_completed_when_the_rest_has_run(repository: Path) -> None:
    edit(repository, "T: 500 ", "T: 600 ", "params.yaml")
    run(repository, "dvc", "repro", "train_ddpm")
    assert [outcome.what for outcome in sync()] == ["completed"]
    run(repository, "dvc", "repro")
    assert [outcome.what for outcome in sync()] == ["completed"]
    ((_, row),) = rows(repository).items()
    assert files(repository, row)["recipe/dvc.lock"] == (repository / "dvc.lock").read_bytes()
    check_unchanged(repository)


def test_stages_that_are_not_up_to_date_make_no_row(repository: Path) -> None:
    text = (repository / "params.yaml").read_text()
    (repository / "params.yaml").write_text(text.replace("neighbours: 3 ", "neighbours: 4 "))
    assert sync() == []
    assert rows(repository) == {}


def test_a_stage_counts_only_if_all_before_it_are_up_to_date(repository: Path) -> None:
    def up_to_date() -> set[str]:
        return set(lineage_of_checkout(repository).results)

    assert up_to_date() == set(STAGES)
    text = (repository / "params.yaml").read_text()
    (repository / "params.yaml").write_text(text.replace("T: 500 ", "T: 600 "))
    assert up_to_date() == {"prepare"}  # the evaluation agrees with its inputs: they are stale
    (repository / "params.yaml").write_text(text)
    (repository / "metrics" / "ddpm.json").write_text("{}")
    assert up_to_date() == {"prepare", "train_ddpm"}


def test_row_of_a_run_gets_the_final_lock_and_a_cached_one_names_where_its_results_come_from(
    repository: Path,
) -> None:
    run(repository, "dvc", "exp", "run", "-n", "first", "-S", "ddpm.T=1000", TOY_TORCH="1")
    row = rows(repository)["first"]
    assert statuses(row) == {"prepare": "cached", "train_ddpm": "finished", "evaluate_ddpm": "finished"}
    assert "dvc.exp_rev" not in row.data.tags and row.data.tags["rediffuse.state"]
    (outcome,) = sync()  # the files are the experiment's, so they make no second row
    assert (outcome.name, outcome.what) == ("first", "completed")
    ((baseline, _), commit) = next(iter(experiments(repository).items()))
    first = rows(repository)["first"]
    head = run(repository, "git", "rev-parse", "HEAD").stdout.strip()
    assert first.data.tags["dvc.exp_rev"] == commit and first.data.tags["dvc.baseline"] == baseline == head
    committed = run(repository, "git", "show", f"{commit}:dvc.lock").stdout.encode()
    assert files(repository, first)["recipe/dvc.lock"] == committed
    check_unchanged(repository)

    run(repository, "git", "checkout", "-q", "--", ".")
    run(repository, "dvc", "checkout")
    said = run(repository, "dvc", "exp", "run", "-n", "second", "-S", "ddpm.T=1000").stdout
    assert "Running stage" not in said and set(rows(repository)) == {"first"}
    assert {outcome.name: outcome.what for outcome in sync()}["second"] == "made"
    second = rows(repository)["second"]
    assert numbers(first) == numbers(second) == {"train_ddpm/loss": 50.0, "ddpm/loss": 50.0, "ddpm/fd": 53.0}
    assert first.data.params == second.data.params
    assert second.info.status == "FINISHED" and statuses(second)["train_ddpm"] == "cached"
    assert second.data.tags["stage.train_ddpm.origin_run"] == first.info.run_id
    environment = "stage.train_ddpm.environment"
    assert second.data.tags[environment] == first.data.tags[environment]
    logged = [files(repository, row) for row in (first, second)]
    for name in ("images/ddpm~noising.png", "metrics/ddpm.json", "recipe/params.yaml"):
        assert logged[0][name] == logged[1][name]
    check_unchanged(repository)


def test_killed_run_is_told_and_goes_on_in_its_row(repository: Path) -> None:
    (repository / "stop").touch()
    command = ("dvc", "exp", "run", "-n", "unlucky", "-S", "ddpm.T=1000")
    assert run(repository, *command, check=False).returncode != 0
    assert rows(repository)["unlucky"].info.status == "RUNNING"
    assert Outcome("unlucky", rows(repository)["unlucky"].info.run_id, "killed") in sync()
    row = rows(repository)["unlucky"]
    assert (row.info.status, statuses(row)["train_ddpm"]) == ("KILLED", "killed")
    (repository / "stop").unlink()
    run(repository, *command)
    again = rows(repository)["unlucky"]
    assert again.info.run_id == row.info.run_id and again.info.status == "FINISHED"
    assert numbers(again)["ddpm/fd"] == 53.0
    sync()
    check_unchanged(repository)


def test_what_was_missed_while_the_store_was_away_arrives_afterwards(repository: Path) -> None:
    (repository / ".mlflow").write_text("not a folder")
    said = run(repository, "dvc", "exp", "run", "-n", "deaf", "-S", "ddpm.T=1000")
    assert said.stderr.count("tracking is off for the rest of stage") == 2
    with pytest.raises(UserError, match="rediffuse sync"):
        sync()
    (repository / ".mlflow").unlink()
    assert {outcome.name: outcome.what for outcome in sync()} == {"deaf": "made"}
    row = rows(repository)["deaf"]
    assert numbers(row)["ddpm/fd"] == 53.0 and row.info.status == "FINISHED"
    client = connect(f"sqlite:///{repository}/.mlflow/mlflow.db")
    points = [(point.step, point.value) for point in client.get_metric_history(row.info.run_id, "ddpm/loss")]
    assert sorted(points) == [(10, 100.0), (20, 50.0)]
    check_unchanged(repository)


def test_only_experiments_on_the_commit_in_hand_unless_all_are_asked_for(repository: Path) -> None:
    run(
        repository,
        "dvc",
        "exp",
        "run",
        "--temp",
        "-n",
        "old",
        "-S",
        "evaluate.neighbours=7",
        REDIFFUSE_TRACKING="off",
    )
    run(repository, "git", "commit", "-q", "--allow-empty", "-m", "next")
    assert "old" not in {outcome.name for outcome in sync()}
    assert {outcome.name: outcome.what for outcome in sync(every=True)}["old"] == "made"
    assert numbers(rows(repository)["old"])["ddpm/fd"] == 32.0
    check_unchanged(repository)


def test_experiment_whose_data_are_elsewhere_gets_what_there_is(repository: Path, tmp_path: Path) -> None:
    run(repository, "dvc", "exp", "run", "--temp", "-n", "far", "-S", "ddpm.T=1000", REDIFFUSE_TRACKING="off")
    kept = tmp_path / "cache"
    shutil.move(repository / ".dvc" / "cache", kept)
    outcome = next(outcome for outcome in sync() if outcome.name == "far")
    assert outcome.what.startswith("made") and "train_ddpm" in outcome.what and "dvc exp pull" in outcome.what
    row = rows(repository)["far"]
    assert numbers(row)["ddpm/fd"] == 53.0
    assert not any(name.startswith("images/") for name in files(repository, row))
    shutil.move(kept, repository / ".dvc" / "cache")
    assert next(outcome.what for outcome in sync() if outcome.name == "far") == "completed"
    assert "images/ddpm~noising.png" in files(repository, row)
    check_unchanged(repository)


# Nothing to complete from


def test_experiment_on_data_that_no_commit_has_says_which_and_what_to_do(repository: Path) -> None:
    (repository / "data" / "digits").mkdir()
    (repository / "data" / "digits" / "a.txt").write_text("1")
    run(repository, "dvc", "add", "-q", "data/digits")
    text = (repository / "dvc.yaml").read_text()
    (repository / "dvc.yaml").write_text(
        text.replace("deps: [raw.txt, stage.py]", "deps: [data/digits, stage.py]")
    )
    run(repository, "dvc", "exp", "run", "-n", "digits", REDIFFUSE_TRACKING="off")
    what = {outcome.name: outcome.what for outcome in sync()}["digits"]
    assert what.startswith(
        "skipped: stage prepare does not agree with its dvc.lock: data/digits is in no commit"
    )
    assert "`git add data/digits.dvc` and commit before `dvc exp run`" in what and "stage.py" not in what


def test_experiment_whose_code_was_edited_by_hand_says_what_differs(repository: Path) -> None:
    run(repository, "dvc", "exp", "run", "-n", "edited", "-S", "ddpm.T=1000", REDIFFUSE_TRACKING="off")
    ((_, commit),) = experiments(repository).items()
    ref = run(
        repository, "git", "for-each-ref", "--format=%(refname)", "--points-at", commit, "refs/exps"
    ).stdout.split()[-1]
    run(repository, "git", "checkout", "-q", "-f", "--detach", commit)
    with (repository / "stage.py").open("a") as code:
        code.write("# another")
    run(repository, "git", "commit", "-q", "-a", "-m", "by hand")
    run(repository, "git", "update-ref", ref, "HEAD")
    run(repository, "git", "checkout", "-q", "-f", "main")
    what = {outcome.name: outcome.what for outcome in sync()}["edited"]
    assert what == "skipped: stage prepare does not agree with its dvc.lock: stage.py differs"


# The last process that runs completes the row


def edit(root: Path, old: str, new: str, name: str = "stage.py") -> None:
    text = (root / name).read_text()
    assert old in text
    (root / name).write_text(text.replace(old, new))


def test_stage_that_writes_the_same_bytes_again_completes_the_row(repository: Path) -> None:
    edit(repository, "deps: [raw.txt, stage.py]", "deps: [raw.txt, stage.py, notes.txt]", "dvc.yaml")
    (repository / "notes.txt").write_text("1")
    assert run(repository, "dvc", "repro").stdout.count("Running stage") == 1
    ((name, row),) = rows(repository).items()
    assert numbers(row) == NUMBERS and "images/ddpm~noising.png" in files(repository, row)
    assert statuses(row) == {"prepare": "finished", "train_ddpm": "cached", "evaluate_ddpm": "cached"}
    assert row.data.tags["rediffuse.state"]
    run(repository, "dvc", "repro", "-f", "-s", "prepare")  # a second attempt in the row of the commit
    assert numbers(rows(repository)[name]) == NUMBERS


def test_row_of_two_stages_that_run_again_is_complete(repository: Path) -> None:
    edit(repository, "T: 500 ", "T: 600 ", "params.yaml")
    run(repository, "dvc", "repro")
    ((name, first),) = rows(repository).items()
    run(repository, "dvc", "repro", "-f", "-s", "train_ddpm", "evaluate_ddpm")
    again = rows(repository)[name]
    assert again.info.run_id != first.info.run_id and again.data.tags["rediffuse.attempt"] == "2"
    assert numbers(again) == numbers(first) == {"train_ddpm/loss": 30.0, "ddpm/loss": 30.0, "ddpm/fd": 33.0}
    assert statuses(again) == {"prepare": "cached", "train_ddpm": "finished", "evaluate_ddpm": "finished"}


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
    saved = json.dumps(json.loads(tags[TAG]) | {"updatedAt": 1})  # as MLflow's pages save it
    client.set_experiment_tag(experiment, TAG, saved)
    client.set_experiment_tag(experiment, PRIMARY, "ddpm/mnist-cnn-v1/recall")
    client.log_metric(row, "ddpm/other-v1/fd", 2.0)
    tags = charts(client, experiment)[1]  # what the user chose stays
    assert tags[TAG] == saved and tags[PRIMARY] == "ddpm/mnist-cnn-v1/recall"


def test_page_fits_into_a_tag() -> None:
    names = [
        f"{model}/{'i' * 60}-v{i}/{score}"
        for i in range(20)
        for model in ("vae", "ddpm")
        for score in ("fd", "precision", "recall")
    ]
    assert len(view_of([names])) < 20_000


def test_outside_a_repository_the_remedy_is_named(tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path), pytest.raises(UserError, match="change into the checkout"):
        sync()
