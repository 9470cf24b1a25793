"""A row made again in a clone: which commit is found, what is refused, what is compared, and the verdict."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toy
import yaml
from click.testing import CliRunner
from toy import FOREIGN, add_row, commit, dvc, experiment_ref, git, tags_of

from rediffuse.cli import main
from rediffuse.commands.rebuild import rebuild
from rediffuse.commands.rows import find_row
from rediffuse.commands.verdict import Metric, Output, compare_outputs, judge, spread_of
from rediffuse.runtime.errors import UserError
from rediffuse.tracking.environment import describe_environment, environment_digest

PROJECT = Path(__file__).resolve().parents[1]
STAGES = ("prepare", "train", "evaluate")
pytestmark = pytest.mark.slow
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("base") / "my repository"
    with pytest.MonkeyPatch.context() as patch:
        for name in FOREIGN:
            patch.delenv(name, raising=False)
        toy.make_repository(root)
    return root


@pytest.fixture
def root(base: Path, empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository as working directory, with an empty store; clones go to the folder `clones`."""
    root = tmp_path / "my repository"
    toy.copy_repository(base, root, empty_store)
    (tmp_path / "clones").mkdir()
    for name in FOREIGN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "clones"))
    monkeypatch.setattr("tempfile.tempdir", None)  # it is set at the first use
    monkeypatch.chdir(root)
    return root


def clones(root: Path) -> list[Path]:
    """What rebuilds have left behind."""
    return list((root.parent / "clones").glob("rediffuse-rebuild-*"))


def environment(**changes: object) -> tuple[str, dict[str, bytes]]:
    """The digest of this environment with changes of what decides the bits, and its artifact."""
    described = describe_environment()
    described["decides"] |= changes
    digest = environment_digest(described)
    return digest, {f"recipe/environment/{digest}.json": json.dumps(described).encode()}


def locked(edit: Callable[[dict[str, Any]], object], root: Path) -> dict[str, bytes]:
    """The dvc.lock of HEAD as an artifact, after an edit of its stages."""
    lock = yaml.safe_load(git(root, "show", "HEAD:dvc.lock"))
    edit(lock["stages"])
    return {"recipe/dvc.lock": yaml.safe_dump(lock, sort_keys=False).encode()}


def refused(row: str, capfd: Capture) -> str:
    """The refusal: no stage has run, and the row has no verdict."""
    with pytest.raises(UserError) as error:
        rebuild(row)
    assert "Running stage" not in capfd.readouterr().err
    assert "rebuild.verdict" not in tags_of(Path.cwd(), row) and clones(Path.cwd()) == []
    return str(error.value)


# The commit


def test_experiment_is_rebuilt_exactly_and_the_row_says_so(root: Path, capfd: Capture) -> None:
    digest, files = environment()
    tags = {f"stage__{stage}__environment": digest for stage in STAGES}
    row = add_row(root, "larger", experiment=True, files=files, **tags)
    (root / "stages" / "model.py").write_text("SLOPE = 7.0\n")  # the clone has the experiment's
    assert rebuild("larger") == "exact"
    output = capfd.readouterr()
    lines = output.out.splitlines()
    made = git(root, "rev-parse", experiment_ref(root, "larger"))
    stages = yaml.safe_load(git(root, "show", f"{made}:dvc.lock"))["stages"]
    outputs = [(stage, out["path"], out["md5"][:8]) for stage in STAGES for out in stages[stage]["outs"]]
    for stage, path, md5 in outputs:
        assert [stage, path, md5, md5, "same"] in [line.split() for line in lines]
    assert len(outputs) == 4 and lines[-1] == "exact"
    assert "metrics: all 2 numbers are those of the row" in lines
    assert lines[-3:-1] == ["environment of prepare, train, evaluate:", "  no difference"]
    assert "Running stage 'train'" in output.err
    tags = tags_of(root, row)
    assert [tags[f"rebuild.{name}"] for name in ("verdict", "environment", "rev")] == ["exact", digest, made]
    assert clones(root) == []


