"""The page that compares rows: a saved view of MLflow (3.17 or newer), kept as a tag of the experiment, so
that it has an address.

MLflow's own "Compare" shows no pictures, and its charts give every number a card of its own.  This view shows
the parameters that differ, the main scores, and the pictures of all rows side by side; the rest is folded
below.  It is in the menu "Views" and at ADDRESS.  The scores depend on the instruments of the rows, so the
view is written again when a row has another instrument.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rediffuse.runtime.kinds import KINDS

if TYPE_CHECKING:
    from mlflow import MlflowClient

KEY, NAME = "compare", "Compare"
TAG = f"mlflow.sharedViewState.{KEY}"
PRIMARY = "mlflow.experiment.primaryMetric.name"
PRIMARY_GREATER = "mlflow.experiment.primaryMetric.greaterIsBetter"
OUR_PRIMARY = "rediffuse.primaryMetric"  # the last one that we set
ADDRESS = (
    "{server}/#/experiments/{experiment}/runs"
    f"?workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey={KEY}"
)
MODELS = KINDS[::-1]
# Instruments shown, those of the latest rows: MLflow takes 20,000 characters for a tag of an experiment.
MOST = 4
LATEST = 100  # rows that are searched for instruments
SCORE = re.compile(rf"({'|'.join(MODELS)})/([^/]+)/(fd|fid|precision|recall)")
HEADLINES = [f"{model}/ratio_to_real" for model in MODELS]  # the number to hold, shown first
CURVES = ["ddpm/loss", "vae/elbo"]
SAMPLES = ["ddpm/samples", "vae/samples"]
PICTURES = [
    *("ddpm/denoising", "vae/reconstructions", "vae/interpolation", "vae/latent"),
    *("ddpm/scores", "vae/scores", "ddpm/classes", "vae/classes", "ddpm/neighbours", "vae/neighbours"),
]
PARAMS = ("seed", "ddpm.T", "ddpm.schedule", "sample.ddpm.sampler", "sample.ddpm.steps", "vae.latent_dim")
# The sections in which MLflow puts other numbers: the part of their names before the last "/".
FOLDED = [
    *("ddpm", "vae", "reference", "train_ddpm", "train_vae", "seconds"),
    *("train_ddpm/validation", "train_vae/test", "train_vae/train", "Model metrics", "System metrics"),
]


def update_experiment(client: MlflowClient, experiment: str) -> None:
    """Let the experiment's view and primary metric follow the instruments of the latest rows.

    A view that the user has saved over ours stays, and so does a primary metric that the user has chosen.
    """
    rows = client.search_runs([experiment], order_by=["attributes.start_time DESC"], max_results=LATEST)
    names, tags = [row.data.metrics for row in rows], client.get_experiment(experiment).tags
    view = view_of(names, rows[0].data.params if rows else {})
    if view != tags.get(TAG) and (TAG not in tags or _is_ours(tags[TAG])):
        client.set_experiment_tag(experiment, TAG, view)
    distances = [name for name in scores_of(names) if name in HEADLINES or name.endswith(("/fd", "/fid"))]
    ours = tags.get(PRIMARY) == tags.get(OUR_PRIMARY)  # nobody has chosen another
    if distances and distances[0] != tags.get(PRIMARY) and ours:
        chosen = {PRIMARY: distances[0], OUR_PRIMARY: distances[0], PRIMARY_GREATER: "False"}
        for tag, value in chosen.items():
            client.set_experiment_tag(experiment, tag, value)


def _is_ours(view: str) -> bool:
    """Return whether nobody has saved this view in MLflow's pages, which record when."""
    try:
        saved = json.loads(view)
        return bool(saved["name"] == NAME and saved["updatedAt"] == 0)
    except (ValueError, TypeError, KeyError):
        return False


