"""Promotions by a metric of masks or segments: every rule applies to the requested metric, not to boxes."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pyarrow as pa
import pytest

from detr.inference.detector import ObjectDetector
from detr.model.segmentation import DetrForSegmentation
from pipelines.promote import main
from raydetr.config import PromoteConfig
from raydetr.data.shards import Manifest
from raydetr.errors import ConfigError
from raydetr.registry.models import register
from raydetr.registry.tracking import client, start_run
from tests.empty_registry import empty_registry
from tests.pipelines.promotions import champion, put, refused, tags
from tests.raydetr.promotion.judged_masks import outlines, scenes, segmented
from tests.tiers import rest_slow
from tests.tiny_detr import add_mask_head, save_tiny_detr

BLUR = 0.12
BOXES = 0.05
"""Displacement of the boxes of both versions, unless a test overrides it. The boxes must not affect the decision."""


@dataclass(frozen=True)
class MetricCase:
    """A metric, and the task and predictions of the evaluations that have it."""

    metric: str
    task: str
    predict: Callable[..., pa.Table]
    title: str


CASES = [
    MetricCase("mask_AP", "instance", outlines, "mask AP"),
    MetricCase("PQ", "panoptic", segmented, "PQ"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(params=rest_slow(CASES), ids=lambda each: each.metric)
def case(request: pytest.FixtureRequest) -> MetricCase:
    return request.param


@pytest.fixture
def flags(config: PromoteConfig, case: MetricCase) -> PromoteConfig:
    """The flags with the metric of the case."""
    return replace(config, metric=case.metric)


def blurs(data: Manifest, default: float, **by_class: float) -> dict[str, float]:
    """Return the displacement of each class by name."""
    return {category["name"]: by_class.get(category["name"], default) for category in data.categories}


def evaluate_both(flags, tmp_path, data, case, old, new, boxes=(BOXES, BOXES), seeds=(0, 0)) -> None:
    """Store predictions of the two versions, with masks or segments displaced by `old` and `new`."""
    for version, blur, box_blur, seed in zip((1, 2), (old, new), boxes, seeds, strict=True):
        put(flags, tmp_path, version, data, case.predict(data, blur, box_blur, seed), task=case.task)


def test_a_better_version_is_promoted_although_its_boxes_are_worse(flags, data, case, tmp_path):
    evaluate_both(flags, tmp_path, data, case, BLUR, BLUR / 2, boxes=(0.02, 0.2))
    assert "AP is better: -0." in refused(replace(flags, metric="AP"))
    page = tmp_path / "page.html"
    summary = main(replace(flags, report=str(page)))
    assert champion(flags) == 2
    metric = summary["figures"][case.metric]
    assert metric["delta"] > 0.05
    assert summary["figures"]["AP"]["high"] < 0
    assert summary["reason"].startswith(f"{case.metric} {metric['old']:.4f} to {metric['new']:.4f}")
    found = {rule["rule"]: rule["found"] for rule in summary["rules"]}
    assert found[f"{case.metric} is better beyond chance"] == (
        f"95 % of resamples between {metric['low']:+.4f} and {metric['high']:+.4f}"
    )
    assert found["no class is much worse"].startswith("the worst of ")
    decision = tags(flags, 2)["promotion.champion.0001"]
    assert (decision["promoted"], decision["reason"]) == (True, summary["reason"])
    html = page.read_text()
    assert f"{case.metric} rose by" in html
    assert f"{case.title} old" in html


def test_an_equal_version_is_refused(flags, data, case, tmp_path):
    evaluate_both(flags, tmp_path, data, case, BLUR, BLUR, boxes=(0.2, 0.02))
    reason = refused(flags)
    assert reason.startswith(f"{case.metric} is better: +0.0000 ")
    assert "beyond chance" not in reason


def test_a_slightly_worse_version_passes_only_with_a_margin_and_a_tolerance(flags, data, case, tmp_path):
    evaluate_both(flags, tmp_path, data, case, BLUR, BLUR * 1.03, boxes=(0.2, 0.02))
    assert f"{case.metric} is better: -0.0" in refused(flags)
    assert main(replace(flags, margin=-0.05, tolerance=0.1))["promoted"]
    assert champion(flags) == 2


def test_an_improvement_within_chance_is_refused(flags, data, case, tmp_path):
    evaluate_both(flags, tmp_path, data, case, BLUR, BLUR * 0.98, seeds=(1, 0))
    reason = refused(flags)
    assert reason.startswith(f"{case.metric} is better beyond chance: 95 % of resamples between -0.")
    assert main(replace(flags, tolerance=0.2, max_class_drop=1.0))["promoted"]


def test_a_version_with_a_much_worse_class_in_the_metric_is_refused_with_its_name(
    flags, data, case, tmp_path
):
    evaluate_both(flags, tmp_path, data, case, BLUR, blurs(data, 0.02, square=0.35))
    reason = refused(flags)
    assert reason.startswith("no class is much worse: square -0.")
    assert reason.endswith(f"required: no class that loses more than 0.05 {case.metric} beyond chance")
    assert f"{case.metric} is better" not in reason
    assert main(replace(flags, max_class_drop=1.0))["promoted"]


def test_stuff_classes_count_for_panoptic_quality(config, data, tmp_path):
    case, flags = CASES[1], replace(config, metric="PQ")
    evaluate_both(flags, tmp_path, data, case, BLUR, blurs(data, 0.02, sky=0.6))
    assert refused(flags).startswith("no class is much worse: sky -0.")


def test_the_error_of_a_missing_metric_lists_the_available_ones(config, data, tmp_path):
    evaluate_both(config, tmp_path, data, CASES[0], BLUR, BLUR / 2)
    with pytest.raises(ConfigError, match="--metric PQ: the comparison has AP, AP50, AP75, mask_AP"):
        main(replace(config, metric="PQ"))


def test_the_masks_must_reproduce_the_recorded_metrics(flags, data, case, tmp_path):
    """Predictions with other masks but the same boxes do not match the record."""
    evaluate_both(flags, tmp_path, data, case, BLUR, BLUR / 2)
    folders = [tmp_path / f"evaluation-{version}-{data.digest[:8]}" for version in (1, 2)]
    (folders[1] / "predictions.parquet").write_bytes((folders[0] / "predictions.parquet").read_bytes())
    reason = refused(flags)
    assert f"the predictions reproduce the recorded metrics: challenger's {case.metric} 0." in reason


@pytest.mark.slow
def test_latency_is_measured_with_the_mask_heads(data, case, tmp_path):
    uri = empty_registry(tmp_path)
    run_id = start_run(uri, "training", "run", {}, {})
    names = [category["name"] for category in data.categories]
    for version in (1, 2):
        folder = save_tiny_detr(tmp_path / f"tiny-{version}", names, edge=64, seed=version)
        register(uri, run_id, str(add_mask_head(folder, seed=version)))
    client(uri).set_registered_model_alias("raydetr", "champion", "1")
    flags = PromoteConfig(tracking_uri=uri, metric=case.metric, latency_images=4, max_latency_ms=1e6)
    evaluate_both(flags, tmp_path, data, case, BLUR, BLUR / 2)
    detectors = []
    load = ObjectDetector.from_pretrained

    def load_and_record(*arguments, **rest):
        detectors.append(load(*arguments, **rest))
        return detectors[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ObjectDetector, "from_pretrained", load_and_record)
        summary = main(flags)
    assert summary["rules"][-1]["rule"] == "the latency is within the limit"
    assert [type(each.model) for each in detectors] == [DetrForSegmentation] * 2
