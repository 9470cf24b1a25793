"""The comparison guard: what may stand side by side, in which units, and where it is found."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from click.testing import CliRunner, Result

from rediffuse.cli import main
from rediffuse.commands.compare import Comparison, Row, Score, compare, difference, to_json, to_text
from rediffuse.runtime.errors import UserError
from rediffuse.tracking.store import connect, experiment_id

PROJECT = Path(__file__).resolve().parents[1]
CNN, CONV = "fashion-mnist-cnn-v1", "random-conv-v1"
PARAMS = {"seed": 1, "vae.latent_dim": 32, "ddpm.T": 500, "ddpm.space": "pixels", "sample.ddpm.steps": 20}


def spread(*values: float) -> dict[str, Any]:
    std = stdev(values) if len(values) > 1 else 0.0
    return {"mean": mean(values), "std": std, "min": min(values), "max": max(values), "values": list(values)}


def measured(id: str, sha256: str, fd: tuple[float, ...] = (1.7, 1.8, 1.9)) -> dict[str, Any]:
    scores = {"fd": spread(*fd), "kid": spread(0.03, 0.04, 0.05), "density": spread(0.8, 0.9, 1.0)}
    accuracy = None if id == CONV else 0.93
    instrument = {"name": id, "sha256": sha256, "layer": "penultimate", "dimension": 64, "accuracy": accuracy}
    scale = {"expected_bias": 0.0612, "floor": 0.1, "ceiling": 62.0}
    return {"instrument": instrument, "scores": scores, "position": spread(0.02, 0.03, 0.04), **scale}


def record(model: str = "ddpm", **changes: Any) -> dict[str, Any]:
    """Return a full record; a change is named by its path, "sampling__n", and None removes what is there."""
    sampling = {"sampler": "dpm-solver++", "steps": 20} if model == "ddpm" else {"prior": "normal"}
    made: dict[str, Any] = {
        "model": model,
        "sampling": {"n": 5000, "seeds": [1, 2, 3], **sampling, "rounding": "half to even"},
        "reference": {"set": "fashion-mnist", "split": "test", "n": 10000, "sha256": "12" * 32},
        "train": {"n": 55000, "sha256": "56" * 32},
        "settings": {"is_splits": 10, "kid_subset_size": 1000, "neighbours": 3, "metric_seed": 2020},
        "instruments": {CNN: measured(CNN, "ab" * 32), CONV: measured(CONV, "cd" * 32)},
        "memorisation": {"copies": spread(0, 1, 2)},
    }
    if model == "ddpm":
        made |= {"accuracy_score": spread(0.8, 0.81, 0.82), "label_accuracy": spread(0.84, 0.85, 0.86)}
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


def with_instrument(id: str, **changes: Any) -> dict[str, Any]:
    """Return a record in which this instrument's own record differs."""
    made = record()
    made["instruments"][id]["instrument"] |= changes
    return made


def only(*names: str) -> dict[str, Any]:
    instruments = record()["instruments"]
    return record(instruments={name: instruments.get(name, measured(name, "99" * 32)) for name in names})


def with_fd(*fd: float, model: str = "ddpm") -> dict[str, Any]:
    fd = fd if len(fd) > 1 else (fd[0] - 0.1, fd[0], fd[0] + 0.1)
    return record(model, **{f"instruments__{CNN}": measured(CNN, "ab" * 32, fd)})


def ids(comparison: Comparison) -> set[str | None]:
    return {line.instrument for line in comparison.table}


def metrics(comparison: Comparison, id: str | None = None) -> list[str]:
    return [line.metric for line in comparison.table if line.instrument == id]


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
        ("settings__kid_subset_size", 500, "settings.kid_subset_size: A 1000, B 500"),
        ("settings__neighbours", None, "settings.neighbours: A 3, B none"),
        ("settings__new", 1, "settings.new: A none, B 1"),
    ],
)
def test_rows_of_another_measurement_are_refused_altogether(path: str, value: Any, sentence: str) -> None:
    verdict = compare(rows(record(), record(**{path: value})))
    assert verdict.refusals == [sentence] and not verdict.table
    assert f"  refused: {sentence}" in to_text(verdict)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sha256": "ef" * 32}, f"instrument {CNN}: sha256: A abababababab, B efefefefefef"),
        ({"layer": "logits"}, f"instrument {CNN}: layer: A penultimate, B logits"),
        ({"dimension": 10}, f"instrument {CNN}: dimension: A 64, B 10"),
        ({"shape": [3, 32, 32]}, f"instrument {CNN}: shape: A none, B [3, 32, 32]"),
        ({"resize": "bilinear"}, f"instrument {CNN}: resize: A none, B bilinear"),
    ],
)
def test_another_ruler_of_the_same_name_is_refused_and_the_other_instrument_is_not(
    change: dict[str, Any], sentence: str
) -> None:
    verdict = compare(rows(record(), with_instrument(CNN, **change)))
    assert sentence in verdict.refusals and CNN not in ids(verdict) and CONV in ids(verdict)


