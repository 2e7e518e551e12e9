"""One evaluation from addresses to figures; what pipelines/evaluate.py runs."""

from typing import Any

from detr.metrics.coco import METRIC_NAMES
from raydetr import storage
from raydetr.cluster import connect, require_shared
from raydetr.config import EvaluateConfig
from raydetr.data.shards import Manifest
from raydetr.data.synthetic import embedded
from raydetr.evaluation.predict import PredictOptions, predict
from raydetr.evaluation.record import find, keep
from raydetr.evaluation.score import score
from raydetr.registry.models import resolve
from raydetr.registry.tracking import resolve_uri


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score a model on shards, or find the record of the same evaluation.

    Returns:
        summary: model, data, data_digest, images, undecodable, the 12 figures by name and again together as
        `figures`, run_id, predictions, output, and whether it was `already_scored`.
    """
    uri = resolve_uri(config.tracking_uri)
    model = resolve(config.model, uri)
    cpus = config.actors + 1
    if not config.data:
        connect(cpus)  # before `embedded`, which asks for less
    manifest = Manifest.load(config.data or embedded("val"))
    output = storage.absolute(config.output or f"runs/evaluations/{model.label}-{manifest.digest[:12]}")
    record = find(model, manifest, output)
    known = record is not None
    if record is None:
        connect(cpus)
        require_shared(data=config.data, output=config.output, tracking_uri=uri)
        options = PredictOptions(config.actors, config.batch_size, config.num_gpus)
        predictions = predict(model, manifest, options, output)
        record = keep(uri, model, manifest, score(predictions, manifest), predictions, output)
    figures = {name: record["figures"][name] for name in METRIC_NAMES}
    return {
        "model": model.address,
        "data": manifest.root,
        "data_digest": manifest.digest,
        "images": record["images"],
        "undecodable": len(record["undecodable"]),
        **figures,
        "figures": figures,
        "run_id": record["run_id"],
        "predictions": record["predictions"],
        "output": output,
        "already_scored": known,
    }
