"""Known issues of other DETR implementations: each is fixed here and, if transformers has it, reproduced there.

Further known issues are tested in the file of their subject, with the mark `known_issue`.
"""

import contextlib
import copy
import socket

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from torch import nn

from detr import DetrConfig, DetrForObjectDetection, DetrImageProcessor, ObjectDetector
from detr.loss.criterion import target_counts
from tests.detr.conftest import small_config, transformers_config


def label_boxes_in_pixels(processor, sizes) -> list[list[float]]:
    """Return the label box of each image of a padded batch, scaled to pixels by the image size without padding."""
    images = [np.zeros((*size, 3), np.uint8) for size in sizes]
    entry = {"bbox": [8, 8, 16, 16], "area": 256, "category_id": 0, "iscrowd": 0}
    annotations = [{"image_id": i, "annotations": [entry]} for i in range(len(images))]
    labels = processor(images, annotations, return_tensors="pt", do_resize=False)["labels"]
    return [(label["boxes"][0] * torch.tensor([w, h, w, h])).tolist() for label, (h, w) in zip(labels, sizes)]


@pytest.mark.known_issue(1)
def test_label_boxes_are_relative_to_the_image_as_post_processing_expects():
    sizes, expected = ((64, 96), (32, 48)), [16, 16, 16, 16]
    for box in label_boxes_in_pixels(DetrImageProcessor(), sizes):
        assert box == pytest.approx(expected, abs=1e-4)
    theirs = label_boxes_in_pixels(transformers.DetrImageProcessor(), sizes)
    assert theirs[1] != pytest.approx(expected, abs=1e-4), "half as large: relative to the padded image"


@pytest.mark.known_issue(2)
def test_auxiliary_losses_change_no_prediction(make_twins, make_batch):
    batch = make_batch()
    pair = make_twins()

    def change(model, build):
        config = copy.deepcopy(model.config)
        config.auxiliary_loss = True
        other = build(config).eval()
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            return float((other(batch.pixel_values).logits - model(batch.pixel_values).logits).abs().max())

    assert change(pair.ours, DetrForObjectDetection) == 0
    assert change(pair.theirs, transformers.DetrForObjectDetection) > 0.1


@pytest.mark.known_issue(3)
@pytest.mark.known_issue(5)
def test_a_nan_prediction_does_not_stop_the_training(make_twins, make_batch):
    batch = make_batch()
    pair = make_twins()

    def loss(model, head):
        model = copy.deepcopy(model)
        with torch.no_grad():
            head(model).bias.fill_(float("nan"))
        return model(batch.pixel_values, labels=batch.labels).loss

    assert loss(pair.ours, lambda m: m.bbox_predictor.layers[2]).shape == ()
    with pytest.raises(ValueError, match="boxes1 must be in"):
        loss(pair.theirs, lambda m: m.bbox_predictor.layers[2])


@pytest.mark.known_issue(4)
def test_boxes_in_the_wrong_format_are_named_with_their_image(make_twins, make_batch):
    batch = make_batch()
    pair = make_twins()
    batch.labels[1] |= {"image_id": torch.tensor([4711]), "boxes": batch.labels[1]["boxes"] * 100}
    with pytest.raises(ValueError, match=r"image_id 4711.*center x, center y, width, height"):
        pair.ours(batch.pixel_values, labels=batch.labels)
    pair.theirs(batch.pixel_values, labels=batch.labels)  # trains on boxes a hundred times too large


@pytest.mark.known_issue(6)
def test_a_class_beyond_the_last_one_is_an_error(make_twins, make_batch):
    batch = make_batch()
    pair = make_twins()
    batch.labels[0]["class_labels"][1] = 5
    with pytest.raises(ValueError, match=r"object 1 of image 0.*has class 5; the model's classes are 0\.\.4"):
        pair.ours(batch.pixel_values, labels=batch.labels)
    pair.theirs(batch.pixel_values, labels=batch.labels)  # trains this object as "no object"


@pytest.mark.known_issue(7)
def test_loading_with_other_classes_needs_only_num_labels(make_twins, tmp_path):
    pair = make_twins()
    pair.ours.save_pretrained(tmp_path)
    model = DetrForObjectDetection.from_pretrained(tmp_path, num_labels=3)
    assert model.class_labels_classifier.out_features == 4
    unchanged = {name for name in model.state_dict() if "class_labels" not in name}
    assert all(torch.equal(model.state_dict()[name], pair.ours.state_dict()[name]) for name in unchanged)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.DetrForObjectDetection.from_pretrained(tmp_path, num_labels=3)


@pytest.mark.known_issue(11)
def test_keypoints_of_some_objects_stay_aligned_with_their_objects():
    points = [10.0, 20.0, 2.0]
    entries = [{"bbox": [0, 0, 9, 9], "area": 1, "category_id": c} for c in range(3)]
    entries[1]["keypoints"] = points
    image, annotation = np.zeros((40, 60, 3), np.uint8), {"image_id": 1, "annotations": entries}
    labels = DetrImageProcessor()(image, annotation, return_tensors="pt")["labels"][0]
    assert labels["keypoints"].tolist() == [[0, 0, 0], points, [0, 0, 0]]
    with pytest.raises(IndexError):
        transformers.DetrImageProcessor()(image, annotation, return_tensors="pt")


@pytest.mark.known_issue(12)
@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_gray_and_transparent_images_are_processed(mode):
    image = Image.new(mode, (60, 40))
    assert DetrImageProcessor()(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 800, 1200)
    with pytest.raises((ValueError, RuntimeError)):
        transformers.DetrImageProcessor()(image, return_tensors="pt")


