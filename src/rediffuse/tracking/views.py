"""The page that compares rows: a saved view of MLflow (3.17 or newer), kept as a tag of the experiment, so that it can be linked.

MLflow's own "Compare" shows no pictures, and its charts give every number a card of its own, with all parameters above each picture.
This view shows the parameters that differ, the headline scores, and the pictures of all rows side by side.  It stands in the menu
"Views" and at ADDRESS; what it does not name stays below, folded up or in sections that MLflow adds.
"""

from __future__ import annotations

import json
from typing import Any

KEY = "compare"
ADDRESS = "{server}/#/experiments/{experiment}/runs?workflowType=machine_learning&compareRunsMode=CHART&viewStateShareKey=" + KEY
INSTRUMENT = "fashion-mnist-cnn-v1"
SCORES = [f"{model}/{INSTRUMENT}/{score}" for model in ("ddpm", "vae") for score in ("fd", "precision", "recall")]
CURVES = ["ddpm/loss", "vae/elbo"]
SAMPLES = ["ddpm/samples", "vae/samples"]
PICTURES = [
    *("ddpm/denoising", "vae/reconstructions", "vae/interpolation", "vae/latent"),
    *("ddpm/scores", "vae/scores", "ddpm/classes", "vae/classes", "ddpm/neighbours", "vae/neighbours"),
]
COLUMNS = [  # of the table
    *("attributes.`Models`", "tags.`rebuild.verdict`"),
    *(f"metrics.`{name}`" for name in SCORES if not name.endswith("precision")),
    *(f"params.`{name}`" for name in ("seed", "ddpm.T", "ddpm.schedule", "sample.ddpm.sampler", "sample.ddpm.steps", "vae.latent_dim")),
]
# Where MLflow puts numbers that no card here shows: everything before the last "/".
FOLDED = [
    *("ddpm", "vae", "reference", "train_ddpm", "train_vae", "seconds"),
    *(f"{owner}/{INSTRUMENT}" for owner in ("ddpm", "vae", "reference")),
    *("train_ddpm/validation", "train_vae/test", "train_vae/train", "Model metrics", "System metrics"),
]


def view_tags() -> dict[str, str]:
    """The tags of the experiment that hold the view.  MLflow takes 20,000 characters for one."""
    sections = [
        _section("Parameters that differ", 1, 280),
        _section("Scores", 3, 260),
        _section("Samples", 1, 700),
        _section("More pictures", 1, 700),
        _section("Curves", 2, 360),
        *(_section(name, 3, 360, display=False) for name in FOLDED),
    ]
    differences = {"compareGroups": ["Parameters"], "chartName": "Parameters that differ", "showDifferencesOnly": True}
    charts = [
        _chart("Parameters that differ", "DIFFERENCE", **differences, showChangeFromBaseline=False, baselineColumnUuid=""),
        *(_chart("Scores", "BAR", metricKey=name) for name in SCORES),
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
        "selectedColumns": COLUMNS,
        "columnOrder": COLUMNS,  # MLflow takes the widths only with an order
        "columnWidths": {column: 225 for column in COLUMNS if column.startswith("metrics.")},
        "compareRunCharts": [{**chart, "uuid": f"rediffuse-{number}"} for number, chart in enumerate(charts)],
        "compareRunSections": sections,
        "isAccordionReordered": True,  # else MLflow sorts the sections by name
        "hideEmptyCharts": True,
    }
    saved = {"name": "Compare", "createdAt": 0, "updatedAt": 0, "state": json.dumps(state)}
    return {f"mlflow.sharedViewState.{KEY}": json.dumps(saved)}


def _section(name: str, columns: int, height: int, display: bool = True) -> dict[str, Any]:
    return {"uuid": name, "name": name, "display": display, "columns": columns, "cardHeight": height, "isReordered": True}


def _chart(section: str, kind: str, **settings: Any) -> dict[str, Any]:
    return {"type": kind, "metricSectionId": section, "runsCountToCompare": 10, "deleted": False, "isGenerated": False, **settings}
