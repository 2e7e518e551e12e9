"""Registered versions for tests of promotions, created quickly because their files have only a few bytes."""

import hashlib
import tempfile
from pathlib import Path

from raydetr.registry.models import DIGEST_TAG
from raydetr.registry.sources import MODEL_FILES
from raydetr.registry.tracking import client, start_run


def bare_versions(
    uri: str, count: int, name: str = "raydetr", evaluated: bool = True, tags: dict[str, str] | None = None
) -> None:
    """Register versions 1 to `count`, with an evaluation on the data `d1` if `evaluated`."""
    run_id = start_run(uri, "training", "run", {}, {})
    mlflow = client(uri)
    artifacts = mlflow.get_run(run_id).info.artifact_uri
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, count + 1):
            Path(folder, str(number)).mkdir()
            for file in MODEL_FILES:
                Path(folder, str(number), file).write_text(str(number))
        mlflow.log_artifacts(run_id, folder, "versions")
    mlflow.create_registered_model(name)
    for number in range(1, count + 1):
        all_tags = {DIGEST_TAG: digest_of(number), **(tags or {})}
        if evaluated:
            all_tags["evaluation.d1"] = '{"figures": {"AP": 0.5}}'
        mlflow.create_model_version(name, f"{artifacts}/versions/{number}", run_id=run_id, tags=all_tags)
    mlflow.set_registered_model_alias(name, "challenger", str(count))


def digest_of(number: int) -> str:
    """Return the digest of the files of a version registered by `bare_versions`."""
    content = hashlib.sha256(str(number).encode()).digest()
    return hashlib.sha256(b"".join(f"{file}\n".encode() + content for file in MODEL_FILES)).hexdigest()
