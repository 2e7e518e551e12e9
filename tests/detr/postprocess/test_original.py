"""The old names of the DETR page equal the original code; the reference is a slow reimplementation of it."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from detr import DetrImageProcessor
from detr.postprocess import post_process_instance, post_process_panoptic, post_process_segmentation
from tests.detr.postprocess.random_outputs import SECTION, THEIRS, Outputs, random_outputs

ROW = pytest.mark.checklist(SECTION, "original post-processors")
OURS = DetrImageProcessor()
SIZES = [(40, 61), (18, 25), (7, 9)]
PROCESSED = [(64, 98), (72, 100), (40, 51)]
THINGS = {0: True, 1: False, 2: True, 3: False, 4: False}


def confident(outputs, image, threshold):
    """Yield the index, score and label of each query of an image with a class above the threshold."""
    for query, probabilities in enumerate(outputs.logits[image].softmax(-1)):
        score, label = probabilities.max(0)
        if label < len(probabilities) - 1 and score > threshold:
            yield query, score, int(label)


@ROW
@pytest.mark.parametrize("sizes", [SIZES, torch.tensor(SIZES)], ids=["list", "tensor"])
@pytest.mark.parametrize(
    "thresholds", [(), (0.5, 0.3), (1.0, 0.5)], ids=["default", "lower", "none selected"]
)
def test_masks_above_a_score_may_overlap(thresholds, sizes):
    threshold, mask_threshold = thresholds or (0.9, 0.5)
    count = 0
    for seed in range(3):
        outputs = random_outputs(seed, confidence=9)
        got = OURS.post_process_segmentation(outputs, sizes, *thresholds)
        assert len(got) == len(SIZES)
        for i, (result, size) in enumerate(zip(got, SIZES)):
            expected = list(confident(outputs, i, threshold))
            assert list(result) == ["scores", "labels", "masks"]
            assert result["scores"].tolist() == [float(score) for _, score, _ in expected]
            assert result["labels"].tolist() == [label for *_, label in expected]
            assert result["masks"].dtype == torch.int64
            assert result["masks"].shape == (len(expected), *size)
            for mask, (query, *_) in zip(result["masks"], expected):
                logits = F.interpolate(outputs.pred_masks[i, query][None, None], size=size, mode="bilinear")
                assert torch.equal(mask, (logits[0, 0].sigmoid() > mask_threshold).long())
                count += 1
    assert (count > 10) == (threshold < 1)


@ROW
def test_masks_of_all_queries_are_resized_cropped_and_resized_to_the_original():
    """PostProcessSegm of the original, whose results are passed to COCO's evaluation together with all boxes."""
    outputs = random_outputs(0)
    results = OURS.post_process(outputs, torch.tensor(SIZES))
    got = OURS.post_process_instance(results, outputs, torch.tensor(SIZES), torch.tensor(PROCESSED))
    assert got is results
    for i, (height, width) in enumerate(PROCESSED):
        assert set(got[i]) == {"scores", "labels", "boxes", "masks"}
        padded = F.interpolate(outputs.pred_masks[i][None], size=(72, 100), mode="bilinear")
        on = padded.sigmoid()[:, :, :height, :width] > 0.5
        expected = F.interpolate(on.float(), size=SIZES[i], mode="nearest").byte()[0][:, None]
        assert got[i]["masks"].dtype == torch.uint8
        assert torch.equal(got[i]["masks"], expected)


def slow_panoptic(outputs, index, processed, target, things, threshold):
    """Compute ids as an array, and segments, as PostProcessPanoptic of the original does."""
    selected = list(confident(outputs, index, threshold))
    labels = [label for *_, label in selected]
    masks = [outputs.pred_masks[index, query] for query, *_ in selected]
    masks = [F.interpolate(mask[None, None], size=processed, mode="bilinear")[0, 0] for mask in masks]
    merge = True
    while True:
        ids = np.zeros(processed, np.int64)
        if masks:
            ids = torch.stack(masks, -1).flatten(0, 1).softmax(-1).argmax(-1).view(processed).numpy()
        for label in set(labels) if merge else ():
            same = [k for k, other in enumerate(labels) if other == label]
            if not things[label]:
                ids[np.isin(ids, same)] = same[0]
        merge = False
        id_image = Image.fromarray(np.stack([ids, ids * 0, ids * 0], -1).astype(np.uint8))
        ids = np.array(id_image.resize(target[::-1], Image.Resampling.NEAREST))[..., 0].astype(int)
        areas = [int((ids == k).sum()) for k in range(len(labels))]
        if all(area > 4 for area in areas):
            break
        masks = [mask for mask, area in zip(masks, areas) if area > 4]
        labels = [label for label, area in zip(labels, areas) if area > 4]
    segments = [
        {"id": k, "isthing": things[label], "category_id": label, "area": area}
        for k, (label, area) in enumerate(zip(labels, areas))
    ]
    return ids, segments


