"""A model version on a device, without Serve."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from detr import DetrConfig
from detr.inference.detector import ObjectDetector
from raydetr.errors import ServingError
from raydetr.registry.models import ResolvedModel, folder_digest, resolve
from raydetr.serving.loaded import OUT_OF_MEMORY, LoadedModel, run_halving
from tests.tiny_detr import add_mask_head, png, save_tiny_detr

NAMES = ["ant", "bee", "cat"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ResolvedModel:
    return resolve(str(save_tiny_detr(tmp_path_factory.mktemp("model") / "tiny", NAMES, edge=64)), "")


def with_masks(folder: Path) -> ResolvedModel:
    return resolve(str(add_mask_head(folder)), "")


class SmallDevice:
    """A device whose memory holds a limited number of pixels."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.batch_sizes: list[int] = []

    def run(self, items: list[int]) -> list[int]:
        self.batch_sizes.append(len(items))
        if sum(items) > self.capacity:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return [2 * item for item in items]


def test_a_batch_that_does_not_fit_is_halved_until_it_does():
    device = SmallDevice(3)
    assert run_halving(device.run, [1] * 8) == [2] * 8
    assert device.batch_sizes == [8, 4, 2, 2, 4, 2, 2]


def test_an_image_that_does_not_fit_alone_fails_alone():
    assert run_halving(SmallDevice(3).run, [1, 9, 1, 2]) == [2, OUT_OF_MEMORY, 2, 4]
    assert OUT_OF_MEMORY.status == 503


def test_other_errors_are_not_treated_as_out_of_memory():
    def broken(items):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        run_halving(broken, [1, 2])


def test_detections_after_out_of_memory_equal_those_of_single_images(model):
    loaded = LoadedModel.load(model, "cpu")
    images = [loaded.detector.prepare(png(60, 90, seed=seed)) for seed in range(5)]
    expected = [loaded.detector.detect([image])[0] for image in images]
    detect = loaded.detector.detect

    def detect_at_most_two(images):
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return detect(images)

    loaded.detector.detect = detect_at_most_two
    for ours, theirs in zip(loaded.detect(images), expected, strict=True):
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-5)
        np.testing.assert_allclose(ours.boxes_xyxy, theirs.boxes_xyxy, atol=1e-3)


def test_a_mask_head_does_not_change_the_detections(tmp_path):
    folder = save_tiny_detr(tmp_path / "tiny", NAMES, edge=64)
    loaded = LoadedModel.load(with_masks(folder), "cpu")
    loaded.check()
    image = loaded.detector.prepare(png(60, 90))
    expected = ObjectDetector.from_pretrained(folder).detect([image])[0]
    np.testing.assert_allclose(loaded.detect([image])[0].scores, expected.scores, atol=1e-6)
    own = {id(parameter) for parameter in loaded.detector.model.parameters()}
    assert own < {id(parameter) for parameter in loaded.segmenter.model.parameters()}, (
        "the weights are shared"
    )


def test_stuff_classes_are_read_from_the_configuration(model, tmp_path):
    assert LoadedModel.load(model, "cpu").stuff == []
    folder = save_tiny_detr(tmp_path / "tiny", NAMES, edge=64)
    config = DetrConfig.from_pretrained(folder)
    config.stuff_label_ids = [0, 2]
    config.save_pretrained(folder)
    assert LoadedModel.load(resolve(str(folder), ""), "cpu").stuff == [0, 2]


def test_a_version_with_non_finite_outputs_is_rejected(model, tmp_path):
    damaged = damaged_copy(model, tmp_path)
    file = Path(damaged.folder, "model.safetensors")
    weights = load_file(file)
    weights["class_labels_classifier.bias"][0] = float("nan")
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ServingError, match="logits of a reference image are not finite"):
        LoadedModel.load(replace_digest(damaged), "cpu").check()
    LoadedModel.load(model, "cpu").check()


def test_a_version_with_a_wrong_number_of_labels_is_rejected(model, tmp_path):
    damaged = damaged_copy(model, tmp_path)
    file = Path(damaged.folder, "config.json")
    config = json.loads(file.read_text())
    config["id2label"]["3"] = "dog"
    config["label2id"]["dog"] = 3
    file.write_text(json.dumps(config))
    with pytest.raises((ServingError, ValueError)):
        LoadedModel.load(replace_digest(damaged), "cpu").check()


def test_bf16_equals_float32_within_its_precision(model):
    exact, rounded = (LoadedModel.load(model, "cpu", precision) for precision in ("float32", "bf16"))
    rounded.check()
    image = exact.detector.prepare(png(60, 90))
    expected, detected = exact.detect([image])[0], rounded.detect([image])[0]
    assert detected.scores.dtype == np.float32
    assert abs(detected.scores[0] - expected.scores[0]) < 0.1
    assert not np.array_equal(detected.scores, expected.scores), "it should compute in bf16"


@pytest.mark.slow
def test_openvino_equals_torch(tmp_path):
    model = with_masks(save_tiny_detr(tmp_path / "tiny", NAMES, edge=64))
    plain, fast = (LoadedModel.load(model, "cpu", engine=engine) for engine in ("torch", "openvino"))
    fast.check()
    image = plain.detector.prepare(png(60, 90))
    expected, detected = plain.detect([image])[0], fast.detect([image])[0]
    np.testing.assert_allclose(detected.scores, expected.scores, atol=1e-5)
    assert not np.array_equal(detected.scores, expected.scores), "it should be computed by another library"


def damaged_copy(model: ResolvedModel, tmp_path: Path) -> ResolvedModel:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in Path(model.folder).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return dataclasses.replace(model, folder=str(folder))


def replace_digest(model: ResolvedModel) -> ResolvedModel:
    return dataclasses.replace(model, digest=folder_digest(model.folder))
