"""The comparison guard: what may stand side by side, in which units, and where `rediffuse compare` finds it."""

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
from rediffuse.commands.compare import (
    Comparison,
    Difference,
    Row,
    Score,
    compare,
    difference,
    label,
    to_json,
    to_markdown,
    to_refusal,
    to_text,
)
from rediffuse.runtime.errors import UserError
from rediffuse.tracking.store import connect, experiment_id

PROJECT = Path(__file__).resolve().parents[1]
CNN, CONV = "fashion-mnist-cnn-v1", "random-conv-v1"


def spread(*values: float) -> dict[str, Any]:
    std = stdev(values) if len(values) > 1 else 0.0
    return {"mean": mean(values), "std": std, "min": min(values), "max": max(values), "values": list(values)}


def measured(id: str, sha256: str, fd: tuple[float, ...] = (1.7, 1.8, 1.9)) -> dict[str, Any]:
    scores = {"fd": spread(*fd), "kid": spread(0.03, 0.04, 0.05), "density": spread(0.8, 0.9, 1.0), "coverage": spread(0.7, 0.8, 0.9)}
    if id != CONV:
        scores["is"] = spread(7.4, 7.5, 7.6)
    instrument = {"name": id, "sha256": sha256, "layer": "penultimate", "dimension": 64, "accuracy": None if id == CONV else 0.93}
    return {
        "instrument": instrument,
        "expected_bias": 0.0612,
        "scores": scores,
        "position": spread(0.02, 0.03, 0.04),
        "floor": 0.1,
        "ceiling": 62.0,
    }


def record(model: str = "ddpm", **changes: Any) -> dict[str, Any]:
    """A full record; a change is named by its path, "sampling__n"."""
    sampling = {"sampler": "dpm-solver++", "steps": 20} if model == "ddpm" else {"prior": "normal"}
    made: dict[str, Any] = {
        "model": model,
        "sampling": {"n": 5000, "seeds": [1, 2, 3], **sampling, "rounding": "round(255 x), half to even"},
        "reference": {"set": "fashion-mnist", "split": "test", "n": 10000, "sha256": "12" * 32},
        "settings": {"is_splits": 10, "kid_subsets": 100, "kid_subset_size": 1000, "neighbours": 3, "metric_seed": 2020},
        "instruments": {CNN: measured(CNN, "ab" * 32), CONV: measured(CONV, "cd" * 32)},
        "memorisation": {"ratio": 0.3333, "copies": spread(0, 1, 2), "pairs": [[1, 2]]},
    }
    if model == "ddpm":
        made |= {"accuracy_score": spread(0.8, 0.81, 0.82), "label_accuracy": spread(0.84, 0.85, 0.86)}
    for path, value in changes.items():
        *groups, last = path.split("__")
        node = made
        for group in groups:
            node = node[group]
        if value is None:
            del node[last]
        else:
            node[last] = value
    return made


def rows(*records: dict[str, Any]) -> list[Row]:
    return [Row(label(i), f"row{i}", f"origin {i}", each) for i, each in enumerate(records)]


def with_instrument(id: str, **changes: Any) -> dict[str, Any]:
    """A record in which this instrument's own record differs."""
    made = record()
    made["instruments"][id]["instrument"] |= changes
    return made


def ids(comparison: Comparison) -> list[str]:
    """The instruments whose numbers are shown."""
    return [section.id for section in comparison.sections if section.id and section.lines]


def line(comparison: Comparison, metric: str, id: str = CNN) -> Any:
    (section,) = (section for section in comparison.sections if section.id == id)
    (found,) = (line for line in section.lines if line.metric == metric)
    return found


# The guard


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("sampling__n", 10000, "sampling.n: 5000 in A, 10000 in B: a Fréchet distance falls with N"),
        (
            "sampling__rounding",
            "truncate",
            "sampling.rounding: round(255 x), half to even in A, truncate in B: the same image has other pixels",
        ),
        ("reference__sha256", "34" * 32, "reference: SHA-256 121212121212 in A, 343434343434 in B: other real images"),
        ("reference__split", "train", "reference.split: test in A, train in B: other real images"),
        ("reference__n", 60000, "reference.n: 10000 in A, 60000 in B: a Fréchet distance falls with N"),
        ("settings__kid_subset_size", 500, "settings.kid_subset_size: 1000 in A, 500 in B: the metric is another"),
        ("settings__neighbours", None, "settings.neighbours: 3 in A, none in B: the metric is another"),
    ],
)
def test_rows_of_another_measurement_are_refused_altogether(path: str, value: Any, sentence: str) -> None:
    verdict = compare(rows(record(), record(**{path: value})))
    assert verdict.refusals == (sentence,)
    assert not verdict.comparable and not any(section.lines for section in verdict.sections)
    assert not any(section["metrics"] for section in to_json(verdict)["sections"])
    assert to_refusal(verdict).splitlines() == ["  ddpm: A = row0 (origin 0), B = row1 (origin 1)", f"    {sentence}"]


