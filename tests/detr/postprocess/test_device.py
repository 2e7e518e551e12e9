"""Results stay on the device of the outputs, and are the same on every device."""

import pytest
import torch

from detr import DetrImageProcessor
from tests.detr.postprocess.random_outputs import SECTION, Outputs, random_outputs

SIZES = [(40, 61), (18, 25), (7, 9)]
PROCESSED = [(72, 100), (60, 100), (40, 51)]
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


def tensors(value):
    """Yield every tensor in nested lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


@pytest.mark.checklist(SECTION, "device")
@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("processed", [None, PROCESSED], ids=["whole", "cut"])
def test_results_are_on_the_device_of_the_outputs(device, processed):
    processor = DetrImageProcessor()
    outputs = random_outputs(0)
    outputs.logits[1, :, -1] += 100
    moved = Outputs(*(tensor.to(device) for tensor in vars(outputs).values()))
    calls = [
        lambda o: processor.post_process_object_detection(o, target_sizes=SIZES),
        lambda o: processor.post_process_semantic_segmentation(o, SIZES, processed_sizes=processed),
        lambda o: processor.post_process_instance_segmentation(
            o, target_sizes=SIZES, processed_sizes=processed
        ),
        lambda o: processor.post_process_panoptic_segmentation(
            o, label_ids_to_fuse={1}, target_sizes=SIZES, processed_sizes=processed
        ),
        lambda o: processor.post_process_segmentation(o, SIZES, processed_sizes=processed),
    ]
    for call in calls:
        got = list(tensors(call(moved)))
        assert got
        assert {tensor.device.type for tensor in got} == {device}
        for ours, expected in zip(got, tensors(call(outputs))):
            assert ours.dtype == expected.dtype
            assert ours.shape == expected.shape
    maps = processor.post_process_instance_segmentation(moved, 0.0, target_sizes=SIZES)
    ids = [[segment["id"] for segment in result["segments_info"]] for result in maps]
    for options in ({"return_coco_annotation": True}, {"rle_format": "coco"}):
        runs = processor.post_process_instance_segmentation(moved, 0.0, target_sizes=SIZES, **options)
        assert isinstance(runs[0]["segmentation"], list)
        assert [[segment["id"] for segment in result["segments_info"]] for result in runs] == ids
    assert len(processor.post_process_panoptic(moved, PROCESSED)) == 3
