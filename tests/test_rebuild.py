"""A row made again in a clone: where the revision comes from, what is refused, what is compared, and the verdict."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from toy import FOREIGN, add_row, client, commit, copy_repository, dvc, experiment_ref, git, make_repository, tags_of

from rediffuse.cli import main
from rediffuse.commands.rebuild import rebuild
from rediffuse.commands.verdict import STATUS, Metric, Output, compare_outputs, first_diverging, judge, spread_of
from rediffuse.runtime.errors import UserError
from rediffuse.tracking.environment import describe_environment, environment_digest
from rediffuse.tracking.lock import read_lock

PROJECT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("base") / "my repository"
    with pytest.MonkeyPatch.context() as patch:
        for name in FOREIGN:
            patch.delenv(name, raising=False)
        make_repository(root)
    return root


@pytest.fixture
def root(base: Path, empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository as working directory, with an empty store; temporary folders go to `clones` beside it."""
    root = tmp_path / "my repository"
    copy_repository(base, root, empty_store)
    (tmp_path / "clones").mkdir()
    for name in FOREIGN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "clones"))
    monkeypatch.setattr("tempfile.tempdir", None)  # where it was found before is kept there
    monkeypatch.chdir(root)
    return root


def clones(root: Path) -> list[str]:
    """What rebuilds have left behind."""
    return [path.name for path in (root.parent / "clones").iterdir() if path.name.startswith("rediffuse-rebuild-")]


def recorded_environment(**changes: object) -> tuple[str, bytes]:
    """The digest and the text of this environment, with changes of what decides the bits."""
    environment = describe_environment()
    environment["decides"] |= changes
    return environment_digest(environment), json.dumps(environment).encode()


def lock_of(root: Path, revision: str) -> dict[str, dict[str, object]]:
    return dict(yaml.safe_load(git(root, "show", f"{revision}:dvc.lock"))["stages"])


def dump_lock(stages: dict[str, dict[str, object]]) -> bytes:
    return yaml.safe_dump({"schema": "2.0", "stages": stages}, sort_keys=False).encode()


# Where the revision comes from


