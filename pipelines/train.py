"""Train a DETR on shards, log the run to MLflow and register the result as challenger.

- On a cluster: ray job submit -- python pipelines/train.py --train-data s3://bucket/train --output s3://bucket/runs/1
- On one machine: python pipelines/train.py --train-data shards/train --output runs/mine
- Demo scenes: python pipelines/train.py --recipe scenes
- Tiny: python pipelines/train.py --recipe scenes --steps 20 --output runs/tiny

--recipe sets the defaults of all other flags, and --config replaces some of them by those of a file. --print-config
prints the result.
Rerun the command to resume the run at --output; for a finished run it returns immediately. Exit status: 0 finished,
2 an error that the message explains, 75 stopped at a checkpoint after --max-hours.
"""

from typing import Any

from raydetr.config import EvaluateConfig
from raydetr.results.json_form import to_json
from raydetr.training.config import TrainConfig
from raydetr.training.start import run


def main(config: TrainConfig) -> dict[str, Any]:
    """Train; evaluate the registered version if --val-data is given."""
    if config.fault_tolerance.replay:
        from raydetr.training.non_finite import replay

        return replay(config)
    from raydetr.training.trainer import train

    trained = train(config)
    summary: dict[str, Any] = to_json(trained)
    if config.validation.val_data:
        from raydetr.evaluation.evaluate import evaluate

        on_gpu = config.cluster.on_gpu
        scored = evaluate(
            EvaluateConfig(
                model=trained.model or trained.model_folder,
                data=config.validation.val_data,
                task=config.run.task,
                actors=config.cluster.workers if on_gpu else 1,
                num_gpus=float(on_gpu),
                tracking_uri=config.tracking.tracking_uri,
            )
        )
        summary |= scored.metrics
        summary |= {"validation_images": scored.images, "predictions": scored.predictions}
    return summary


if __name__ == "__main__":
    run(main, TrainConfig)