def test_settings_that_only_the_later_row_has_are_a_difference() -> None:
    assert compare(rows(record(settings__neighbours=None), record())).refusals == (
        "settings.neighbours: none in A, 3 in B: the metric is another",
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sha256": "ef" * 32}, f"instrument {CNN}: SHA-256 abababababab in A, efefefefefef in B: other weights are another ruler"),
        ({"layer": "logits"}, f"instrument {CNN}: layer: penultimate in A, logits in B: another layer is another ruler"),
        ({"resize": "bilinear"}, f"instrument {CNN}: resize: none in A, bilinear in B: resizing is part of the ruler"),
    ],
)
def test_another_ruler_of_the_same_name_is_refused_and_the_other_instrument_is_not(change: dict[str, Any], sentence: str) -> None:
    verdict = compare(rows(record(), with_instrument(CNN, **change)))
    assert sentence in verdict.refusals
    assert ids(verdict) == [CONV] and verdict.comparable
    text = to_text(verdict)
    assert f"instrument {CNN}\n\n  refused: {sentence}" in text
    assert "1.80" in text.partition(f"instrument {CONV}")[2] and "1.80" not in text.partition(f"instrument {CONV}")[0]


def test_every_difference_has_its_own_sentence_and_rows_that_agree_are_named_together() -> None:
    other = record(sampling__n=10000, reference__split="train")
    verdict = compare(rows(record(), other, record(), other))
    assert verdict.refusals == (
        "sampling.n: 5000 in A and C, 10000 in B and D: a Fréchet distance falls with N",
        "reference.split: test in A and C, train in B and D: other real images",
    )


def test_what_is_compared_may_differ() -> None:
    verdict = compare(rows(record(), record(sampling__steps=50, sampling__seeds=[7, 8, 9], reference__set="renamed")))
    assert not verdict.refusals and ids(verdict) == [CNN, CONV]
    assert verdict.conditions["different"] == "seeds [1, 2, 3] in A, [7, 8, 9] in B; steps 20 in A, 50 in B"


def test_two_models_are_compared_by_what_both_have() -> None:
    verdict = compare(rows(record("vae"), record("ddpm")))
    assert verdict.title == "vae and ddpm" and ids(verdict) == [CNN, CONV]
    assert (
        "model vae in A, ddpm in B; prior normal in A, none in B; sampler none in A, dpm-solver++ in B" in verdict.conditions["different"]
    )
    assert line(verdict, "label_accuracy", "").differences == (Difference("B", None),)


@pytest.mark.parametrize(
    ("path", "lacking"),
    [
        ("sampling__n", "sampling.n"),
        ("sampling__seeds", "sampling.seeds"),
        ("reference__sha256", "reference.sha256"),
        ("reference", "reference.sha256, reference.split, reference.n"),
        ("settings", "settings"),
        ("instruments", "instruments"),
        (f"instruments__{CNN}__instrument__sha256", f"instruments.{CNN}.instrument.sha256"),
        (f"instruments__{CNN}__scores", f"instruments.{CNN}.scores"),
    ],
)
def test_record_that_does_not_say_how_it_was_measured_is_refused_even_beside_itself(path: str, lacking: str) -> None:
    incomplete = record(**{path: None})
    with pytest.raises(UserError, match=rf"record of ddpm in row0 \(origin 0\) lacks {lacking}, .* `dvc repro`"):
        compare(rows(incomplete, incomplete))


@pytest.mark.parametrize("path", ["settings", "instruments"])
def test_record_of_another_form_is_an_error_for_the_user(path: str) -> None:
    with pytest.raises(UserError, match=f"lacks {path}"):
        compare(rows(record(), record(**{path: ["something"]})))


def test_fewer_than_two_rows_are_no_comparison() -> None:
    with pytest.raises(UserError, match="at least two rows, got 1"):
        compare(rows(record()))


# Which instruments


def only(*names: str, model: str = "ddpm") -> dict[str, Any]:
    made = record(model)
    made["instruments"] = {name: made["instruments"].get(name, measured(name, "99" * 32)) for name in names}
    return made


def test_instrument_that_some_rows_lack_is_left_out_with_a_note() -> None:
    verdict = compare(rows(*(only(*names, model="vae") for names in ((CNN, CONV), (CONV, "inception-v3"), (CONV,)))))
    assert ids(verdict) == [CONV] and not verdict.refusals
    assert verdict.notes == (
        f"instrument {CNN}: measured in A, not in B and C",
        "instrument inception-v3: measured in B, not in A and C",
    )
    assert verdict.notes[1] in to_text(verdict)


def test_rows_without_a_common_instrument_are_refused() -> None:
    verdict = compare(rows(only(CNN), only(CONV)))
    assert not verdict.comparable
    assert verdict.refusals == (
        "no instrument has measured all rows",
        f"instrument {CNN}: measured in A, not in B",
        f"instrument {CONV}: measured in B, not in A",
    )


