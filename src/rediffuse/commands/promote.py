"""Move the alias of a registered model, `champion` as a rule, to the model of another row."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rediffuse.runtime.errors import UserError
from rediffuse.tracking.models import open_registry, registered_name

if TYPE_CHECKING:
    from mlflow import MlflowClient


def promote(name: str, model: str, alias: str) -> str:
    """Give the alias of rediffuse-<model> to the version of a row, or to a version by its number.  Returns what was done, in words.

    name: a row (run id or name), or the number of a version.
    Raises UserError if there is no such row or version, for a row whose model is not registered, and where the store fails.
    """
    client, version = _version(name, model)
    from mlflow.exceptions import MlflowException

    registered = registered_name(model)
    try:
        found = client.get_model_version(registered, version)
        before = client.get_registered_model(registered).aliases.get(alias)
        client.set_registered_model_alias(registered, alias, version)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise UserError(f"{registered} has no version {version}: `make ui` shows the models that are registered") from None
        raise UserError(f"{registered}@{alias} is not moved: {error.message}") from None
    old = {None: "no version had this alias before", version: "as before"}.get(before and str(before), f"before, version {before}")
    return f"{registered}@{alias} is now version {version}, from run {found.run_id} ({old})"


def _version(name: str, model: str) -> tuple[MlflowClient, str]:
    """The store, and the number of the version that is meant."""
    if name.isdecimal() and len(name) < 10:  # a run id has 32 digits
        return open_registry()[0], str(int(name))
    from rediffuse.commands.rows import find_row

    client, row = find_row(name)
    address = row.data.tags.get(f"model.{model}", "")
    if not address:
        raise UserError(f"row {name} has no registered {model}: complete it with `rediffuse sync` where the model is, or pull it first")
    return client, address.rpartition("/")[2]
