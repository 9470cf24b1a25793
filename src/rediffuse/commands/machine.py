"""What `rediffuse doctor` looks at beside the checkout: the rows and their store, Python and its packages, and the hardware.

What this machine lacks, such as a GPU or a network file system, comes in as an argument, so that every check can be tested anywhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rediffuse.commands.checks import Finding, counted, listed, ok
from rediffuse.tracking.environment import PACKAGES, differences, same_machine_class
from rediffuse.tracking.store import EXPERIMENT, connect, repository_root

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as Row

Environment = dict[str, Any]

OF_A_STAGE = ("DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV", "RANK")  # set by DVC and torchrun
# File systems on which several machines write, so that locks of files, as SQLite and DVC take them, may not hold.
NETWORK = re.compile(r"nfs|cifs|smb|afs|ceph|lustre|gluster|gpfs|beegfs|9p|fuse\.(sshfs|s3fs|rclone|gcsfuse|davfs)|davfs", re.IGNORECASE)
PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
PATIENCE = 3.0  # seconds for a server
DAY = 24 * 3600
DESCRIBE = "import json; from rediffuse.tracking.environment import describe_environment; print(json.dumps(describe_environment()))"


# The rows


def no_stage_is_meant(variables: Mapping[str, str]) -> list[Finding]:
    """Variables that DVC sets for its stages must not come from the shell, or results go into the row of something else."""
    found = list[Finding]()
    if names := [name for name in OF_A_STAGE if variables.get(name)]:
        found.append(Finding("FAIL", f"{listed(names)} in this shell: stages would write into another row", f"unset {' '.join(names)}"))
    if variables.get("REDIFFUSE_TRACKING", "").lower() == "off":
        found.append(Finding("warn", "REDIFFUSE_TRACKING=off: stages write no rows", "unset REDIFFUSE_TRACKING; later `rediffuse sync`"))
    return found


def store_answers(uri: str, *, ignored: bool = False, patience: float = PATIENCE) -> list[Finding]:
    """uri: where rows go.  ignored: whether MLFLOW_TRACKING_URI says another place, but a relative one."""
    if ignored:
        what = f"MLFLOW_TRACKING_URI={os.environ.get('MLFLOW_TRACKING_URI')} is relative and ignored: rows go to {uri}"
        return [Finding("FAIL", what, "give http://..., postgresql://... or sqlite:////absolute/path, or unset it")]
    place, remedy = urlsplit(uri), "start the server, or set MLFLOW_TRACKING_URI"
    shown = f"{place.scheme}://{place.hostname}{f':{place.port}' if place.port else ''}"
    if place.scheme == "sqlite":
        file = Path(uri.removeprefix("sqlite:///"))
        if not file.exists():
            return [ok("no row yet: the first stage that runs makes the store")]
        if not (os.access(file, os.W_OK) and os.access(file.parent, os.W_OK)):  # SQLite makes its journal beside the file
            return [Finding("FAIL", f"rows cannot be written to {file}", "mend its owner or permissions")]
        return [ok("rows go to SQLite below the repository" if file.parent.name == ".mlflow" else f"rows go to {file}")]
    if place.scheme.partition("+")[0] not in PORTS or not place.hostname:
        return [ok(f"rows go to {shown}")]
    try:
        _knock(uri, patience)
    except (OSError, ValueError) as error:
        return [Finding("FAIL", f"the tracking server {shown} does not answer ({error}): no rows are written", remedy)]
    return [ok(f"rows go to {shown}, which answers")]


def _knock(uri: str, patience: float) -> None:
    """Raises OSError if nobody answers at this address."""
    place = urlsplit(uri)
    scheme = place.scheme.partition("+")[0]
    if scheme in ("http", "https"):
        with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=patience):
            pass  # a refusal is an answer
    else:
        socket.create_connection((place.hostname, place.port or PORTS[scheme]), timeout=patience).close()


def mounts() -> dict[str, str]:
    """{mount point: type of file system} of this machine."""
    import psutil

    return {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}


def locks_hold(path: Path, mounts: Mapping[str, str], *, rows: bool = True) -> list[Finding]:
    """path: where rows (in SQLite) lie, or else only the locks of rows.  mounts: {mount point: type of file system}."""
    there = Path(os.path.realpath(path))
    inside = [place for place in mounts if there.is_relative_to(place)]
    kind = mounts[max(inside, key=len)] if inside else "unknown"
    if not NETWORK.match(kind):
        return [ok(f"the {'store' if rows else 'locks of rows'} lies on a local file system ({kind})".replace("rows lies", "rows lie"))]
    if rows:
        what = f"the store lies on a network file system ({kind}), on which SQLite loses rows when two processes write"
        return [Finding("FAIL", what, "set MLFLOW_TRACKING_URI to a server, or to sqlite:////absolute/path on a local disk")]
    what = f"the repository lies on a network file system ({kind}): two stages that start at once may make two rows"
    return [Finding("warn", what, "work in a clone on a local disk")]


def _experiment(uri: str) -> tuple[MlflowClient, str | None]:
    """A client, and the id of the table of rows, if there is one."""
    client = connect(uri)
    found = client.get_experiment_by_name(EXPERIMENT)
    return client, found.experiment_id if found else None


def rows_have_ended(uri: str) -> list[Finding]:
    """Rows that say running."""
    from rediffuse.tracking.attempts import place_of
    from rediffuse.tracking.sync import process_runs

    client, experiment = _experiment(uri)
    rows = client.search_runs([experiment], "attributes.status = 'RUNNING'", max_results=1000) if experiment else []
    return none_is_stale(rows, place_of(repository_root()), process_runs, time.time())


def none_is_stale(rows: Sequence[Row], place: str, alive: Callable[[str], bool], now: float) -> list[Finding]:
    """rows: those that say running.  place: of this checkout; its processes are looked up by `alive`, those of others by their age."""
    stale = list[str]()
    for row in rows:
        where, _, process = row.data.tags.get("rediffuse.process", "").partition(" ")
        gone = not alive(process) if where == place else now - row.info.start_time / 1000 > DAY
        stale += [row.info.run_name] if gone else []
    if stale:
        what = f"{counted(len(stale), 'row')} {'says' if len(stale) == 1 else 'say'} running, but nothing runs: {listed(stale)}"
        return [Finding("warn", what, "rediffuse sync")]
    return [ok(f"{counted(len(rows), 'row')} running" if rows else "no row says running that does not run")]


def recorded_environments(root: Path, uri: str) -> dict[str, Environment]:
    """The environment that computed each stage's results here, by stage, as far as rows say."""
    from rediffuse.commands.rows import read_artifact
    from rediffuse.tracking.attempts import stage_tag
    from rediffuse.tracking.lineage import lineage_of_checkout

    client, experiment = _experiment(uri)
    found, read = dict[str, Environment](), dict[str, Environment]()
    for stage, key in lineage_of_checkout(root).keys.items() if experiment else ():
        tag = stage_tag(stage, "environment")
        query = f"tags.`{stage_tag(stage, 'key')}` = '{key}'"
        rows = client.search_runs([experiment], query, order_by=["attributes.start_time DESC"], max_results=20)
        for row in [row for row in rows if tag in row.data.tags][:1]:
            digest = row.data.tags[tag]
            if digest not in read:
                read[digest] = json.loads(read_artifact(client, row, f"recipe/environment/{digest}.json"))
            found[stage] = read[digest]
    return found