def test_question_for_one_instrument_hangs_on_no_other() -> None:
    other = with_instrument(CNN, sha256="ef" * 32)
    verdict = compare(rows(record(), other), [CONV])
    assert not verdict.refusals and [section.id for section in verdict.sections] == [CONV]
    assert compare(rows(record(), other), [CNN]).refusals and not compare(rows(record(), other), [CNN]).comparable


def test_asked_instrument_that_a_row_lacks_is_a_refusal() -> None:
    verdict = compare(rows(only(CNN, CONV), only(CNN)), [CONV])
    assert verdict.refusals == (f"instrument {CONV}: measured in A, not in B",) and not verdict.comparable


def test_unknown_instrument_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(UserError, match=f"instrument inception-v3; they were with {CNN}, {CONV}"):
        compare(rows(record(), record()), ["inception-v3"])


# Memorisation and classes


def test_memorisation_by_another_threshold_is_refused_alone() -> None:
    verdict = compare(rows(record(), record(memorisation__ratio=0.5)))
    assert verdict.refusals == ("memorisation.ratio: 0.3333 in A, 0.5 in B: another test for copies",)
    assert ids(verdict) == [CNN, CONV]
    assert [each.metric for each in verdict.sections[-1].lines] == ["accuracy_score", "label_accuracy"]


def test_label_accuracy_by_another_judge_is_refused_alone() -> None:
    verdict = compare(rows(only(CNN, CONV), only("classifier", CONV)))
    assert verdict.refusals == (f"label_accuracy: judged by {CNN} abababababab in A, classifier 999999999999 in B: another judge",)
    assert [each.metric for each in verdict.sections[-1].lines] == ["memorisation.copies", "accuracy_score"]


def test_judge_of_labels_is_the_first_instrument_that_classifies_the_data() -> None:
    """Inception has logits and an inception score as well, but of ImageNet's classes, and no accuracy."""
    other = only("inception-v3", CNN)
    other["instruments"]["inception-v3"]["instrument"]["accuracy"] = None
    assert not compare(rows(only(CNN), other)).refusals


def test_memorisation_has_no_better_direction_and_thresholds_no_line() -> None:
    verdict = compare(rows(record(), record(memorisation__copies=spread(90, 91, 92))))
    assert [each.metric for each in verdict.sections[-1].lines] == ["memorisation.copies", "accuracy_score", "label_accuracy"]
    (other,) = line(verdict, "memorisation.copies", "").differences
    assert other.units == pytest.approx(90) and other.mark == ""


def test_row_without_memorisation_leaves_a_gap() -> None:
    verdict = compare(rows(record(), record(memorisation=None)))
    assert not verdict.refusals
    assert line(verdict, "memorisation.copies", "").scores[1] is None


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
    ],
)
def test_units_of_spread_and_mark(first: tuple[float, float], other: tuple[float, float], better: str, units: float, mark: str) -> None:
    found = difference("B", Score(*first, 3), Score(*other, 3), better)
    assert found.value == other[0] - first[0]
    assert found.units == pytest.approx(units, rel=1e-12)
    assert (found.mark, found.note) == (mark, "")


def test_units_come_from_the_records_spread() -> None:
    other = record()
    other["instruments"][CNN] = measured(CNN, "ab" * 32, fd=(2.0, 2.4, 2.8))
    (found,) = line(compare(rows(record(), other)), "fd").differences
    assert found.units == pytest.approx(0.6 / ((0.1**2 + 0.4**2) / 2) ** 0.5, rel=1e-9)  # means 1.8 and 2.4, deviations 0.1 and 0.4
    assert found.mark == "worse"


def test_zero_spread_gives_a_difference_without_units() -> None:
    almost = 1e-17  # what a mean of equal numbers may leave
    for std in (0.0, almost):
        assert difference("B", Score(0.5, std, 3), Score(0.6, std, 3), "lower") == Difference(
            "B", 0.6 - 0.5, None, "worse", "spread is zero"
        )
    same = difference("B", Score(0.0, 0.0, 3), Score(0.0, 0.0, 3), "lower")
    assert same == Difference("B", 0.0, None, "", "spread is zero")


def test_single_set_gives_a_difference_without_units_and_says_so() -> None:
    single = record(sampling__seeds=[1])
    single["instruments"] = {CNN: measured(CNN, "ab" * 32, fd=(2.5,))}
    verdict = compare(rows(record(), single), [CNN])
    (found,) = line(verdict, "fd").differences
    assert (found.units, found.mark, found.note) == (None, "", "one set") and found.value == pytest.approx(0.7)
    text = to_text(verdict)
    assert "fd: a row has fewer than two sample sets, so there is no spread to count in" in text
    assert "sets 3 in A, 1 in B" in text