def test_experiment_is_rebuilt_exactly_and_the_row_says_so(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    digest, text = recorded_environment()
    environments = {f"stage__{stage}__environment": digest for stage in ("prepare", "train", "evaluate")}
    row = add_row(root, "larger", experiment=True, files={f"recipe/environment/{digest}.json": text}, **environments)
    (root / "stages" / "model.py").write_text("SLOPE = 7.0\n")  # the checkout has gone on: the clone is of the experiment
    assert rebuild("larger") == "exact"
    said = capfd.readouterr()
    lines = said.out.splitlines()
    commit_ = git(root, "rev-parse", experiment_ref(root, "larger"))
    assert lines[0] == f"row larger ({row}), rebuilt from experiment commit {commit_[:7]} (tag dvc.exp_rev)"
    made = read_lock(git(root, "show", f"{commit_}:dvc.lock").encode(), "")
    for stage, path in (("prepare", "data/pixels"), ("train", "data/model.txt"), ("evaluate", "metrics/toy.json")):
        (md5,) = (out["md5"][:8] for out in made[stage]["outs"] if out["path"] == path)
        assert [stage, path, md5, md5, "same"] in [line.split() for line in lines]
    assert "metrics: all 2 numbers are those of the row" in lines
    assert "environment: the same as recorded for prepare, train, evaluate" in lines
    assert lines[-1] == "exact" and not any("DIFFERS" in line or "first diverging" in line for line in lines)
    assert "Running stage 'train'" in said.err  # what the stages say passes through
    tags = tags_of(root, row)
    assert (tags["rebuild.verdict"], tags["rebuild.environment"], tags["rebuild.rev"]) == ("exact", digest, commit_)
    assert abs((datetime.now(UTC) - datetime.fromisoformat(tags["rebuild.date"])).total_seconds()) < 60
    assert clones(root) == []


def test_row_that_sync_has_not_seen_is_rebuilt_from_the_ref_and_its_lock(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Without dvc.exp_rev, and with a dvc.lock in which the last stage is still that of the baseline."""
    stale = lock_of(root, experiment_ref(root, "larger")) | {"evaluate": lock_of(root, "HEAD")["evaluate"]}
    row = add_row(root, "larger", experiment=True, files={"recipe/dvc.lock": dump_lock(stale)}, dvc__exp_rev="")
    assert rebuild(row) == "exact"
    said = capfd.readouterr().out
    assert f"({experiment_ref(root, 'larger')})" in said.splitlines()[0]
    assert "environment: not recorded for prepare, train, evaluate" in said


def test_experiment_that_is_only_on_the_git_remote_is_fetched(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    row = add_row(root, "larger", experiment=True)
    ref = experiment_ref(root, "larger")
    git(root.parent, "init", "-q", "--bare", "remote.git")
    git(root, "remote", "add", "origin", "../remote.git")
    git(root, "push", "-q", "origin", f"{ref}:{ref}")
    git(root, "update-ref", "-d", ref)
    git(root, "update-ref", "-d", "refs/exps/exec/EXEC_BRANCH")
    git(root, "reflog", "expire", "--expire=now", "--all")
    git(root, "gc", "-q", "--prune=now")
    assert rebuild(row) == "exact"
    assert f"fetched from git remote origin ({ref})" in capfd.readouterr().out.splitlines()[0]


def test_experiment_that_is_gone_is_rebuilt_from_baseline_diff_and_parameters(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Changed and new code, binary and with a space in its name."""
    (root / "stages" / "model.py").write_text("from stages.slope import SLOPE\n")
    (root / "stages" / "slope.py").write_text("SLOPE = 1.5\n")
    (root / "stages" / "a picture.bin").write_bytes(bytes(range(256)))
    (root / "params.yaml").write_text((root / "params.yaml").read_text().replace("scale: 2.0", "scale: 5.0"))
    dvc(root, "repro")
    git(root, "add", "--intent-to-add", "stages")
    diff = subprocess.run(["git", "diff", "--binary", "HEAD", "--", "stages"], cwd=root, check=True, capture_output=True).stdout
    files = {f"recipe/{name}": (root / name).read_bytes() for name in ("params.yaml", "dvc.lock")} | {"recipe/code.diff": diff}
    row = add_row(root, "repro-1", files=files, git__dirty="true", metrics=False)
    client(root).log_metric(row, "toy/cnn/fd", 1.5 * 5 * 10)
    git(root, "reset", "-q")
    git(root, "checkout", "-q", ".")
    (root / "stages" / "slope.py").unlink()
    assert rebuild(row) == "exact"
    said = capfd.readouterr().out.splitlines()
    head = git(root, "rev-parse", "HEAD")
    assert said[0] == f"row repro-1 ({row}), rebuilt from commit {head[:7]} with the row's code.diff and params.yaml"
    assert "metric toy/n: not in the row, rebuilt 3.0" in said  # which contradicts nothing


def test_ref_that_is_another_experiment_by_now_is_passed_over(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    row = add_row(root, "larger", experiment=True, dvc__exp_rev="")
    git(root, "update-ref", experiment_ref(root, "larger"), experiment_ref(root, "chance"))
    assert rebuild(row) == "exact"
    said = capfd.readouterr().out.splitlines()
    assert "is another experiment now, its params.yaml differs" in said[0]
    assert "with the row's params.yaml" in said[1]


def test_commit_that_nobody_has_is_refused(root: Path) -> None:
    row = add_row(root, "lost", mlflow__source__git__commit="1" * 40)
    with pytest.raises(UserError, match=f"commit {'1' * 40} .* is neither in this repository nor on a git remote"):
        rebuild(row)


def test_superseded_rows_lose_against_the_live_one(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    add_row(root, "larger", experiment=True, rediffuse__superseded="true")
    live = add_row(root, "larger", experiment=True, rediffuse__superseded="false")
    rebuild("larger", "evaluate")
    assert f"({live})" in capfd.readouterr().out.splitlines()[0]


def test_unknown_row_is_an_error_with_the_remedy(root: Path) -> None:
    with pytest.raises(UserError, match=r"no row is called 'nobody': .*look its id or name up with `make ui`"):
        rebuild("nobody")


# What is refused before anything runs


def refused(row: str, capfd: pytest.CaptureFixture[str], stage: str | None = None) -> str:
    """The refusal; no stage has run, and no tag says otherwise."""
    with pytest.raises(UserError) as error:
        rebuild(row, stage)
    assert "Running stage" not in capfd.readouterr().err
    assert "rebuild.verdict" not in tags_of(Path.cwd(), row) and clones(Path.cwd()) == []
    return str(error.value)


def test_altered_line_of_code_is_named(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The tag names a commit in which one line of a module is another."""
    git(root, "checkout", "-q", "--detach", experiment_ref(root, "larger"))
    (root / "stages" / "model.py").write_text("SLOPE = 1.25\n")
    altered = commit(root, "altered")
    git(root, "checkout", "-q", "main")
    said = refused(add_row(root, "larger", experiment=True, dvc__exp_rev=altered), capfd)
    assert "\n  stages/model.py (stage train): " in said and said.count("(stage ") == 1


def test_altered_parameter_is_named_with_both_values(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    row = add_row(root, "larger", experiment=True, dvc__exp_rev=git(root, "rev-parse", "HEAD"))
    assert "params.yaml: train.scale is 3.0 in the row, 2.0 in the clone" in refused(row, capfd)


def test_altered_parameter_in_the_recipe_contradicts_the_table(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    row = add_row(root, "repro-1")
    settings = git(root, "show", "HEAD:params.yaml").replace("scale: 2.0", "scale: 2.5") + "\n"
    client(root).log_text(row, settings, "recipe/params.yaml")
    assert "params.yaml: train.scale is 2.0 in the row's table, 2.5 in the clone" in refused(row, capfd)


def test_altered_pipeline_is_named(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pipeline = git(root, "show", "HEAD:dvc.yaml").replace("python -m stages.train", "python -u -m stages.train")
    said = refused(add_row(root, "repro-1", files={"recipe/dvc.yaml": pipeline.encode()}), capfd)
    assert "dvc.yaml: stage train differs" in said


def test_altered_data_file_is_named(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lock = lock_of(root, "HEAD")
    deps = lock["prepare"]["deps"]
    assert isinstance(deps, list)
    (extra,) = (dep for dep in deps if dep["path"] == "data/extra.csv")
    extra["md5"] = "0" * 32
    assert "data/extra.csv (stage prepare): 00000000 in the row" in refused(
        add_row(root, "r", files={"recipe/dvc.lock": dump_lock(lock)}), capfd
    )


def test_tracked_raw_data_that_nobody_has_are_named(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    row = add_row(root, "repro-1")
    md5 = yaml.safe_load((root / "data/extra.csv.dvc").read_text())["outs"][0]["md5"]
    shutil.rmtree(root / ".dvc/cache/files/md5" / md5[:2])
    said = refused(row, capfd)
    assert f"raw data data/extra.csv ({md5}) is neither in the checkout's DVC cache nor on its DVC remote" in said and "`dvc pull`" in said


def test_dirty_row_without_a_diff_is_refused(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "no artifact recipe/code.diff" in refused(add_row(root, "repro-1", git__dirty="true"), capfd)


def test_incomplete_lock_is_refused_with_the_remedy(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A plain `dvc repro` before `rediffuse sync`: nobody else has the lock."""
    lock = lock_of(root, "HEAD")
    del lock["evaluate"]
    row = add_row(root, "repro-1", files={"recipe/dvc.lock": dump_lock(lock)})
    assert "does not record what came of evaluate (recipe/dvc.lock)" in (said := refused(row, capfd)) and "`rediffuse sync`" in said
    assert "does not record" in refused(row, capfd, "evaluate")
    assert rebuild(row, "train") == "exact"


# What diverges


def test_altered_raw_data_that_no_lock_knows_diverge(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (root / "data/raw/numbers.txt").write_text("1 2 4 ")
    assert rebuild(add_row(root, "repro-1")) == "diverged"
    assert "first diverging stage: prepare" in capfd.readouterr().out.splitlines()


def test_chance_diverges_and_the_metric_is_told_in_units_of_its_spread(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    row = add_row(root, "chance", experiment=True)
    assert rebuild(row, keep=True) == "diverged"
    lines = capfd.readouterr().out.splitlines()
    assert lines[-1] == tags_of(root, row)["rebuild.verdict"] == "diverged"
    assert "first diverging stage: train" in lines
    assert [line.split()[-1] for line in lines if line.startswith(("prepare ", "train ", "evaluate "))] == ["same", *["DIFFERS"] * 3]
    # an independent reckoning, from the files of both
    (clone,) = (Path(line.removeprefix("clone: ")) for line in lines if line.startswith("clone: "))
    rebuilt = json.loads((clone / "metrics/toy.json").read_text())["cnn"]["fd"]
    recorded = json.loads(git(root, "show", f"{experiment_ref(root, 'chance')}:metrics/toy.json"))["cnn"]["fd"]
    units = (rebuilt - recorded) / 0.25
    (metric,) = (line for line in lines if line.startswith("metric "))
    assert metric.startswith(f"metric toy/cnn/fd: recorded {recorded!r}, rebuilt {rebuilt!r}, difference ")
    assert metric.endswith(f"{units:+.2f} units of spread: {'within' if abs(units) < 2 else 'beyond'} the recorded spread")


def test_number_in_the_row_that_its_files_do_not_have_diverges(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    row = add_row(root, "repro-1", metrics=False)
    client(root).log_metric(row, "toy/cnn/fd", 19.0)  # 20 is true
    assert rebuild(row, "evaluate") == "diverged"
    assert "recorded 19.0, rebuilt 20.0, difference +1, +4.00 units of spread: beyond" in capfd.readouterr().out


def test_other_environment_is_named_and_has_its_own_verdict(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    digest, text = recorded_environment(threads=999)
    files = {f"recipe/environment/{digest}.json": text}
    row = add_row(root, "repro-1", files=files, stage__train__environment=digest)
    assert rebuild(row) == "exact-env-differs"
    lines = capfd.readouterr().out.splitlines()
    at = lines.index("environment of train differs:")
    assert lines[at + 1].startswith("  threads 999, here ")
    assert "environment: not recorded for prepare, evaluate" in lines


# One stage


def test_single_stage_takes_its_inputs_from_the_cache_and_runs_alone(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    row = add_row(root, "larger", experiment=True)
    shutil.rmtree(root / "data/raw")  # only prepare reads it
    assert rebuild(row, "train") == "exact"
    said = capfd.readouterr()
    assert "Running stage 'train'" in said.err and said.err.count("Running stage") == 1
    assert [line.split()[0] for line in said.out.splitlines() if line.endswith("same")] == ["train"]
    tags = tags_of(root, row)
    assert tags["rebuild.train.verdict"] == "exact" and "rebuild.verdict" not in tags  # nobody has looked at the others


def test_single_stage_whose_input_is_gone_is_refused(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    row = add_row(root, "repro-1")
    shutil.rmtree(root / ".dvc/cache")
    dvc(root, "commit", "-f", "data/extra.csv.dvc")
    assert "data/model.txt (" in (said := refused(row, capfd, "evaluate")) and "which stage evaluate reads" in said


def test_unknown_stage_is_an_error_that_lists_the_known(root: Path) -> None:
    with pytest.raises(UserError, match=r"--stage nope is not in dvc\.yaml of this row; its stages are prepare, train, evaluate"):
        rebuild(add_row(root, "repro-1"), "nope")


# The clone


def test_clone_has_a_cache_of_its_own_and_is_kept_on_demand(root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    dvc(root, "cache", "dir", "--local", str(tmp_path / "elsewhere"))
    shutil.copytree(root / ".dvc/cache", tmp_path / "elsewhere")
    before = sorted(path.name for path in (tmp_path / "elsewhere").rglob("*"))
    assert rebuild(add_row(root, "repro-1"), keep=True) == "exact"
    (clone,) = (Path(line.removeprefix("clone: ")) for line in capfd.readouterr().out.splitlines() if line.startswith("clone: "))
    assert len(clones(root)) == 1 and (clone / "data/model.txt").read_text() == "20.0"
    assert list((clone / ".dvc/cache/files/md5").rglob("*")) and (clone / ".git").is_dir()  # no worktree
    assert sorted(path.name for path in (tmp_path / "elsewhere").rglob("*")) == before
    assert git(root, "status", "--porcelain") == "" and git(root, "worktree", "list").count("\n") == 0


def test_failing_stage_is_named_and_the_clone_goes(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = git(root, "show", "HEAD:params.yaml").replace("broken: false", "broken: true")
    lock = lock_of(root, "HEAD")
    params = lock["train"]["params"]
    assert isinstance(params, dict)
    params["params.yaml"]["train"]["broken"] = True
    row = add_row(root, "repro-1", files={"recipe/params.yaml": settings.encode(), "recipe/dvc.lock": dump_lock(lock)})
    with pytest.raises(
        UserError, match="stage train failed in the clone: its last lines stand above; the clone is removed; keep it with --keep"
    ):
        rebuild(row)
    assert "the toy is broken" in capfd.readouterr().err and clones(root) == []


def test_interrupted_rebuild_leaves_nothing_behind(root: Path, tmp_path: Path) -> None:
    settings = git(root, "show", "HEAD:params.yaml").replace("slow: false", "slow: true")
    lock = lock_of(root, "HEAD")
    params = lock["train"]["params"]
    assert isinstance(params, dict)
    params["params.yaml"]["train"]["slow"] = True
    row = add_row(root, "repro-1", files={"recipe/params.yaml": settings.encode(), "recipe/dvc.lock": dump_lock(lock)})
    code = f"from rediffuse.commands.rebuild import rebuild; rebuild({row!r})"
    environment = {**os.environ, "PYTHONPATH": str(PROJECT / "src"), "TOY_STARTED": str(tmp_path / "started")}
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored, if the tests run in a shell's background
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    assert len(clones(root)) == 1
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does on Ctrl-C
    said = process.communicate(timeout=30)[1]
    assert "KeyboardInterrupt" in said and clones(root) == []
    assert "rebuild.verdict" not in tags_of(root, row)


def test_environment_of_an_experiment_does_not_reach_the_clone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = add_row(root, "repro-1")
    monkeypatch.setenv("DVC_EXP_NAME", "foreign")
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "1" * 40)
    monkeypatch.setenv("DVC_ROOT", str(root))
    assert rebuild(row) == "exact"


# The verdict, in figures


def test_verdict_hangs_on_outputs_numbers_and_environment() -> None:
    same, other = Output("a", "x", "1", "1"), Output("b", "y", "1", "2")
    differs, missing = Metric("m", 1.0, 2.0, None), Metric("m", None, 2.0, None)
    assert [judge([same], [], environment) for environment in (True, None, False)] == ["exact", "exact", "exact-env-differs"]
    assert judge([same, other], [], True) == judge([same], [differs], True) == judge([other], [], False) == "diverged"
    assert judge([same], [missing], True) == "exact"
    assert first_diverging([same, other]) == "b" and first_diverging([same]) is None


def test_output_that_one_side_lacks_differs() -> None:
    def entry(*paths: str) -> dict[str, object]:
        return {"outs": [{"path": path, "hash": "md5", "md5": path * 32} for path in paths]}

    lines = compare_outputs(["s", "t"], {"s": entry("a", "b"), "t": entry("c")}, {"s": entry("b", "d")})
    assert [(line.path, line.same) for line in lines] == [("a", False), ("b", True), ("d", False), ("c", False)]


def test_spread_is_found_where_the_record_has_it() -> None:
    """In a record that the pipeline wrote."""
    records = {model: json.loads((PROJECT / f"metrics/evaluation/{model}.json").read_text()) for model in ("ddpm", "reference")}
    scores = records["ddpm"]["instruments"]["fashion-mnist-cnn-v1"]
    assert spread_of(records, "ddpm/fashion-mnist-cnn-v1/kid") == scores["scores"]["kid"]["std"]
    assert spread_of(records, "ddpm/fashion-mnist-cnn-v1/position") == scores["position"]["std"]
    assert spread_of(records, "ddpm/label_accuracy") == records["ddpm"]["label_accuracy"]["std"]
    rows = records["reference"]["instruments"]["fashion-mnist-cnn-v1"]["rows"]
    assert spread_of(records, "reference/fashion-mnist-cnn-v1/fd") == rows["train"]["fd"]["std"]
    for name in ("ddpm/n", "ddpm/fashion-mnist-cnn-v1/fd_std", "train_vae/elbo", "ddpm/nobody/fd"):
        assert spread_of(records, name) is None


# The command


@pytest.mark.parametrize(("verdict", "status"), [("exact", 0), ("exact-env-differs", 3), ("diverged", 4)])
def test_verdict_is_the_exit_status(verdict: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[object]()

    def pretend(row: str, stage: str | None = None, *, keep: bool = False) -> str:
        asked.append((row, stage, keep))
        return verdict

    monkeypatch.setattr("rediffuse.commands.rebuild.rebuild", pretend)
    assert CliRunner().invoke(main, ["rebuild", "tidy-ox"]).exit_code == status
    assert CliRunner().invoke(main, ["rebuild", "tidy-ox", "--stage", "sample_vae", "--keep"]).exit_code == status
    assert asked == [("tidy-ox", None, False), ("tidy-ox", "sample_vae", True)]


def test_refusal_is_an_error_and_help_tells_the_statuses(root: Path) -> None:
    result = CliRunner().invoke(main, ["rebuild", "nobody"])
    assert result.exit_code == 1 and result.stdout == "" and result.stderr.startswith("error: no row is called 'nobody'")
    said = CliRunner().invoke(main, ["rebuild", "--help"]).stdout
    assert all(f"{status}  {verdict}" in said for verdict, status in STATUS.items())