def environments_agree(recorded: Mapping[str, Environment], here: Callable[[], Environment]) -> list[Finding]:
    """recorded: of the results in the checkout, by stage."""
    if not recorded:
        return [ok("no row says in which environment the results here were computed")]
    elsewhere = {stage: differences(environment, here()) for stage, environment in recorded.items()}
    other = {stage for stage, environment in recorded.items() if not same_machine_class(environment, here())}
    if not other:
        informed = listed({text for texts in elsewhere.values() for text in texts})
        return [ok(f"the results were computed by this class of machine{f' (though {informed})' if informed else ''}")]
    reasons = dict.fromkeys(text for stage in sorted(other) for text in elsewhere[stage])
    what = f"{listed(other)} was computed elsewhere ({'; '.join(list(reasons)[:4])}): run here, the bytes may differ"
    return [Finding("warn", what, "the same packages and OMP_NUM_THREADS as there, or `dvc repro -f` to compute all of it here")]


# The machine


@contextmanager
def environment_of_stages(root: Path, variables: Mapping[str, str]) -> Iterator[Callable[[], Environment]]:
    """The environment that stages will find, described by the `python` that DVC will start; importing torch takes it seconds.

    The process runs beside the block, in which the function that is handed over waits for it.
    """
    python = shutil.which("python", path=variables.get("PATH")) or sys.executable
    pipe, own = subprocess.PIPE, {"PYTHONPATH": str(root / "src")}
    process = subprocess.Popen([python, "-c", DESCRIBE], cwd=root, env={**variables, **own}, stdout=pipe, stderr=pipe, text=True)
    known = dict[str, Environment]()

    def environment() -> Environment:
        if not known:
            told, error = process.communicate(timeout=60)
            if process.returncode:
                raise RuntimeError(error.strip().splitlines()[-1] if error.strip() else f"{python} ended with {process.returncode}")
            known["here"] = json.loads(told)
        return known["here"]

    try:
        yield environment
    finally:
        process.kill()
        process.communicate()


