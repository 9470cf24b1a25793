"""A row made a branch: what it is made from, and that it outlives everything that removes experiments and data."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from toy import FOREIGN, add_row, client, commit, copy_repository, dvc, experiment_ref, git, make_repository

from rediffuse.cli import main
from rediffuse.commands.keep import keep
from rediffuse.commands.rebuild import rebuild
from rediffuse.runtime.errors import UserError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("base") / "repository"
    with pytest.MonkeyPatch.context() as patch:
        for name in FOREIGN:
            patch.delenv(name, raising=False)
        make_repository(root)
    return root


@pytest.fixture
def root(base: Path, empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository as working directory, with an empty store and without remotes."""
    root = tmp_path / "repository"
    copy_repository(base, root, empty_store)
    for name in FOREIGN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(root)
    return root


def add_remotes(root: Path) -> None:
    """A git remote, and a DVC remote that the commits so far do not know."""
    git(root.parent, "init", "-q", "--bare", "remote.git")
    git(root, "remote", "add", "origin", "../remote.git")
    dvc(root, "remote", "add", "--local", "--default", "store", str(root.parent / "store"))


def refs(repository: Path) -> dict[str, str]:
    lines = git(repository, "for-each-ref", "--format=%(refname) %(objectname)").splitlines()
    return dict(line.split() for line in lines)


