"""Registered versions for tests of promotions, made quickly: they have no files."""

from raydetr.registry.models import DIGEST_TAG
from raydetr.registry.tracking import client, start_run


def bare_versions(
    uri: str, count: int, name: str = "raydetr", evaluated: bool = True, tags: dict[str, str] | None = None
) -> None:
    """Versions 1 to `count`, with an evaluation on the data `d1` where they are to have one."""
    run_id = start_run(uri, "training", "run", {}, {})
    mlflow = client(uri)
    mlflow.create_registered_model(name)
    for number in range(1, count + 1):
        all_tags = {DIGEST_TAG: f"digest {number}", **(tags or {})}
        if evaluated:
            all_tags["evaluation.d1"] = '{"figures": {"AP": 0.5}}'
        mlflow.create_model_version(name, "s3://nowhere/model", run_id=run_id, tags=all_tags)
    mlflow.set_registered_model_alias(name, "challenger", str(count))
