"""The MLflow pyfunc model of a registered version ("models from code").

Each version contains a copy of this file, and MLflow runs the copy when it loads the version. Nothing in the project
imports this module.

    model = mlflow.pyfunc.load_model("models:/raydetr@champion")
    detections = model.predict([open("photo.jpg", "rb").read()])
"""

from typing import Any

import mlflow

from detr.inference.detector import ObjectDetector


class DetrModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc,name-defined]  # not in mlflow's types
    """Detects objects in encoded images."""

    def load_context(self, context: Any) -> None:
        """Load the model folder of the version."""
        self.detector = ObjectDetector.from_pretrained(context.artifacts["model"])

    # No return annotation: MLflow warns about every dictionary in it.
    def predict(self, model_input: list[bytes]):  # type: ignore[no-untyped-def]
        """Detect objects.

        Args:
            model_input: contents of JPEG, PNG or WebP files, as a list or as the column `image` of a DataFrame.

        Returns:
            For each image the detections of all queries, best first: `{"score", "label", "label_id",
            "box": {"xmin", "ymin", "xmax", "ymax"}}`, with boxes in pixels of the image.
        """
        return [self.detector.detect_image(data) for data in model_input]


mlflow.models.set_model(DetrModel())