@pytest.mark.parametrize("broken", [None, float("nan"), {"mean": float("nan"), "std": 1.0, "values": [1, 2]}, {"std": 1.0}, "many", True])
def test_missing_or_broken_number_is_a_gap(broken: Any) -> None:
    verdict = compare(rows(record(), record(**{f"instruments__{CNN}__scores__kid": broken})))
    assert line(verdict, "kid").scores[1] is None
    assert line(verdict, "kid").differences == (Difference("B", None),)
    (shown,) = (each for each in to_text(verdict).partition(f"instrument {CONV}")[0].splitlines() if each.startswith("  kid"))
    assert shown.split() == ["kid", "lower", "0.040", "±", "0.010", "-", "-", "-"]


def test_instrument_without_any_number_is_refused() -> None:
    empty = record(**{f"instruments__{CNN}__scores": {"fd": None}, f"instruments__{CNN}__position": None})
    verdict = compare(rows(empty, empty), [CNN])
    assert verdict.refusals == (f"instrument {CNN}: no row has a finite score",) and not verdict.comparable


@pytest.mark.parametrize("end", ["floor", "ceiling"])
def test_position_between_other_ends_is_left_out(end: str) -> None:
    verdict = compare(rows(record(), record(**{f"instruments__{CNN}__{end}": 70.0})), [CNN])
    assert not verdict.refusals and "position" not in [each.metric for each in verdict.sections[0].lines]
    text = to_text(verdict)
    assert "position is left out" in text and "70 in B" in text
    rounded = record()
    rounded["instruments"][CNN][end] *= 1 + 1e-9  # another machine
    assert line(compare(rows(record(), rounded), [CNN]), "position").differences[0].units == 0


def test_same_row_twice_is_within_the_spread() -> None:
    verdict = compare(rows(record(), record()))
    lines = [each for section in verdict.sections for each in section.lines]
    assert len(lines) == 14 and all(each.differences[0].units == 0 and each.differences[0].mark == "~" for each in lines)


# How it is shown

TEXT = f"""\
ddpm

  A  row0  origin 0
  B  row1  origin 1

  the same: model ddpm, n 5000, seeds [1, 2, 3], sampler dpm-solver++, rounding round(255 x), half to even, sets 3
  different: steps 20 in A, 50 in B
  reference: fashion-mnist, test, n 10000, SHA-256 121212121212
  metrics: is_splits 10, kid_subsets 100, kid_subset_size 1000, neighbours 3, metric_seed 2020

instrument {CNN}, SHA-256 abababababab

  Fréchet distance: expected bias at this N 0.0612, floor 0.1, ceiling 62

  metric    better is                 A              B   B - A  units
  fd        lower           1.80 ± 0.10    2.40 ± 0.40   +0.60  +2.06  worse
  kid       lower         0.040 ± 0.010  0.040 ± 0.010  +0.000  +0.00  ~
  is        higher          7.50 ± 0.10    7.50 ± 0.10   +0.00  +0.00  ~
  density   higher, to 1    0.90 ± 0.10    0.90 ± 0.10   +0.00  +0.00  ~
  coverage  higher          0.80 ± 0.10    0.80 ± 0.10   +0.00  +0.00  ~
  position  lower         0.030 ± 0.010  0.030 ± 0.010  +0.000  +0.00  ~"""


def pair() -> Comparison:
    other = record(sampling__steps=50)
    other["instruments"][CNN] = measured(CNN, "ab" * 32, fd=(2.0, 2.4, 2.8))
    return compare(rows(record(), other), [CNN])


def test_text_is_aligned() -> None:
    assert to_text(pair()) == TEXT


def test_markdown_holds_the_same_cells() -> None:
    plain = [each.split() for each in TEXT.splitlines() if each.startswith(("  fd", "  position"))]
    piped = [each for each in to_markdown(pair()).splitlines() if each.startswith(("| fd", "| position"))]
    assert [each.replace("|", " ").split() for each in piped] == plain
    head, rule = (each for each in to_markdown(pair()).splitlines() if each.startswith(("| metric", "|:--")))
    assert head.count("|") == rule.count("|") == piped[0].count("|") == 8


def test_later_rows_each_stand_beside_their_difference_to_the_first() -> None:
    records = [record() for _ in range(3)]
    for each, shift in zip(records, (0.0, 1.0, -1.0), strict=True):
        each["instruments"][CNN] = measured(CNN, "ab" * 32, fd=(1.7 + shift, 1.8 + shift, 1.9 + shift))
    verdict = compare(rows(*records))
    assert [(each.label, round(each.units), each.mark) for each in line(verdict, "fd").differences] == [
        ("B", 10, "worse"),
        ("C", -10, "better"),
    ]
    (head,) = (each for each in to_text(verdict).partition(CONV)[0].splitlines() if "metric " in each)
    assert head.split("  ", 1)[1].split() == ["metric", "better", "is", "A", "B", "C", "B", "-", "A", "units", "C", "-", "A", "units"]


