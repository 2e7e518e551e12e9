"""Run all stages on one machine with generated scenes: generate, ingest, train, evaluate, promote, serve, draw.

On one machine: make demo, or a tiny one: python pipelines/demo.py --steps 20 --output runs/tiny-demo

It writes summary.json, loss.png, predictions.png and answer.png to --output, and registers the model raydetr-demo.
"""

import shlex
import sys
from typing import Any

from detr.inference.detector import ObjectDetector
from raydetr import cluster, storage
from raydetr.client.client import Client
from raydetr.command import Clock, run, write_summary
from raydetr.config import DemoConfig, EvaluateConfig, PromoteConfig
from raydetr.data.shards import Manifest, read_records
from raydetr.data.synthetic.dataset import embedded
from raydetr.evaluation.evaluate import evaluate
from raydetr.evaluation.record import ANALYSIS
from raydetr.flat_keys import override
from raydetr.lease import exclusive
from raydetr.prediction.coco_files import coco_results
from raydetr.prediction.predict import read_predictions
from raydetr.promotion.promote import promote
from raydetr.registry import models, tracking
from raydetr.reports import run_pictures
from raydetr.results.json_form import to_json
from raydetr.serving.app import application, endpoint
from raydetr.training.recipes import scenes
from raydetr.training.trainer import train


def main(config: DemoConfig) -> dict[str, Any]:
    """Run every stage once; return a summary of the times and results."""
    output, uri, clock = storage.absolute(config.output), tracking.resolve_uri(""), Clock()
    training = override(scenes(), output=f"{output}/train", name=NAME, experiment="demo", seed=config.seed)
    training = override(training, steps=config.steps or training.optimizer.steps)
    with tracking.connecting(uri):
        cluster.connect(training.cluster.workers + training.cluster.data_cpus)
    clock.stage("generate and ingest")
    _, val_data = embedded("train"), embedded("val")  # different seeds: no scene is in both
    clock.stage("train")
    trained = train(training)
    model = str(trained.model)
    clock.stage("evaluate")
    scored = evaluate(EvaluateConfig(model=model, data=val_data))
    clock.stage("promote")
    promoted = promote(PromoteConfig(model=model, data=scored.data_digest, allow_contaminated_eval=True))
    champion = models.resolve(f"models:/{NAME}@champion", uri)
    clock.stage("serve one validation image over HTTP")
    image = next(read_records(Manifest.load(val_data)))["image"] or b""
    with endpoint(application(champion), "127.0.0.1", config.port) as url, Client(url) as client:
        answer = client.detect(image, threshold=0.0)
    clock.stage("draw")
    expected = ObjectDetector.from_pretrained(champion.folder).detect_image(image)
    run_pictures.loss_curve(tracking.metric_history(uri, trained.run_id, "loss"), f"{output}/loss.png")
    detections = coco_results(read_predictions(scored.predictions))
    run_pictures.contact_sheet(Manifest.load(val_data), detections, f"{output}/predictions.png")
    run_pictures.answer(image, answer.detections, f"{output}/answer.png")
    clock.stop()
    summary = {
        **{name: scored.metrics[name] for name in ("AP", "AP50")},
        "duplicates": storage.read_json(storage.join(scored.output, ANALYSIS))["duplicates"],
        "validation_images": scored.images,
        "images_per_second": trained.images_per_second,
        "model_version": champion.model_uri,
        "promoted": promoted.promoted,
        "answer_differs_from_model_by": run_pictures.difference(answer.detections, expected),
        "seconds": clock.seconds,
        "total_seconds": round(sum(clock.seconds.values()), 1),
        "answer": answer.model_dump(),
        "training": to_json(trained),
        "evaluation": scored.to_output(),
    }
    write_summary(f"{output}/summary.json", summary)
    print(NEXT.format(*map(shlex.quote, (config.output, scored.report, sys.orig_argv[0], uri)), name=NAME))
    return summary


NAME = "raydetr-demo"  # not `raydetr`, the other pipelines' default, which is for the user's own model
NEXT = """
Results: predictions.png, loss.png and answer.png in {0}, evaluation report {1}
Serve this model:  {2} pipelines/serve.py --model models:/{name}@champion
Runs and models:   {2} -m mlflow ui --backend-store-uri {3}
"""

if __name__ == "__main__":
    run(exclusive(main), DemoConfig)