def scores_of(rows: Iterable[Iterable[str]]) -> list[str]:
    """Return the metrics to show as scores: the headlines, then grouped by instrument, then by model.

    rows: names of metrics, the latest row first.  The instrument with most scores comes first in its row.
    """
    found: dict[str, dict[str, None]] = {}  # instrument -> its scores
    rows = list(map(set, rows))
    for names in rows:
        of_row: dict[str, list[str]] = {}
        for name in sorted(names, key=lambda name: (*map(name.startswith, MODELS[1:]), name)):
            if match := SCORE.fullmatch(name):
                of_row.setdefault(match[2], []).append(name)
        for instrument in sorted(of_row, key=lambda instrument: (-len(of_row[instrument]), instrument)):
            found.setdefault(instrument, {}).update(dict.fromkeys(of_row[instrument]))
    headlines = [name for name in HEADLINES if any(name in names for names in rows)]
    return headlines + [name for scores in list(found.values())[:MOST] for name in scores]


def view_of(rows: Iterable[Iterable[str]] = (), params: Mapping[str, str] | None = None) -> str:
    """Return the view as MLflow keeps it in a tag.

    rows: names of metrics, the latest row first.  params: of the latest row.
    """
    scores = scores_of(rows)
    instruments = dict.fromkeys(score.split("/")[1] for score in scores if score not in HEADLINES)
    folded = [*FOLDED, *(f"{owner}/{id}" for id in instruments for owner in (*MODELS, "reference"))]
    columns = [  # of the table
        *("attributes.`Models`", "tags.`rebuild.verdict`"),
        *(f"metrics.`{name}`" for name in scores if not name.endswith("/precision")),
        *(f"params.`{name}`" for name in PARAMS),
    ]
    shown = {"Parameters that differ": (1, 280), "Scores": (3, 260), "Samples": (1, 700)}
    shown |= {"More pictures": (1, 700), "Curves": (2, 360), "Training": (2, 640)}
    sections = [_section(name, *shape) for name, shape in shown.items()]
    sections += [_section(name, 3, 360, display=False) for name in folded]
    differ: dict[str, Any] = {"chartName": "Parameters that differ", "compareGroups": ["Parameters"]}
    differ |= {"showDifferencesOnly": True, "showChangeFromBaseline": False, "baselineColumnUuid": ""}
    # MLflow shows a card of several pictures as a table, with a column for each row of the experiment.
    pictures = [("Samples", SAMPLES, 0), ("More pictures", PICTURES, 0)]
    # A card with a slider shows nothing until its step is one of the pictures: begin with the last one.
    pictures += [("Training", [f"{model}/training"], _last_step(params or {}, model)) for model in MODELS]
    line = {"xAxisKey": "step", "range": {}}
    charts = [_chart("Parameters that differ", "DIFFERENCE", **differ)]
    charts += [_chart("Scores", "BAR", metricKey=name) for name in scores]
    for section, keys, step in pictures:
        charts.append(_chart(section, "IMAGE", imageKeys=keys, step=step, showRunParams=False))
    for name in CURVES:
        charts.append(_chart("Curves", "LINE", metricKey=name, selectedMetricKeys=[name], **line))
    state = {
        "searchFilter": "tags.`rediffuse.superseded` = 'false'",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        "columnOrder": columns,  # MLflow takes the widths only with an order
        "columnWidths": {column: 225 for column in columns if column.startswith("metrics.")},
        "compareRunCharts": [{**chart, "uuid": f"rediffuse-{number}"} for number, chart in enumerate(charts)],
        "compareRunSections": sections,
        "isAccordionReordered": True,  # else MLflow sorts the sections by name
        "hideEmptyCharts": True,
    }
    return json.dumps({"name": NAME, "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)})


def _last_step(params: Mapping[str, str], model: str) -> int:
    """Return the images that a training has seen at its end."""
    images, batch = (int(params.get(f"{model}.training.{name}", 1)) for name in ("images", "batch"))
    return images // batch * batch


def _section(name: str, columns: int, height: int, display: bool = True) -> dict[str, Any]:
    shape = {"columns": columns, "cardHeight": height, "isReordered": True}
    return {"uuid": name, "name": name, "display": display, **shape}


def _chart(section: str, kind: str, **settings: Any) -> dict[str, Any]:
    common = {"runsCountToCompare": 10, "deleted": False, "isGenerated": False}
    return {"type": kind, "metricSectionId": section, **common, **settings}
