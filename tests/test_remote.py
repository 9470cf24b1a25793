"""Results shared between two clones: experiments over git, data over a remote that speaks S3's protocol
(moto's server).
"""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from servers import CREDENTIALS, make_bucket, s3, stored
from toy_pipeline import enter
from tracked_project import Checkout, expected_metrics, make_project, pictures_of, results_of

from rediffuse.tracking.store import connect
from rediffuse.tracking.sync import sync

pytestmark = pytest.mark.slow

BUCKET = "team"


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3(tmp_path_factory.mktemp("s3")) as address:
        make_bucket(address, BUCKET)
        yield address


@pytest.fixture(scope="module")
def first(endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """The clone in which everything was computed and from which everything was pushed: the baseline and an
    experiment.
    """
    folder = tmp_path_factory.mktemp("team")
    clone = make_project(folder / "first", **CREDENTIALS)
    clone.git("init", "-q", "--bare", "-b", "main", str(folder / "team.git"))
    clone.git("remote", "add", "origin", str(folder / "team.git"))
    clone.dvc("remote", "add", "-d", "storage", f"s3://{BUCKET}/rediffuse")
    clone.dvc("remote", "modify", "storage", "endpointurl", endpoint)
    clone.dvc("repro")
    clone.git("add", ".")
    clone.git("commit", "-q", "-m", "results")
    clone.dvc("push")
    clone.git("push", "-q", "-u", "origin", "main")
    clone.dvc("exp", "run", "--temp", "-n", "larger", "-S", "ddpm.T=1000")
    clone.dvc("exp", "push", "origin", "larger")
    return clone


@pytest.fixture(scope="module")
def second(first: Checkout) -> Checkout:
    """Another clone, in which nothing was computed, with the experiment pulled."""
    root = first.root.with_name("second")
    first.git("clone", "-q", first.git("remote", "get-url", "origin"), str(root))
    clone = Checkout(root, **CREDENTIALS)
    clone.dvc("exp", "pull", "origin", "larger")
    return clone


@pytest.fixture
def in_second(second: Checkout, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second clone as working directory of this process."""
    enter(second.root, monkeypatch)


def rows(clone: Checkout) -> dict[str, Any]:
    client = connect(f"sqlite:///{clone.root}/.mlflow/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name("rediffuse").experiment_id])
    assert len({row.info.run_name for row in found}) == len(found)
    return {row.info.run_name: row for row in found}


def test_data_lies_on_the_remote_under_its_hash(first: Checkout, endpoint: str) -> None:
    listed = json.loads(first.dvc("data", "status", "--json", "--granular", "--unchanged"))
    assert listed["unchanged"]
    lock = (first.root / "dvc.lock").read_text()
    hashes = {word for word in lock.split() if word.endswith(".dir")}
    assert len(hashes) == 3  # the samples, and the pictures of two stages
    assert {f"rediffuse/files/md5/{name[:2]}/{name[2:]}" for name in hashes} <= set(stored(endpoint, BUCKET))


def test_commit_pulled_elsewhere_runs_nothing(second: Checkout) -> None:
    assert not (second.root / "data/samples/ddpm").exists()
    said = second.dvc("repro", "--pull")
    assert "Running stage" not in said
    assert (second.root / "data/samples/ddpm/images.bin").read_bytes() == (500).to_bytes(4, "big") * 1000
    assert second.git("status", "--porcelain") == ""


def test_experiment_pulled_elsewhere_runs_nothing(second: Checkout) -> None:
    second.dvc("exp", "apply", "larger")
    said = second.dvc("repro", "--pull")
    assert "Running stage" not in said
    assert "Data and pipelines are up to date." in second.dvc("status")
    assert (second.root / "data/samples/ddpm/images.bin").read_bytes() == (1000).to_bytes(4, "big") * 1000


def test_sync_gives_the_second_clone_the_rows_of_the_first(
    first: Checkout, second: Checkout, in_second: None
) -> None:
    second.git("checkout", "-q", "--", ".")  # what the experiment has put there
    second.dvc("pull")
    assert {outcome.what for outcome in sync(every=True)} == {"made"}
    ours, theirs = rows(first)["larger"], rows(second)["larger"]
    assert results_of(theirs) == results_of(ours) == expected_metrics(1000)
    assert theirs.data.params == ours.data.params
    assert theirs.info.status == ours.info.status == "FINISHED"
    for tag in ("rediffuse.key", "rediffuse.params", "dvc.baseline", "dvc.exp_name", "dvc.exp_ref"):
        assert theirs.data.tags[tag] == ours.data.tags[tag]
    assert theirs.data.tags["dvc.exp_rev"] == first.git("rev-parse", ours.data.tags["dvc.exp_ref"])
    pictures = {"ddpm/noising", "ddpm/scores"}
    for clone, row in ((first, ours), (second, theirs)):
        assert pictures_of(connect(f"sqlite:///{clone.root}/.mlflow/mlflow.db"), row) == pictures
    assert {outcome.what for outcome in sync(every=True)} == {"unchanged"}