@pytest.mark.parametrize("kept", [False, True])
def test_experiment_that_is_only_on_the_git_remote_is_fetched(root: Path, kept: bool) -> None:
    """As `dvc exp push` puts it there, or as a branch."""
    row, ref = add_row(root, "larger", experiment=True), experiment_ref(root, "larger")
    git(root.parent, "init", "-q", "--bare", "remote.git")
    git(root, "remote", "add", "origin", "../remote.git")
    git(root, "push", "-q", "origin", f"{ref}:{'refs/heads/kept/larger' if kept else ref}")
    git(root, "update-ref", "-d", ref)
    git(root, "update-ref", "-d", "refs/exps/exec/EXEC_BRANCH")
    git(root, "reflog", "expire", "--expire=now", "--all")
    git(root, "gc", "-q", "--prune=now")
    assert rebuild(row) == "exact"


@pytest.mark.parametrize(("path", "dirty"), [("stages/model.py", "true"), ("params.yaml", "false")])
def test_uncommitted_recipe_is_refused_until_committed(
    root: Path, capfd: Capture, path: str, dirty: str
) -> None:
    text = (root / path).read_text()
    (root / path).write_text(text.replace("SLOPE = 1.0", "SLOPE = 4.0").replace("scale: 2.0", "scale: 5.0"))
    dvc(root, "repro")
    files = {f"recipe/{name}": (root / name).read_bytes() for name in ("params.yaml", "dvc.lock")}
    row = add_row(root, "repro-1", files=files, metrics=False, git__dirty=dirty)
    assert "`dvc exp save`" in refused(row, capfd)
    made = commit(root, "results")
    (root / "stages" / "model.py").write_text("SLOPE = 9.0\n")
    dvc(root, "repro")
    commit(root, "later")
    assert rebuild(row) == "exact"
    assert tags_of(root, row)["rebuild.rev"] == made
    assert "metric toy/n: not in the row, rebuilt 3.0" in capfd.readouterr().out  # which contradicts nothing


@pytest.mark.parametrize(("made", "words"), [("1" * 40, "1" * 40), ("", "rediffuse sync --all")])
def test_experiment_without_a_commit_is_refused(root: Path, capfd: Capture, made: str, words: str) -> None:
    lock = locked(lambda stages: stages.pop("evaluate"), root)  # which no commit has
    assert words in refused(add_row(root, "larger", experiment=True, files=lock, dvc__exp_rev=made), capfd)


def test_of_several_attempts_the_live_one_is_meant(root: Path) -> None:
    add_row(root, "larger", experiment=True, rediffuse__superseded="true")
    live = add_row(root, "larger", experiment=True, rediffuse__superseded="false")
    assert find_row("larger")[1].info.run_id == live
    add_row(root, "larger", experiment=True)
    with pytest.raises(UserError, match=live):
        find_row("larger")


# What is refused


def set_hash(stage: str, path: str) -> Callable[[dict[str, Any]], None]:
    """An edit of dvc.lock: another hash of a dependency."""

    def edit(stages: dict[str, Any]) -> None:
        next(entry for entry in stages[stage]["deps"] if entry["path"] == path)["md5"] = "0" * 32

    return edit


def set_train(**values: object) -> Callable[[dict[str, Any]], None]:
    """An edit of dvc.lock: other parameters of the stage train."""
    return lambda stages: stages["train"]["params"]["params.yaml"]["train"].update(values)


EDITS = {
    "train: stages/model.py modified": set_hash("train", "stages/model.py"),
    "prepare: data/extra.csv modified": set_hash("prepare", "data/extra.csv"),
    "evaluate: dvc.lock of the row": set_hash("evaluate", "data/model.txt"),  # as before `rediffuse sync`
    "train: params.yaml train modified": set_train(scale=2.5),
    "train: command modified": lambda stages: stages["train"].update(cmd="python"),
    "evaluate: not in dvc.lock": lambda stages: stages.pop("evaluate"),
}


@pytest.mark.parametrize(("words", "edit"), EDITS.items())
def test_what_differs_from_the_row_is_named(root: Path, capfd: Capture, words: str, edit: Any) -> None:
    message = refused(add_row(root, "repro-1", files=locked(edit, root)), capfd)
    assert words in message and message.count("\n  stage ") == 1