NEEDED = ["sampling__n", "reference__sha256", "settings__metric_seed", "instruments"]
NEEDED += [f"instruments__{CNN}__scores", f"instruments__{CNN}__instrument__sha256"]


@pytest.mark.parametrize("path", NEEDED)
def test_record_that_does_not_say_how_it_was_measured_is_refused_even_beside_itself(path: str) -> None:
    incomplete = record(**{path: None})
    with pytest.raises(UserError, match=rf"row0 \(origin 0\) lacks {path.replace('__', '.')}, .*`dvc repro`"):
        compare(rows(incomplete, incomplete))


def test_what_is_compared_may_differ() -> None:
    verdict = compare(rows(record(), record(sampling__steps=50, reference__set="renamed")))
    assert not verdict.refusals and ids(verdict) == {CNN, CONV, None}
    expected = {"sampling.steps": {"A": 20, "B": 50}, "reference.set": {"A": "fashion-mnist", "B": "renamed"}}
    assert verdict.different == expected
    models = compare(rows(record("vae"), record(memorisation=None)))
    assert not models.refusals and models.different["model"] == {"A": "vae", "B": "ddpm"}
    assert scores(models, "label_accuracy", None)[0] is scores(models, "memorisation.copies", None)[1] is None


def test_instrument_that_some_rows_lack_is_left_out_with_a_note() -> None:
    verdict = compare(rows(only(CNN, CONV), only(CONV), only(CONV)))
    assert ids(verdict) == {CONV, None}
    assert verdict.notes == [f"instrument {CNN}: not measured in B, C"]
    none_shared = compare(rows(only(CNN), only(CONV)))
    assert f"instrument {CNN}: not measured in B" in none_shared.refusals and ids(none_shared) == {None}


def test_question_for_one_instrument_depends_on_no_other() -> None:
    pair = rows(record(), with_instrument(CNN, sha256="ef" * 32))
    assert not compare(pair, [CONV]).refusals and ids(compare(pair, [CONV])) == {CONV}
    assert compare(pair, [CNN]).refusals and not compare(pair, [CNN]).table
    lacking = compare(rows(only(CNN, CONV), only(CNN)), [CONV])
    assert lacking.refusals == [f"instrument {CONV}: not measured in B"] and not lacking.table
    with pytest.raises(UserError, match=f"inception-v3.*{CNN}, {CONV}"):
        compare(pair, ["inception-v3"])


@pytest.mark.parametrize(
    ("other", "refused"),
    [
        (record(train__sha256="78" * 32), "memorisation.copies"),
        (only("classifier", CONV), "label_accuracy"),  # its labels were read by another classifier
    ],
)
def test_memorisation_and_label_accuracy_have_own_rulers(other: dict[str, Any], refused: str) -> None:
    verdict = compare(rows(only(CNN, CONV), other))
    assert len(verdict.refusals) == 1 and refused.partition(".")[0] in verdict.refusals[0]
    everything = ["memorisation.copies", "accuracy_score", "label_accuracy"]
    assert metrics(verdict) == [name for name in everything if name != refused]


def test_judge_of_labels_is_the_first_instrument_with_an_accuracy() -> None:
    """Inception has logits as well, but of ImageNet's classes, and no accuracy."""
    other = only("inception-v3", CNN)
    other["instruments"]["inception-v3"]["instrument"]["accuracy"] = None
    assert not compare(rows(only(CNN), other)).refusals


# Parameters


