"""Panoptic maps, ids and scores equal transformers'; fused segments can be merged."""

import logging

import pytest
import torch

from detr import DetrImageProcessor
from detr.postprocess import post_process_panoptic_segmentation
from detr.postprocess.panoptic import _warn_that_nothing_is_fused
from tests.detr.postprocess.random_outputs import (
    SECTION,
    THEIRS,
    Outputs,
    assert_same_segments,
    random_outputs,
)

ROW = pytest.mark.checklist(SECTION, "panoptic")
SIZES = [(40, 61), (18, 25), (7, 9)]


def disjoint(labels):
    """Build confident outputs with a stripe of two columns for each label."""
    count = len(labels)
    logits = torch.full((1, count, max(labels) + 2), 0.0)
    logits[0, torch.arange(count), torch.tensor(labels)] = 12 - torch.arange(count) / 8
    masks = torch.full((1, count, 3, 2 * count), -9.0)
    for k in range(count):
        masks[0, k, :, 2 * k : 2 * k + 2] = 9.0
    return Outputs(logits, masks, torch.rand(1, count, 4))


@ROW
@pytest.mark.parametrize("fuse", [set(), {0, 2}, {0, 1, 2, 3, 4}], ids=["none", "some", "all"])
@pytest.mark.parametrize("sizes", [None, SIZES], ids=["cells", "resized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_maps_and_segments_equal_transformers(fuse, sizes, dtype):
    repeated = 0
    for seed in range(4):
        outputs = random_outputs(seed, dtype=dtype)
        for rules in [(0.5, 0.5, 0.8), (0.0, 0.3, 0.0), (0.7, 0.0, 0.3)]:
            expected = THEIRS.post_process_panoptic_segmentation(outputs, *rules, fuse, sizes)
            got = DetrImageProcessor().post_process_panoptic_segmentation(
                outputs, *rules, label_ids_to_fuse=fuse, target_sizes=sizes
            )
            assert_same_segments(got, expected)
            ids = [[segment["id"] for segment in result["segments_info"]] for result in expected]
            repeated += sum(len(image) - len(set(image)) for image in ids)
    assert (repeated > 3) == bool(fuse), "the random outputs should have fused segments"


@ROW
@pytest.mark.checklist(SECTION, "none kept")
def test_without_a_query_above_the_threshold_the_map_is_minus_one():
    outputs = random_outputs(0)
    outputs.logits[1, :, -1] += 100
    got = post_process_panoptic_segmentation(outputs, label_ids_to_fuse={1}, target_sizes=SIZES)
    assert_same_segments(
        got, THEIRS.post_process_panoptic_segmentation(outputs, label_ids_to_fuse={1}, target_sizes=SIZES)
    )
    assert got[1]["segmentation"].unique().tolist() == [-1]
    got = post_process_panoptic_segmentation(outputs, label_ids_to_fuse=(), integer_maps=True)
    assert got[1]["segmentation"].dtype == torch.int32


@ROW
def test_a_warning_that_nothing_is_fused_is_logged_once(caplog):
    _warn_that_nothing_is_fused.cache_clear()
    outputs = random_outputs(1)
    with caplog.at_level(logging.WARNING, "detr.postprocess.panoptic"):
        got = [post_process_panoptic_segmentation(outputs) for _ in range(2)]
    assert [record.message for record in caplog.records] == [
        "`label_ids_to_fuse` unset. No instance will be fused."
    ]
    assert_same_segments(got[0], post_process_panoptic_segmentation(outputs, label_ids_to_fuse=set()))


@ROW
@pytest.mark.known_issue(23)
def test_merged_segments_have_one_entry_and_a_unique_id():
    # Sky (0), a person (1), sky again, a car (2): in transformers the car gets the id of the person.
    outputs = disjoint([0, 1, 0, 2])
    stripes = [[1, 1, 2, 2, 1, 1, 3, 3]] * 3

    def ids(result):
        return [
            (segment["id"], segment["label_id"], segment["was_fused"]) for segment in result["segments_info"]
        ]

    (merged,) = post_process_panoptic_segmentation(outputs, label_ids_to_fuse={0}, merge_fused=True)
    assert merged["segmentation"].tolist() == stripes
    assert ids(merged) == [(1, 0, True), (2, 1, False), (3, 2, False)]
    (theirs,) = THEIRS.post_process_panoptic_segmentation(outputs, label_ids_to_fuse={0})
    assert theirs["segmentation"].tolist() != stripes
    assert ids(theirs) == [(1, 0, True), (2, 1, False), (1, 0, True), (2, 2, False)]
    assert_same_segments(post_process_panoptic_segmentation(outputs, label_ids_to_fuse={0}), [theirs])
    assert merged["segments_info"][0]["score"] == theirs["segments_info"][0]["score"]


@ROW
def test_a_merged_segment_has_the_best_score_of_its_queries():
    outputs = disjoint([0, 0])
    outputs.logits[0, 0, 0] = 3.0
    (apart,) = post_process_panoptic_segmentation(outputs, label_ids_to_fuse={0})
    (merged,) = post_process_panoptic_segmentation(outputs, label_ids_to_fuse={0}, merge_fused=True)
    scores = [segment["score"] for segment in apart["segments_info"]]
    assert scores[0] < scores[1] == merged["segments_info"][0]["score"]


@ROW
@pytest.mark.parametrize("fuse", [(), {0, 2}, range(5)], ids=["none", "some", "all"])
def test_merging_changes_only_ids(fuse):
    """Each merged segment covers the pixels of its queries; ids are 1, 2, ... without gaps."""
    for seed in range(6):
        outputs = random_outputs(seed)
        rules = {"threshold": 0.2, "overlap_mask_area_threshold": 0.2, "target_sizes": SIZES}
        apart = post_process_panoptic_segmentation(outputs, label_ids_to_fuse=(), **rules)
        merged = post_process_panoptic_segmentation(
            outputs, label_ids_to_fuse=fuse, merge_fused=True, **rules
        )
        for before, after in zip(apart, merged):
            ids = [segment["id"] for segment in after["segments_info"]]
            assert ids == list(range(1, len(ids) + 1))
            for segment in after["segments_info"]:
                mask = torch.zeros_like(before["segmentation"], dtype=torch.bool)
                covered = before["segmentation"][after["segmentation"] == segment["id"]].unique()
                for id in covered.tolist():
                    assert before["segments_info"][id - 1]["label_id"] == segment["label_id"]
                    mask |= before["segmentation"] == id
                assert torch.equal(mask, after["segmentation"] == segment["id"])
                assert len(covered) == 1 or segment["was_fused"]
            fused = [segment["label_id"] for segment in after["segments_info"] if segment["was_fused"]]
            assert len(fused) == len(set(fused))


def test_the_number_of_target_sizes_must_be_that_of_the_images():
    with pytest.raises(ValueError, match="as many target sizes as the batch dimension of the logits"):
        post_process_panoptic_segmentation(random_outputs(0), label_ids_to_fuse=(), target_sizes=SIZES[:2])
