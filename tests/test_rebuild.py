"""A row made again in a clone: which commit is found, what is refused, what is compared, and the verdict."""

from __future__ import annotations

import json
import os
import re
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
from rediffuse.commands.revision import find_commit
from rediffuse.commands.rows import find_row
from rediffuse.commands.verdict import Output, compare_metrics, compare_outputs, judge, spread_of
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


def locked(root: Path, *edits: Callable[[dict[str, Any]], object]) -> dict[str, bytes]:
    """The dvc.lock of HEAD as an artifact, after edits of its stages."""
    lock = yaml.safe_load(git(root, "show", "HEAD:dvc.lock"))
    for edit in edits:
        edit(lock["stages"])
    return {"recipe/dvc.lock": yaml.safe_dump(lock, sort_keys=False).encode()}


def set_hash(stage: str, path: str) -> Callable[[dict[str, Any]], None]:
    """An edit of dvc.lock: another hash of a dependency."""

    def edit(stages: dict[str, Any]) -> None:
        next(entry for entry in stages[stage]["deps"] if entry["path"] == path)["md5"] = "0" * 32

    return edit


def set_train(**values: object) -> Callable[[dict[str, Any]], None]:
    """An edit of dvc.lock: other parameters of the stage train."""
    return lambda stages: stages["train"]["params"]["params.yaml"]["train"].update(values)


def found(root: Path, row: str) -> str:
    """The commit that the row is rebuilt from."""
    files = ((root / name).read_bytes() for name in ("params.yaml", "dvc.lock"))
    return find_commit(root, toy.client(root).get_run(row), *files)[0]


def refused(row: str, capfd: Capture) -> str:
    """The refusal: no stage has run, and the row has no verdict."""
    with pytest.raises(UserError) as error:
        rebuild(row)
    assert "Running stage" not in capfd.readouterr().err
    assert "rebuild.verdict" not in tags_of(Path.cwd(), row) and clones(Path.cwd()) == []
    return str(error.value)


# The commit


@pytest.mark.parametrize("kept", [False, True])
def test_experiment_that_is_only_on_the_git_remote_is_fetched(root: Path, kept: bool) -> None:
    """As `dvc exp push` puts it there, or as a branch."""
    row, ref = add_row(root, "larger", experiment=True), experiment_ref(root, "larger")
    made = git(root, "rev-parse", ref)
    git(root.parent, "init", "-q", "--bare", "remote.git")
    git(root, "remote", "add", "origin", "../remote.git")
    git(root, "push", "-q", "origin", f"{ref}:{'refs/heads/kept/larger' if kept else ref}")
    git(root, "update-ref", "-d", ref)
    git(root, "update-ref", "-d", "refs/exps/exec/EXEC_BRANCH")
    git(root, "reflog", "expire", "--expire=now", "--all")
    git(root, "gc", "-q", "--prune=now")
    assert found(root, row) == made == git(root, "rev-parse", f"{made}^{{commit}}")  # it is here again


@pytest.mark.parametrize(("path", "dirty"), [("stages/model.py", "true"), ("params.yaml", "false")])
def test_uncommitted_recipe_is_refused_until_committed(root: Path, path: str, dirty: str) -> None:
    row = add_row(root, "repro-1", git__dirty=dirty)
    (root / path).write_text((root / path).read_text() + "\nmore: 1\n")
    lock = (root / "dvc.lock").read_text()
    (root / "dvc.lock").write_text(lock + "# of the row\n")
    with pytest.raises(UserError, match="`dvc exp save`"):
        found(root, row)
    made = commit(root, "results")
    (root / "dvc.lock").write_text(lock + "# of a later one\n")
    commit(root, "later")
    (root / "dvc.lock").write_text(lock + "# of the row\n")
    assert found(root, row) == made


def test_experiment_without_a_commit_is_refused(root: Path) -> None:
    (root / "dvc.lock").write_text("# which no commit has")
    for made, words in {"1" * 40: "1" * 40, "": "rediffuse sync --all"}.items():
        with pytest.raises(UserError, match=words):
            found(root, add_row(root, "larger", experiment=True, dvc__exp_rev=made))


def test_of_several_attempts_the_live_one_is_meant(root: Path) -> None:
    add_row(root, "larger", experiment=True, rediffuse__superseded="true")
    live = add_row(root, "larger", experiment=True, rediffuse__superseded="false")
    assert find_row("larger")[1].info.run_id == live
    add_row(root, "larger", experiment=True)
    with pytest.raises(UserError, match=live):
        find_row("larger")


