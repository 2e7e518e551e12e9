"""Detect objects in a folder of images: pictures with boxes, and results.json in COCO's results form.

On a cluster:    ray job submit -- python pipelines/predict.py --images s3://bucket/photos --output s3://bucket/out
On one machine:  python pipelines/predict.py --images photos --output runs/predict
By an endpoint:  python pipelines/predict.py --images photos --endpoint http://127.0.0.1:8000
"""

from typing import Any

from raydetr import storage
from raydetr.command import run
from raydetr.config import PredictConfig
from raydetr.evaluation.pictures import Detect, detect_folder, model_detector
from raydetr.registry.models import resolve
from raydetr.registry.tracking import resolve_uri
from raydetr.serving.client import detect, health


def endpoint_detector(endpoint: str) -> Detect:
    """All detections of a running endpoint."""
    health(endpoint)
    return lambda data: detect(endpoint, data, threshold=0.0)["detections"]


def main(config: PredictConfig) -> dict[str, Any]:
    """Detect by the endpoint where one is given, else by the model in this process; the summary."""
    if config.endpoint:
        source, detector = config.endpoint, endpoint_detector(config.endpoint)
    else:
        model = resolve(config.model or "models:/raydetr@champion", resolve_uri(config.tracking_uri))
        source, detector = model.address, model_detector(model)
    output = storage.absolute(config.output)
    made = detect_folder(config.images, output, detector, config.threshold)
    return {
        "detected_by": source,
        "images": made.images,
        "objects": made.objects,
        "unreadable": len(made.unreadable),
        "pictures": storage.join(output, "pictures"),
        "results": storage.join(output, "results.json"),
    }


if __name__ == "__main__":
    run(main, PredictConfig)
