"""The gate where masks or segments are what is judged: every rule is about the figure that was asked for, not boxes."""

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
"""Of both versions, unless a test says otherwise: what boxes are like must not matter."""


@dataclass(frozen=True)
class Judge:
    """A figure and the evaluations that have it."""

    metric: str
    task: str
    predict: Callable[..., pa.Table]
    title: str


JUDGES = [Judge("mask_AP", "instance", outlines, "mask AP"), Judge("PQ", "panoptic", segmented, "PQ")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(params=rest_slow(JUDGES), ids=lambda each: each.metric)
def judge(request: pytest.FixtureRequest) -> Judge:
    return request.param


@pytest.fixture
def by(config: PromoteConfig, judge: Judge) -> PromoteConfig:
    """The flags that ask for the figure."""
    return replace(config, metric=judge.metric)


def blurs(data: Manifest, of_all: float, **of_some: float) -> dict[str, float]:
    """By name of the class."""
    return {category["name"]: of_some.get(category["name"], of_all) for category in data.categories}


def evaluate_both(by, tmp_path, data, judge, old, new, boxes=(BOXES, BOXES), seeds=(0, 0)) -> None:
    """Put predictions of the two versions on file, masks or segments off by `old` and `new`."""
    for version, blur, off, seed in zip((1, 2), (old, new), boxes, seeds, strict=True):
        put(by, tmp_path, version, data, judge.predict(data, blur, off, seed), task=judge.task)


def test_a_better_one_is_promoted_although_its_boxes_are_worse(by, data, judge, tmp_path):
    evaluate_both(by, tmp_path, data, judge, BLUR, BLUR / 2, boxes=(0.02, 0.2))
    assert "AP is better: -0." in refused(replace(by, metric="AP"))
    page = tmp_path / "page.html"
    summary = main(replace(by, report=str(page)))
    assert champion(by) == 2
    figure = summary["figures"][judge.metric]
    assert figure["delta"] > 0.05
    assert summary["figures"]["AP"]["high"] < 0
    assert summary["reason"].startswith(f"{judge.metric} {figure['old']:.4f} to {figure['new']:.4f}")
    found = {rule["rule"]: rule["found"] for rule in summary["rules"]}
    assert found[f"{judge.metric} is better beyond chance"] == (
        f"95 % of resamples between {figure['low']:+.4f} and {figure['high']:+.4f}"
    )
    assert found["no class is much worse"].startswith("the worst of ")
    kept = tags(by, 2)["promotion.champion.0001"]
    assert (kept["promoted"], kept["reason"]) == (True, summary["reason"])
    html = page.read_text()
    assert f"{judge.metric} rose by" in html
    assert f"{judge.title} old" in html


def test_an_equal_one_is_refused(by, data, judge, tmp_path):
    evaluate_both(by, tmp_path, data, judge, BLUR, BLUR, boxes=(0.2, 0.02))
    reason = refused(by)
    assert reason.startswith(f"{judge.metric} is better: +0.0000 ")
    assert "beyond chance" not in reason


def test_a_slightly_worse_one_is_refused_and_passes_where_that_much_is_allowed(by, data, judge, tmp_path):
    evaluate_both(by, tmp_path, data, judge, BLUR, BLUR * 1.03, boxes=(0.2, 0.02))
    assert f"{judge.metric} is better: -0.0" in refused(by)
    assert main(replace(by, margin=-0.05, tolerance=0.1))["promoted"]
    assert champion(by) == 2


def test_better_by_chance_is_refused(by, data, judge, tmp_path):
    evaluate_both(by, tmp_path, data, judge, BLUR, BLUR * 0.98, seeds=(1, 0))
    reason = refused(by)
    assert reason.startswith(f"{judge.metric} is better beyond chance: 95 % of resamples between -0.")
    assert main(replace(by, tolerance=0.2, max_class_drop=1.0))["promoted"]


def test_one_class_much_worse_in_that_figure_is_refused_by_name(by, data, judge, tmp_path):
    evaluate_both(by, tmp_path, data, judge, BLUR, blurs(data, 0.02, square=0.35))
    reason = refused(by)
    assert reason.startswith("no class is much worse: square -0.")
    assert reason.endswith(f"asked for: none that loses more than 0.05 {judge.metric} beyond chance")
    assert f"{judge.metric} is better" not in reason
    assert main(replace(by, max_class_drop=1.0))["promoted"]


def test_a_class_of_stuff_counts_for_panoptic_quality(config, data, tmp_path):
    judge, by = JUDGES[1], replace(config, metric="PQ")
    evaluate_both(by, tmp_path, data, judge, BLUR, blurs(data, 0.02, sky=0.6))
    assert refused(by).startswith("no class is much worse: sky -0.")


def test_what_the_evaluations_have_is_told_where_the_figure_is_missing(config, data, tmp_path):
    judge = JUDGES[0]
    evaluate_both(config, tmp_path, data, judge, BLUR, BLUR / 2)
    with pytest.raises(ConfigError, match="--metric PQ: the comparison has AP, AP50, AP75, mask_AP"):
        main(replace(config, metric="PQ"))


def test_the_masks_that_were_scored_are_asked_for(by, data, judge, tmp_path):
    """Predictions with other masks and the same boxes are not those of the record."""
    evaluate_both(by, tmp_path, data, judge, BLUR, BLUR / 2)
    folders = [tmp_path / f"evaluation-{version}-{data.digest[:8]}" for version in (1, 2)]
    (folders[1] / "predictions.parquet").write_bytes((folders[0] / "predictions.parquet").read_bytes())
    reason = refused(by)
    assert f"the predictions give the figures on file: challenger's {judge.metric} 0." in reason


@pytest.mark.slow
def test_latency_is_measured_with_the_mask_heads(data, judge, tmp_path):
    uri = empty_registry(tmp_path)
    run_id = start_run(uri, "training", "run", {}, {})
    names = [category["name"] for category in data.categories]
    for version in (1, 2):
        folder = save_tiny_detr(tmp_path / f"tiny-{version}", names, edge=64, seed=version)
        register(uri, run_id, str(add_mask_head(folder, seed=version)))
    client(uri).set_registered_model_alias("raydetr", "champion", "1")
    by = PromoteConfig(tracking_uri=uri, metric=judge.metric, latency_images=4, max_latency_ms=1e6)
    evaluate_both(by, tmp_path, data, judge, BLUR, BLUR / 2)
    measured = []
    load = ObjectDetector.from_pretrained

    def loaded(*arguments, **rest):
        measured.append(load(*arguments, **rest))
        return measured[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ObjectDetector, "from_pretrained", loaded)
        summary = main(by)
    assert summary["rules"][-1]["rule"] == "it is fast enough"
    assert [type(each.model) for each in measured] == [DetrForSegmentation] * 2