def test_a_kept_experiment_outlives_its_machine(root: Path) -> None:
    """The commands of docs/team.md keep it, and a clone elsewhere pulls it."""
    git(root.parent, "init", "-q", "--bare", "remote.git")
    git(root, "remote", "add", "origin", "../remote.git")
    storage = ["remote", "add", "--local", "--default", "storage", "../storage"]
    dvc(root, *storage)
    page = (PROJECT / "docs/team.md").read_text()
    (commands,) = re.findall(r"^    dvc exp branch .*\n(?:    .+\n)*", page, re.MULTILINE)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["sh", "-ec", commands.replace("tidy-ox", "larger")]
    subprocess.run(command, cwd=root, env=os.environ | {"PATH": path}, check=True)
    clone = root.parent / "clone"
    git(root.parent, "clone", "-q", "-b", "kept/larger", "remote.git", "clone")
    dvc(clone, *storage)
    dvc(clone, "pull")
    assert (clone / "data/model.txt").read_text() == "30.0"  # the scale, 3, times the sum of 1, 2, 3 and 4


# What is refused


def test_whatever_differs_from_the_row_is_named(root: Path, capfd: Capture) -> None:
    edits = [
        set_hash("train", "stages/model.py"),
        set_hash("prepare", "data/extra.csv"),
        set_hash("evaluate", "data/model.txt"),  # as before `rediffuse sync`
        set_train(scale=2.5),
        lambda stages: stages["train"].update(cmd="python"),
    ]
    message = refused(add_row(root, "repro-1", files=locked(root, *edits)), capfd)
    assert sorted(re.findall(r"^  stage (.*)", message, re.MULTILINE)) == [
        "evaluate: dvc.lock of the row is not complete",
        "prepare: data/extra.csv modified",
        "train: command modified in dvc.yaml",
        "train: params.yaml train modified",
        "train: stages/model.py modified",
    ]
    lock = locked(root, lambda stages: stages.pop("evaluate"))
    message = refused(add_row(root, "repro-2", files=lock), capfd)
    assert re.findall(r"^  stage (.*)", message, re.MULTILINE) == ["evaluate: not in dvc.lock of the row"]


def test_tracked_raw_data_come_from_the_dvc_remote(root: Path, capfd: Capture) -> None:
    dvc(root, "remote", "add", "--local", "storage", "../storage")  # not in the commit
    dvc(root, "push", "-r", "storage", "data/extra.csv.dvc")
    shutil.rmtree(root / ".dvc/cache")
    row = add_row(root, "repro-1")
    assert "data/extra.csv deleted" in refused(row, capfd)
    dvc(root, "remote", "default", "--local", "storage")
    assert rebuild(row) == "exact"


# What is compared