@ROW
@pytest.mark.parametrize("targets", [None, SIZES, torch.tensor(SIZES)], ids=["processed", "list", "tensor"])
@pytest.mark.parametrize("threshold", [0.3, 0.85, 1.0])
def test_panoptic_maps_and_segments_equal_the_original(targets, threshold):
    stuff = 0
    for seed in range(3):
        outputs = random_outputs(seed, confidence=9)
        got = OURS.post_process_panoptic(outputs, PROCESSED, targets, THINGS, threshold)
        for i, result in enumerate(got):
            target = PROCESSED[i] if targets is None else SIZES[i]
            ids, segments = slow_panoptic(outputs, i, PROCESSED[i], target, THINGS, threshold)
            assert list(result) == ["png_string", "segments_info"]
            with Image.open(io.BytesIO(result["png_string"])) as image:
                assert image.format == "PNG"
                assert np.array_equal(np.array(image) @ [1, 256, 65536], ids)
            assert result["segments_info"] == segments
            stuff += sum(not segment["isthing"] for segment in segments)
    assert (stuff > 3) == (threshold < 1)


@ROW
def test_panoptic_defaults_are_the_original_threshold_and_the_things_of_coco():
    logits = torch.zeros(1, 3, 202)
    logits[0, 0, 90] = logits[0, 1, 91] = 20.0
    logits[0, 2, 5] = 7.0  # a probability of 0.845
    masks = torch.full((1, 3, 4, 9), -9.0)
    for k in range(3):
        masks[0, k, :, 3 * k : 3 * k + 3] = 9.0
    (result,) = post_process_panoptic(Outputs(logits, masks, torch.rand(1, 3, 4)), [(4, 9)])
    assert [(s["category_id"], s["isthing"]) for s in result["segments_info"]] == [(90, True), (91, False)]


@ROW
def test_invalid_sizes_and_labels_are_rejected():
    outputs = random_outputs(1, confidence=9)
    with pytest.raises(ValueError, match="as many processed sizes as target sizes: there are 3 and 2"):
        post_process_panoptic(outputs, PROCESSED, SIZES[:2])
    with pytest.raises(ValueError, match="as many target sizes as the batch dimension"):
        post_process_panoptic(outputs, PROCESSED[:2])
    with pytest.raises(ValueError, match="is_thing_map does not have the predicted label 1"):
        post_process_panoptic(outputs, PROCESSED, None, {99: True}, 0.0)
    with pytest.raises(ValueError, match="as many target sizes as the batch dimension"):
        post_process_segmentation(outputs, SIZES[:2])
    with pytest.raises(ValueError, match="2 results and 3 images"):
        post_process_instance([{}, {}], outputs, SIZES, PROCESSED)


@pytest.mark.checklist(SECTION, "masks resized with padding")
@pytest.mark.known_issue(22)
def test_original_post_processing_crops_padding_on_request():
    # The second image is the left half of the padded batch, and its object is the left half of the image.
    masks = torch.full((2, 2, 8, 16), -9.0)
    masks[0, 0] = 9.0
    masks[1, 0, :, :4] = 9.0
    masks[1, 1, :, 4:] = 9.0
    outputs = Outputs(torch.tensor([[[9.0, 0, 0], [0, 9, 0]]] * 2), masks, torch.rand(2, 2, 4))
    processed = [(32, 64), (32, 32)]
    half = torch.zeros(32, 32, dtype=torch.int64)
    half[:, :16] = 1

    def masks_of(**options):
        return post_process_segmentation(outputs, processed, **options)[1]["masks"][0]

    def ids_of(**options):
        (_, result) = post_process_panoptic(outputs, processed, **options)
        return np.array(Image.open(io.BytesIO(result["png_string"])))[..., 0]

    assert torch.equal(masks_of(processed_sizes=processed), half)
    assert not torch.equal(masks_of(), half)
    assert np.array_equal(ids_of(cut_padding=True), 1 - half.numpy())
    assert not np.array_equal(ids_of(), 1 - half.numpy())
    (_, instance) = post_process_instance([{}, {}], outputs, processed, processed)
    assert torch.equal(instance["masks"][0, 0].long(), half)


def test_transformers_no_longer_has_the_old_names():
    for name in (
        "post_process",
        "post_process_segmentation",
        "post_process_instance",
        "post_process_panoptic",
    ):
        assert not hasattr(THEIRS, name)
        assert getattr(OURS, name).__doc__