def test_kept_experiment_outlives_removal_and_garbage_collection(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_remotes(root)
    add_row(root, "larger", experiment=True)
    ref = experiment_ref(root, "larger")
    made = git(root, "rev-parse", ref)
    assert keep("larger") == "kept/larger"
    said = capsys.readouterr().out
    assert refs(root.parent / "remote.git") == {"refs/heads/kept/larger": made, ref: made}
    assert f"branch kept/larger: made, {made[:7]}" in said and "git remote origin: pushed" in said and "DVC remote store:" in said

    assert keep("larger") == "kept/larger"  # again: nothing new, no error
    said = capsys.readouterr().out
    assert f"branch kept/larger: is there already, {made[:7]}" in said
    assert "git remote origin: has them already" in said and "DVC remote store: has the data already" in said

    dvc(root, "exp", "remove", "larger")
    dvc(root, "gc", "-w", "-f")
    clone = root.parent / "clone"
    git(root.parent, "clone", "-q", "-b", "kept/larger", "remote.git", "clone")
    dvc(clone, "remote", "add", "--local", "--default", "store", str(root.parent / "store"))
    dvc(clone, "pull")
    assert (clone / "data/model.txt").read_text() == "30.0"  # scale 3 times the sum of 1, 2, 3 and 4
    assert "up to date" in dvc(clone, "status")
    assert rebuild("larger", "evaluate") == "exact"  # its input is only on the remote by now


def test_without_remotes_the_local_part_is_done_and_the_rest_is_said(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = add_row(root, "larger", experiment=True)
    assert keep(row, "better") == "better"
    said = capsys.readouterr().out
    assert refs(root)["refs/heads/better"] == git(root, "rev-parse", experiment_ref(root, "larger"))
    assert "git remote: there is none" in said and "`git remote add origin URL`" in said
    assert "DVC remote: there is none" in said and "`dvc remote add --default NAME URL`" in said


def test_remote_that_fails_is_an_error_after_the_rest_is_done(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_remotes(root)
    add_row(root, "larger", experiment=True)
    with pytest.raises(UserError, match="branch kept/larger is there, but not everything could be pushed:\n  git remote nowhere: "):
        keep("larger", remote="nowhere")
    said = capsys.readouterr().out
    assert "refs/heads/kept/larger" in refs(root) and "DVC remote store: " in said and "files pushed" in said


def test_data_that_are_nowhere_are_named(root: Path) -> None:
    add_remotes(root)
    add_row(root, "larger", experiment=True)
    dvc(root, "gc", "-w", "-f")  # drops the experiment's own model, and keeps what the checkout shares with it
    with pytest.raises(UserError, match=r"DVC remote store: neither it nor the cache here has data/model\.txt: make them again"):
        keep("larger")


def test_results_of_a_plain_repro_are_found_where_they_are_committed(root: Path) -> None:
    """Not at the commit that the row names, from which they were made, nor at the last one."""
    (root / "stages" / "model.py").write_text("SLOPE = 4.0\n")
    dvc(root, "repro")
    row = add_row(root, "repro-1", files={"recipe/dvc.lock": (root / "dvc.lock").read_bytes()})
    made = commit(root, "results with another slope")
    (root / "README").write_text("on we go")
    (root / "stages" / "model.py").write_text("SLOPE = 5.0\n")
    dvc(root, "repro")
    commit(root, "later")
    assert keep(row) == "kept/repro-1"
    assert refs(root)["refs/heads/kept/repro-1"] == made


def test_results_in_the_checkout_are_saved_with_new_code(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (root / "stages" / "model.py").write_text("from stages.slope import SLOPE\n")
    (root / "stages" / "slope.py").write_text("SLOPE = 6.0\n")
    (root / "notes").write_text("nothing that a stage reads")
    pipeline = yaml.safe_load((root / "dvc.yaml").read_text())
    pipeline["stages"]["train"]["deps"].append("stages/slope.py")
    (root / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    dvc(root, "repro")
    lock = (root / "dvc.lock").read_bytes()
    assert b"stages/slope.py" in lock
    files = {"recipe/dvc.lock": lock, "recipe/dvc.yaml": (root / "dvc.yaml").read_bytes()}
    before = git(root, "rev-parse", "HEAD")
    row = add_row(root, "repro-1", files=files)
    assert keep(row) == "kept/repro-1"
    assert git(root, "show", "kept/repro-1:stages/slope.py") == "SLOPE = 6.0"
    assert git(root, "show", "kept/repro-1:dvc.lock").encode() + b"\n" == lock
    assert "notes" not in git(root, "ls-tree", "--name-only", "kept/repro-1").split()
    assert git(root, "rev-parse", "HEAD") == before and (root / "stages/slope.py").exists()  # the checkout is as it was
    assert keep(row) == "kept/repro-1"
    assert "its results are in commit" in capfd.readouterr().out


def test_results_that_are_nowhere_are_refused_with_the_remedy(root: Path) -> None:
    (root / "stages" / "model.py").write_text("SLOPE = 4.0\n")
    dvc(root, "repro")
    row = add_row(root, "repro-1", files={"recipe/dvc.lock": (root / "dvc.lock").read_bytes()})
    git(root, "checkout", "-q", ".")
    with pytest.raises(UserError, match=r"are in no commit, and the checkout holds others by now: .*`rediffuse sync`.*`dvc repro`"):
        keep(row)
    assert not any("kept" in ref for ref in refs(root))


def test_code_that_went_on_after_the_results_is_not_what_is_kept(root: Path) -> None:
    """dvc.lock in the checkout is the row's, the module no longer is."""
    (root / "stages" / "model.py").write_text("SLOPE = 4.0\n")
    dvc(root, "repro")
    row = add_row(root, "repro-1", files={"recipe/dvc.lock": (root / "dvc.lock").read_bytes()})
    (root / "stages" / "model.py").write_text("SLOPE = 4.5\n")
    with pytest.raises(UserError, match="are in no commit"):
        keep(row)
    commit(root, "a lock that belongs to other code")
    with pytest.raises(UserError, match="are in no commit"):
        keep(row)


def test_names_that_git_does_not_take(root: Path) -> None:
    row = add_row(root, "larger", experiment=True)
    with pytest.raises(UserError, match=r"'a\.\.b' is no name for a branch of git: give another with --branch"):
        keep(row, "a..b")
    git(root, "branch", "kept")
    with pytest.raises(UserError, match=r"branch kept/larger cannot be made .*: give another name with --branch"):
        keep(row)
    head = git(root, "rev-parse", "HEAD")
    with pytest.raises(UserError, match=f"branch kept exists and is {head[:7]}, not "):
        keep(row, "kept")


@pytest.mark.parametrize(
    ("name", "branch"), [("larger (attempt 2)", "kept/larger-attempt-2"), ("a..b~.lock", "kept/a-b"), ("ü", "kept/row")]
)
def test_default_branch_is_the_rows_name_as_git_takes_it(root: Path, name: str, branch: str) -> None:
    row = add_row(root, "repro-1")
    client(root).update_run(row, name=name)
    assert keep(row) == branch
    assert f"refs/heads/{branch}" in refs(root)


def test_experiment_that_is_only_on_the_git_remote_is_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = add_row(root, "larger", experiment=True)
    ref = experiment_ref(root, "larger")
    made = git(root, "rev-parse", ref)
    add_remotes(root)
    git(root, "push", "-q", "origin", f"{ref}:{ref}")
    git(root, "push", "-q", "origin", "main")
    git(root.parent, "clone", "-q", "-b", "main", "remote.git", "fresh")  # on another machine, with the same store
    monkeypatch.chdir(fresh := root.parent / "fresh")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root}/.mlflow/mlflow.db")
    assert keep(row) == "kept/larger"
    assert refs(fresh)["refs/heads/kept/larger"] == made


def test_command_ends_with_an_error_only_if_something_asked_for_was_not_done(root: Path) -> None:
    row = add_row(root, "larger", experiment=True)
    assert CliRunner().invoke(main, ["keep", row]).exit_code == 0  # without remotes
    result = CliRunner().invoke(main, ["keep", row, "--branch", "better", "--remote", "nowhere"])
    assert result.exit_code == 1 and "git remote nowhere: " in result.stderr
    assert {"refs/heads/kept/larger", "refs/heads/better"} <= refs(root).keys()
