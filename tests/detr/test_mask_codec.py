"""Segmentations in all formats decode to the masks of pycocotools; those that do not fit the image are rejected."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from detr import CocoEvaluator, DetrImageProcessor
from detr.mask_codec import check_segmentation, decode_segmentation, encode_runs, rle_runs
from detr.metrics.masks import encode_masks

SIZE = (60, 80)
SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]
RUNS = [610] + [20, 40] * 19 + [20, 3030]


def rle(counts, size=SIZE):
    return {"size": size, "counts": counts}


def runs_of(mask: np.ndarray) -> list[int]:
    flat = np.concatenate([[0], mask.flatten("F"), [2]])
    return np.diff(np.flatnonzero(np.diff(flat)), prepend=0).tolist()


@pytest.mark.parametrize(
    "segmentation",
    [
        [SQUARE],
        (tuple(SQUARE),),
        [np.array(SQUARE)],
        np.array([SQUARE], np.float32),
        [torch.tensor(SQUARE)],
        SQUARE,
        np.array(SQUARE),
        [np.array(SQUARE).reshape(4, 2).tolist()],
        [SQUARE, [1, 1, 5, 5]],
        [[1, 1, 5, 5], SQUARE],
        [SQUARE, []],
        [[], np.array(SQUARE)],
        rle(RUNS),
        rle(tuple(RUNS)),
        rle(np.array(RUNS)),
        rle([float(run) for run in RUNS]),
        rle(encode_runs(RUNS, *SIZE)["counts"]),
        rle(encode_runs(RUNS, *SIZE)["counts"].encode(), np.array(SIZE)),
        rle(RUNS) | {"score": 1},
        rle([*RUNS[:-1], 1000, 0, 2030]),
    ],
    ids=str,
)
def test_every_format_of_a_square_decodes_to_the_square(segmentation):
    mask = decode_segmentation(segmentation, *SIZE, "it")
    assert mask.sum() == 400
    assert mask[10:30, 10:30].all()


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "has the segmentation None"),
        ([], r"has the segmentation \[\]"),
        ([[]], "polygons of at least 3 points"),
        ([[1, 2, 3, 4]], "polygons of at least 3 points"),
        ([[1, 2, 3, 4, 5, 6, 7]], "a polygon of 7 coordinates"),
        ([["a", "b"] * 3], "a list of numbers"),
        ([[SQUARE]], "a list of numbers"),
        ([{"x": 1}], "a list of numbers"),
        ("text", "has the segmentation text"),
        ({"counts": [1]}, "expected a list of polygons"),
        ([[1, 2, 3, 4, 5, np.nan]], "NaN or beyond"),
        ([[1, 2, 3, 4, 5, -np.inf]], "NaN or beyond"),
        ([[1, 2, 3, 4, 5, None]], "NaN or beyond"),
        ([[1, 2, 3, 4, 5, 2e6]], r"beyond 1e\+06"),
        (rle([10, 20]), "run lengths of 30 pixels in all: expected 60 x 80 = 4800"),
        (rle([]), "run lengths of 0 pixels"),
        (rle(""), "run lengths of 0 pixels"),
        (rle("Rc0d0X1"), "expected 60 x 80 = 4800"),
        (rle([10, 5000]), "run lengths of 5010 pixels"),
        (rle([-5, 10, 4795]), "the run length -5"),
        (rle([2**62, 2**62, 2**62, 2**62, 4800]), "expected 60 x 80"),
        (rle([10.5, 4789.5]), "cannot be read: 10.5 is not an integer"),
        (rle(["10", "4790"]), "cannot be read"),
        (rle([True, 4799]), "True is not an integer"),
        (rle(None), "cannot be read"),
        (rle(4800), "cannot be read"),
        (rle("o\x07"), "character 7 at 1"),
        (rle("é"), "cannot be read"),
        (rle("P" * 4), "ends within a number"),
        (rle("P" * 20 + "0"), "a number has 21 digits"),
        (rle([5400], (60, 90)), r"RLE of \[60, 90\], the image is \[60, 80\]"),
        (rle([4800], (4800,)), r"RLE of size \(4800,\)"),
        (rle([4800], (60, float("inf"))), "RLE of size"),
    ],
    ids=str,
)
def test_a_segmentation_that_does_not_fit_the_image_is_rejected(segmentation, message):
    with pytest.raises(ValueError, match=f"^image 7: object 2 .*{message}"):
        check_segmentation(segmentation, SIZE, "image 7: object 2")


@pytest.mark.parametrize("seed", range(5))
def test_random_masks_are_restored_from_every_encoding(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 50, 2).tolist()
    mask = (rng.random((height, width)) < rng.random()).astype(np.uint8)
    packed = coco_mask.encode(np.asfortranarray(mask))["counts"]
    assert rle_runs(packed).tolist() == runs_of(mask)
    assert encode_runs(runs_of(mask), height, width)["counts"] == packed.decode()
    for counts in (packed, packed.decode(), runs_of(mask)):
        assert np.array_equal(decode_segmentation(rle(counts, (height, width)), height, width, "it"), mask)


def test_random_polygons_are_drawn_as_pycocotools_draws_them():
    rng = np.random.default_rng(9)
    for _ in range(20):
        polygons = [rng.uniform(-5, 85, 2 * rng.integers(3, 8)).tolist() for _ in range(rng.integers(1, 4))]
        expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *SIZE)))
        assert np.array_equal(decode_segmentation(polygons, *SIZE, "it"), expected)


BAD = [rle([10, 20]), rle(""), [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, np.nan]], [[1e9] * 6]]


@pytest.mark.parametrize("segmentation", BAD, ids=str)
def test_every_entry_point_rejects_invalid_segmentations(segmentation):
    entry = {"category_id": 1, "bbox": [10, 10, 20, 20], "area": 400, "segmentation": segmentation}
    crowd = entry | {"iscrowd": 1}
    with pytest.raises(ValueError, match="image_id 7: object 1 has"):
        DetrImageProcessor()(
            np.zeros((*SIZE, 3), np.uint8),
            {"image_id": 7, "annotations": [crowd, entry]},
            return_segmentation_masks=True,
        )
    ground_truth = {
        "images": [{"id": 7, "height": 60, "width": 80}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [entry | {"id": 1, "image_id": 7}],
    }
    evaluator = CocoEvaluator(ground_truth, "segm")
    evaluator.update({7: {"scores": [0.5], "labels": [1], "masks": np.ones((1, *SIZE))}})
    with pytest.raises(ValueError, match=r"annotation 0 \(image_id 7\) has"):
        evaluator.accumulate()
    if isinstance(segmentation, dict):
        with pytest.raises(ValueError, match="a mask has an RLE"):
            encode_masks([segmentation])


def test_masks_that_all_lie_outside_the_image_are_an_error_and_not_empty_objects():
    def labels(*objects):
        entries = [{"category_id": 1, "bbox": b, "area": 400, "segmentation": s} for b, s in objects]
        processor = DetrImageProcessor(do_resize=False)
        annotation = {"image_id": 7, "annotations": entries}
        return processor(np.zeros((*SIZE, 3), np.uint8), annotation, return_segmentation_masks=True)["labels"]

    box, relative, tiny = (
        [10, 10, 20, 20],
        [[0.1, 0.1, 0.3, 0.1, 0.3, 0.3]],
        ([5, 5, 0.2, 0.2], [[5, 5, 5.2, 5, 5, 5.2]]),
    )
    for segmentation in (relative, rle([4800]), [[100, 100, 120, 100, 120, 120]]):
        with pytest.raises(ValueError, match="image_id 7: the segmentations of its 1 objects cover no pixel"):
            labels((box, segmentation))
    assert labels(tiny)[0]["masks"].sum() == 0
    assert labels((box, [SQUARE]), (box, relative))[0]["masks"].sum() == 400
