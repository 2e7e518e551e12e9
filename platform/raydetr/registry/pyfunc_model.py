"""The code of a registered version, for MLflow: a copy of this file travels with it ("models from code").

Nothing in the project imports it. MLflow runs the copy when it loads a version:

    model = mlflow.pyfunc.load_model("models:/raydetr@champion")
    detections = model.predict([open("photo.jpg", "rb").read()])
"""

from typing import Any

import mlflow

from detr.inference.detector import ObjectDetector


class DetrModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc,name-defined]  # not in mlflow's types
    """Encoded images to detections."""

    def load_context(self, context: Any) -> None:
        """Load the DETR folder that the version carries."""
        self.detector = ObjectDetector.from_pretrained(context.artifacts["model"])

    # No annotation of what is returned: MLflow warns about every dictionary in it.
    def predict(self, model_input: list[bytes]):  # type: ignore[no-untyped-def]
        """Detect objects.

        Args:
            model_input: JPEG, PNG or WebP files, as a list or as the column `image` of a DataFrame.

        Returns:
            for each image all queries' detections, best first: `{"score", "label", "label_id",
            "box": {"xmin", "ymin", "xmax", "ymax"}}` with boxes in pixels of the image.
        """
        return [self.detector.detect_image(data) for data in model_input]


mlflow.models.set_model(DetrModel())
