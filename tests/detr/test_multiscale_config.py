"""`MultiScaleConfig`: saving, loading and validation."""

import pytest

from detr.config import DetrConfig
from detr.multiscale_config import MultiScaleConfig


def test_saved_settings_load_unchanged(tmp_path):
    config = DetrConfig(multi_scale={"candidates_per_query": 4, "nms_threshold": 0.65})
    config.save_pretrained(tmp_path)
    loaded = DetrConfig.from_pretrained(tmp_path)
    assert loaded.multi_scale == MultiScaleConfig(candidates_per_query=4, nms_threshold=0.65)
    assert loaded == config


@pytest.mark.parametrize(
    ("value", "error", "reason"),
    [
        ({"candidate": 200}, TypeError, "no setting 'candidate'"),
        ({"candidates_per_query": 0}, ValueError, "at least 1"),
        ({"candidates_per_query": 2.5}, TypeError, "must be int"),
        ({"head_convolutions": True}, TypeError, "must be int"),
        ({"nms_threshold": 0}, ValueError, "nms_threshold"),
        ({"nms_threshold": float("nan")}, ValueError, "nms_threshold"),
        (True, TypeError, "must be a MultiScaleConfig"),
    ],
)
def test_invalid_settings_are_rejected(value, error, reason):
    with pytest.raises(error, match=reason):
        DetrConfig(multi_scale=value)