@pytest.mark.parametrize(
    ("model", "changes", "shown"),
    [
        ("ddpm", {"ddpm.T": 9, "seed": 2, "vae.latent_dim": 2}, {"seed", "ddpm.T"}),
        ("vae", {"ddpm.T": 9, "sample.ddpm.steps": 9, "vae.latent_dim": 2}, {"vae.latent_dim"}),
        ("ddpm", {"ddpm.space": "latents", "vae.latent_dim": 2}, {"ddpm.space", "vae.latent_dim"}),
        ("ddpm", {"ddpm.space": "latents", "sample.vae.prior": "normal"}, {"ddpm.space"}),
    ],
)
def test_parameters_that_differ_are_named_if_they_can_affect_the_model(
    model: str, changes: dict[str, Any], shown: set[str]
) -> None:
    first, other = rows(record(model), record(model))
    verdict = compare([first, Row("other", "origin", other.record, PARAMS | changes)])
    assert verdict.different == {name: {"A": PARAMS[name], "B": changes[name]} for name in shown}


def test_rows_without_parameters_are_named_and_the_others_are_compared() -> None:
    first, unknown, other = rows(record(), record(), record())
    unknown = Row("old", "origin", unknown.record)
    verdict = compare([first, unknown, Row("other", "origin", other.record, PARAMS | {"ddpm.T": 1000})])
    assert verdict.different == {"ddpm.T": {"A": 500, "C": 1000}}
    assert verdict.notes == ["the parameters of B cannot be read"] and not verdict.refusals


# Units of spread


@pytest.mark.parametrize(
    ("first", "other", "better", "units", "mark"),
    [
        ((10.0, 3.0), (20.0, 4.0), "lower", 10 / 12.5**0.5, "worse"),  # sqrt((9 + 16) / 2)
        ((20.0, 3.0), (10.0, 4.0), "lower", -10 / 12.5**0.5, "better"),
        ((10.0, 3.0), (20.0, 4.0), "higher", 10 / 12.5**0.5, "better"),
        ((10.0, 3.0), (20.0, 4.0), "", 10 / 12.5**0.5, ""),
        ((10.0, 1.0), (12.0, 1.0), "higher", 2.0, "better"),  # two units are beyond the spread
        ((10.0, 1.0), (11.999, 1.0), "higher", 1.999, "~"),
        ((10.0, 1.0), (8.001, 1.0), "lower", -1.999, "~"),
        ((0.9, 0.01), (1.4, 0.01), "higher, to 1", 50, "better"),
        ((1.1, 0.01), (1.6, 0.01), "higher, to 1", 50, ""),
        ((1.6, 0.01), (0.9, 0.01), "higher, to 1", -70, "worse"),
        ((0.0, 0.0), (3.0, 2.0**0.5), "lower", 3.0, "worse"),  # one spread of two is zero
        ((0.5, 0.0), (0.6, 0.0), "lower", None, "worse"),
        ((0.5, 1e-17), (0.6, 1e-17), "lower", None, "worse"),  # what a mean of equal numbers may leave
        ((0.0, 0.0), (0.0, 0.0), "lower", None, ""),
        ((0.5, 0.1), (0.6, None), "lower", None, ""),  # a single set
    ],
)
def test_units_of_spread_and_mark(
    first: tuple[float, float], other: tuple[float, float], better: str, units: float | None, mark: str
) -> None:
    found = difference(Score(*first), Score(*other), better)
    assert found and found.difference == other[0] - first[0]
    assert (found.units, found.mark) == (units and pytest.approx(units, rel=1e-12), mark)


def test_units_come_from_the_records_spread() -> None:
    found = scores(compare(rows(record(), with_fd(2.0, 2.4, 2.8), with_fd(0.8))), "fd")
    assert found[1].units == pytest.approx(0.6 / ((0.1**2 + 0.4**2) / 2) ** 0.5, rel=1e-9)
    assert (round(found[2].units), found[2].mark) == (-10, "better")
    single = scores(compare(rows(record(), record(**{f"instruments__{CNN}__scores__fd": spread(2.5)}))), "fd")
    assert single[1] == Score(2.5, None, pytest.approx(0.7))


