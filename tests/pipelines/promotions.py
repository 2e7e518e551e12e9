"""Helpers for tests of promotions: the version behind the alias, the tags of the versions, stored evaluations."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.promote import main
from raydetr.config import PromoteConfig
from raydetr.data.shards import Manifest
from raydetr.errors import PromotionRefused
from raydetr.registry.tracking import client
from raydetr.results.record import EvaluationRecord
from tests.raydetr.promotion.judged import put_on_file


def champion(config: PromoteConfig) -> int:
    return int(client(config.tracking_uri).get_registered_model("raydetr").aliases["champion"])


def tags(config: PromoteConfig, version: int) -> dict[str, dict[str, Any]]:
    """Return the decisions that are stored as tags of a version."""
    all_tags = client(config.tracking_uri).get_model_version("raydetr", str(version)).tags
    return {key: json.loads(value) for key, value in all_tags.items() if key.startswith("promotion.")}


def put(
    config: PromoteConfig, tmp_path: Path, version: int, data: Manifest, predictions: pa.Table, **changes: Any
) -> EvaluationRecord:
    """Store predictions as an evaluation of a version; return the record."""
    folder = tmp_path / f"evaluation-{version}-{data.digest[:8]}"
    return put_on_file(config.tracking_uri, version, data, predictions, folder, **changes)


def refused(config: PromoteConfig) -> str:
    """Run a promotion that must be refused, check the alias and the tags of both versions, and return the reason."""
    before = champion(config)
    with pytest.raises(PromotionRefused) as error:
        main(config)
    assert error.value.exit_status == 3
    assert champion(config) == before
    reason = error.value.summary["reason"]
    assert f"raydetr@champion stays at version {before}: {reason}" in str(error.value)
    challenger = int(config.model.rpartition("/")[2])
    for version in (before, challenger):
        (decision,) = tags(config, version).values()
        assert (decision["promoted"], decision["reason"], decision["old"], decision["new"]) == (
            False,
            reason,
            before,
            challenger,
        )
    print("\nREASON", reason)
    return reason
