"""Score a model on a data set: COCO's figures of boxes and masks, panoptic quality, predictions, a report as a page, and
the record that a promotion asks for.

On a cluster:    ray job submit -- python pipelines/evaluate.py --data s3://bucket/val --actors 8 --output s3://...
On one machine:  python pipelines/evaluate.py --model models:/raydetr@challenger --data shards/val
A COCO folder:   python pipelines/evaluate.py --annotations my/val.json --images my/val
Tiny:            python pipelines/evaluate.py

The same model, data and settings are scored once, however many start at once; another call gives the stored figures, one
that was interrupted goes on. Exit status: 0 scored, 4 --metric is below --min-metric, 2 an error.
"""

from raydetr.command import run
from raydetr.config import EvaluateConfig
from raydetr.evaluation.evaluate import evaluate

if __name__ == "__main__":
    run(evaluate, EvaluateConfig)
