"""What tests of the gate ask after a promotion: where the alias is, and what the versions carry."""

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
from tests.raydetr.promotion.judged import put_on_file


def champion(config: PromoteConfig) -> int:
    return int(client(config.tracking_uri).get_registered_model("raydetr").aliases["champion"])


def tags(config: PromoteConfig, version: int) -> dict[str, dict[str, Any]]:
    """The decisions that a version carries."""
    of = client(config.tracking_uri).get_model_version("raydetr", str(version)).tags
    return {key: json.loads(value) for key, value in of.items() if key.startswith("promotion.")}


def put(
    config: PromoteConfig, tmp_path: Path, version: int, data: Manifest, predictions: pa.Table, **changes: Any
) -> dict[str, Any]:
    """Put predictions on file as an evaluation of a version; its record."""
    folder = tmp_path / f"evaluation-{version}-{data.digest[:8]}"
    return put_on_file(config.tracking_uri, version, data, predictions, folder, **changes)


def refused(config: PromoteConfig) -> str:
    """The reason of a refusal, which has left the alias where it was and is kept on both versions."""
    before = champion(config)
    with pytest.raises(PromotionRefused) as error:
        main(config)
    assert error.value.exit_status == 3
    assert champion(config) == before
    reason = error.value.summary["reason"]
    assert f"raydetr@champion stays at version {before}: {reason}" in str(error.value)
    challenger = int(config.model.rpartition("/")[2])
    for version in (before, challenger):
        (kept,) = tags(config, version).values()
        assert (kept["promoted"], kept["reason"], kept["old"], kept["new"]) == (
            False,
            reason,
            before,
            challenger,
        )
    print("\nREASON", reason)
    return reason
