"""The trained models in MLflow's registry: one version per content, self-contained, served with the bytes
that `generate` gives.
"""

import base64
import json
import shutil
import threading
import urllib.error
import urllib.request
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from mlflow.exceptions import RestException
from servers import HOST, clean_environment, free_port, serving
from tiny_checkout import CLASSES, make_checkout, save_vae, write_params

from rediffuse.commands.generate import generate
from rediffuse.commands.promote import promote
from rediffuse.diffusion.denoiser import Denoiser
from rediffuse.params import load_params
from rediffuse.runtime.errors import UserError
from rediffuse.runtime.kinds import KINDS
from rediffuse.runtime.weights import load_model
from rediffuse.tracking.lineage import Lineage
from rediffuse.tracking.lock import directory_md5
from rediffuse.tracking.models import log_models
from rediffuse.tracking.preview import draw_preview
from rediffuse.tracking.store import connect, experiment_id
from rediffuse.tracking.sync import complete
from rediffuse.tracking.writer import RowWriter
from rediffuse.vae.model import VAE

GUIDED = {"sample.ddpm.autoguidance_scale": 1.5}
REQUEST = {"n": 3, "label": "Ankle boot", "seed": 5}


class Store:
    """The store in this database, and rows in it."""

    def __init__(self, database):
        self.uri = f"sqlite:///{database}"
        self.client = connect(self.uri)
        self.experiment = experiment_id(self.client, self.uri, database.parent)

    def row(self, name="row"):
        run = self.client.create_run(self.experiment, run_name=name)
        self.client.log_param(run.info.run_id, "ddpm.T", "12")
        return self.client.get_run(run.info.run_id)

    def versions(self, kind):
        return self.client.search_model_versions(f"name = 'rediffuse-{kind}'")


