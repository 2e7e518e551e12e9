"""Move an alias (champion) to a model version (the challenger) that has an evaluation on file.

On a cluster:    ray job submit -- python pipelines/promote.py --tracking-uri http://mlflow:5000
On one machine:  python pipelines/promote.py --model models:/raydetr/3 --alias champion
Tiny:            python pipelines/promote.py
"""

from typing import Any

from raydetr.command import run
from raydetr.config import PromoteConfig
from raydetr.registry.promote import promote
from raydetr.registry.tracking import resolve_uri


def main(config: PromoteConfig) -> dict[str, Any]:
    """Promote; the summary."""
    done = promote(resolve_uri(config.tracking_uri), config.model, config.alias)
    before = "nothing" if done.previous is None else f"version {done.previous}"
    print(f"\n{done.name}@{done.alias}: from {before} to version {done.version}")
    return {
        "model": done.name,
        "alias": done.alias,
        "from_version": "none" if done.previous is None else done.previous,
        "version": done.version,
        **{f"AP on {digest[:12]}": e["figures"]["AP"] for digest, e in done.evaluations.items()},
        "evaluations": {digest: record["figures"] for digest, record in done.evaluations.items()},
    }


if __name__ == "__main__":
    run(main, PromoteConfig)
