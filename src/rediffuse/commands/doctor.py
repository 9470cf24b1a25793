"""`rediffuse doctor`: find what silently makes results that cannot be rebuilt.

Leave out what `dvc status`, `dvc doctor`, `git status` and `pip check` say.  Take none of DVC's locks, so
that it can run beside the pipeline.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from rediffuse.tracking import environment
from rediffuse.tracking.attempts import stage_tag
from rediffuse.tracking.git import git
from rediffuse.tracking.identity import one_line
from rediffuse.tracking.store import EXPERIMENT, checkout_root, connect, repository_root, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

OF_A_STAGE = ("DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV", "RANK")  # of DVC and torchrun
CODE = ("src/*.py", "stages/*.py", "dvc.yaml", "dvc.lock", "params.yaml", "requirements.lock")
NETWORK = re.compile(r"nfs|cifs|smb|afs|ceph|lustre|gluster|gpfs|beegfs|9p|davfs|fuse\.(sshfs|s3fs|rclone)")


class Finding(NamedTuple):
    """ok: as it should be.  warn: may cost a result or its proof.  FAIL: results are wrong or lost."""

    level: Literal["ok", "warn", "FAIL"]
    what: str
    remedy: str = ""


def doctor() -> list[Finding]:
    """Return what the checks find; one that breaks gives a warning.  Raises UserError outside a checkout."""
    root, found = checkout_root(), list[Finding]()
    checks = {
        "stages run the Python of this environment": check_python,
        "packages on which results depend are those of requirements.lock": check_packages,
        "no variable of the shell changes what stages compute or record": check_variables,
        "git or DVC tracks every file that stages read": check_files,
        "rows have a safe place and name no other machine for the results here": check_rows,
    }
    for title, check in checks.items():
        try:
            found += list(check(root)) or [Finding("ok", title)]
        except Exception as error:  # of git, DVC, MLflow or the file system
            found.append(Finding("warn", f"not checked: {title} ({one_line(error)})"))
    return found


def check_python(root: Path) -> Iterator[Finding]:
    found = shutil.which("python")  # in a venv it is a link to the system's, so compare the folders
    if not found or Path(found).parent.resolve() != Path(sys.executable).parent.resolve():
        what = f"stages would run {found or 'no python'}, not {sys.executable}"
        yield Finding("FAIL", what, "activate the environment (. .venv/bin/activate), or use `make repro`")


def check_packages(root: Path) -> Iterator[Finding]:
    from packaging.requirements import Requirement

    names = "|".join(("torch", *environment.PACKAGES))
    locked = re.findall(rf"^(?:{names})==[^\\\n]*", (root / "requirements.lock").read_text(), re.MULTILINE)
    for package in map(Requirement, locked):
        applies = package.marker is None or package.marker.evaluate()
        if applies and (here := version(package.name)) not in package.specifier:
            yield Finding("FAIL", f"{package.name} is {here}, locked {package.specifier}", "make environment")


def check_variables(root: Path) -> Iterator[Finding]:
    for name in filter(os.environ.get, OF_A_STAGE):
        yield Finding("FAIL", f"{name} is set: stages would write into another row", f"unset {name}")
    for name in filter(os.environ.get, environment.VARIABLES):
        yield Finding("warn", f"{name} is set: other arithmetic than on machines without it", f"unset {name}")
    name = "CUBLAS_WORKSPACE_CONFIG"
    if os.environ.get(name, ":4096:8") not in (":4096:8", ":16:8"):
        yield Finding("FAIL", f"{name}={os.environ[name]}: two runs on a GPU may differ", f"unset {name}")
    if os.environ.get("REDIFFUSE_TRACKING", "").lower() == "off":
        yield Finding("warn", "REDIFFUSE_TRACKING=off: stages write no rows", "unset REDIFFUSE_TRACKING")


def check_files(root: Path) -> Iterator[Finding]:
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        stages = list(repo.index.stages)
    made = {Path(out.fs_path) for stage in stages for out in stage.outs}
    deps = {Path(dep.fs_path) for stage in stages for dep in stage.deps}
    read = [str(dep) for dep in deps if dep.is_relative_to(root) and not made & {dep, *dep.parents}]
    names = git(root, "ls-files", "--others", "-z", "--", *read, *CODE).split("\0")
    if unknown := [name for name in names if name and "__pycache__" not in name]:
        shown = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        what = f"neither git nor DVC tracks {shown}: clones and `dvc exp run --temp` lack it"
        yield Finding("FAIL", what, "`git add -f`, or `dvc add` for data, or delete it")


def check_rows(root: Path) -> Iterator[Finding]:
    import psutil

    uri = tracking_uri(repository_root())
    if uri.startswith("sqlite:"):
        database = Path(uri.removeprefix("sqlite:///"))
        mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
        kind = next((mounts[place] for place in database.resolve().parents if place in mounts), "")
        if NETWORK.match(kind):
            what = f"{database} lies on a network file system ({kind}), where SQLite loses rows"
            yield Finding("FAIL", what, "set MLFLOW_TRACKING_URI to a server, or to SQLite on a local disk")
        if not database.exists():  # to connect would make it
            return
    client = connect(uri)
    if experiment := client.get_experiment_by_name(EXPERIMENT):
        yield from check_machine(root, client, experiment.experiment_id)


def check_machine(root: Path, client: MlflowClient, experiment: str) -> Iterator[Finding]:
    """Compare this machine with the one that computed the results here, as far as rows say."""
    from rediffuse.commands.rows import read_artifact
    from rediffuse.tracking.lineage import lineage_of_checkout

    here = environment.describe_environment()
    for stage, key in lineage_of_checkout(root).keys.items():
        tag, query = stage_tag(stage, "environment"), f"tags.`{stage_tag(stage, 'key')}` = '{key}'"
        rows = client.search_runs([experiment], query, order_by=["attributes.start_time DESC"])
        for row in [row for row in rows if tag in row.data.tags][:1]:  # the latest that computed it
            there = json.loads(read_artifact(client, row, f"recipe/environment/{row.data.tags[tag]}.json"))
            if not environment.same_machine_class(there, here):
                different = "; ".join(environment.differences(there, here)[:4])
                what = f"{stage} was computed by another class of machine: {different}"
                yield Finding("warn", what, "use the same packages and threads, or `dvc repro -f` here")