def test_tracked_raw_data_that_nobody_has_are_named(root: Path, capfd: Capture) -> None:
    shutil.rmtree(root / ".dvc/cache")
    assert "data/extra.csv deleted" in refused(add_row(root, "repro-1"), capfd)


def test_tracked_raw_data_come_from_the_dvc_remote(root: Path) -> None:
    dvc(root, "remote", "add", "--local", "--default", "storage", "../storage")  # not in the commit
    dvc(root, "push", "data/extra.csv.dvc")
    shutil.rmtree(root / ".dvc/cache")
    assert rebuild(add_row(root, "repro-1")) == "exact"


# What diverges


def test_altered_raw_data_that_no_lock_knows_diverge(root: Path, capfd: Capture) -> None:
    (root / "data/raw/numbers.txt").write_text("1 2 4 ")
    assert rebuild(add_row(root, "repro-1")) == "diverged"
    assert "first diverging stage: prepare" in capfd.readouterr().out.splitlines()


def test_chance_diverges_and_the_metric_is_told_in_units_of_its_spread(root: Path, capfd: Capture) -> None:
    row = add_row(root, "chance", experiment=True)
    assert rebuild(row, keep=True) == "diverged" == tags_of(root, row)["rebuild.verdict"]
    lines = capfd.readouterr().out.splitlines()
    assert "first diverging stage: train" in lines
    assert "environment of prepare, train, evaluate: not recorded" in lines
    assert [line.split()[-1] for line in lines if line.startswith(STAGES)] == ["same", *["DIFFERS"] * 3]
    (metrics,) = root.parent.glob("clones/*/*/metrics/toy.json")
    texts = git(root, "show", f"{experiment_ref(root, 'chance')}:metrics/toy.json"), metrics.read_text()
    recorded, rebuilt = (json.loads(text)["cnn"]["fd"] for text in texts)
    units = (rebuilt - recorded) / 0.25
    (metric,) = (line for line in lines if line.startswith("metric "))
    assert metric.startswith(f"metric toy/cnn/fd: recorded {recorded!r}, rebuilt {rebuilt!r}, ")
    assert f"{units:+.2f} units of spread, {'within' if abs(units) < 2 else 'beyond'}" in metric


def test_number_in_the_row_that_its_files_do_not_have_diverges(root: Path, capfd: Capture) -> None:
    row = add_row(root, "repro-1", metrics=False)
    toy.client(root).log_metric(row, "toy/cnn/fd", 19.0)  # 20 is true
    assert rebuild(row) == "diverged"
    assert "recorded 19.0, rebuilt 20.0, +1 or +4.00 units of spread, beyond" in capfd.readouterr().out


def test_other_environment_is_named_and_has_its_own_verdict(root: Path, capfd: Capture) -> None:
    digest, files = environment(threads=999)
    row = add_row(root, "repro-1", files=files, stage__train__environment=digest)
    assert rebuild(row) == "exact-env-differs"
    lines = capfd.readouterr().out.splitlines()
    assert lines[lines.index("environment of train:") + 1].startswith("  threads 999, here ")
    assert "environment of prepare, evaluate: not recorded" in lines


# The clone


def test_clone_has_a_cache_of_its_own_and_is_kept_on_demand(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dvc(root, "cache", "dir", "--local", str(tmp_path / "elsewhere"))
    shutil.copytree(root / ".dvc/cache", tmp_path / "elsewhere")
    before = sorted((tmp_path / "elsewhere").rglob("*"))
    monkeypatch.setenv("DVC_EXP_NAME", "foreign")
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "1" * 40)
    monkeypatch.setenv("DVC_ROOT", str(root))
    assert rebuild(add_row(root, "repro-1"), keep=True) == "exact"
    clone = clones(root)[0] / root.name
    assert (clone / "data/model.txt").read_text() == "20.0"
    assert list((clone / ".dvc/cache/files/md5").iterdir())
    assert sorted((tmp_path / "elsewhere").rglob("*")) == before
    assert git(root, "status", "--porcelain") == ""


def row_of(root: Path, setting: str) -> str:
    """A row whose commit has this setting of the stage train on."""
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace(f"{setting}: false", f"{setting}: true"))
    commit(root, setting)
    return add_row(root, "repro-1", files=locked(set_train(**{setting: True}), root))


