"""The trained models of a row in MLflow's registry: rediffuse-vae and rediffuse-ddpm, ready for `mlflow
models serve`.

A version belongs to the bytes of a model (DVC's md5) and its sampling settings; rows that share both share a
version.  What is logged is self-contained: weights, settings, the script that answers requests (served.py)
and a copy of the package.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import rediffuse
from rediffuse.inference.card import CARD, COMMIT, ROW, USAGE, model_card
from rediffuse.inference.settings import SAMPLING, pack_settings, sampling_settings
from rediffuse.params import load_params
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.kinds import KINDS, Kind, read_config
from rediffuse.sampling.vae import PRIOR
from rediffuse.tracking.lineage import MODELS, PIXELS, SAMPLES
from rediffuse.tracking.lock import directory_md5, hashes, lock_of, md5_of, output_hashes
from rediffuse.tracking.store import connect, repository_root, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as Row

LOCK_SECONDS = 60.0  # another process needs less to register a model
LIBRARIES = [  # what serving imports
    *("mlflow", "filelock", "numpy", "pandas", "pillow", "pydantic", "pyyaml", "safetensors", "torch", "tqdm")
]
SCRIPT = "served.py"
# Of the package.
NOT_SERVED = ["cli.py", "commands", "evaluation", "figures", "sources", "tracking", "training", "__pycache__"]
MODEL_ID = "rediffuse.model_id"  # tag of a version: MLflow's SQL store forgets the logged model of a version
MODEL_VERSIONS = "mlflow.modelVersions"  # tag by which MLflow's pages find the versions of a logged model


class Version(NamedTuple):
    """A version, such as models:/rediffuse-ddpm/3, and MLflow's id of the logged model, "" if unknown."""

    address: str
    model_id: str


def registered_name(kind: str) -> str:
    """Return the name in MLflow's registry."""
    return f"rediffuse-{kind}"


