"""Show the rows in MLflow: on its own server, or on one that is started here."""

from __future__ import annotations

import os
import sys

import click

from rediffuse.runtime.errors import UserError
from rediffuse.tracking.identity import PASSWORD, one_line
from rediffuse.tracking.store import connect, experiment_id, repository_root, row_lock, tracking_uri
from rediffuse.tracking.views import ADDRESS

HOST = "127.0.0.1"


def ui(port: int) -> None:
    """Print the address of the page that compares rows, and become a server on this port.

    No server is started if MLFLOW_TRACKING_URI names one.  Raises UserError outside a checkout, and if the
    store cannot be reached.
    """
    root = repository_root()
    uri, files = tracking_uri(root), root / ".mlflow"
    shown, served = PASSWORD.sub("//", uri), uri.startswith(("http://", "https://"))
    try:
        files.mkdir(exist_ok=True)
        with row_lock(root):
            experiment = experiment_id(connect(uri), uri, root)
    except Exception as error:  # MLflow raises many kinds of its database, server and file system
        raise UserError(f"the rows in {shown} cannot be shown ({one_line(error)})") from None
    server = shown.rstrip("/") if served else f"http://{HOST}:{port}"
    click.echo(f"Charts and pictures: {ADDRESS.format(server=server, experiment=experiment)}")
    if served:
        return
    sys.stdout.flush()
    options = ["--host", HOST, "--port", str(port), "--workers", "1", "--backend-store-uri", uri]
    options += ["--default-artifact-root", str(files / "artifacts"), "--no-serve-artifacts"]
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "server", *options])
