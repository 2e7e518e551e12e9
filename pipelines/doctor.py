"""Check that a training run can work before it costs money; takes the flags of pipelines/train.py.

- On a cluster: ray job submit -- python pipelines/doctor.py --train-data s3://bucket/train --output s3://bucket/runs/1
- On one machine: python pipelines/doctor.py --train-data shards/train --output runs/mine
- Demo scenes: python pipelines/doctor.py
- Tiny: python pipelines/doctor.py --overfit-steps 20 --output runs/tiny

It prints a line per check: ok, warn or FAIL, with the remedy. It checks the cluster, versions and code on every node,
storage, MLflow, data, labels and masks; draws the first batch (OUTPUT/doctor/batch.png); overfits eight images; and
estimates hours, memory and epochs. Exit status: 0 no check failed, 2 a check failed.
"""

from typing import Any

from raydetr.command import print_summary, write_summary
from raydetr.doctor.config import DoctorConfig
from raydetr.errors import RaydetrError
from raydetr.training.start import run


def main(config: DoctorConfig) -> dict[str, Any]:
    """Run all checks; return the summary.

    Raises:
        RaydetrError: a check failed.
    """
    from raydetr.doctor.examine import examine

    print()
    summary = examine(config)
    if summary["failed"]:
        print_summary(summary)
        if config.json:
            write_summary(config.json, summary)
        raise RaydetrError(f"this run cannot work: {', '.join(summary['failed'])} failed, see above.")
    return summary


if __name__ == "__main__":
    run(main, DoctorConfig)