def python_is_ours(found: str | None, ours: str) -> list[Finding]:
    """found: the `python` that stages run, by PATH.  ours: the one that runs this."""
    if found and os.path.realpath(Path(found).parent) == os.path.realpath(Path(ours).parent):  # in a venv both are links to one file
        return [ok("stages run the Python of this environment")]
    what = f"stages would run {found}, not {ours}" if found else "there is no `python` on PATH, which stages run"
    return [Finding("FAIL", what, "activate the environment (. .venv/bin/activate), or use `make repro`")]


def installed() -> dict[str, str]:
    """{package: version} of this environment, names as packaging spells them."""
    from packaging.utils import canonicalize_name

    return {canonicalize_name(package.metadata["Name"]): package.version for package in metadata.distributions()}


def packages_are_locked(lock: str, installed: Mapping[str, str]) -> list[Finding]:
    """lock: the text of requirements.lock.  installed: {package: version}."""
    from packaging.markers import Marker
    from packaging.utils import canonicalize_name

    lines = re.findall(r"^([\w.-]+)==([^\s;\\]+)(?:\s*;\s*([^\\\n]+))?", lock, re.MULTILINE)
    wanted = {canonicalize_name(name): version for name, version, marker in lines if not marker or Marker(marker.strip()).evaluate()}
    other = {
        name: f"{name} {installed[name]} (locked {version})"
        for name, version in wanted.items()
        if name in installed
        and installed[name] not in (version, version.partition("+")[0])
        # torch 2.9.0+cu130 is a build of the 2.9.0 that is locked
        and installed[name].partition("+")[0] != version
    }
    missing = wanted.keys() - installed.keys()
    found = list[Finding]()
    deciding = {text for name, text in other.items() if name in ("torch", *PACKAGES)}
    if deciding:
        what = f"results depend on packages that are not those locked: {listed(deciding)}"
        found.append(Finding("FAIL", what, "make environment"))
    if rest := set(other.values()) - deciding:
        found.append(Finding("warn", f"packages are not those locked: {listed(rest)}", "make environment"))
    if missing:
        found.append(Finding("warn", f"packages of requirements.lock are not installed: {listed(missing)}", "make environment"))
    return found or [ok(f"{len(wanted)} packages are those of requirements.lock")]


def venv_is_current(venv: Path, lock: Path) -> list[Finding]:
    """.venv/lock, which `make` writes last, against requirements.lock."""
    marker = venv / "lock"
    if not marker.is_file() or marker.read_text().partition("\n")[2] != lock.read_text():
        return [Finding("warn", ".venv was not installed from this requirements.lock", "make environment")]
    return [ok(".venv was installed from this requirements.lock")]


def hardware_is_deterministic(environment: Environment) -> list[Finding]:
    """environment: of the stages."""
    decides = environment["decides"]
    found = list[Finding]()
    if variables := decides["variables"]:
        what = f"{listed(f'{name}={value}' for name, value in variables.items())}: other arithmetic than on machines without"
        found.append(Finding("warn", what, f"unset {' '.join(variables)}"))
    if cuda := decides["cuda"]:
        if cuda["cublas_workspace"] not in (":4096:8", ":16:8"):
            what = f"CUBLAS_WORKSPACE_CONFIG={cuda['cublas_workspace']}: on the GPU two runs may differ"
            found.append(Finding("FAIL", what, "unset CUBLAS_WORKSPACE_CONFIG; stages then set :4096:8"))
        title = f"{cuda['device']}, CUDA {cuda['version']}"
    else:
        title = f"{environment['informs']['cpu']}, {counted(decides['threads'], 'thread')}"
    arithmetic = "bfloat16" if (cuda or decides["cpu"])["bfloat16"] else "float32"
    return found or [ok(f"stages compute the same bytes each time: {title}, {arithmetic}, torch {decides['packages']['torch']}")]