def test_experiment_is_rebuilt_exactly_and_the_row_says_so(
    root: Path, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a clone with a cache of its own, from the experiment's code, without what steers DVC here."""
    (here, files), (other, others) = environment(), environment(threads=999)
    dvc(root, "cache", "dir", "--local", str(tmp_path / "elsewhere"))
    shutil.copytree(root / ".dvc/cache", tmp_path / "elsewhere")
    before = sorted((tmp_path / "elsewhere").rglob("*"))
    variables = {"DVC_EXP_NAME": "foreign", "DVC_EXP_BASELINE_REV": "1" * 40, "DVC_ROOT": str(root)}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    tags = {"stage__prepare__environment": here, "stage__train__environment": other}
    row = add_row(root, "larger", experiment=True, files=files | others, **tags)
    (root / "stages" / "model.py").write_text("SLOPE = 7.0\n")
    assert rebuild("larger", keep=True) == "exact-env-differs"
    output = capfd.readouterr()
    lines = output.out.splitlines()
    made = git(root, "rev-parse", experiment_ref(root, "larger"))
    stages = yaml.safe_load(git(root, "show", f"{made}:dvc.lock"))["stages"]
    outputs = [(stage, out["path"], out["md5"][:8]) for stage in STAGES for out in stages[stage]["outs"]]
    for stage, path, md5 in outputs:
        assert [stage, path, md5, md5, "same"] in [line.split() for line in lines]
    assert len(outputs) == 4 and lines[-1] == "exact-env-differs"
    assert "metrics: all 2 numbers are those of the row" in lines
    assert lines[lines.index("environment of prepare:") + 1] == "  no difference"
    assert lines[lines.index("environment of train:") + 1].startswith("  threads 999, here ")
    assert "environment of evaluate: not recorded" in lines and "Running stage 'train'" in output.err
    tags = {name: tags_of(root, row)[f"rebuild.{name}"] for name in ("verdict", "environment", "rev")}
    assert tags == {"verdict": "exact-env-differs", "environment": here, "rev": made}
    clone = clones(root)[0] / root.name
    assert (clone / "data/model.txt").read_text() == "30.0" and any((clone / ".dvc/cache").rglob("*.dir"))
    assert sorted((tmp_path / "elsewhere").rglob("*")) == before
    assert git(root, "status", "--porcelain") == "M stages/model.py"


def test_chance_diverges_and_the_metric_is_told_in_units_of_its_spread(root: Path, capfd: Capture) -> None:
    row = add_row(root, "chance", experiment=True)
    assert rebuild(row, keep=True) == "diverged" == tags_of(root, row)["rebuild.verdict"]
    lines = capfd.readouterr().out.splitlines()
    assert "first diverging stage: train" in lines
    assert [line.split()[-1] for line in lines if line.startswith(STAGES)] == ["same", *["DIFFERS"] * 3]
    (metrics,) = root.parent.glob("clones/*/*/metrics/toy.json")
    texts = git(root, "show", f"{experiment_ref(root, 'chance')}:metrics/toy.json"), metrics.read_text()
    recorded, rebuilt = (json.loads(text)["cnn"]["fd"] for text in texts)
    units = (rebuilt - recorded) / 0.25
    (metric,) = (line for line in lines if line.startswith("metric "))
    assert metric.startswith(f"metric toy/cnn/fd: recorded {recorded!r}, rebuilt {rebuilt!r}, ")
    assert f"{units:+.2f} units of spread, {'within' if abs(units) < 2 else 'beyond'}" in metric


# A clone never outlives its rebuild


def row_of(root: Path, setting: str) -> str:
    """A row whose commit has this setting of the stage train on."""
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace(f"{setting}: false", f"{setting}: true"))
    commit(root, setting)
    return add_row(root, "repro-1", files=locked(root, set_train(**{setting: True})))


def test_failed_or_interrupted_rebuild_leaves_nothing_behind(
    root: Path, tmp_path: Path, capfd: Capture
) -> None:
    with pytest.raises(UserError, match="--keep"):
        rebuild(row_of(root, "broken"))
    assert "the toy is broken" in capfd.readouterr().err and clones(root) == []

    toy.git(root, "reset", "-q", "--hard", "HEAD~1")
    row, started = row_of(root, "slow"), tmp_path / "started"
    code = f"""
import signal
from rediffuse.commands.rebuild import rebuild
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process ignores it
rebuild({row!r})
"""
    variables = {**os.environ, "PYTHONPATH": str(PROJECT / "src"), "TOY_STARTED": str(started)}
    how: dict[str, Any] = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen([sys.executable, "-c", code], env=variables, **how)
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
    missing, differs = (compare_metrics(row, {"m": 2.0}, {}) for row in ({}, {"m": 1.0}))
    assert compare_metrics({"m": 2.0}, {"m": 2.0}, {}) == [] and "not in the row" in str(missing[0])
    assert [judge([same], missing, like) for like in (True, False)] == ["exact", "exact-env-differs"]
    cases = [([same, other], [], True), ([same], differs, True), ([other], [], False)]
    assert [judge(*case) for case in cases] == ["diverged"] * 3
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
        "ddpm/fashion-mnist-cnn-v1/ratio_to_real": scores["ratio_to_real"]["std"],
        "ddpm/label_accuracy": records["ddpm"]["label_accuracy"]["std"],
        "ddpm/authentic": records["ddpm"]["memorisation"]["authentic"]["std"],
        "reference/fashion-mnist-cnn-v1/fd": rows["real"]["fd"]["std"],
    }
    without = ("ddpm/n", "ddpm/fashion-mnist-cnn-v1/fd_std", "train_vae/elbo", "ddpm/nobody/fd")
    found = {name: spread_of(records, name) for name in (*expected, *without)}
    assert found == expected | dict.fromkeys(without)


def test_verdict_is_the_exit_status(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(main, ["rebuild", "nobody"])
    assert result.exit_code == 1 and result.stderr.startswith("error: no row is called 'nobody'")
    monkeypatch.setattr("rediffuse.tracking.sync.sync", list)
    for verdict, status in {"exact": 0, "exact-env-differs": 3, "diverged": 4}.items():
        monkeypatch.setattr("rediffuse.commands.rebuild.rebuild", lambda row, *, keep, is_=verdict: is_)
        assert CliRunner().invoke(main, ["rebuild", "tidy-ox", "--keep"]).exit_code == status
