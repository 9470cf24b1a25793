"""`rediffuse doctor` finds what was broken on purpose, and nothing in a checkout that is in order."""

import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from rediffuse.commands import checks, doctor, machine
from rediffuse.commands.checks import Finding
from rediffuse.params import flatten, load_params
from rediffuse.runtime.errors import UserError
from rediffuse.tracking.environment import describe_environment, environment_digest

PROJECT = Path(__file__).resolve().parents[1]
GROUPS = ["seed", "precision", "compile", "launcher", "data", "reference", "vae", "ddpm", "sample", "evaluate"]
PREPARE = """
from pathlib import Path
from model import TEXT
Path("data/pixels").mkdir(parents=True, exist_ok=True)
Path("data/pixels/images").write_text(TEXT + str(Path("data/raw").is_dir()))
"""
PIPELINE = {
    "prepare": {
        "cmd": f"PYTHONPATH=src {sys.executable} stages/prepare.py",
        "deps": ["src/model.py", "src/weights", "stages/prepare.py"],
        "params": GROUPS,
        "outs": ["data/pixels"],
    },
    "measure": {
        "cmd": "mkdir -p metrics && echo '{\"size\": 5}' > metrics/size.json",
        "deps": ["data/pixels"],
        "params": ["seed"],
        "metrics": [{"metrics/size.json": {"cache": False}}],
    },
}