@pytest.mark.parametrize("broken", [None, float("nan"), {"mean": float("nan")}, {"std": 1.0}, "many", True])
def test_missing_or_broken_number_is_a_gap(broken: Any) -> None:
    verdict = compare(rows(record(), record(**{f"instruments__{CNN}__scores__kid": broken})))
    assert scores(verdict, "kid") == [Score(pytest.approx(0.04), pytest.approx(0.01)), None]
    assert "\n| kid | lower | 0.040 ± 0.010 | - | - | - |  |\n" in to_text(verdict, markdown=True)


@pytest.mark.parametrize("end", ["floor", "ceiling"])
def test_position_between_other_ends_is_left_out(end: str) -> None:
    verdict = compare(rows(record(), record(**{f"instruments__{CNN}__{end}": 70.0})), [CNN])
    assert not verdict.refusals and "position" not in metrics(verdict, CNN)
    rounded = record()
    rounded["instruments"][CNN][end] *= 1 + 1e-9  # another machine
    assert scores(compare(rows(record(), rounded), [CNN]), "position")[1].units == 0


@pytest.mark.parametrize(
    ("mean_", "std", "shown"),
    [
        (7.5, 0.09999999999999964, "7.50 ± 0.10"),  # the deviation of 7.4, 7.5, 7.6
        (0.033333, 0.00123, "0.0333 ± 0.0012"),
        (61234.5, 456.7, "61234 ± 457"),
        (0.8571, 0.0, "0.8571 ± 0.0000"),
        (0.0, 0.0, "0 ± 0"),
        (0.8571, None, "0.8571"),
    ],
)
def test_two_digits_of_the_spread_are_shown(mean_: float, std: float | None, shown: str) -> None:
    node = {"mean": mean_, "std": std, "values": [0] * (1 if std is None else 3)}
    made = record(**{f"instruments__{CNN}__scores__kid": node})
    text = to_text(compare(rows(made, made), [CNN]), markdown=True)
    assert f"\n| kid | lower | {shown} | {shown} | +" in text


def test_text_markdown_and_json_hold_the_same_table() -> None:
    first, other = rows(record(), with_fd(2.0, 2.4, 2.8))
    verdict = compare([first, Row("row1", "origin 1", other.record, PARAMS | {"ddpm.T": 1000})])
    text, markdown = to_text(verdict), to_text(verdict, markdown=True)
    assert " fd lower 1.80 ± 0.10 2.40 ± 0.40 +0.60 +2.06 worse kid " in " ".join(text.split())
    assert "\n| fd | lower | 1.80 ± 0.10 | 2.40 ± 0.40 | +0.60 | +2.06 | worse |\n" in markdown
    assert "\n  ddpm.T: A 500, B 1000\n" in text and "\n- ddpm.T: A 500, B 1000\n" in markdown
    made = json.loads(json.dumps(to_json(verdict), allow_nan=False))
    line = next(line for line in made["table"] if line["metric"] == "fd")
    assert (line["instrument"], line["better"], line["scores"]["B"].pop("mark")) == (CNN, "lower", "worse")
    expected = {"mean": 2.4, "std": 0.4, "difference": 0.6, "units": 2.058}
    assert line["scores"]["B"] == pytest.approx(expected, abs=1e-3)
    assert made["different"] == {"ddpm.T": {"A": 500, "B": 1000}} and made["same"]["sampling.n"] == 5000
    assert made["rows"]["B"]["instruments"] == {CNN: "ab" * 32, CONV: "cd" * 32}


# The command


def git(root: Path, *arguments: str) -> str:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "init.defaultBranch=main"]
    command = ["git", *who, *arguments]
    return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def write(root: Path, *, T: int = 500, **records: dict[str, Any]) -> None:
    folder = root / "metrics" / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    for model, content in records.items():
        (folder / f"{model}.json").write_text(json.dumps(content))
    params = {"seed": 1, "vae": {"beta": 1}, "ddpm": {"T": T, "training": {"lr": "1e-05"}}}
    (root / "params.yaml").write_text(json.dumps(params))


