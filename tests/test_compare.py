"""The comparison guard: what may stand side by side, in which units, and where it is found."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from click.testing import CliRunner, Result
from toy import commit, git

from rediffuse.cli import main
from rediffuse.commands.compare import Comparison, Row, Score, compare, difference, to_text
from rediffuse.runtime.errors import UserError
from rediffuse.tracking.store import connect, experiment_id

PROJECT = Path(__file__).resolve().parents[1]
CNN, CONV = "fashion-mnist-cnn-v1", "random-conv-v1"
PARAMS = {"seed": 1, "vae.latent_dim": 32, "ddpm.T": 500, "ddpm.space": "pixels", "sample.ddpm.steps": 20}


def spread(*values: float) -> dict[str, Any]:
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else 0.0, "values": list(values)}


def measured(id: str, sha256: str, fd: tuple[float, ...] = (1.7, 1.8, 1.9), **changes: Any) -> dict[str, Any]:
    scores = {"fd": spread(*fd), "kid": spread(0.03, 0.04, 0.05)}
    instrument = {"name": id, "sha256": sha256, "layer": "penultimate", "dimension": 64}
    instrument |= {"accuracy": None if id == CONV else 0.93, **changes}
    return {"instrument": instrument, "scores": scores, "floor": 0.1, "ceiling": 62.0}


def record(model: str = "ddpm", **changes: Any) -> dict[str, Any]:
    """Return a full record; a change is named by its path, "sampling__n", and None removes what is there."""
    made: dict[str, Any] = {
        "model": model,
        "sampling": {"n": 5000, "seeds": [1, 2, 3], "steps": 20, "rounding": "half to even"},
        "reference": {"set": "fashion-mnist", "split": "test", "n": 10000, "sha256": "12" * 32},
        "train": {"n": 55000, "sha256": "56" * 32},
        "settings": {"is_splits": 10, "neighbours": 3, "metric_seed": 2020},
        "instruments": {CNN: measured(CNN, "ab" * 32), CONV: measured(CONV, "cd" * 32)},
        "memorisation": {"copies": spread(0, 1, 2)},
        "label_accuracy": spread(0.84, 0.85, 0.86) if model == "ddpm" else None,
    }
    for path, value in changes.items():
        *groups, last = path.split("__")
        node = made
        for group in groups:
            node = node[group]
        node[last] = value
        if value is None:
            del node[last]
    return made


def rows(*records: dict[str, Any]) -> list[Row]:
    return [Row(f"row{i}", f"origin {i}", each, PARAMS) for i, each in enumerate(records)]


def only(*names: str, **changes: Any) -> dict[str, Any]:
    """Return a record of these instruments; changes: of the first."""
    hashes = {CNN: "ab" * 32, CONV: "cd" * 32}
    made = {name: measured(name, hashes.get(name, "99" * 32)) for name in names}
    made[names[0]]["instrument"] |= changes
    return record(instruments=made)


def with_fd(*fd: float, model: str = "ddpm") -> dict[str, Any]:
    fd = fd if len(fd) > 1 else (fd[0] - 0.1, fd[0], fd[0] + 0.1)
    return record(model, **{f"instruments__{CNN}": measured(CNN, "ab" * 32, fd)})


def ids(comparison: Comparison) -> set[str | None]:
    return {line.instrument for line in comparison.table}


def scores(comparison: Comparison, metric: str, id: str | None = CNN) -> Any:
    (found,) = (line for line in comparison.table if (line.instrument, line.metric) == (id, metric))
    return list(found.scores.values())


# The guard


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("sampling__n", 10000, "sampling.n: A 5000, B 10000"),
        ("sampling__rounding", "truncate", "sampling.rounding: A half to even, B truncate"),
        ("reference__sha256", "34" * 32, "reference.sha256: A 121212121212, B 343434343434"),
        ("reference__split", "train", "reference.split: A test, B train"),
        ("reference__n", 60000, "reference.n: A 10000, B 60000"),
        ("settings__neighbours", None, "settings.neighbours: A 3, B none"),
        ("settings__new", 1, "settings.new: A none, B 1"),
    ],
)
def test_rows_of_another_measurement_are_refused_altogether(path: str, value: Any, sentence: str) -> None:
    verdict = compare(rows(record(), record(**{path: value})))
    assert verdict.refusals == [sentence] and not verdict.table
    assert f"  refused: {sentence}" in to_text(verdict)


RULERS = [
    ("sha256", "ef" * 32),
    ("layer", "logits"),
    ("dimension", 10),
    ("shape", [1]),
    ("resize", "nearest"),
]


@pytest.mark.parametrize(("key", "value"), RULERS)
def test_another_ruler_of_the_same_name_is_refused_and_the_other_instrument_is_not(
    key: str, value: Any
) -> None:
    pair = rows(record(), only(CNN, CONV, **{key: value}))
    verdict = compare(pair)
    assert verdict.refusals[0].startswith(f"{CNN}: {key}: A ") and ids(verdict) == {CONV, None}
    assert not compare(pair, [CONV]).refusals and ids(compare(pair, [CONV])) == {CONV}
    assert compare(pair, [CNN]).refusals and not compare(pair, [CNN]).table


NEEDED = ["sampling__n", "reference__sha256", "settings__metric_seed", "instruments"]


@pytest.mark.parametrize("path", [*NEEDED, f"instruments__{CNN}__instrument__sha256"])
def test_record_that_does_not_say_how_it_was_measured_is_refused_even_beside_itself(path: str) -> None:
    incomplete = record(**{path: None})
    with pytest.raises(UserError, match=rf"row0 \(origin 0\) lacks {path.replace('__', '.')}, .*`dvc repro`"):
        compare(rows(incomplete, incomplete))


def test_what_is_compared_may_differ() -> None:
    verdict = compare(rows(record(), record(sampling__steps=50, reference__set="renamed")))
    assert not verdict.refusals and ids(verdict) == {CNN, CONV, None}
    expected = {"sampling.steps": {"A": 20, "B": 50}, "reference.set": {"A": "fashion-mnist", "B": "renamed"}}
    assert verdict.different == expected and verdict.same["sampling.n"] == 5000
    models = compare(rows(record("vae"), record()))
    assert not models.refusals and models.different["model"] == {"A": "vae", "B": "ddpm"}
    assert models.notes == ["label_accuracy: not measured in A"]


def test_instrument_that_some_rows_lack_is_left_out_with_a_note() -> None:
    verdict = compare(rows(only(CNN, CONV), only(CONV), only(CONV)))
    assert CNN not in ids(verdict) and CONV in ids(verdict)
    assert f"{CNN}: not measured in B, C" in verdict.notes
    assert f"{CNN}: not measured in B" in compare(rows(only(CNN), only(CONV))).refusals  # none is shared
    lacking = compare(rows(only(CNN, CONV), only(CNN)), [CONV])
    assert lacking.refusals == [f"{CONV}: not measured in B"] and not lacking.table
    with pytest.raises(UserError, match=f"inception-v3.*{CNN}, {CONV}"):
        compare(rows(record(), record()), ["inception-v3"])


def test_memorisation_and_label_accuracy_have_own_rulers() -> None:
    other_images = compare(rows(record(), record(train__sha256="78" * 32)))
    assert [each.partition(":")[0] for each in other_images.refusals] == ["memorisation"]
    assert [line.metric for line in other_images.table if not line.instrument] == ["label_accuracy"]
    other_judge = compare(rows(only(CNN, CONV), only("classifier", CONV)))
    assert [each.partition(":")[0] for each in other_judge.refusals] == ["label_accuracy"]
    # Inception, without an accuracy, judges no labels, even if it comes first.
    assert not compare(rows(only(CNN), only("inception-v3", CNN, accuracy=None))).refusals


@pytest.mark.parametrize(
    ("model", "changes", "shown"),
    [
        ("ddpm", {"ddpm.T": 9, "seed": 2, "vae.latent_dim": 2}, {"seed", "ddpm.T"}),
        ("vae", {"ddpm.T": 9, "sample.ddpm.steps": 9, "vae.latent_dim": 2}, {"vae.latent_dim"}),
        ("ddpm", {"ddpm.space": "latents", "vae.latent_dim": 2}, {"ddpm.space", "vae.latent_dim"}),
    ],
)
def test_parameters_that_differ_are_named_if_they_can_affect_the_model(
    model: str, changes: dict[str, Any], shown: set[str]
) -> None:
    first, unknown = Row("first", "origin", record(model), PARAMS), Row("old", "origin", record(model))
    verdict = compare([first, unknown, Row("other", "origin", record(model), PARAMS | changes)])
    assert verdict.different == {name: {"A": PARAMS[name], "C": changes[name]} for name in shown}
    assert "the parameters of B are not known" in verdict.notes and not verdict.refusals


# Units of spread


@pytest.mark.parametrize(
    ("first", "other", "better", "units", "mark"),
    [
        ((10.0, 3.0), (20.0, 4.0), "lower", 10 / 12.5**0.5, "worse"),  # sqrt((9 + 16) / 2)
        ((20.0, 3.0), (10.0, 4.0), "lower", -10 / 12.5**0.5, "better"),
        ((10.0, 3.0), (20.0, 4.0), "higher", 10 / 12.5**0.5, "better"),
        ((10.0, 3.0), (20.0, 4.0), "", 10 / 12.5**0.5, ""),
        ((10.0, 1.0), (12.0, 1.0), "higher", 2.0, "better"),  # two units are beyond the spread
        ((10.0, 1.0), (8.001, 1.0), "lower", -1.999, "~"),
        ((0.0, 0.0), (3.0, 2.0**0.5), "lower", 3.0, "worse"),  # one spread of two is zero
        ((0.5, 0.0), (0.6, 0.0), "lower", None, ""),
        ((0.5, 0.1), (0.6, None), "lower", None, ""),  # a single set
    ],
)
def test_units_of_spread_and_mark(
    first: tuple[float, float], other: tuple[float, float], better: str, units: float | None, mark: str
) -> None:
    found = difference(Score(*first), Score(*other), better)
    assert found and found.difference == other[0] - first[0]
    assert (found.units, found.mark) == (units and pytest.approx(units, rel=1e-12), mark)


def test_text_shows_scores_and_units_of_the_records_and_gaps() -> None:
    equal = {"mean": 0.1, "std": 1e-17, "values": [0.1] * 3}  # what the mean of equal numbers may leave
    other = with_fd(2.0, 2.4, 2.8) | {"label_accuracy": spread(0.9), "memorisation": {"copies": equal}}
    del other["instruments"][CNN]["scores"]["kid"]
    verdict = compare(rows(record(memorisation__copies=equal), other))
    assert scores(verdict, "fd")[1].units == pytest.approx(0.6 / ((0.1**2 + 0.4**2) / 2) ** 0.5, rel=1e-9)
    for markdown in (False, True):
        table = [" ".join(line.split()) for line in to_text(verdict, markdown=markdown).splitlines()]
        assert "| fd | lower | 1.8 ± 0.1 | 2.4 ± 0.4 | +0.6 (+2.06) worse |" in table
        assert "| kid | lower | 0.04 ± 0.01 | - | - |" in table
        assert "| label_accuracy | higher | 0.85 ± 0.01 | 0.9 | +0.05 |" in table  # a single set
        assert "| memorisation.copies | | 0.1 ± 0 | 0.1 ± 0 | +0 |" in table


# The command


def write(root: Path, *, T: int = 500, **records: dict[str, Any]) -> None:
    folder = root / "metrics" / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    for model, content in records.items():
        (folder / f"{model}.json").write_text(json.dumps(content))
    params = {"seed": 1, "vae": {"beta": 1}, "ddpm": {"T": T, "training": {"lr": "1e-05"}}}
    (root / "params.yaml").write_text(json.dumps(params))


def add_experiment(root: Path, baseline: str, name: str, fd: float) -> str:
    """Make a commit on the baseline under refs/exps, as `dvc exp run --queue` leaves it."""
    here = git(root, "rev-parse", "HEAD")
    git(root, "checkout", "-q", "--detach", baseline)
    write(root, T=1000, ddpm=with_fd(fd))
    made = commit(root, f"experiment {name}")
    git(root, "update-ref", f"refs/exps/{baseline[:2]}/{baseline[2:]}/{name}", made)
    git(root, "checkout", "-q", "--detach", here)
    return made


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project below a git repository: a commit without records (tag `old`), and one with them.

    The working directory is a folder of the project.
    """
    root = tmp_path / "repository" / "my project"
    for folder in (".dvc", "src"):
        (root / folder).mkdir(parents=True)
    git(root.parent, "init", "-q", "-b", "main")
    (root / "params.yaml").touch()
    commit(root, "old")
    git(root, "tag", "old")
    write(root, vae=record("vae"), ddpm=record())
    commit(root, "records")
    for name in ("DVC_ROOT", "MLFLOW_TRACKING_URI", "GIT_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(root / "src")
    return root


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(main, ["compare", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def fails(*arguments: str) -> str:
    """Return what the command says on stderr; it must print nothing else, and no traceback."""
    result = run(*arguments)
    assert result.exit_code == 1 and result.stdout == "" and result.stderr.startswith("error: ")
    return result.stderr


def shown(*arguments: str) -> list[dict[str, Any]]:
    return json.loads(run(*arguments, "--json").stdout)["comparisons"]


def fd_of(*arguments: str) -> list[list[float]]:
    """Return the fd of all rows by the first instrument, for each comparison."""
    lines = [each["table"][0]["scores"].values() for each in shown(*arguments)]
    return [[round(score["mean"], 6) for score in line] for line in lines]


def test_each_model_that_all_have_gets_its_own_table_and_the_changed_parameters(root: Path) -> None:
    write(root, T=1000)
    for form, item in ([], "  "), (["--markdown"], "- "):
        result = run("HEAD", "workspace", *form)
        vae, ddpm = result.stdout.split("ddpm\n\n")
        assert result.exit_code == 0 and result.stderr == "" and "label_accuracy" not in vae
        assert f"git revision {git(root, 'rev-parse', '--short=7', 'HEAD')}\n{item}B: workspace, files" in vae
        assert "different: nothing\n" in vae and f"\n{item}ddpm.T: A 500, B 1000\n" in ddpm
    [vae_, found] = shown("HEAD", "workspace")
    assert vae_["different"] == {} and found["different"] == {"ddpm.T": {"A": 500, "B": 1000}}
    assert found["rows"]["B"]["instruments"] == {CNN: "ab" * 32, CONV: "cd" * 32}
    (root / "params.yaml").write_text("{")
    assert "the parameters of B are not known" in run("HEAD", "workspace").stdout


def test_workspace_is_what_lies_there_and_a_revision_what_was_committed(root: Path) -> None:
    write(root, ddpm=with_fd(2.5), vae=with_fd(4.0, model="vae"))
    assert fd_of("HEAD:ddpm", "workspace:ddpm") == fd_of("HEAD:ddpm", "workspace") == [[1.8, 2.5]]
    assert fd_of("workspace:vae", "workspace:ddpm") == [[4.0, 2.5]]
    commit(root, "next")
    assert fd_of("HEAD~1", "main") == [[1.8, 4.0], [1.8, 2.5]]


def test_experiment_is_found_by_its_name_after_revisions_and_on_the_checked_out_commit_first(
    root: Path,
) -> None:
    bases = git(root, "rev-parse", "HEAD"), commit_empty(root)
    made = [add_experiment(root, base, "tidy-ox", fd) for base, fd in zip(bases, (2.5, 3.5), strict=True)]
    add_experiment(root, bases[1], "main", 9.0)
    git(root, "update-ref", "refs/exps/exec/EXEC_BRANCH", made[0])  # DVC's own, without a baseline
    (found,) = shown("HEAD:ddpm", "tidy-ox", "main")
    assert found["rows"]["B"]["origin"] == f"experiment {made[1][:7]} on {bases[1][:7]}"
    assert found["different"] == {"ddpm.T": {"A": 500, "B": 1000, "C": 500}}
    assert fd_of("HEAD:ddpm", "tidy-ox", "main") == [[1.8, 3.5, 1.8]]
    commit_empty(root)
    said = fails("HEAD", "tidy-ox")
    assert all(each[:7] in said for each in made)
    assert fd_of("HEAD:ddpm", made[0][:7]) == [[1.8, 2.5]]  # the remedy


def commit_empty(root: Path) -> str:
    git(root, "commit", "-q", "--allow-empty", "-m", "nothing")
    return git(root, "rev-parse", "HEAD")


def test_what_is_refused_shows_no_number_and_fails(root: Path) -> None:
    vae = record("vae")
    vae["instruments"][CNN]["instrument"]["layer"] = "logits"
    write(root, vae=vae, ddpm=record(sampling__n=10000))
    result = run("HEAD", "workspace")
    assert result.exit_code == 1 and "may not be compared" in result.stderr
    partly, wholly = result.stdout.split("ddpm\n\n")
    assert "1.8 ± 0.1" in partly and f"refused: {CNN}: layer: A penultimate, B logits" in partly
    assert "±" not in wholly and "refused: sampling.n: A 5000, B 10000" in wholly
    made = json.loads(run("HEAD", "workspace", "--json").stdout)
    assert made["refused"] is True and [bool(each["table"]) for each in made["comparisons"]] == [True, False]
    chosen = run("HEAD:vae", "workspace", "--instrument", CONV)
    assert chosen.exit_code == 0 and chosen.stderr == "" and CNN not in chosen.stdout
    assert run("HEAD:vae", "workspace", "--instrument", CNN, "--instrument", CONV).exit_code == 1


def test_name_that_is_missing_or_unknown(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "at least two rows, got 1" in fails("HEAD:ddpm")
    for name in ("no-such", "HEAD:gan"):
        said = fails("HEAD", name)
        assert (
            f"no revision, experiment or row is called '{name}'" in said and "there is no store yet" in said
        )
    assert not (root / ".mlflow").exists()
    monkeypatch.chdir(root.parent)
    assert "not inside a DVC repository" in fails("HEAD", "workspace")


def test_missing_records(root: Path) -> None:
    (root / "metrics" / "evaluation" / "vae.json").unlink()
    result = run("HEAD", "workspace")
    assert result.exit_code == 0 and "vae is left out: no record of it in workspace" in result.stdout
    assert "workspace:vae (files of the checkout) has no metrics/" in fails("HEAD:vae", "workspace:vae")
    assert "HEAD:vae or HEAD:ddpm" in fails("HEAD:vae", "HEAD:ddpm", "HEAD")
    commit(root, "ddpm alone")
    git(root, "mv", "metrics/evaluation/ddpm.json", "metrics/evaluation/vae.json")
    assert "no model is in all of them" in fails("HEAD", "workspace")
    git(root, "rm", "-q", "-r", "-f", "metrics")
    for name in ("workspace", "old"):
        assert f"{name} (" in fails(name, "HEAD") and "`dvc repro`" in fails(name, "HEAD")


@pytest.mark.parametrize("content", ["{", "\xff", '{"model": "ddpm"}'])
def test_damaged_record_names_the_file_and_the_remedy(root: Path, content: str) -> None:
    (root / "metrics" / "evaluation" / "ddpm.json").write_text(content, encoding="latin-1")
    said = fails("HEAD:ddpm", "workspace")
    assert "workspace (files of the checkout)" in said and "`dvc repro" in said
    assert run("HEAD:vae", "workspace").exit_code == 0  # the other record is not read


def test_nan_in_a_file_is_a_gap(root: Path) -> None:
    nan = float("nan")
    broken = {"mean": nan, "std": nan, "values": [nan] * 3}
    write(root, ddpm=record(sampling__eta=nan, **{f"instruments__{CNN}__scores__fd": broken}))
    assert shown("HEAD:ddpm", "workspace")[0]["table"][0]["scores"]["B"] is None


# MLflow


@pytest.fixture
def in_store(root: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With rows "tidy-ox" (with parameters), "it's-ours", two "twice", and "early" without a record."""
    (root / ".mlflow").mkdir()
    shutil.copy(empty_store, root / ".mlflow" / "mlflow.db")
    uri = f"sqlite:///{root}/.mlflow/mlflow.db"
    client = connect(uri)
    experiment = experiment_id(client, uri, root)
    for name, fd in (("tidy-ox", 2.5), ("it's-ours", 3.5), ("early", None), ("twice", 1.0), ("twice", 2.0)):
        id = client.create_run(experiment, run_name=name).info.run_id
        if fd:
            client.log_text(id, json.dumps(with_fd(fd)), "metrics/evaluation/ddpm.json")
    (made,) = client.search_runs([experiment], "attributes.run_name = 'tidy-ox'")
    params = {"seed": "1", "vae.beta": "1.0", "ddpm.T": "1000", "ddpm.training.lr": "1e-05"}
    for key, value in params.items():
        client.log_param(made.info.run_id, key, value)
    return root


def test_mlflow_row_is_found_by_name_and_by_id_with_its_parameters(in_store: Path) -> None:
    (found,) = shown("HEAD:ddpm", "tidy-ox", "it's-ours:ddpm")
    id = found["rows"]["B"]["origin"].removeprefix("MLflow run ")
    assert found["different"] == {"ddpm.T": {"A": 500, "B": 1000}}
    assert found["notes"] == ["the parameters of C are not known"]
    assert fd_of("HEAD:ddpm", "tidy-ox", id, "it's-ours") == [[1.8, 2.5, 2.5, 3.5]]
    said = fails("HEAD", "twice")
    listed = [each.split(",")[0].strip() for each in said.splitlines()[1:]]
    assert "'twice'" in said and sorted(fd_of("HEAD:ddpm", id)[0][1] for id in listed) == [1.0, 2.0]
    said = fails("HEAD", "early")
    assert "early (MLflow run " in said and "metrics/evaluation/ddpm.json" in said
    for name in ("no-such", '"it\'s" both quotes'):
        assert "mlflow.db has no such row" in fails("HEAD", name)
    add_experiment(in_store, git(in_store, "rev-parse", "HEAD"), "tidy-ox", 9.0)
    assert fd_of("HEAD:ddpm", "tidy-ox") == [[1.8, 9.0]]  # an experiment comes before a row


def test_store_that_cannot_be_read_is_named_without_its_password(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    for name, value in {"MAX_RETRIES": "0", "TIMEOUT": "2", "BACKOFF_FACTOR": "0"}.items():
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", value)
    said = fails("HEAD", "no-such")
    assert "http://127.0.0.1:9 cannot be read" in said and "secret" not in said


def test_only_what_the_command_needs_is_imported(root: Path) -> None:
    heavy = "{'torch', 'numpy', 'mlflow', 'dvc', 'matplotlib'} & set(sys.modules)"
    code = "import sys, rediffuse.cli\ntry: rediffuse.cli.main(sys.argv[1:])\n"
    code += f"finally: print('heavy:', *{heavy})"
    environment = {**os.environ, "PYTHONPATH": str(PROJECT / "src")}
    command = [sys.executable, "-c", code, "compare", "HEAD", "workspace"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy:"
