"""A trained model as MLflow serves it.

MLflow copies this file into the logged model and runs it there, beside a copy of the package.  So it imports
nothing from its own package at the top.  A request is a list of records, and the answer has one record for
each image:

    request:  {"n": 4, "label": "Ankle boot", "seed": 1}
    answer:   {"label": "Ankle boot", "png": "iVBORw0KGgo..."}
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import mlflow.models
import mlflow.pyfunc
import pandas as pd  # type: ignore[import-untyped]


class ServedImageModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc]  # mlflow has no types
    """label: a class by name or index, as text; without it all classes in turn.  png: an image in base64."""

    def load_context(self, context: Any) -> None:
        from rediffuse.inference.model import load_image_model
        from rediffuse.inference.settings import SAMPLING, packed_settings

        folder = Path(context.artifacts[SAMPLING]).parent
        self.model = load_image_model(folder, packed_settings(folder))

    def predict(self, context: Any, model_input: pd.DataFrame) -> list[dict[str, Any]]:
        """Return a record for each image.  model_input: a data frame with a row for each request."""
        from mlflow.exceptions import MlflowException

        from rediffuse.runtime.errors import UserError

        try:
            return [image for request in model_input.to_dict("records") for image in self._draw(**request)]
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None

    def _draw(self, n: int, seed: int, label: Any = None) -> list[dict[str, Any]]:
        from rediffuse.images.files import encode_image

        number = None
        if not pd.isna(label):
            # pandas turns the indices of a column with gaps into floats.
            text = str(int(label) if isinstance(label, float) and label.is_integer() else label)
            number = self.model.label(text)
        images, labels = self.model.draw(int(n), seed=int(seed), label=number)
        names = [None] * len(images) if labels is None else [self.model.class_names[i] for i in labels]
        pictures = [base64.b64encode(encode_image(image)).decode() for image in images]
        return [{"label": name, "png": picture} for name, picture in zip(names, pictures, strict=True)]


mlflow.models.set_model(ServedImageModel())
