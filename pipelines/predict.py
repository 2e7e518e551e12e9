"""Predict on a folder or bucket of images: write detections or segments as Parquet and COCO JSON, and draw overlays.

- On a cluster: ray job submit -- python pipelines/predict.py --images s3://bucket/photos --output s3://bucket/out
- On one machine: python pipelines/predict.py --images photos --output runs/predict --visualize
- By an endpoint: python pipelines/predict.py --images photos --endpoint http://127.0.0.1:8000

Rerun the command to resume an interrupted run. images.json lists files that are not images. The token of an endpoint is
read from the environment variable RAYDETR_TOKEN, since flags are visible in process lists.
"""

import os
from collections.abc import Sequence
from typing import Any

from raydetr import storage
from raydetr.client.client import Client
from raydetr.cluster import connect, require_shared
from raydetr.command import run
from raydetr.config import PredictConfig
from raydetr.lease import Held, lease
from raydetr.prediction import image_folder
from raydetr.prediction.actors import ActorOptions
from raydetr.prediction.pictures import write_overlays
from raydetr.prediction.predictions import PredictionSettings
from raydetr.registry.models import ResolvedModel, resolve
from raydetr.registry.tracking import resolve_uri
from raydetr.responses import Detection

TOKEN = "RAYDETR_TOKEN"


def main(config: PredictConfig) -> dict[str, Any]:
    """Predict with the endpoint if one is given, else with model actors; return the summary."""
    uri = "" if config.endpoint else resolve_uri(config.tracking_uri)
    model = None if config.endpoint else resolve(config.model or "models:/raydetr@champion", uri)
    images = image_folder.list_images(config.images)
    with lease(storage.absolute(config.output)) as held:
        return predict(config, images, model, held)


def predict(
    config: PredictConfig, images: image_folder.Images, model: ResolvedModel | None, held: Held
) -> dict[str, Any]:
    """Predict into an output folder whose lease this process holds."""
    output = storage.absolute(config.output)
    if model is None:
        source = config.endpoint
        with Client(source, token=os.environ.get(TOKEN)) as client:
            client.health()

            def detect(data: bytes) -> Sequence[Detection]:
                return client.detect(data, 0.0, orientation=config.orientation).detections

            predictions, labels = image_folder.predict_by_endpoint(images, detect, config.orientation)
    else:
        source, labels = model.model_uri, image_folder.label_names(model)
        print(f"predicting {len(images.names):,} images with {source}", flush=True)
        connect(config.actors + 1, gpus=config.actors * config.num_gpus)
        require_shared(images=config.images, output=config.output)
        settings = PredictionSettings(
            config.masks, config.precision, config.engine, config.segment_threshold, config.orientation
        )
        options = ActorOptions(config.actors, config.batch_size, config.num_gpus)
        predictions = image_folder.predict_by_model(images, model, options, settings, output)
    named = image_folder.with_names(predictions, images)
    held.verify()
    image_folder.write_files(named, labels, output)
    if hint := image_folder.no_detections_hint(named, labels, config.threshold):
        print(f"\n{hint}", flush=True)
    summary = {
        "predicted_by": source,
        "images": len(images.names),
        "unreadable": len(named) - named.column("error").null_count,
        "objects": image_folder.count_detections(named, config.threshold),
        "best_score": max((each.score for each in image_folder.best_scores(named, labels, 1)), default=0.0),
        "predictions": storage.join(output, "predictions.parquet"),
        "results": storage.join(output, "results.json"),
    }
    if config.visualize:
        connect(1)
        write_overlays(named, images.folder, labels, output, config.threshold, config.orientation)
        summary["pictures"] = storage.join(output, "pictures")
    return summary


if __name__ == "__main__":
    run(main, PredictConfig)
