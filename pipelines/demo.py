"""The whole path on one machine: generate, ingest, train, evaluate, promote, serve, ask, draw.

On one machine:  make demo   (or: python pipelines/demo.py)
Tiny:            python pipelines/demo.py --steps 20 --output runs/tiny-demo

It leaves in --output: summary.json, loss.png, predictions.png, answer.png. Another --output is another run.
"""

from dataclasses import asdict, replace
from typing import Any

from detr.detector import ObjectDetector
from raydetr import cluster, storage
from raydetr.command import Clock, run, write_summary
from raydetr.config import DemoConfig, EvaluateConfig, PromoteConfig
from raydetr.data.shards import Manifest, read_records
from raydetr.data.synthetic import embedded
from raydetr.evaluation import report
from raydetr.evaluation.coco_files import coco_results
from raydetr.evaluation.evaluate import evaluate
from raydetr.evaluation.predict import read_predictions
from raydetr.evaluation.promotion import promote
from raydetr.lease import exclusive
from raydetr.registry import models, tracking
from raydetr.serving.app import application, endpoint
from raydetr.serving.client import Client
from raydetr.training.recipes import RECIPES
from raydetr.training.trainer import train


def main(config: DemoConfig) -> dict[str, Any]:
    """Every stage once; the summary says how long each took and what came of it."""
    output, uri = storage.absolute(config.output), tracking.resolve_uri("")
    clock = Clock()
    recipe = replace(RECIPES["small"], output=f"{output}/train", seed=config.seed, experiment="demo")
    cluster.connect(recipe.workers + recipe.data_cpus)
    clock.stage("generate and ingest")
    _, val_data = embedded("train"), embedded("val")  # of other seeds: no scene is in both
    clock.stage("train")
    trained = train(replace(recipe, steps=config.steps or recipe.steps))
    clock.stage("evaluate")
    scored = evaluate(EvaluateConfig(model=trained["model"], data=val_data))
    clock.stage("promote")
    judge = PromoteConfig(model=trained["model"], data=scored["data_digest"], allow_chosen_on=True)
    promoted = promote(judge)
    champion = models.resolve("models:/raydetr@champion", uri)
    clock.stage("serve one validation image over HTTP")
    image = next(read_records(Manifest.load(val_data)))["image"]
    with endpoint(application(champion), "127.0.0.1", config.port) as url, Client(url) as client:
        answer = asdict(client.detect(image, threshold=0.0))
    clock.stage("draw")
    own = ObjectDetector.from_pretrained(champion.folder).detect_image(image)
    report.loss_curve(tracking.metric_history(uri, trained["run_id"], "loss"), f"{output}/loss.png")
    found = coco_results(read_predictions(scored["predictions"]))
    report.sheet(Manifest.load(val_data), found, f"{output}/predictions.png")
    report.answer(image, answer["detections"], f"{output}/answer.png")
    clock.stop()
    summary = {
        **{name: scored[name] for name in ("AP", "AP50")},
        "validation_images": scored["images"],
        "images_per_second": trained["images_per_second"],
        "model_version": champion.address,
        "promoted": promoted["promoted"],
        "answer_differs_from_model_by": report.difference(answer["detections"], own),
        "seconds": clock.seconds,
        "total_seconds": round(sum(clock.seconds.values()), 1),
        "answer": answer,
        "training": trained,
        "evaluation": scored,
    }
    write_summary(f"{output}/summary.json", summary)
    print(NEXT.format(output=config.output, uri=uri, report=scored["report"]))
    return summary


NEXT = """
Look at {output}/predictions.png, {output}/loss.png, {output}/answer.png and the evaluation's report:
{report}
Runs and models:  .venv/bin/mlflow ui --backend-store-uri {uri}
Your own data:    .venv/bin/python pipelines/ingest.py --annotations FILE.json --images FOLDER --output runs/data/mine
                  .venv/bin/python pipelines/train.py --train-data runs/data/mine --num-queries 100 --output runs/mine
"""

if __name__ == "__main__":
    run(exclusive(main), DemoConfig)