def test_json_has_numbers_verdicts_and_conditions() -> None:
    made = json.loads(json.dumps(to_json(pair()), allow_nan=False))
    assert made["comparable"] and made["refusals"] == [] and made["models"] == ["ddpm", "ddpm"]
    assert made["rows"][1] == {"label": "B", "name": "row1", "origin": "origin 1", "sampling": record(sampling__steps=50)["sampling"]}
    (section,) = made["sections"]
    assert (section["instrument"], section["sha256"]) == (CNN, "ab" * 32)
    assert (section["expected_bias"], section["floor"], section["ceiling"]) == ([0.0612] * 2, [0.1] * 2, [62.0] * 2)
    fd = section["metrics"][0]
    assert (fd["metric"], fd["better"]) == ("fd", "lower")
    assert fd["scores"][0] == {"mean": pytest.approx(1.8), "std": pytest.approx(0.1), "sets": 3}
    assert fd["differences"] == [
        {"label": "B", "value": pytest.approx(0.6), "units": pytest.approx(2.058, abs=1e-3), "mark": "worse", "note": ""}
    ]


def test_metrics_have_a_fixed_order_and_unknown_ones_come_last_without_direction() -> None:
    scores = {name: spread(1, 2, 3) for name in ("zeta", "coverage", "kid", "fid_inf", "recall", "fid", "precision", "alpha")}
    made = record(**{f"instruments__{CNN}__scores": scores})
    section = compare(rows(made, made)).sections[0]
    assert [each.metric for each in section.lines] == [
        "fid",
        "fid_inf",
        "kid",
        "precision",
        "recall",
        "coverage",
        "position",
        "zeta",
        "alpha",
    ]
    assert section.lines[-1].better == ""


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
    (cells,) = (each for each in to_markdown(compare(rows(made, made), [CNN])).splitlines() if each.startswith("| kid"))
    assert cells.split(" | ")[2:4] == [shown, shown]


def test_labels_go_beyond_the_alphabet() -> None:
    assert [label(i) for i in (0, 25, 26)] == ["A", "Z", "R27"]


# The command


