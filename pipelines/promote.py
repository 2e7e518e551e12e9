"""Promote a model version (the challenger): move an alias (champion) to it if the gate passes.

- On a cluster: ray job submit -- python pipelines/promote.py --tracking-uri http://mlflow:5000
- On one machine: python pipelines/promote.py --model models:/raydetr/3 --margin 0.005 --max-latency-ms 200
- Tiny: python pipelines/promote.py --allow-contaminated-eval
- Undo: python pipelines/promote.py --undo

Both versions need an evaluation on the same data (pipelines/evaluate.py). The tiny command needs its flag because the
embedded validation set also selects the best checkpoint. Exit status: 0 promoted, 3 refused, 2 an error.
"""

from typing import Any

from raydetr import storage
from raydetr.command import require_writable, run
from raydetr.config import PromoteConfig
from raydetr.errors import PromotionRefused
from raydetr.promotion.promote import promote
from raydetr.results.json_form import to_json


def main(config: PromoteConfig) -> dict[str, Any]:
    """Promote or undo; return the summary.

    Raises:
        PromotionRefused: the gate refused the promotion; the summary is still printed and written.
    """
    if config.report:
        require_writable(storage.absolute(config.report), "--report")
    summary = promote(config)
    print()
    for rule in summary.rules:
        print(f"  {'ok  ' if rule.passed else 'FAIL'}  {rule.rule}: {rule.found} (required: {rule.limit})")
    before = "nothing" if summary.from_version == "none" else f"version {summary.from_version}"
    alias = f"{summary.model}@{summary.alias}"
    if not summary.promoted:
        refusal = PromotionRefused(f"{alias} stays at {before}: {summary.reason}.")
        refusal.summary = to_json(summary)
        raise refusal
    moved = "would move" if config.dry_run else "moved"
    print(f"\n{alias} {moved} from {before} to version {summary.version}: {summary.reason}")
    return to_json(summary)


if __name__ == "__main__":
    run(main, PromoteConfig)
