"""Train a DETR on shards, log the run to MLflow and register the result as challenger.

On a cluster:    ray job submit -- python pipelines/train.py --train-data s3://bucket/train --output s3://bucket/runs/1
On one machine:  python pipelines/train.py --train-data shards/train --output runs/mine
Demo scenes:     python pipelines/train.py --recipe scenes
Tiny:            python pipelines/train.py --recipe scenes --steps 20 --output runs/tiny

--recipe sets the defaults of all other flags: multi-scale (the default), scenes, detr-small, detr-r50, fine-tune,
panoptic, panoptic-boxes, masks.
Rerun the command to resume the run at --output; for a finished run it returns immediately. Exit status: 0 finished,
2 an error that the message explains, 75 stopped at a checkpoint after --max-hours.
"""

import argparse
from functools import partial
from typing import Any

from raydetr.command import run
from raydetr.config import EvaluateConfig
from raydetr.training.config import TrainConfig
from raydetr.training.recipes import DEFAULT, RECIPES, require_model_flags


def main(config: TrainConfig, recipe: str = "") -> dict[str, Any]:
    """Train; evaluate the registered version if --val-data is given."""
    if recipe:
        require_model_flags(config, recipe)
    if config.replay:
        from raydetr.training.non_finite import replay

        return replay(config)
    from raydetr.training.trainer import train

    summary = train(config)
    if config.val_data:
        from raydetr.evaluation.evaluate import evaluate

        on_gpu = config.accelerator == "gpu"
        scored = evaluate(
            EvaluateConfig(
                model=summary.get("model", summary["model_folder"]),
                data=config.val_data,
                task=config.task,
                actors=config.workers if on_gpu else 1,
                num_gpus=float(on_gpu),
                tracking_uri=config.tracking_uri,
            )
        )
        summary |= scored["figures"]
        summary |= {"validation_images": scored["images"], "predictions": scored["predictions"]}
    return summary


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", choices=sorted(RECIPES), default=DEFAULT)
    recipe, flags = parser.parse_known_args()
    run(partial(main, recipe=recipe.recipe), TrainConfig, default=RECIPES[recipe.recipe], args=flags)
