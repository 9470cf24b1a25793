"""Move the alias of a registered model, usually `champion`, to the model of another row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rediffuse.runtime.errors import UserError
from rediffuse.tracking.models import open_registry, registered_name

if TYPE_CHECKING:
    from mlflow import MlflowClient


def promote(name: str, model: str, alias: str) -> str:
    """Give the alias of rediffuse-<model> to a version.  Return in words what was done.

    name: a row (run id or name), or the number of a version.
    Raises UserError if there is no such row or version, the row has no registered model, or the store fails.
    """
    client, version = _version(name, model)
    from mlflow.exceptions import MlflowException

    registered = registered_name(model)
    try:
        run = client.get_model_version(registered, version).run_id
        before = client.get_registered_model(registered).aliases.get(alias)
        client.set_registered_model_alias(registered, alias, version)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            what = f"{registered} has no version {version}: `make ui` shows the registered models"
        else:
            what = f"{registered}@{alias} is not moved: {error.message}"
        raise UserError(what) from None
    old = "no version had this alias" if before is None else f"before, version {before}"
    if str(before) == version:
        old = "as before"
    return f"{registered}@{alias} is now version {version}, from run {run} ({old})"


def _version(name: str, model: str) -> tuple[MlflowClient, str]:
    """Return the store, and the number of the version that is meant."""
    if name.isdecimal() and len(name) < 10:  # a run id has 32 digits
        return open_registry()[0], str(int(name))
    from rediffuse.commands.rows import find_row

    client, row = find_row(name)
    address = row.data.tags.get(f"model.{model}", "")
    if not address:
        remedy = "complete it with `rediffuse sync` where the model is, or pull it first"
        raise UserError(f"row {name} has no registered {model}: {remedy}")
    return client, address.rpartition("/")[2]
