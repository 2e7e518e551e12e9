"""Post-processing of perfect outputs for real photos reproduces their panoptic ground truth."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detr import DetrImageProcessor
from detr.image_transforms import rgb_to_id
from detr.metrics.panoptic import PanopticEvaluator
from tests.detr.postprocess.random_outputs import SECTION, THEIRS, Outputs, assert_same_segments

DATA = Path(__file__).parents[4] / "shared" / "data" / "panopticapi_sample"
PANOPTIC = DATA / "panoptic_examples.json"

pytestmark = pytest.mark.skipif(not PANOPTIC.is_file(), reason="the sample of panopticapi is missing")

OURS = DetrImageProcessor()
THINGS = {label: label <= 90 for label in range(201)}
STUFF = {label for label in range(201) if label > 90}


def load_ground_truth():
    """Yield (annotation, ids int64 [height, width]) of each photo."""
    for annotation in json.loads(PANOPTIC.read_text())["annotations"]:
        with Image.open(DATA / "panoptic_examples" / annotation["file_name"]) as image:
            yield annotation, torch.from_numpy(rgb_to_id(np.asarray(image.convert("RGB")))).long()


def outputs_of(annotation, ids):
    """Build the outputs of a perfect, confident model for these ids, with three additional empty queries."""
    segments = annotation["segments_info"]
    queries = len(segments) + 3
    logits = torch.zeros(1, queries, 202)
    logits[0, len(segments) :, -1] = 20.0
    masks = torch.full((1, queries, *ids.shape), -9.0)
    for k, segment in enumerate(segments):
        logits[0, k, segment["category_id"]] = 20.0
        masks[0, k][ids == segment["id"]] = 9.0
    return Outputs(logits, masks, torch.rand(1, queries, 4))


@pytest.mark.checklist(SECTION, "panoptic")
def test_perfect_outputs_reproduce_the_ground_truth_at_mask_resolution():
    for annotation, full in load_ground_truth():
        ids = full[2::4, 2::4]
        outputs = outputs_of(annotation, ids)
        (apart,) = OURS.post_process_panoptic_segmentation(outputs, label_ids_to_fuse=())
        assert_same_segments(
            [apart], THEIRS.post_process_panoptic_segmentation(outputs, label_ids_to_fuse=set())
        )
        present = [s for s in annotation["segments_info"] if (ids == s["id"]).any()]
        assert len(apart["segments_info"]) == len(present) > 10
        for result, segment in zip(apart["segments_info"], present):
            assert result["label_id"] == segment["category_id"]
            not_void = ids != 0  # void pixels are assigned to any segment
            assert torch.equal(
                apart["segmentation"][not_void] == result["id"], ids[not_void] == segment["id"]
            )


@pytest.mark.checklist(SECTION, "panoptic")
@pytest.mark.checklist(SECTION, "original post-processors")
@pytest.mark.parametrize("old", [False, True], ids=["page's name", "old name"])
def test_perfect_outputs_have_a_panoptic_quality_of_one(old):
    evaluator = PanopticEvaluator(PANOPTIC, DATA / "panoptic_examples")
    for annotation, ids in load_ground_truth():
        outputs, size = outputs_of(annotation, ids), tuple(ids.shape)
        if old:
            (result,) = OURS.post_process_panoptic(outputs, [size], is_thing_map=THINGS)
            with Image.open(io.BytesIO(result["png_string"])) as image:
                assert image.size == size[::-1]
        else:
            (result,) = OURS.post_process_panoptic_segmentation(
                outputs, label_ids_to_fuse=STUFF, target_sizes=[size], merge_fused=True
            )
        evaluator.update([{"image_id": annotation["image_id"], **result}])
    metrics = evaluator.summarize()
    for group in ("All", "Things", "Stuff"):
        assert metrics[group]["n"] > 0
        assert metrics[group]["pq"] == pytest.approx(1.0, abs=1e-12)