def test_failing_stage_is_an_error_and_the_clone_goes(root: Path, capfd: Capture) -> None:
    row = row_of(root, "broken")
    with pytest.raises(UserError, match="--keep"):
        rebuild(row)
    assert "the toy is broken" in capfd.readouterr().err and clones(root) == []


def test_interrupted_rebuild_leaves_nothing_behind(root: Path, tmp_path: Path) -> None:
    row, started = row_of(root, "slow"), tmp_path / "started"
    command = [sys.executable, "-c", f"from rediffuse.commands.rebuild import rebuild; rebuild({row!r})"]
    variables = {**os.environ, "PYTHONPATH": str(PROJECT / "src"), "TOY_STARTED": str(started)}
    how: dict[str, Any] = {
        "env": variables,
        "stderr": subprocess.PIPE,
        "text": True,
        "start_new_session": True,
    }
    default = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  # a shell's background ignores it
    process = subprocess.Popen(command, preexec_fn=default, **how)
    deadline = time.monotonic() + 60
    while not started.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    assert len(clones(root)) == 1
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does on Ctrl-C
    assert "KeyboardInterrupt" in process.communicate(timeout=30)[1]
    assert clones(root) == [] and "rebuild.verdict" not in tags_of(root, row)


# The verdict


def test_verdict_depends_on_outputs_numbers_and_environment() -> None:
    same, other = Output("a", "x", "1", "1"), Output("b", "y", "1", "2")
    differs, missing = Metric("m", 1.0, 2.0, None), Metric("m", None, 2.0, None)
    assert [judge([same], [missing], like) for like in (True, False)] == ["exact", "exact-env-differs"]
    cases = [([same, other], [], True), ([same], [differs], True), ([other], [], False)]
    assert [judge(*case) for case in cases] == ["diverged"] * 3


def test_output_that_one_side_lacks_differs() -> None:
    outs = [[{"path": path, "md5": path * 32} for path in paths] for paths in ("ab", "bd")]
    lines = compare_outputs(*({"stage": {"outs": out}} for out in outs))
    assert [(line.path, line.same) for line in lines] == [("a", False), ("b", True), ("d", False)]


def test_spread_is_found_where_the_record_has_it() -> None:
    """In a record that the pipeline wrote."""
    files = {model: PROJECT / f"metrics/evaluation/{model}.json" for model in ("ddpm", "reference")}
    records = {model: json.loads(file.read_text()) for model, file in files.items()}
    scores = records["ddpm"]["instruments"]["fashion-mnist-cnn-v1"]
    rows = records["reference"]["instruments"]["fashion-mnist-cnn-v1"]["rows"]
    expected = {
        "ddpm/fashion-mnist-cnn-v1/kid": scores["scores"]["kid"]["std"],
        "ddpm/fashion-mnist-cnn-v1/position": scores["position"]["std"],
        "ddpm/label_accuracy": records["ddpm"]["label_accuracy"]["std"],
        "ddpm/authentic": records["ddpm"]["memorisation"]["authentic"]["std"],
        "reference/fashion-mnist-cnn-v1/fd": rows["train"]["fd"]["std"],
    }
    without = ("ddpm/n", "ddpm/fashion-mnist-cnn-v1/fd_std", "train_vae/elbo", "ddpm/nobody/fd")
    assert {name: spread_of(records, name) for name in (*expected, *without)} == expected | dict.fromkeys(
        without
    )


@pytest.mark.parametrize(("verdict", "status"), [("exact", 0), ("exact-env-differs", 3), ("diverged", 4)])
def test_verdict_is_the_exit_status(verdict: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rediffuse.commands.rebuild.rebuild", lambda row, *, keep: verdict)
    monkeypatch.setattr("rediffuse.tracking.sync.sync", list)
    assert CliRunner().invoke(main, ["rebuild", "tidy-ox", "--keep"]).exit_code == status


def test_unknown_row_is_an_error(root: Path) -> None:
    result = CliRunner().invoke(main, ["rebuild", "nobody"])
    assert result.exit_code == 1 and result.stderr.startswith("error: no row is called 'nobody'")
