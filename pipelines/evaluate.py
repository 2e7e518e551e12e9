"""Score a model on a validation set: COCO's 12 figures, predictions, and the record that a promotion asks for.

On a cluster:    ray job submit -- python pipelines/evaluate.py --data s3://bucket/val --actors 8 --output s3://...
On one machine:  python pipelines/evaluate.py --model models:/raydetr@challenger --data shards/val
Tiny:            python pipelines/evaluate.py

The same model, data and settings are scored once; another call gives the stored figures.
"""

from typing import Any

from raydetr.command import run
from raydetr.config import EvaluateConfig
from raydetr.evaluation.evaluate import evaluate


def main(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate; the summary."""
    summary = evaluate(config)
    if summary["already_scored"]:
        print(f"\n{summary['model']} is already scored on this data: these are the stored figures.")
    return summary


if __name__ == "__main__":
    run(main, EvaluateConfig)