def git(root: Path, *arguments: str) -> str:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "init.defaultBranch=main"]
    return subprocess.run(["git", *who, *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def write(root: Path, **records: dict[str, Any]) -> None:
    for model, content in records.items():
        path = root / "metrics" / "evaluation" / f"{model}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))


def commit(root: Path, message: str) -> str:
    git(root, "add", ".")
    git(root, "commit", "-q", "--allow-empty", "-m", message)
    return git(root, "rev-parse", "HEAD")


def add_experiment(root: Path, baseline: str, name: str, **records: dict[str, Any]) -> str:
    """A commit on the baseline under refs/exps, as `dvc exp run --queue` leaves it; the checkout stays as it was."""
    here = git(root, "rev-parse", "HEAD")
    git(root, "checkout", "-q", "--detach", baseline)
    write(root, **records)
    made = commit(root, f"experiment {name}")
    git(root, "update-ref", f"refs/exps/{baseline[:2]}/{baseline[2:]}/{name}", made)
    git(root, "checkout", "-q", "--detach", here)
    return made


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository: a commit before there were records (tag `old`), one with records, and the working directory in it."""
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


def fd_of(result: Result) -> list[list[float]]:
    """The mean fd of the first instrument in each comparison."""
    tables = (each["sections"][0]["metrics"] for each in json.loads(result.stdout)["comparisons"])
    return [[round(score["mean"], 6) for score in metrics[0]["scores"]] for metrics in tables]


def with_fd(fd: float, model: str = "ddpm") -> dict[str, Any]:
    made = record(model)
    made["instruments"][CNN] = measured(CNN, "ab" * 32, fd=(fd - 0.1, fd, fd + 0.1))
    return made


def test_each_model_that_all_have_gets_its_own_table(root: Path) -> None:
    result = run("HEAD", "workspace")
    assert result.exit_code == 0 and result.stderr == ""
    head = git(root, "rev-parse", "--short=7", "HEAD")
    vae, ddpm = result.stdout.split("ddpm\n\n  A")
    assert vae.startswith(f"vae\n\n  A  HEAD       git revision {head}\n  B  workspace  files of the checkout\n")
    assert "accuracy_score" in ddpm and "accuracy_score" not in vae
    assert result.stdout.count("training again with another seed would add its own") == 1


def test_workspace_is_what_lies_there_and_a_revision_what_was_committed(root: Path) -> None:
    write(root, ddpm=with_fd(2.5))
    assert fd_of(run("HEAD:ddpm", "workspace:ddpm", "--json")) == [[1.8, 2.5]]
    write(root, ddpm=with_fd(3.5))
    commit(root, "next")
    assert fd_of(run("HEAD~1:ddpm", "HEAD", "--json")) == [[1.8, 3.5]]  # the model that one names is meant of both
    assert fd_of(run("HEAD~1", "main", "--json")) == [[1.8, 1.8], [1.8, 3.5]]


def test_two_models_of_one_source(root: Path) -> None:
    write(root, vae=with_fd(4.0, "vae"))
    result = run("workspace:vae", "workspace:ddpm", "--json")
    assert result.exit_code == 0 and fd_of(result) == [[4.0, 1.8]]
    assert json.loads(result.stdout)["comparisons"][0]["models"] == ["vae", "ddpm"]


def test_works_from_a_folder_of_a_dvc_repository_below_the_git_repository(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = root / "project"
    (project / ".dvc").mkdir(parents=True)
    (project / "src").mkdir()
    write(project, ddpm=with_fd(5.0))
    git(root, "add", "project/metrics")
    commit(root, "a project below")
    monkeypatch.chdir(project / "src")
    assert fd_of(run("HEAD", "workspace", "--json")) == [[5.0, 5.0]]


def test_experiment_is_found_by_its_name(root: Path) -> None:
    base = git(root, "rev-parse", "HEAD")
    made = add_experiment(root, base, "tidy-ox", ddpm=with_fd(2.5))
    git(root, "update-ref", "refs/exps/exec/EXEC_BRANCH", made)  # DVC's own, without a baseline
    result = run("workspace:ddpm", "tidy-ox:ddpm", "--json")
    assert fd_of(result) == [[1.8, 2.5]]
    assert json.loads(result.stdout)["comparisons"][0]["rows"][1]["origin"] == f"experiment {made[:7]} on {base[:7]}"


def test_revision_comes_before_an_experiment_of_the_same_name(root: Path) -> None:
    add_experiment(root, git(root, "rev-parse", "HEAD"), "main", ddpm=with_fd(2.5))
    assert fd_of(run("HEAD:ddpm", "main:ddpm", "--json")) == [[1.8, 1.8]]


def test_experiment_on_the_commit_that_is_checked_out_is_preferred_and_others_are_ambiguous(root: Path) -> None:
    first = git(root, "rev-parse", "HEAD")
    second = commit(root, "second")
    made = [add_experiment(root, base, "tidy-ox", ddpm=with_fd(fd)) for base, fd in ((first, 2.5), (second, 3.5))]
    assert fd_of(run("HEAD:ddpm", "tidy-ox", "--json")) == [[1.8, 3.5]]
    commit(root, "third")
    result = run("HEAD", "tidy-ox")
    assert result.exit_code == 1 and "several experiments are called 'tidy-ox'" in result.stderr
    for base, commit_ in zip((first, second), made, strict=True):
        assert f"refs/exps/{base[:2]}/{base[2:]}/tidy-ox, which is {commit_[:7]}" in result.stderr
    assert fd_of(run("HEAD:ddpm", made[0][:10], "--json")) == [[1.8, 2.5]]  # the remedy


# Exit status


@pytest.mark.parametrize("form", [[], ["--markdown"]])
def test_nothing_comparable_prints_no_number_and_fails(root: Path, form: list[str]) -> None:
    write(root, vae=record("vae", sampling__n=10000), ddpm=record(sampling__n=10000))
    result = run("HEAD", "workspace", *form)
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("error: these rows may not be compared, so no numbers are shown\n  vae: A = HEAD (git revision ")
    assert result.stderr.count("    sampling.n: 5000 in A, 10000 in B: a Fréchet distance falls with N\n") == 2


def test_a_refused_part_fails_beside_what_is_shown(root: Path) -> None:
    write(root, ddpm=with_instrument(CNN, sha256="ef" * 32))
    result = run("HEAD:ddpm", "workspace")
    assert result.exit_code == 1 and f"instrument {CONV}, SHA-256 cdcdcdcdcdcd" in result.stdout
    assert f"refused: instrument {CNN}: SHA-256 abababababab in A, efefefefefef in B" in result.stdout
    assert result.stderr.startswith("error: a part may not be compared\n  ddpm: A = HEAD:ddpm")


def test_one_refused_model_fails_beside_the_other(root: Path) -> None:
    write(root, ddpm=record(sampling__n=10000))
    result = run("HEAD", "workspace")
    assert result.exit_code == 1 and "a part may not be compared" in result.stderr
    vae, ddpm = result.stdout.split("ddpm\n\n  A")
    assert "1.80 ± 0.10" in vae and "1.80" not in ddpm
    assert "refused: sampling.n: 5000 in A, 10000 in B: a Fréchet distance falls with N" in ddpm
    assert f"instrument {CNN}" in vae and f"instrument {CNN}" not in ddpm  # nor empty headings


def test_named_instrument_that_is_comparable_succeeds(root: Path) -> None:
    write(root, ddpm=with_instrument(CNN, sha256="ef" * 32))
    result = run("HEAD:ddpm", "workspace", "--instrument", CONV)
    assert result.exit_code == 0 and result.stderr == "" and CNN not in result.stdout
    assert run("HEAD:ddpm", "workspace", "--instrument", CNN).exit_code == 1
    assert run("HEAD:ddpm", "workspace", "--instrument", CNN, "--instrument", CONV).exit_code == 1
    assert "they were with" in run("HEAD:ddpm", "workspace", "--instrument", "eye").stderr


def test_json_tells_the_refusal_and_fails_too(root: Path) -> None:
    write(root, ddpm=record(sampling__n=10000))
    result = run("HEAD:ddpm", "workspace", "--json")
    made = json.loads(result.stdout)
    assert result.exit_code == 1 and made["refused"] is True
    assert made["comparisons"][0]["refusals"] == ["sampling.n: 5000 in A, 10000 in B: a Fréchet distance falls with N"]
    assert json.loads(run("HEAD:ddpm", "HEAD", "--json").stdout)["refused"] is False


def test_same_row_twice_succeeds(root: Path) -> None:
    assert run("HEAD", "HEAD", "workspace").exit_code == 0


def test_model_that_only_some_have_is_left_out_with_a_note(root: Path) -> None:
    (root / "metrics" / "evaluation" / "vae.json").unlink()
    result = run("HEAD", "workspace")
    assert result.exit_code == 0 and "vae is left out: no record of it in workspace" in result.stdout


# Errors


def fails(*arguments: str) -> str:
    """What the command says on stderr; it must print nothing else, and no traceback."""
    result = run(*arguments)
    assert result.exit_code == 1 and result.stdout == "" and result.stderr.startswith("error: ")
    return result.stderr


@pytest.mark.parametrize("names", [[], ["HEAD"]])
def test_fewer_than_two_names(root: Path, names: list[str]) -> None:
    assert f"needs at least two rows, got {len(names)}" in fails(*names)


def test_unknown_name_lists_what_was_tried(root: Path) -> None:
    said = fails("HEAD", "no-such")
    places = ["git: no revision", "DVC: no experiment", "MLflow: there is no store yet"]
    assert said.startswith("error: nothing is called 'no-such'") and all(place in said for place in places)
    assert sorted(places, key=said.index) == places
    assert "`dvc exp show`" in said and "`make ui`" in said
    assert not (root / ".mlflow").exists()
    assert "after a colon only vae or ddpm is a model" in fails("HEAD", "HEAD:gan")


@pytest.mark.parametrize("name", ["", ":vae", "-x"])
def test_name_that_is_none(root: Path, name: str) -> None:
    assert "names no revision, experiment or run" in fails("--", "HEAD", name)


def test_revision_from_before_there_were_records(root: Path) -> None:
    said = fails("old", "HEAD")
    assert f"old ({git(root, 'rev-parse', '--short=7', 'old')}) has no metrics/evaluation/vae.json" in said
    assert "before full records existed" in said and "`dvc repro` there" in said


def test_workspace_without_records(root: Path) -> None:
    git(root, "rm", "-q", "-r", "metrics")
    assert "the workspace has no metrics/evaluation/vae.json" in fails("workspace", "HEAD")


@pytest.mark.parametrize("content", ["{", "[1]", "\xff", '{"model": "ddpm"}'])
def test_damaged_record_names_the_file_and_the_remedy(root: Path, content: str) -> None:
    (root / "metrics" / "evaluation" / "ddpm.json").write_text(content, encoding="latin-1")
    said = fails("HEAD", "workspace")
    assert "`dvc repro" in said
    assert "metrics/evaluation/ddpm.json of workspace" in said or "the record of ddpm in workspace (files of the checkout) lacks" in said
    assert run("HEAD:vae", "workspace").exit_code == 0  # another record is none of its business


def test_nan_in_a_file_is_a_gap(root: Path) -> None:
    made = record()
    made["sampling"]["eta"] = float("nan")
    made["instruments"][CNN]["scores"]["fd"] = {"mean": float("nan"), "std": float("nan"), "values": [float("nan")] * 3}
    write(root, ddpm=made)
    result = run("HEAD:ddpm", "workspace", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["comparisons"][0]["sections"][0]["metrics"][0]["scores"][1] is None


def test_model_that_is_missing_or_not_named(root: Path) -> None:
    (root / "metrics" / "evaluation" / "vae.json").unlink()
    assert "workspace:vae (files of the checkout) has no record of vae, only of ddpm" in fails("HEAD:vae", "workspace:vae")
    assert "say which model of HEAD is meant: HEAD:vae or HEAD:ddpm" in fails("HEAD:vae", "HEAD:ddpm", "HEAD")
    commit(root, "ddpm alone")
    git(root, "mv", "metrics/evaluation/ddpm.json", "metrics/evaluation/vae.json")
    assert "no model is in all of them (HEAD (git revision " in fails("HEAD", "workspace")


def test_outside_a_checkout(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "not inside a DVC repository; change into the checkout" in fails("HEAD", "workspace")


def test_without_git_the_workspace_still_compares(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    (root / ".git").rename(root / "no-git")
    assert run("workspace:vae", "workspace:ddpm").exit_code == 0
    assert fails("HEAD", "workspace").count("fatal: not a git repository") == 1
    monkeypatch.setenv("PATH", "")
    assert "git cannot be run" in fails("HEAD", "workspace")


# MLflow


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with an MLflow store: runs "tidy-ox" (with a record), "it's-ours" (with one), "early" (without), and two called "twice"."""
    root = tmp_path_factory.mktemp("store")
    (root / ".mlflow").mkdir()
    uri = f"sqlite:///{root}/.mlflow/mlflow.db"
    client = connect(uri)
    experiment = experiment_id(client, uri, root)
    for name, fd in (("tidy-ox", 2.5), ("it's-ours", 3.5), ("early", None), ("twice", 1.0), ("twice", 2.0)):
        made = client.create_run(experiment, run_name=name)
        if fd:
            write(root, ddpm=with_fd(fd))
            client.log_artifact(made.info.run_id, str(root / "metrics" / "evaluation" / "ddpm.json"), "metrics/evaluation")
    return root


@pytest.fixture
def in_store(root: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}/.mlflow/mlflow.db")
    return root


def run_ids(store: Path) -> dict[str, str]:
    client = connect(f"sqlite:///{store}/.mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("rediffuse")
    assert experiment
    return {each.info.run_name: each.info.run_id for each in client.search_runs([experiment.experiment_id])}


def test_mlflow_run_is_found_by_name_and_by_id(in_store: Path, store: Path) -> None:
    known = run_ids(store)
    result = run("HEAD:ddpm", "tidy-ox", known["tidy-ox"], "it's-ours:ddpm", "--json")
    assert fd_of(result) == [[1.8, 2.5, 2.5, 3.5]]
    origins = [each["origin"] for each in json.loads(result.stdout)["comparisons"][0]["rows"]]
    assert origins[1:] == [f"MLflow run {known[name]}" for name in ("tidy-ox", "tidy-ox", "it's-ours")]


def test_experiment_comes_before_an_mlflow_run_of_the_same_name(in_store: Path) -> None:
    add_experiment(in_store, git(in_store, "rev-parse", "HEAD"), "tidy-ox", ddpm=with_fd(9.0))
    assert fd_of(run("HEAD:ddpm", "tidy-ox", "--json")) == [[1.8, 9.0]]


def test_mlflow_runs_of_one_name_are_listed(in_store: Path, store: Path) -> None:
    said = fails("HEAD", "twice")
    assert "several MLflow runs are called 'twice'" in said and "UTC" in said
    listed = [each.split(",")[0].strip() for each in said.splitlines()[1:]]
    assert len(set(listed)) == 2
    assert sorted(fd_of(run("HEAD:ddpm", id, "--json"))[0][1] for id in listed) == [1.0, 2.0]


def test_mlflow_run_without_a_record(in_store: Path) -> None:
    said = fails("HEAD", "early")
    assert "early has no metrics/evaluation/vae.json or metrics/evaluation/ddpm.json" in said and "stage evaluate" in said


def test_unknown_name_was_looked_for_in_mlflow_too(in_store: Path) -> None:
    said = fails("HEAD", "no-such")
    assert "MLflow: no run of this id or name (sqlite:////" in said
    assert "MLflow: no run" in fails("HEAD", '"it\'s" both quotes')


def test_store_that_cannot_be_read_is_named_without_its_password(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    for name, value in {"MAX_RETRIES": "0", "TIMEOUT": "2", "BACKOFF_FACTOR": "0"}.items():
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", value)
    said = fails("HEAD", "no-such")
    assert "MLflow: http://127.0.0.1:9 cannot be read" in said and "secret" not in said


# Quick, and clear


def test_only_what_a_command_needs_is_imported(root: Path) -> None:
    code = (
        "import sys\nfrom rediffuse.cli import main\n"
        "try: main(sys.argv[1:])\nfinally: print('heavy:', *sorted({'torch', 'numpy', 'mlflow', 'dvc', 'matplotlib'} & set(sys.modules)))"
    )
    for arguments in (["--help"], ["compare", "--help"], ["compare", "HEAD", "workspace"]):
        environment = {**os.environ, "PYTHONPATH": str(PROJECT / "src")}
        done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "heavy:"


@pytest.mark.parametrize("arguments", [["--help"], *(["compare", option] for option in ("--help", "-h"))])
def test_help_has_an_example(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0 and "\n    rediffuse compare HEAD workspace\n" in result.stdout


def test_wrong_option_is_a_usage_error() -> None:
    assert CliRunner().invoke(main, ["compare", "--nope"]).exit_code == 2
