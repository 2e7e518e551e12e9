"""Evaluate a model on a data set: COCO metrics, panoptic quality, predictions, an HTML report, and the record in MLflow
that a promotion requires.

- On a cluster: ray job submit -- python pipelines/evaluate.py --data s3://bucket/val --actors 8 --output s3://...
- On one machine: python pipelines/evaluate.py --model models:/raydetr@challenger --data shards/val
A COCO folder:   python pipelines/evaluate.py --annotations my/val.json --images my/val
- Tiny: python pipelines/evaluate.py

Each combination of model, data and settings is evaluated once, even by concurrent commands. Rerun the command to read
the stored metrics or to resume an interrupted evaluation. Exit status: 0 finished, 4 --metric is below --min-metric,
2 an error.
"""

from typing import Any

from raydetr.command import run
from raydetr.config import EvaluateConfig
from raydetr.evaluation.evaluate import evaluate


def main(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate; return the summary."""
    return evaluate(config).to_output()


if __name__ == "__main__":
    run(main, EvaluateConfig)