def trainable(backbone: nn.Module) -> set[str]:
    """Return the top-level modules of a backbone, such as ``layer1``, that have trainable parameters."""
    return {
        name.split("model.")[-1].split(".")[0] for name, p in backbone.named_parameters() if p.requires_grad
    }


@pytest.mark.known_issue(13)
def test_the_stem_and_the_first_stage_of_a_resnet_are_frozen():
    config = small_config(trainable_backbone_stages=3)
    assert trainable(DetrForObjectDetection(config).model.backbone) == {"layer2", "layer3", "layer4"}
    theirs = transformers.DetrForObjectDetection(transformers_config(config))
    assert {"conv1", "layer1"} <= trainable(theirs.model.backbone)


@pytest.mark.known_issue(14)
def test_an_efficientnet_has_all_activations_of_the_pretrained_network(make_twins):
    def activations(model):
        return sum(isinstance(m, nn.SiLU) for m in model.modules())

    whole = timm.create_model("efficientnet_b0", features_only=True, out_indices=(1, 2, 3, 4))
    config = small_config(backbone="efficientnet_b0")
    ours = DetrForObjectDetection(config).model.backbone
    theirs = transformers.DetrForObjectDetection(transformers_config(config)).model.backbone
    assert activations(ours) == activations(whole) > activations(theirs)


@pytest.mark.known_issue(16)
def test_learned_positions_of_a_version_4_file_are_loaded(make_twins, make_batch, tmp_path):
    from safetensors.torch import load_file, save_file

    pair = make_twins(position_embedding_type="learned")
    pair.ours.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    old = {
        name.replace("model.position_embedding.", "model.backbone.position_embedding."): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(old, file, metadata={"format": "pt"})
    name = "model.position_embedding.row_embeddings.weight"
    expected = pair.ours.state_dict()[name]
    assert torch.equal(DetrForObjectDetection.from_pretrained(tmp_path).state_dict()[name], expected)
    theirs = transformers.DetrForObjectDetection.from_pretrained(tmp_path)
    assert not torch.equal(theirs.state_dict()[name], expected), "transformers reinitializes them silently"


@pytest.mark.known_issue(17)
def test_the_mean_loss_of_two_processes_is_that_of_one_with_the_whole_batch(make_twins, make_batch):
    """With the normalizers that `detr.loss.normalizers` computes; test_normalizers.py runs two real processes."""
    batch = make_batch(sizes=((64, 64),) * 2, objects=(1, 9))
    pair = make_twins()
    halves = [(batch.pixel_values[i : i + 1], batch.labels[i : i + 1]) for i in range(2)]
    counts = [target_counts(labels, None, 12, 0.1) for _, labels in halves]
    normalizers = {
        "num_boxes": sum(boxes for boxes, _ in counts) / 2,
        "class_weight_sum": sum(weight for _, weight in counts) / 2,
    }
    with torch.no_grad():
        whole = pair.ours(batch.pixel_values, labels=batch.labels).loss
        parts = [pair.ours(pixels, labels=labels, **normalizers).loss for pixels, labels in halves]
        torch.testing.assert_close(sum(parts) / 2, whole, rtol=1e-5, atol=0)
        whole = pair.theirs(batch.pixel_values, labels=batch.labels).loss
        parts = [pair.theirs(pixels, labels=labels).loss for pixels, labels in halves]
    assert abs(float(sum(parts) / 2 - whole)) > 1e-2 * float(whole)


@pytest.mark.known_issue(18)
def test_a_prediction_does_not_depend_on_the_other_images_of_the_batch(make_twins):
    """With the canonical padding of `ObjectDetector`; padding to the largest image changes predictions of any DETR."""
    rng = np.random.default_rng(0)
    small, large = (
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)) for size in ((60, 90, 3), (150, 130, 3))
    )
    pair = make_twins()
    settings = {"size": {"shortest_edge": 64, "longest_edge": 160}}
    detector = ObjectDetector(copy.deepcopy(pair.ours), DetrImageProcessor(**settings))
    prepared = detector.prepare(small)
    other = detector.prepare(Image.fromarray(rng.integers(0, 256, (60, 90, 3), dtype=np.uint8)))
    alone, together = detector.detect([prepared])[0], detector.detect([other, prepared])[1]
    np.testing.assert_allclose(alone.scores, together.scores, atol=1e-5)

    processor = transformers.DetrImageProcessor(**settings)
    with torch.no_grad():
        logits = [
            pair.theirs(**processor(images, return_tensors="pt")).logits[0]
            for images in ([small], [small, large])
        ]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


@pytest.mark.known_issue(25)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_loss_is_computed_for_a_model_of_any_precision(dtype, make_twins, make_batch):
    batch = make_batch(dtype=dtype)
    pair = make_twins().to(dtype)
    loss = pair.ours(batch.pixel_values, labels=batch.labels).loss
    assert torch.isfinite(loss)
    with pytest.raises((RuntimeError, NotImplementedError)):
        pair.theirs(batch.pixel_values, labels=batch.labels)


@pytest.mark.known_issue(15)
def test_a_new_configuration_needs_no_network_access(monkeypatch):
    requested_hosts = []

    def no_network(host, *args, **kwargs):
        requested_hosts.append(host)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    values = {"backbone": "resnet18", "backbone_kwargs": {"out_indices": [2, 3, 4]}}
    assert DetrConfig(**values).backbone_config["out_indices"] == [2, 3, 4]
    assert not requested_hosts
    with contextlib.suppress(Exception):  # the type depends on the HTTP package that its version uses
        transformers.DetrConfig(**values)
    assert requested_hosts