def commit(root: Path, message: str) -> str:
    git(root, "add", ".")
    git(root, "commit", "-q", "--allow-empty", "-m", message)
    return git(root, "rev-parse", "HEAD")


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
    """A repository, the working directory: a commit without records (tag `old`), and one with them."""
    root = tmp_path / "my repository"
    (root / ".dvc").mkdir(parents=True)
    git(root, "init", "-q")
    commit(root, "old")
    git(root, "tag", "old")
    write(root, vae=record("vae"), ddpm=record())
    commit(root, "records")
    for name in ("DVC_ROOT", "MLFLOW_TRACKING_URI", "GIT_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(root)
    return root


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(main, ["compare", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def shown(*arguments: str) -> list[dict[str, Any]]:
    return json.loads(run(*arguments, "--json").stdout)["comparisons"]


def fd_of(*arguments: str) -> list[list[float]]:
    """Return the fd of all rows by the first instrument, for each comparison."""
    lines = [each["table"][0]["scores"].values() for each in shown(*arguments)]
    return [[round(score["mean"], 6) for score in line] for line in lines]


def test_each_model_that_all_have_gets_its_own_table_and_the_changed_parameters(root: Path) -> None:
    write(root, T=1000)
    result = run("HEAD", "workspace")
    vae, ddpm = result.stdout.split("ddpm\n\n  A")
    assert result.exit_code == 0 and result.stderr == ""
    assert f"git revision {git(root, 'rev-parse', '--short=7', 'HEAD')}\n  B  workspace  files" in vae
    assert "accuracy_score" not in vae and "different: nothing\n" in vae
    assert "accuracy_score" in ddpm and "\n  ddpm.T: A 500, B 1000\n" in ddpm
    commit(root, "longer")
    assert shown("HEAD~1:ddpm", "HEAD")[0]["different"] == {"ddpm.T": {"A": 500, "B": 1000}}
    (root / "params.yaml").write_text("{")
    assert "the parameters of B cannot be read" in run("HEAD", "workspace").stdout


def test_workspace_is_what_lies_there_and_a_revision_what_was_committed(root: Path) -> None:
    write(root, ddpm=with_fd(2.5), vae=with_fd(4.0, model="vae"))
    assert fd_of("HEAD:ddpm", "workspace:ddpm") == fd_of("HEAD:ddpm", "workspace") == [[1.8, 2.5]]
    assert fd_of("workspace:vae", "workspace:ddpm") == [[4.0, 2.5]]
    commit(root, "next")
    assert fd_of("HEAD~1", "main") == [[1.8, 4.0], [1.8, 2.5]]


def test_dvc_repository_may_lie_below_the_git_repository(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = root / "project"
    for folder in (".dvc", "src"):
        (project / folder).mkdir(parents=True)
    write(project, ddpm=with_fd(5.0))
    commit(root, "a project below")
    monkeypatch.chdir(project / "src")
    assert fd_of("HEAD", "workspace") == [[5.0, 5.0]]


def test_experiment_is_found_by_its_name_after_revisions(root: Path) -> None:
    base = git(root, "rev-parse", "HEAD")
    made = add_experiment(root, base, "tidy-ox", 2.5)
    git(root, "update-ref", "refs/exps/exec/EXEC_BRANCH", made)  # DVC's own, without a baseline
    (found,) = shown("workspace:ddpm", "tidy-ox:ddpm")
    assert found["rows"]["B"]["origin"] == f"experiment {made[:7]} on {base[:7]}"
    assert found["different"] == {"ddpm.T": {"A": 500, "B": 1000}}
    add_experiment(root, base, "main", 3.5)
    assert fd_of("HEAD:ddpm", "tidy-ox", "main") == [[1.8, 2.5, 1.8]]


def test_experiment_on_the_checked_out_commit_is_preferred_and_others_are_ambiguous(root: Path) -> None:
    bases = git(root, "rev-parse", "HEAD"), commit(root, "second")
    made = [add_experiment(root, base, "tidy-ox", fd) for base, fd in zip(bases, (2.5, 3.5), strict=True)]
    assert fd_of("HEAD:ddpm", "tidy-ox") == [[1.8, 3.5]]
    commit(root, "third")
    said = fails("HEAD", "tidy-ox")
    for base, each in zip(bases, made, strict=True):
        assert f"refs/exps/{base[:2]}/{base[2:]}/tidy-ox, which is {each[:7]}" in said
    assert fd_of("HEAD:ddpm", made[0][:10]) == [[1.8, 2.5]]  # the remedy


# Exit status


@pytest.mark.parametrize("form", [[], ["--markdown"]])
def test_nothing_comparable_prints_no_number_and_fails(root: Path, form: list[str]) -> None:
    write(root, vae=record("vae", sampling__n=10000), ddpm=record(sampling__n=10000))
    assert fails("HEAD", "workspace", *form).count("    sampling.n: A 5000, B 10000") == 2


def test_a_refused_model_or_instrument_fails_beside_what_is_shown(root: Path) -> None:
    other = record("vae")
    other["instruments"][CNN]["instrument"]["layer"] = "logits"
    write(root, vae=other, ddpm=record(sampling__n=10000))
    result = run("HEAD", "workspace")
    assert result.exit_code == 1 and "a part may not be compared" in result.stderr
    vae, ddpm = result.stdout.split("ddpm\n\n  A")
    assert "1.80 ± 0.10" in vae and f"refused: instrument {CNN}: layer: A penultimate, B logits" in vae
    assert "1.80" not in ddpm and "refused: sampling.n: A 5000, B 10000" in ddpm
    made = json.loads(run("HEAD", "workspace", "--json").stdout)
    assert made["refused"] is True and [bool(each["table"]) for each in made["comparisons"]] == [True, False]


def test_named_instrument_that_is_comparable_succeeds(root: Path) -> None:
    write(root, ddpm=with_instrument(CNN, sha256="ef" * 32))
    result = run("HEAD:ddpm", "workspace", "--instrument", CONV)
    assert result.exit_code == 0 and result.stderr == "" and CNN not in result.stdout
    assert run("HEAD:ddpm", "workspace", "--instrument", CNN, "--instrument", CONV).exit_code == 1
    assert CONV in fails("HEAD:ddpm", "workspace", "--instrument", "eye")


# Errors


def fails(*arguments: str) -> str:
    """Return what the command says on stderr; it must print nothing else, and no traceback."""
    result = run(*arguments)
    assert result.exit_code == 1 and result.stdout == "" and result.stderr.startswith("error: ")
    return result.stderr


def test_name_that_is_missing_unknown_or_none(root: Path) -> None:
    assert "at least two rows, got 0" in fails() and "at least two rows, got 1" in fails("HEAD")
    said = fails("HEAD", "no-such")
    places = ["workspace: ", "git: no revision", "DVC: no experiment", "MLflow: there is no store yet"]
    assert all(place in said for place in places) and sorted(places, key=said.index) == places
    assert not (root / ".mlflow").exists()
    assert "only vae or ddpm is a model" in fails("HEAD", "HEAD:gan")
    for name in ("", ":vae", "-x"):
        assert "names no revision, experiment or run" in fails("--", "HEAD", name)


def test_missing_records(root: Path) -> None:
    (root / "metrics" / "evaluation" / "vae.json").unlink()
    result = run("HEAD", "workspace")
    assert result.exit_code == 0 and "vae is left out: no record of it in workspace" in result.stdout
    assert "workspace:vae (files of the checkout) has no record of vae" in fails("HEAD:vae", "workspace:vae")
    assert "HEAD:vae or HEAD:ddpm" in fails("HEAD:vae", "HEAD:ddpm", "HEAD")
    commit(root, "ddpm alone")
    git(root, "mv", "metrics/evaluation/ddpm.json", "metrics/evaluation/vae.json")
    assert "no model is in all of them (HEAD (git revision " in fails("HEAD", "workspace")
    git(root, "rm", "-q", "-r", "-f", "metrics")
    for name in ("workspace", "old"):
        assert f"{name} (" in fails(name, "HEAD") and "`dvc repro`" in fails(name, "HEAD")


@pytest.mark.parametrize("content", ["{", "[1]", "\xff", '{"model": "ddpm"}'])
def test_damaged_record_names_the_file_and_the_remedy(root: Path, content: str) -> None:
    (root / "metrics" / "evaluation" / "ddpm.json").write_text(content, encoding="latin-1")
    said = fails("HEAD", "workspace")
    assert "ddpm" in said and "workspace (files of the checkout)" in said and "`dvc repro" in said
    assert run("HEAD:vae", "workspace").exit_code == 0  # the other record is not read


def test_nan_in_a_file_is_a_gap(root: Path) -> None:
    nan = float("nan")
    broken = {"mean": nan, "std": nan, "values": [nan] * 3}
    write(root, ddpm=record(sampling__eta=nan, **{f"instruments__{CNN}__scores__fd": broken}))
    assert shown("HEAD:ddpm", "workspace")[0]["table"][0]["scores"]["B"] is None


def test_outside_a_checkout_or_without_git(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(root.parent))
    (root / ".git").rename(root / "no-git")
    assert run("workspace:vae", "workspace:ddpm").exit_code == 0
    assert "not a git repository" in fails("HEAD", "workspace")
    monkeypatch.chdir(root.parent)
    assert "not inside a DVC repository" in fails("HEAD", "workspace")


# MLflow


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with an MLflow store: "tidy-ox", "it's-ours", two "twice", and "early" without a record."""
    root = tmp_path_factory.mktemp("store")
    (root / ".mlflow").mkdir()
    uri = f"sqlite:///{root}/.mlflow/mlflow.db"
    client = connect(uri)
    experiment = experiment_id(client, uri, root)
    for name, fd in (("tidy-ox", 2.5), ("it's-ours", 3.5), ("early", None), ("twice", 1.0), ("twice", 2.0)):
        id = client.create_run(experiment, run_name=name).info.run_id
        if fd:
            write(root, ddpm=with_fd(fd))
            client.log_artifact(id, str(root / "metrics/evaluation/ddpm.json"), "metrics/evaluation")
    (made,) = client.search_runs([experiment], "attributes.run_name = 'tidy-ox'")
    params = {"seed": "1", "vae.beta": "1.0", "ddpm.T": "1000", "ddpm.training.lr": "1e-05"}
    for key, value in params.items():
        client.log_param(made.info.run_id, key, value)
    return root


@pytest.fixture
def in_store(root: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}/.mlflow/mlflow.db")
    return root


def test_mlflow_run_is_found_by_name_and_by_id_with_its_parameters(in_store: Path) -> None:
    (found,) = shown("HEAD:ddpm", "tidy-ox", "it's-ours:ddpm")
    id = found["rows"]["B"]["origin"].removeprefix("MLflow run ")
    assert found["different"] == {"ddpm.T": {"A": 500, "B": 1000}}
    assert found["notes"] == ["the parameters of C cannot be read"]
    assert fd_of("HEAD:ddpm", "tidy-ox", id, "it's-ours") == [[1.8, 2.5, 2.5, 3.5]]
    add_experiment(in_store, git(in_store, "rev-parse", "HEAD"), "tidy-ox", 9.0)
    assert fd_of("HEAD:ddpm", "tidy-ox") == [[1.8, 9.0]]  # an experiment comes before a run


def test_mlflow_runs_of_one_name_are_listed(in_store: Path) -> None:
    said = fails("HEAD", "twice")
    listed = [each.split(",")[0].strip() for each in said.splitlines()[1:]]
    assert "'twice'" in said and sorted(fd_of("HEAD:ddpm", id)[0][1] for id in listed) == [1.0, 2.0]


def test_mlflow_run_that_has_no_record_or_does_not_exist(in_store: Path) -> None:
    said = fails("HEAD", "early")
    assert "early (MLflow run " in said and "metrics/evaluation/ddpm.json" in said
    for name in ("no-such", '"it\'s" both quotes'):
        assert "MLflow: no run of this id or name (sqlite:////" in fails("HEAD", name)


def test_store_that_cannot_be_read_is_named_without_its_password(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    for name, value in {"MAX_RETRIES": "0", "TIMEOUT": "2", "BACKOFF_FACTOR": "0"}.items():
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", value)
    said = fails("HEAD", "no-such")
    assert "MLflow: http://127.0.0.1:9 cannot be read" in said and "secret" not in said


def test_only_what_a_command_needs_is_imported(root: Path) -> None:
    heavy = "{'torch', 'numpy', 'mlflow', 'dvc', 'matplotlib'} & set(sys.modules)"
    code = "import sys, rediffuse.cli\ntry: rediffuse.cli.main(sys.argv[1:])\n"
    code += f"finally: print('heavy:', *{heavy})"
    environment = {**os.environ, "PYTHONPATH": str(PROJECT / "src")}
    for arguments in (["--help"], ["compare", "--help"], ["compare", "HEAD", "workspace"]):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "heavy:"