def lock_models(root):
    """dvc.lock, as if `dvc repro` had made the models."""
    stages = {}
    for kind in KINDS:
        md5 = directory_md5(root / "data/models" / kind)
        stages[f"train_{kind}"] = {"outs": [{"path": f"data/models/{kind}", "hash": "md5", "md5": md5}]}
    (root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models") / "checkout"
    make_checkout(root)
    write_params(root, GUIDED)
    lock_models(root)
    return root


@pytest.fixture
def store(empty_store, tmp_path, monkeypatch):
    """A store of the test's own, which is the one in force."""
    store = Store(shutil.copy(empty_store, tmp_path / "mlflow.db"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    return store


@pytest.fixture
def checkout(models, tmp_path, monkeypatch):
    root = tmp_path / "checkout"
    shutil.copytree(models, root)
    monkeypatch.chdir(root)
    return root


def addresses(client, row, checkout):
    """The versions that the checkout's models are registered as: {"ddpm": "models:/rediffuse-ddpm/1"}."""
    return {kind: version.address for kind, version in log_models(client, row, checkout).items()}


# What is registered


def test_each_model_becomes_a_version_of_the_row_and_says_what_it_takes_and_gives(store, checkout):
    row = store.row()
    assert addresses(store.client, row, checkout) == {
        "vae": "models:/rediffuse-vae/1",
        "ddpm": "models:/rediffuse-ddpm/1",
    }
    (version,) = store.versions("ddpm")
    assert version.run_id == row.info.run_id and version.status == "READY"
    assert version.tags["dvc.md5"] == directory_md5(checkout / "data/models/ddpm")
    logged = store.client.get_logged_model(version.tags["rediffuse.model_id"])
    assert (logged.name, logged.status, logged.params) == ("ddpm", "READY", {"ddpm.T": "12"})
    assert json.loads(logged.tags["mlflow.modelVersions"]) == [{"name": "rediffuse-ddpm", "version": 1}]

    folder = Path(store.client.get_model_version_download_uri("rediffuse-ddpm", "1").removeprefix("file://"))
    signature = yaml.safe_load((folder / "MLmodel").read_text())["signature"]
    inputs, outputs = (json.loads(signature[key]) for key in ("inputs", "outputs"))
    assert {column["name"]: (column["type"], column["required"]) for column in inputs} == {
        "n": ("long", True),
        "label": ("string", False),
        "seed": ("long", True),
    }
    assert [column["name"] for column in outputs] == ["label", "png"]
    assert json.loads((folder / "input_example.json").read_text())["data"] == [[4, CLASSES[-1], 1]]
    assert not [path for path in folder.rglob("*") if path.suffix in (".pkl", ".pyc")]
    assert str(checkout) not in (folder / "MLmodel").read_text()
    assert "\ntorch==" in (folder / "requirements.txt").read_text()


def test_a_models_numbers_and_data_set_are_linked_to_it(store, checkout):
    (checkout / "data/pixels").mkdir(exist_ok=True)
    (checkout / "data/pixels/manifest.json").write_text(json.dumps({"set": "toy", "classes": []}))
    (checkout / "metrics").mkdir(exist_ok=True)
    for name, value in (("ddpm", 1.5), ("train_ddpm", 0.25), ("vae", 9.0)):
        (checkout / f"metrics/{name}.json").write_text(json.dumps({"cnn-v1": {"fd": value}}))
    files = [checkout / f"metrics/{name}.json" for name in ("ddpm", "train_ddpm", "vae")]
    hashes = {"data/pixels": "ab" * 16, "data/models/ddpm": "x", "data/models/vae": "y"}
    lineage = Lineage(checkout, {"evaluate_ddpm": files}, {"evaluate_ddpm": "key"}, hashes=hashes)
    row = store.row()
    for _ in range(2):  # the second time changes nothing
        complete(RowWriter(store.client, store.client.get_run(row.info.run_id)), lineage)
    found = store.client.get_run(row.info.run_id)
    models = {each.name: each for each in store.client.search_logged_models([store.experiment])}
    assert sorted(model.model_id for model in found.outputs.model_outputs) == sorted(
        each.model_id for each in models.values()
    )
    linked = {
        (kind, each.key, each.value, each.dataset_name, each.dataset_digest)
        for kind, model in models.items()
        for each in model.metrics
    }
    expected = {("ddpm", "ddpm", 1.5), ("ddpm", "train_ddpm", 0.25), ("vae", "vae", 9.0)}
    data = ("toy", "ab" * 16)
    assert linked == {(kind, f"{file}/cnn-v1/fd", value, *data) for kind, file, value in expected}
    assert len(store.client.get_metric_history(row.info.run_id, "ddpm/cnn-v1/fd")) == 1


def test_a_version_belongs_to_content_and_settings(store, checkout):
    first, second = store.row("first"), store.row("second")
    known = addresses(store.client, first, checkout)
    assert addresses(store.client, first, checkout) == known
    assert addresses(store.client, second, checkout) == known  # an experiment that shares the models
    write_params(checkout, GUIDED | {"sample.ddpm.steps": 4})
    assert addresses(store.client, second, checkout) == known | {"ddpm": "models:/rediffuse-ddpm/2"}
    params = write_params(checkout, GUIDED)
    save_vae(checkout, params, seed=5)
    lock_models(checkout)
    assert addresses(store.client, second, checkout) == known | {"vae": "models:/rediffuse-vae/2"}
    assert {kind: len(store.versions(kind)) for kind in ("vae", "ddpm")} == {"vae": 2, "ddpm": 2}


def test_a_preview_is_the_same_each_time_and_leaves_the_random_state(checkout):
    params = load_params(checkout / "params.yaml")
    for kind, model_class in (("vae", VAE), ("ddpm", Denoiser)):
        model = load_model(model_class, checkout / "data/models" / kind, torch.device("cpu"))
        before = torch.get_rng_state()
        (key, first), (_, second) = (draw_preview(model, params) for _ in range(2))
        assert key == f"{kind}/training" and first.tobytes() == second.tobytes()
        assert len(first.getcolors()) > 2 and torch.equal(before, torch.get_rng_state())


def test_only_what_the_lock_names_is_registered(store, checkout):
    save_vae(checkout, write_params(checkout, GUIDED), seed=5)  # trained again, as while `dvc repro` runs
    assert set(addresses(store.client, store.row(), checkout)) == {"ddpm"}
    shutil.rmtree(checkout / "data/models/ddpm")
    assert addresses(store.client, store.row(), checkout) == {}
    (checkout / "dvc.lock").unlink()
    assert addresses(store.client, store.row(), checkout) == {}
    assert not store.versions("vae")


def test_two_at_once_make_one_version(store, checkout):
    rows, found = [store.row("a"), store.row("b")], []
    threads = [
        threading.Thread(target=lambda row=row: found.append(addresses(connect(store.uri), row, checkout)))
        for row in rows
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and found[0] == found[1]
    assert len(store.versions("ddpm")) == 1


def test_logging_is_silent_runs_no_model_and_leaves_nothing_behind(
    store, checkout, tmp_path, monkeypatch, capfd
):
    import mlflow

    for kind in KINDS:
        (checkout / f"data/models/{kind}/model.safetensors").write_bytes(b"whoever loads these fails")
    lock_models(checkout)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    mlflow.set_tracking_uri("sqlite:////nowhere/at/all.db")  # the process's global store is another
    try:
        capfd.readouterr()
        assert set(addresses(store.client, store.row(), checkout)) == {"vae", "ddpm"}
        assert capfd.readouterr() == ("", "")
    finally:
        mlflow.set_tracking_uri(None)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_the_hash_of_a_folder_is_that_of_dvc(tmp_path, monkeypatch):
    from dvc.repo import Repo

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "folder"
    for name in ("b.txt", "a/z.txt", "a.txt", "a/b/c.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    with Repo.init(str(tmp_path), no_scm=True) as repo:
        repo.add(str(folder))
    assert f"md5: {directory_md5(folder)}\n" in (tmp_path / "folder.dvc").read_text()


# The alias


def test_promote_moves_the_alias(store, checkout):
    one, two = store.row("one"), store.row("two")
    addresses(store.client, one, checkout)
    write_params(checkout, GUIDED | {"sample.ddpm.steps": 4})
    for kind, address in addresses(store.client, two, checkout).items():
        store.client.set_tag(two.info.run_id, f"model.{kind}", address)

    def champion(kind="ddpm"):
        return store.client.get_model_version_by_alias(f"rediffuse-{kind}", "champion").version

    said = promote("1", "ddpm", "champion")
    assert champion() == 1 and one.info.run_id in said and "no version had" in said
    assert "before, version 1" in promote("two", "ddpm", "champion") and champion() == 2
    assert "as before" in promote("2", "ddpm", "champion") and champion() == 2
    promote(two.info.run_id, "vae", "champion")
    assert champion("vae") == 1
    for name in ("9", "nobody", "one"):  # the row "one" has no tag
        with pytest.raises(UserError, match=name):
            promote(name, "ddpm", "champion")
    assert champion() == 2


# What it draws


def files_of(model, folder, **how):
    """The files of `rediffuse generate` for the request."""
    generate(model, f"{folder}/", **REQUEST | how)
    return [path.read_bytes() for path in sorted(folder.iterdir())]


@pytest.fixture
def champion(store, checkout):
    addresses(store.client, store.row(), checkout)
    promote("1", "ddpm", "champion")
    return "models:/rediffuse-ddpm@champion"


def test_generate_takes_model_and_settings_from_the_registry(checkout, champion, tmp_path):
    files = files_of("ddpm", tmp_path / "expected")
    write_params(checkout, {"sample.ddpm.steps": 5})  # those of the checkout do not count
    for number, address in enumerate((champion, "models:/rediffuse-ddpm/1")):
        assert files_of(address, tmp_path / str(number)) == files
    assert files_of(champion, tmp_path / "other", steps=5) != files
    with pytest.raises(UserError, match="nobody"):
        generate("models:/rediffuse-ddpm@nobody", str(tmp_path / "no"), n=1, seed=1)


def test_a_registered_vae_brings_its_fitted_prior(store, checkout, tmp_path, monkeypatch):
    from stages import sample_vae

    write_params(checkout, {"sample.vae.prior": "mixture"})
    with monkeypatch.context() as patch:
        patch.setenv("REDIFFUSE_TRACKING", "off")
        sample_vae.main()
    addresses(store.client, store.row(), checkout)
    files = files_of("vae", tmp_path / "expected", label=None)
    shutil.rmtree(checkout / "data")
    assert files_of("models:/rediffuse-vae/1", tmp_path / "found", label=None) == files


def ask(url, *records):
    """The status and the answer to a request with these records."""
    body = json.dumps({"dataframe_records": records}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)["predictions"]
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["message"]


@pytest.mark.slow
def test_a_served_model_gives_the_bytes_that_generate_gives(store, checkout, champion, tmp_path):
    """`mlflow models serve` as the README says it, in a folder from which nothing of the project is seen."""
    files = files_of("ddpm", tmp_path / "expected")
    checkout.rename(tmp_path / "gone")
    elsewhere, port = tmp_path / "elsewhere", free_port()
    elsewhere.mkdir()
    url = f"http://{HOST}:{port}"
    command = ["mlflow", "models", "serve", "-m", champion, "--env-manager", "local"]
    command += ["--host", HOST, "--port", port]
    environment = clean_environment(MLFLOW_TRACKING_URI=store.uri)
    ready, log = lambda: urllib.request.urlopen(f"{url}/ping", timeout=5).close(), tmp_path / "serve.log"
    with serving(command, ready, log, cwd=elsewhere, env=environment):
        url += "/invocations"
        status, images = ask(url, REQUEST)
        assert status == 200 and [image["label"] for image in images] == ["Ankle boot"] * 3
        assert [base64.b64decode(image["png"]) for image in images] == files
        status, images = ask(url, {"n": 1, "seed": 5, "label": 1}, {"n": 4, "seed": 5})  # an index; in turn
        assert status == 200 and base64.b64decode(images[0]["png"]) == files[0]
        labels = ["Ankle boot", "T-shirt/top", "Ankle boot", "Bag", "T-shirt/top"]
        assert [image["label"] for image in images] == labels
        assert base64.b64decode(images[2]["png"]) == files[1]
        status, text = ask(url, {"n": 1, "seed": 5, "label": "hat"})
        assert status == 400 and "0 T-shirt/top, 1 Ankle boot, 2 Bag" in text
        status, text = ask(url, {"n": 0, "seed": 5})
        assert status == 400 and "at least 1, got 0" in text
        assert ask(url, {"seed": 5})[0] == 400
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize(("code", "calls"), [("BAD_REQUEST", 2), ("INTERNAL_ERROR", 1)])
def test_a_data_set_that_another_row_adds_meanwhile_is_tried_once_more(store, monkeypatch, code, calls):
    """MLflow looks for a data set, then inserts it: PostgreSQL refuses the second of two rows at once."""
    writer, tried = RowWriter(store.client, store.row()), []
    log_inputs = store.client.log_inputs

    def fail_once(*arguments):
        tried.append(arguments)
        if len(tried) == 1:
            raise RestException({"error_code": code, "message": "UniqueViolation"})
        log_inputs(*arguments)

    monkeypatch.setattr(store.client, "log_inputs", fail_once)
    with nullcontext() if calls == 2 else pytest.raises(RestException):
        writer.log_dataset("toy", "0f0f", {"md5": "0f0f"}, {"classes": []})
    assert len(tried) == calls and len(writer.row.inputs.dataset_inputs) == calls - 1