def open_registry() -> tuple[MlflowClient, str]:
    """Return a client of the store in force, and its address.

    Raises UserError where there is no store yet, and outside a checkout unless MLFLOW_TRACKING_URI names a
    server.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri.startswith(("http://", "https://")):
        uri = tracking_uri(repository_root())
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        # Opening would make an empty one.
        raise UserError(f"there is no MLflow store yet ({uri}): `dvc repro` makes one")
    return connect(uri), uri


def log_models(client: MlflowClient, row: Row, checkout: Path) -> dict[Kind, Version]:
    """Register the models of the checkout as the row's.

    A model counts if the files in data/models are those that dvc.lock names.  One that is registered already,
    with these sampling settings, is not logged again.  The model is not run.  Raises what MLflow, its store
    or the file system raise, UserError for wrong parameters, and filelock's Timeout.
    """
    from filelock import FileLock

    params = load_params(checkout / "params.yaml")
    lock = Path(os.environ.get("DVC_ROOT") or checkout) / ".dvc" / "tmp" / "rediffuse-models.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    found: dict[Kind, Version] = {}
    with FileLock(lock, timeout=LOCK_SECONDS):  # two experiments that share a model may end at the same time
        locked = output_hashes(lock_of(checkout))
        for kind in KINDS:
            folder = checkout / MODELS / kind
            md5 = locked.get(f"{MODELS}/{kind}")
            if md5 and folder.is_dir() and directory_md5(folder) == md5:
                files = model_files(kind, folder, sampling_settings(params, kind), checkout)
                tags = {COMMIT: "mlflow.source.git.commit", "repository": "mlflow.source.git.repoURL"}
                origin = {name: row.data.tags[tag] for name, tag in tags.items() if row.data.tags.get(tag)}
                card = card_of(kind, folder, checkout, origin | {ROW: row.info.run_id})
                found[kind] = _register(client, row, kind, md5, files | {CARD: card.encode()})
    return found


def model_files(kind: Kind, folder: Path, settings: dict[str, Any], checkout: Path) -> dict[str, bytes]:
    """Return the files of a packed model by their paths: its folder, sampling settings, a fitted prior."""
    names = [name.strip() for name in read_config(folder).get("class_names", [])]
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    files[SAMPLING] = pack_settings(kind, settings, names)
    if settings.get("prior") == "mixture":
        files[PRIOR] = (checkout / SAMPLES / "vae" / PRIOR).read_bytes()
    return files


def card_of(kind: Kind, folder: Path, checkout: Path, origin: dict[str, str], usage: str = USAGE) -> str:
    """Return the model card of a model of the checkout.

    It claims only what dvc.lock says of these bytes: parameters that were edited later, or scores of an
    earlier model, cannot get into it.
    """
    stages = lock_of(checkout)
    model, samples, report = f"{MODELS}/{kind}", f"{SAMPLES}/{kind}", f"metrics/evaluation/{kind}.json"

    def locked(stage: str, what: str, path: str) -> str | None:
        return hashes(stages.get(stage, {}).get(what, [])).get(path)

    def read(path: str, agrees: bool) -> Any:
        return json.loads((checkout / path).read_bytes()) if agrees and (checkout / path).is_file() else None

    def params_of(stage: str, agrees: bool) -> dict[str, Any]:
        return dict(stages[stage].get("params", {}).get("params.yaml", {})) if agrees else {}

    md5, pixels = directory_md5(folder), locked("train_" + kind, "deps", PIXELS)
    trained = locked("train_" + kind, "outs", model) == md5
    on_these_data = trained and pixels is not None and locked("prepare", "outs", PIXELS) == pixels
    drawn = locked("sample_" + kind, "deps", model) == md5
    judged = locked("evaluate_" + kind, "deps", samples)
    seen = judged is not None and locked("sample_" + kind, "outs", samples) == judged
    scores = locked("evaluate_" + kind, "outs", report) == md5_of(checkout / report)
    parameters = params_of("prepare", on_these_data) | params_of("train_" + kind, trained)
    return model_card(
        kind,
        config=read_config(folder),
        settings=sampling_settings(load_params(checkout / "params.yaml"), kind),
        manifest=read(f"{PIXELS}/manifest.json", on_these_data),
        record=read(report, drawn and seen and scores),
        parameters=parameters if trained else None,
        origin={"DVC's hash of the model": md5} | origin,
        usage=usage,
    )


def _register(client: MlflowClient, row: Row, kind: Kind, md5: str, files: dict[str, bytes]) -> Version:
    """Return the version of this content, which is made if there is none."""
    from mlflow.exceptions import MlflowException

    name = registered_name(kind)
    settings = hashlib.sha256(files[SAMPLING] + files.get(PRIOR, b"")).hexdigest()
    same = f"name = '{name}' and tags.`dvc.md5` = '{md5}' and tags.`rediffuse.settings` = '{settings}'"
    if there := client.search_model_versions(same):
        first = min(there, key=lambda version: int(version.version))
        return Version(f"models:/{name}/{first.version}", first.tags.get(MODEL_ID, ""))
    model = _log(client, row, kind, files)
    with suppress(MlflowException):  # it is there already; if the store fails, the next request says so
        client.create_registered_model(name)
    # By its place: for models:/ID a store without a server would ask the process's global store.
    version = client.create_model_version(
        name,
        model.artifact_location,
        run_id=row.info.run_id,
        model_id=model.model_id,
        tags={"dvc.md5": md5, "rediffuse.settings": settings, MODEL_ID: model.model_id},
        await_creation_for=0,
    )
    link = json.dumps([{"name": name, "version": int(version.version)}])
    client.set_logged_model_tags(model.model_id, {MODEL_VERSIONS: link})
    return Version(f"models:/{name}/{version.version}", model.model_id)


def _log(client: MlflowClient, row: Row, kind: Kind, files: dict[str, bytes]) -> Any:
    """Log the model as MLflow's LoggedModel.

    The fluent mlflow.pyfunc.log_model needs global state, and runs the model.
    """
    from mlflow.entities.logged_model_status import LoggedModelStatus

    experiment, run = row.info.experiment_id, row.info.run_id
    model = client.create_logged_model(experiment, name=kind, source_run_id=run, params=row.data.params)
    status = LoggedModelStatus.FAILED
    try:
        with tempfile.TemporaryDirectory(prefix="rediffuse-") as folder:
            packed = Path(folder, "model")
            _pack(packed, files, artifact_path=model.artifact_location, model_id=model.model_id, run_id=run)
            client.log_model_artifacts(model.model_id, str(packed))
        status = LoggedModelStatus.READY
    finally:
        client.finalize_logged_model(model.model_id, status)
    return model


def _pack(target: Path, files: dict[str, bytes], **identity: str) -> None:
    """Write a folder that MLflow can load and serve anywhere."""
    import mlflow.pyfunc
    import pandas as pd  # type: ignore[import-untyped]
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import ColSpec, Schema

    names = json.loads(files[SAMPLING])["class_names"]
    example = {"n": 4, "label": names[-1], "seed": 1} if names else {"n": 4, "seed": 1}
    label = ColSpec("string", "label", required=False)
    inputs = Schema([ColSpec("long", "n"), label, ColSpec("long", "seed")])
    outputs = Schema([label, ColSpec("string", "png")])
    with tempfile.TemporaryDirectory(prefix="rediffuse-") as folder:
        # MLmodel records the places that things were taken from: copy them to places without a meaning.
        source, package = Path(rediffuse.__file__).parent, Path(folder, "rediffuse")
        artifacts, script = Path(folder, "artifacts"), Path(folder, SCRIPT)
        shutil.copytree(source, package, ignore=shutil.ignore_patterns(*NOT_SERVED))
        shutil.copyfile(source / "inference" / SCRIPT, script)
        for name, content in files.items():
            (artifacts / name).parent.mkdir(parents=True, exist_ok=True)
            (artifacts / name).write_bytes(content)
        mlflow.pyfunc.save_model(
            target,
            python_model=str(script),
            code_paths=[str(package)],
            artifacts={path.name: str(path) for path in sorted(artifacts.iterdir())},
            signature=ModelSignature(inputs, outputs),
            input_example=pd.DataFrame([example]),
            pip_requirements=[f"{name}=={metadata.version(name).partition('+')[0]}" for name in LIBRARIES],
            mlflow_model=Model(model_uuid=identity["model_id"], **identity),
            uv_project_path=folder,  # not one that happens to lie in the working directory
        )
