"""Move an alias (champion) to a model version (the challenger) that the gate lets through.

On a cluster:    ray job submit -- python pipelines/promote.py --tracking-uri http://mlflow:5000
On one machine:  python pipelines/promote.py --model models:/raydetr/3 --margin 0.005 --max-latency-ms 200
Tiny:            python pipelines/promote.py --allow-contaminated-eval
Back:            python pipelines/promote.py --undo

Both versions need an evaluation on the same data (pipelines/evaluate.py). The embedded validation set also chooses the
best checkpoint, hence the flag of the tiny call. Exit status: 0 promoted, 3 refused, 2 an error.
"""

from typing import Any

from raydetr import storage
from raydetr.command import require_writable, run
from raydetr.config import PromoteConfig
from raydetr.errors import PromotionRefused
from raydetr.promotion.promote import promote


def main(config: PromoteConfig) -> dict[str, Any]:
    """Promote or undo; the summary.

    Raises:
        PromotionRefused: the gate's rules do not hold; the summary is printed and written all the same.
    """
    if config.report:
        require_writable(storage.absolute(config.report), "--report")
    summary = promote(config)
    print()
    for rule in summary["rules"]:
        print(
            f"  {'ok  ' if rule['passed'] else 'FAIL'}  {rule['rule']}: {rule['found']} (asked for: {rule['limit']})"
        )
    before = "nothing" if summary["from_version"] == "none" else f"version {summary['from_version']}"
    alias = f"{summary['model']}@{summary['alias']}"
    if not summary["promoted"]:
        refusal = PromotionRefused(f"{alias} stays at {before}: {summary['reason']}.")
        refusal.summary = summary
        raise refusal
    would = "would go " if config.dry_run else ""
    print(f"\n{alias}: {would}from {before} to version {summary['version']}: {summary['reason']}")
    return summary


if __name__ == "__main__":
    run(main, PromoteConfig)
