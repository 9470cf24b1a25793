"""The page that compares rows: a saved view of MLflow (3.17 or newer), kept as a tag of the experiment, so that it can be linked.

MLflow's own "Compare" shows no pictures, and its charts give every number a card of its own, with all parameters above each picture.
This view shows the parameters that differ, the headline scores, and the pictures of all rows side by side.  It stands in the menu
"Views" and at ADDRESS; what it does not name stays below, folded up or in sections that MLflow adds.  Which scores there are depends on
the instruments that measured the rows, so the view is written again when a row brings another.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rediffuse.runtime.kinds import KINDS

if TYPE_CHECKING:
    from mlflow import MlflowClient

KEY, NAME = "compare", "Compare"
TAG = f"mlflow.sharedViewState.{KEY}"
ADDRESS = "{server}/#/experiments/{experiment}/runs?workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey=" + KEY
MODELS = KINDS[::-1]
MOST = 4  # instruments that are shown, those of the latest rows: MLflow takes 20,000 characters for a tag of an experiment
LATEST = 100  # rows that are looked through for instruments
SCORE = re.compile(rf"({'|'.join(MODELS)})/([^/]+)/(fd|fid|precision|recall)")
CURVES = ["ddpm/loss", "vae/elbo"]
SAMPLES = ["ddpm/samples", "vae/samples"]
PICTURES = [
    *("ddpm/denoising", "vae/reconstructions", "vae/interpolation", "vae/latent"),
    *("ddpm/scores", "vae/scores", "ddpm/classes", "vae/classes", "ddpm/neighbours", "vae/neighbours"),
]
PARAMS = ("seed", "ddpm.T", "ddpm.schedule", "sample.ddpm.sampler", "sample.ddpm.steps", "vae.latent_dim")
# Where MLflow puts numbers that no card here shows: everything before the last "/".
FOLDED = [
    *("ddpm", "vae", "reference", "train_ddpm", "train_vae", "seconds"),
    *("train_ddpm/validation", "train_vae/test", "train_vae/train", "Model metrics", "System metrics"),
]


def update_view(client: MlflowClient, experiment: str) -> bool:
    """Write the view for the instruments of the latest rows, unless the user has saved another over it; whether that changed it."""
    rows = client.search_runs([experiment], order_by=["attributes.start_time DESC"], max_results=LATEST)
    view, there = view_of([row.data.metrics for row in rows]), client.get_experiment(experiment).tags.get(TAG)
    if view == there or (there is not None and not _is_ours(there)):
        return False
    client.set_experiment_tag(experiment, TAG, view)
    return True


def _is_ours(view: str) -> bool:
    """Whether nobody has saved this view in MLflow's pages, which write down when."""
    try:
        saved = json.loads(view)
        return bool(saved["name"] == NAME and saved["updatedAt"] == 0)
    except (ValueError, TypeError, KeyError):
        return False


def scores_of(rows: Iterable[Iterable[str]]) -> list[str]:
    """The scores to show of rows, the latest first, given as names of metrics; those of an instrument, and then of a model, stand together.

    The instrument with most scores is the headline of its row, so it comes first.
    """
    found: dict[str, dict[str, None]] = {}  # instrument -> its scores
    for names in rows:
        of_row: dict[str, list[str]] = {}
        for name in sorted(names, key=lambda name: (*map(name.startswith, MODELS[1:]), name)):
            if match := SCORE.fullmatch(name):
                of_row.setdefault(match[2], []).append(name)
        for instrument in sorted(of_row, key=lambda instrument: (-len(of_row[instrument]), instrument)):
            found.setdefault(instrument, {}).update(dict.fromkeys(of_row[instrument]))
    return [name for scores in list(found.values())[:MOST] for name in scores]


def view_of(rows: Iterable[Iterable[str]] = ()) -> str:
    """The view, as MLflow keeps it in a tag of the experiment; rows: the names of their metrics, the latest row first."""
    scores = scores_of(rows)
    instruments = dict.fromkeys(score.split("/")[1] for score in scores)
    folded = [*FOLDED, *(f"{owner}/{instrument}" for instrument in instruments for owner in (*MODELS, "reference"))]
    columns = [  # of the table
        *("attributes.`Models`", "tags.`rebuild.verdict`"),
        *(f"metrics.`{name}`" for name in scores if not name.endswith("/precision")),
        *(f"params.`{name}`" for name in PARAMS),
    ]
    sections = [
        _section("Parameters that differ", 1, 280),
        _section("Scores", 3, 260),
        _section("Samples", 1, 700),
        _section("More pictures", 1, 700),
        _section("Curves", 2, 360),
        *(_section(name, 3, 360, display=False) for name in folded),
    ]
    differences = {"compareGroups": ["Parameters"], "chartName": "Parameters that differ", "showDifferencesOnly": True}
    charts = [
        _chart("Parameters that differ", "DIFFERENCE", **differences, showChangeFromBaseline=False, baselineColumnUuid=""),
        *(_chart("Scores", "BAR", metricKey=name) for name in scores),
        # Several pictures in one card stand in a table, a column for each row of the experiment; one alone does not.
        _chart("Samples", "IMAGE", imageKeys=SAMPLES, step=0, showRunParams=False),
        _chart("More pictures", "IMAGE", imageKeys=PICTURES, step=0, showRunParams=False),
        *(_chart("Curves", "LINE", metricKey=name, selectedMetricKeys=[name], xAxisKey="step", range={}) for name in CURVES),
    ]
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


def _section(name: str, columns: int, height: int, display: bool = True) -> dict[str, Any]:
    return {"uuid": name, "name": name, "display": display, "columns": columns, "cardHeight": height, "isReordered": True}


def _chart(section: str, kind: str, **settings: Any) -> dict[str, Any]:
    return {"type": kind, "metricSectionId": section, "runsCountToCompare": 10, "deleted": False, "isGenerated": False, **settings}