def git(root: Path, *arguments: str) -> str:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    return subprocess.run(["git", *who, *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def dvc(root: Path, *arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DVC_")} | {"DVC_NO_ANALYTICS": "1"}
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=root, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def write_pipeline(root: Path, stages: dict[str, Any]) -> None:
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkout whose two stages have run, committed and pushed to the remotes of git and DVC beside it."""
    base = tmp_path_factory.mktemp("doctor")
    root = base / "checkout"
    for folder in ("src/weights", "stages"):
        (root / folder).mkdir(parents=True)
    (root / "src/model.py").write_text("TEXT = 'images'\n")
    (root / "src/weights/a.bin").write_text("1")
    (root / "stages/prepare.py").write_text(PREPARE)
    (root / ".gitignore").write_text("/.mlflow/\n/data/raw/\n__pycache__/\n")
    (root / "requirements.lock").write_text("")
    shutil.copy(PROJECT / "params.yaml", root)
    write_pipeline(root, PIPELINE)
    git(base, "init", "-q", "--bare", "remote.git")
    git(root, "init", "-q", "-b", "main")
    dvc(root, "init", "-q")
    dvc(root, "config", "core.analytics", "false")
    dvc(root, "remote", "add", "-d", "storage", "../storage")
    dvc(root, "repro")
    git(root, "add", ".")
    git(root, "commit", "-qm", "results")
    git(root, "remote", "add", "origin", "../remote.git")
    git(root, "push", "-qu", "origin", "main")
    return base


@pytest.fixture
def checkout(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as working directory."""
    shutil.copytree(finished, tmp_path / "copy", symlinks=True)
    root = tmp_path / "copy" / "checkout"
    for name in (*machine.OF_A_STAGE, "MLFLOW_TRACKING_URI", "REDIFFUSE_TRACKING"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(root)
    return root


def stages(root: Path) -> list[Any]:
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        return list(repo.index.stages)


def config(root: Path) -> Any:
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        return repo.config


def only(findings: list[Finding]) -> Finding:
    (finding,) = findings
    return finding


def assert_found(findings: list[Finding], level: str, *words: str) -> None:
    finding = only(findings)
    assert finding.level == level, finding
    assert [word for word in words if word not in finding.what] == [], finding
    assert finding.remedy


# The checkout


def test_a_checkout_in_order_is_ok_throughout(checkout: Path) -> None:
    (checkout / "src/__pycache__").mkdir(exist_ok=True)
    (checkout / "src/__pycache__/model.py").write_text("")
    (checkout / "data/raw").mkdir()
    (checkout / "notes.txt").write_text("unknown to git, and read by nobody")
    (checkout / "src/notes.txt").write_text("the same, in a folder that is no dependency")
    groups = doctor.of_checkout(checkout, {})
    assert {finding.what: finding.level for findings in groups.values() for finding in findings if finding.level != "ok"} == {}
    assert list(groups) == ["code", "pipeline", "results", "remotes"]


def test_changed_code_is_named_as_uncommitted_and_as_newer_than_the_results(checkout: Path) -> None:
    (checkout / "src/model.py").write_text("TEXT = 'other'\n")
    assert_found(checks.code_is_committed(checkout), "warn", "src/model.py", git(checkout, "rev-parse", "HEAD")[:7])
    assert_found(checks.results_are_current(checkout, stages(checkout)), "warn", "prepare (src/model.py)")
    git(checkout, "add", ".")
    assert_found(checks.code_is_committed(checkout), "warn", "src/model.py")
    git(checkout, "commit", "-qm", "other")
    assert only(checks.code_is_committed(checkout)).level == "ok"
    assert_found(checks.results_are_current(checkout, stages(checkout)), "warn", "prepare (src/model.py)")


def test_changed_parameter_is_named(checkout: Path) -> None:
    text = (checkout / "params.yaml").read_text()
    (checkout / "params.yaml").write_text(text.replace("T: 500", "T: 400"))
    assert_found(checks.code_is_committed(checkout), "warn", "params.yaml")
    assert "prepare (ddpm)" in only(checks.results_are_current(checkout, stages(checkout))).what


def test_changed_command_data_and_metrics_are_named(checkout: Path) -> None:
    (checkout / "metrics/size.json").write_text('{"size": 6}')
    (checkout / "data/pixels/images").unlink()
    (checkout / "data/pixels/images").write_text("by hand")
    changed = deepcopy(PIPELINE)
    changed["measure"]["cmd"] += " && true"
    write_pipeline(checkout, changed)
    what = only(checks.results_are_current(checkout, stages(checkout))).what
    assert "prepare (data/pixels)" in what and "measure (data/pixels, its command, metrics/size.json)" in what
    assert_found(checks.results_are_committed(checkout), "warn", "metrics/size.json")


def test_a_checkout_without_a_commit(checkout: Path) -> None:
    shutil.rmtree(checkout / ".git")
    git(checkout, "init", "-q")
    assert_found(checks.code_is_committed(checkout), "FAIL", "no git commit")


@pytest.mark.parametrize("path", ["src/sampler.py", "stages/deeper/extra.py", "src/weights/b.bin"])
@pytest.mark.parametrize("ignored", [False, True])
def test_code_that_git_does_not_know(checkout: Path, path: str, ignored: bool) -> None:
    (checkout / path).parent.mkdir(exist_ok=True)
    (checkout / path).write_text("A = 1\n")
    if ignored:
        (checkout / ".gitignore").write_text(f"/{path}\n")
    finding = only(checks.code_is_known_to_git(checkout, stages(checkout)))
    assert finding.level == "FAIL" and path in finding.what
    assert finding.remedy.startswith(f"git add{' -f' if ignored else ''} {path}")
    git(checkout, "add", "-f", path)
    assert only(checks.code_is_known_to_git(checkout, stages(checkout))).level == "ok"


def test_recipe_that_git_does_not_know(checkout: Path) -> None:
    git(checkout, "rm", "-q", "--cached", "dvc.lock")
    assert_found(checks.code_is_known_to_git(checkout, stages(checkout)), "FAIL", "dvc.lock")


def test_data_that_a_stage_depends_on_and_nobody_tracks(checkout: Path) -> None:
    (checkout / "data/extra.csv").write_text("1,2\n")
    changed = deepcopy(PIPELINE)
    changed["prepare"]["deps"].append("data/extra.csv")
    write_pipeline(checkout, changed)
    assert_found(checks.data_are_known(checkout, stages(checkout)), "FAIL", "data/extra.csv", "read by prepare")
    dvc(checkout, "add", "-q", "data/extra.csv")
    assert only(checks.data_are_known(checkout, stages(checkout))).level == "ok"


def test_data_that_the_code_names_and_nobody_tracks(checkout: Path) -> None:
    (checkout / "data/extra").mkdir()
    (checkout / "data/extra/a.csv").write_text("1,2\n")
    with (checkout / "stages/prepare.py").open("a") as script:
        script.write('print(open(f"data/extra/{TEXT}.csv"), open("data/pixels/images"), "see data/other")\n')
    assert_found(checks.data_are_known(checkout, stages(checkout)), "FAIL", "data/extra", "read by stages/prepare.py")
    git(checkout, "add", "-f", "data/extra/a.csv")
    assert only(checks.data_are_known(checkout, stages(checkout))).level == "ok"


# Parameters and stages


def test_images_of_ones_own_that_nobody_tracks(checkout: Path) -> None:
    own = checkout / "data/own"
    own.mkdir(parents=True)
    (own / ".gitignore").write_text("*\n!.gitignore\n")
    changed = deepcopy(PIPELINE)
    changed["prepare"]["deps"].append("data/own")
    write_pipeline(checkout, changed)
    git(checkout, "add", "-A")
    assert only(checks.data_are_known(checkout, stages(checkout))).level == "ok"
    (own / "cat.png").write_bytes(b"")
    assert_found(checks.data_are_known(checkout, stages(checkout)), "FAIL", "data/own, read by prepare", "tracked by nobody")


def test_parameters_that_no_stage_lists(checkout: Path) -> None:
    changed = deepcopy(PIPELINE)
    changed["prepare"]["params"] = [*(group for group in GROUPS if group not in ("vae", "data")), "vae.training", "vae.beta"]
    write_pipeline(checkout, changed)
    finding = only(checks.parameters_are_listed(checkout, stages(checkout)))
    assert finding.level == "FAIL"
    leaves = set(flatten(load_params(checkout / "params.yaml")))
    unlisted = {leaf for leaf in leaves if leaf.startswith(("data.", "vae.")) and not leaf.startswith(("vae.training.", "vae.beta"))}
    assert f"data.channels, data.path, data.set and {len(unlisted) - 3} more" in finding.what


def test_parameters_that_do_not_exist(checkout: Path) -> None:
    changed = deepcopy(PIPELINE)
    changed["measure"]["params"] = ["seed", "ddpm.typo", "see"]
    write_pipeline(checkout, changed)
    assert_found(checks.parameters_are_listed(checkout, stages(checkout)), "FAIL", "stage measure lists ddpm.typo, see,")


def test_parameters_out_of_range(checkout: Path) -> None:
    text = (checkout / "params.yaml").read_text()
    (checkout / "params.yaml").write_text(text.replace("T: 500", "T: 0"))
    assert_found(checks.parameters_are_listed(checkout, stages(checkout)), "FAIL", "ddpm.T: input should be", "got 0")


def test_stages_that_keep_old_results(checkout: Path) -> None:
    changed = deepcopy(PIPELINE)
    changed["measure"]["frozen"] = True
    changed["prepare"]["outs"] = [{"data/pixels": {"persist": True}}]
    changed["prepare"]["always_changed"] = True
    write_pipeline(checkout, changed)
    found = checks.stages_are_plain(stages(checkout))
    assert_found(found, "warn", "measure is frozen", "prepare always runs", "data/pixels persists")


def test_settings_of_dvc_that_change_or_tell(checkout: Path) -> None:
    assert only(checks.settings_of_dvc(config(checkout), {})).level == "ok"
    (checkout / ".dvc/config").write_text("[hydra]\n    enabled = true\n")
    hydra, analytics = checks.settings_of_dvc(config(checkout), {})
    assert (hydra.level, analytics.level) == ("FAIL", "warn")
    assert only(checks.settings_of_dvc(config(checkout), {"DVC_NO_ANALYTICS": "1"})) == hydra


def test_a_pipeline_that_dvc_cannot_read_fails_in_words(checkout: Path) -> None:
    (checkout / "dvc.yaml").write_text("stages: [1]\n")
    groups = doctor.of_checkout(checkout, {})
    assert_found(groups["pipeline"], "FAIL", "DVC cannot read the pipeline")
    assert "dvc.yaml" in only(groups["code"]).what


# Results


def test_results_that_the_cache_has_lost(checkout: Path) -> None:
    shutil.rmtree(checkout / ".dvc/cache")
    assert_found(checks.results_are_kept(stages(checkout)), "warn", "cache lacks data/pixels")
    shutil.rmtree(checkout / "data/pixels")  # as after a clone: missing data are not stale results
    assert only(checks.results_are_current(checkout, stages(checkout))).level == "ok"


def test_results_that_are_not_checked_out(checkout: Path) -> None:
    shutil.rmtree(checkout / "data/pixels")
    finding = only(checks.results_are_kept(stages(checkout)))
    assert (finding.level, finding.remedy) == ("warn", "dvc checkout")
    assert only(checks.results_are_current(checkout, stages(checkout))).level == "ok"


def test_space_is_compared_with_what_an_experiment_takes(checkout: Path) -> None:
    outputs = checks.size_of(stages(checkout))
    assert outputs == sum((checkout / path).stat().st_size for path in ("data/pixels/images", "metrics/size.json"))
    assert only(checks.space_is_left(3 * 10**9, 10**9)).level == "ok"
    assert_found(checks.space_is_left(2 * 10**9, 10**9), "warn", "2.0 GB", "3.0 GB")
    assert doctor.free(checkout / "not" / "there") > 0  # where a cache will lie


# Remotes


def test_data_without_a_remote(checkout: Path) -> None:
    (checkout / ".dvc/config").write_text("['remote \"storage\"']\n    url = ../../storage\n")
    assert_found(checks.data_have_a_remote(config(checkout)), "warn", "storage", "default")
    (checkout / ".dvc/config").write_text("")
    assert_found(checks.data_have_a_remote(config(checkout)), "warn", "no remote")


def test_commits_that_are_not_pushed(checkout: Path) -> None:
    git(checkout, "commit", "-q", "--allow-empty", "-m", "next")
    assert_found(checks.history_is_pushed(checkout), "warn", "HEAD")
    git(checkout, "push", "-q")
    assert only(checks.history_is_pushed(checkout)).level == "ok"
    git(checkout, "remote", "remove", "origin")
    assert_found(checks.history_is_pushed(checkout), "warn", "git has no remote")


def test_experiments_that_are_not_pushed(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    ref = f"refs/exps/{head[:2]}/{head[2:]}/tidy-ox"
    git(checkout, "update-ref", ref, head)
    git(checkout, "update-ref", "refs/exps/exec/EXEC_BASELINE", head)  # DVC's own
    assert_found(checks.history_is_pushed(checkout), "warn", "this machine only: tidy-ox")
    git(checkout, "push", "-q", "origin", ref)
    assert "1 experiment" in only(checks.history_is_pushed(checkout)).what
    git(checkout, "remote", "set-url", "origin", "../gone.git")
    assert_found(checks.history_is_pushed(checkout), "warn", "origin does not say")


# Rows and their store


def test_variables_of_a_stage_in_the_shell() -> None:
    assert machine.no_stage_is_meant({"PATH": "/bin", "DVC_EXP_NAME": ""}) == []
    finding = only(machine.no_stage_is_meant({"DVC_EXP_NAME": "tidy-ox", "DVC_ROOT": "/x"}))
    assert (finding.level, finding.remedy) == ("FAIL", "unset DVC_ROOT DVC_EXP_NAME")
    assert only(machine.no_stage_is_meant({"REDIFFUSE_TRACKING": "OFF"})).level == "warn"


def test_relative_address_of_the_store_is_refused(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///rows.db")
    found = doctor.of_rows(checkout, dict)["rows"]
    assert_found([finding for finding in found if finding.level == "FAIL"], "FAIL", "sqlite:///rows.db", "relative")
    assert capsys.readouterr() == ("", "")


def test_server_that_is_down(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert only(machine.store_answers(f"postgresql://user:secret@127.0.0.1:{port}/rows")).level == "ok"
        deaf = time.monotonic()
        assert_found(machine.store_answers(f"http://127.0.0.1:{port}", patience=0.3), "FAIL", "timed out")
        assert time.monotonic() - deaf < 5
    assert_found(machine.store_answers(f"http://127.0.0.1:{port}"), "FAIL", "does not answer")
    down = only(machine.store_answers(f"postgresql+psycopg2://user:secret@127.0.0.1:{port}/rows"))
    assert down.level == "FAIL" and "secret" not in down.what
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
    found = doctor.of_rows(checkout, dict)["rows"]  # and asks it nothing more
    assert [finding.level for finding in found] == ["FAIL", "ok"]


@pytest.fixture
def server() -> Iterator[str]:
    """A server that refuses everything, and so is there."""

    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()
        thread.join()


def test_server_that_wants_a_password_answers(server: str) -> None:
    assert only(machine.store_answers(server)).level == "ok"


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "lustre", "9p", "ceph"])
def test_store_on_a_network_file_system(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "repository" / ".mlflow" / "mlflow.db"
    mounts = {"/": "ext4", str(tmp_path.resolve()): kind}
    assert_found(machine.locks_hold(path, mounts), "FAIL", kind)
    assert_found(machine.locks_hold(path, mounts, rows=False), "warn", kind)
    assert only(machine.locks_hold(path, {"/": kind, str(tmp_path.resolve()): "ext4"})).level == "ok"
    assert only(machine.locks_hold(path, {"/": "overlay", f"{tmp_path.resolve()}/repo": kind})).level == "ok"  # a name that begins alike


def test_this_machine_names_its_file_systems(tmp_path: Path) -> None:
    assert "unknown" not in only(machine.locks_hold(tmp_path, machine.mounts())).what


def running(name: str, process: str, started: float = 0.0) -> Any:
    tags = {"rediffuse.process": process} if process else {}
    return SimpleNamespace(info=SimpleNamespace(run_name=name, start_time=started * 1000), data=SimpleNamespace(tags=tags))


def test_rows_that_say_running_and_do_not() -> None:
    now = 10.0 * machine.DAY
    rows = [
        running("runs", "here 1 5.0", now - 2 * machine.DAY),
        running("dead", "here 2 5.0", now),
        running("on another machine", "there 2 5.0", now - 3600),
        running("forgotten on another machine", "there 2 5.0", now - 2 * machine.DAY),
        running("of no process, long ago", "", 0),
    ]
    alive: Callable[[str], bool] = lambda process: process == "1 5.0"  # noqa: E731
    assert_found(machine.none_is_stale(rows, "here", alive, now), "warn", "3 rows", "dead", "forgotten on another machine", "of no process")
    assert only(machine.none_is_stale(rows[:1], "here", alive, now)).what == "1 row running"
    assert only(machine.none_is_stale([], "here", alive, now)).level == "ok"


def test_results_of_another_machine() -> None:
    here = describe_environment()
    other = deepcopy(here)
    other["decides"]["threads"] = here["decides"]["threads"] + 1
    sibling = deepcopy(here)
    sibling["informs"]["cpu"] = "a newer model"
    assert only(machine.environments_agree({"train_vae": here}, lambda: here)).level == "ok"
    assert "a newer model" in only(machine.environments_agree({"train_vae": sibling}, lambda: here)).what
    told = f"threads {here['decides']['threads'] + 1}, here {here['decides']['threads']}"
    found = machine.environments_agree({"train_vae": here, "train_ddpm": other}, lambda: here)
    assert_found(found, "warn", "train_ddpm", told)
    assert "train_vae" not in only(found).what

    def never() -> dict[str, Any]:
        raise AssertionError("nothing to compare with: the seconds that torch takes are not worth it")

    assert only(machine.environments_agree({}, never)).level == "ok"


def test_rows_of_a_real_store(checkout: Path) -> None:
    """A row that was killed, and rows that say where the results here were computed."""
    from rediffuse.tracking.attempts import place_of
    from rediffuse.tracking.lineage import lineage_of_checkout
    from rediffuse.tracking.store import connect, experiment_id

    here = describe_environment()
    assert [finding.level for finding in doctor.of_rows(checkout, lambda: here)["rows"]] == ["ok", "ok"]  # no store is made by looking
    assert not (checkout / ".mlflow").exists()
    (checkout / ".mlflow").mkdir()
    uri = f"sqlite:///{checkout}/.mlflow/mlflow.db"
    client = connect(uri)
    assert "no row" in doctor.of_rows(checkout, lambda: here)["rows"][-1].what
    table = experiment_id(client, uri, checkout)
    keys = lineage_of_checkout(checkout).keys
    assert set(keys) == {"prepare", "measure"}
    other = deepcopy(here)
    other["decides"]["packages"]["torch"] = "1.0"
    for environment, of_stage in ((here, keys["prepare"]), (other, keys["prepare"])):  # the latest counts
        digest = environment_digest(environment)
        tags = {"stage.prepare.key": of_stage, "stage.prepare.environment": digest, "stage.measure.key": "of other results"}
        tags |= {"stage.measure.environment": "none"}
        run = client.create_run(table, tags=tags, run_name="repro-1").info.run_id
        client.log_text(run, json.dumps(environment), f"recipe/environment/{digest}.json")
        client.set_terminated(run)
        time.sleep(0.01)  # they are told apart by their time of start, in milliseconds
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    client.create_run(table, tags={"rediffuse.process": f"{place_of(checkout)} {gone.pid} 5.0"}, run_name="killed")
    stale, elsewhere = [finding for finding in doctor.of_rows(checkout, lambda: here)["rows"] if finding.level == "warn"]
    assert "1 row says running" in stale.what and "killed" in stale.what and stale.remedy == "rediffuse sync"
    assert elsewhere.what.startswith("prepare was computed elsewhere (torch 1.0, here ")


# The machine


def test_python_of_the_stages(tmp_path: Path) -> None:
    for name in ("venv", "system"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "python").symlink_to(sys.executable)  # one file in the end, and yet other packages
    ours, other = str(tmp_path / "venv" / "python"), str(tmp_path / "system" / "python")
    (tmp_path / "link").symlink_to(tmp_path / "venv")
    assert only(machine.python_is_ours(str(tmp_path / "link" / "python"), ours)).level == "ok"
    assert_found(machine.python_is_ours(other, ours), "FAIL", other, ours)
    assert_found(machine.python_is_ours(None, ours), "FAIL", "no `python` on PATH")


LOCK = """# This file was autogenerated
torch==2.14.1 \\
    --hash=sha256:aa \\
    --hash=sha256:bb
scipy==1.0 ; python_full_version < '3.0' \\
    --hash=sha256:cc
scipy==1.17.1 ; python_full_version >= '3.0' \\
    --hash=sha256:cc
Types_PyYAML==6.0
click==8.1
colorama==0.4 ; sys_platform == 'win32' or sys_platform == 'nowhere' \\
    --hash=sha256:dd
"""


def test_packages_against_the_lock() -> None:
    locked = {"torch": "2.14.1+cu130", "scipy": "1.17.1", "types-pyyaml": "6.0", "click": "8.1", "more": "1"}
    if sys.platform == "win32":
        locked["colorama"] = "0.4"
    finding = only(machine.packages_are_locked(LOCK, locked))
    assert finding.level == "ok" and finding.what.startswith(f"{len(locked) - 1} packages")
    assert_found(machine.packages_are_locked(LOCK, locked | {"torch": "2.15.0"}), "FAIL", "torch 2.15.0 (locked 2.14.1)")
    assert_found(machine.packages_are_locked(LOCK, locked | {"scipy": "1.0"}), "FAIL", "scipy 1.0 (locked 1.17.1)")
    assert_found(machine.packages_are_locked(LOCK, locked | {"click": "8.2"}), "warn", "click 8.2 (locked 8.1)")
    del locked["click"]
    assert_found(machine.packages_are_locked(LOCK, locked), "warn", "not installed: click")


def test_installed_packages_are_those_python_says() -> None:
    import torch

    found = machine.installed()
    assert found["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert {"scikit-learn", "torch-fidelity"} <= set(found)


def test_venv_of_another_lock(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text("torch==2.14.1\n")
    (tmp_path / ".venv").mkdir()
    assert only(machine.venv_is_current(tmp_path / ".venv", lock)).level == "warn"
    (tmp_path / ".venv/lock").write_text("/somewhere\ntorch==2.14.1\n")
    assert only(machine.venv_is_current(tmp_path / ".venv", lock)).level == "ok"
    lock.write_text("torch==2.15.0\n")
    assert only(machine.venv_is_current(tmp_path / ".venv", lock)).level == "warn"


CUDA = {"device": "NVIDIA H100", "version": "13.0", "cublas_workspace": ":4096:8", "bfloat16": True}


@pytest.mark.parametrize(("workspace", "level"), [(":4096:8", "ok"), (":16:8", "ok"), (":0:0", "FAIL"), (":4096:2:16:8", "FAIL")])
def test_a_gpu_that_may_differ_from_run_to_run(workspace: str, level: str) -> None:
    environment = describe_environment()
    environment["decides"]["cuda"] = CUDA | {"cublas_workspace": workspace}
    environment["decides"]["variables"] = {}
    assert only(machine.hardware_is_deterministic(environment)).level == level


def test_variables_that_choose_other_kernels() -> None:
    environment = describe_environment()
    environment["decides"]["variables"] = {"NVIDIA_TF32_OVERRIDE": "1"}
    assert_found(machine.hardware_is_deterministic(environment), "warn", "NVIDIA_TF32_OVERRIDE=1")


# All of it


def test_a_check_that_breaks_says_why_and_the_others_go_on(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object) -> list[Finding]:
        raise PermissionError("no\nentry")

    monkeypatch.setattr(checks, "results_are_current", breaks)
    results = doctor.of_checkout(checkout, {})["results"]
    assert results[0] == Finding("warn", "not checked: dvc.lock (PermissionError: no entry)")
    assert len(results) == 4


def test_everything_from_a_subfolder_as_text_and_json(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / "src/rediffuse").symlink_to(PROJECT / "src/rediffuse")  # what a stage would import
    (checkout / ".git/info/exclude").write_text("/src/rediffuse\n")
    monkeypatch.chdir(checkout / "stages")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    groups = doctor.doctor()
    assert list(groups) == ["code", "pipeline", "results", "remotes", "rows", "machine"]
    assert [finding for findings in groups.values() for finding in findings if finding.level != "ok"] == []
    assert not doctor.failed(groups)
    text = doctor.to_text(groups)
    assert "\x1b[1mcode\x1b[0m\n" in text and text.endswith("ok, 0 warnings, 0 failures")
    assert doctor.to_json(groups)["ok"] is True
    groups["code"].append(Finding("FAIL", "this", "that"))
    assert doctor.failed(groups)
    assert "this  -> that" in doctor.to_text(groups)
    machines = json.loads(json.dumps(doctor.to_json(groups)))
    assert machines["ok"] is False
    assert {"group": "code", "level": "FAIL", "what": "this", "remedy": "that"} in machines["findings"]


def test_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="change into the checkout"):
        doctor.doctor()


def test_environment_of_another_python_is_not_taken_for_ours(tmp_path: Path) -> None:
    """A `python` on PATH that lacks what stages need."""
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'no module named torch' >&2\nexit 1\n")
    fake.chmod(0o755)
    with machine.environment_of_stages(tmp_path, {"PATH": str(tmp_path)}) as environment, pytest.raises(RuntimeError, match="no module"):
        environment()
