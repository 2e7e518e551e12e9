import pytest
import torch

from detr.loss.targets import gather_targets, raise_faults


def label(classes=(0, 1), boxes=((0.5, 0.5, 0.2, 0.2), (0.1, 0.9, 0.1, 0.1)), **more):
    return {
        "class_labels": torch.tensor(classes, dtype=torch.int64),
        "boxes": torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4),
        **more,
    }


EMPTY = label((), ())


def gather(labels, dtype=torch.float32):
    return gather_targets(labels, 3, len(labels), torch.device("cpu"), dtype)


def test_labels_are_joined_in_the_order_of_the_images():
    targets = gather([label(), EMPTY, label((2,), ((0.0, 1.0, 1.0, 0.0),))])
    assert targets.class_ids.tolist() == [0, 1, 2]
    assert targets.counts == (2, 0, 1)
    assert (targets.boxes_cxcywh.dtype, targets.boxes_cxcywh.shape) == (torch.float32, (3, 4))
    assert targets.faults is None


def test_batches_without_objects_and_other_integer_types_are_accepted():
    assert gather([EMPTY, EMPTY]).counts == (0, 0)
    small = {"class_labels": torch.tensor([2], dtype=torch.uint8), "boxes": torch.rand(1, 4).half()}
    assert gather([small]).class_ids.dtype == torch.int64


def test_rounding_errors_of_coordinates_are_tolerated():
    gather([label((0,), ((1.0005, 0.5, 1.0005, 0.5),))])


@pytest.mark.checklist("5. Loss", "degenerate target boxes")
@pytest.mark.known_issue(4)
@pytest.mark.parametrize(
    ("box", "meaning"),
    [
        ((0.5, 0.5, -0.1, 0.2), "negative width"),
        ((0.1, 0.1, 300.0, 200.0), "pixels"),
        ((0.5, float("nan"), 0.2, 0.2), "NaN"),
        ((float("inf"), 0.5, 0.2, 0.2), "infinite"),
        ((-0.2, 0.5, 0.2, 0.2), "outside"),
    ],
)
@pytest.mark.parametrize("image", [0, 1])
def test_the_error_for_an_invalid_box_names_its_image_and_the_expected_format(box, meaning, image):
    labels = [EMPTY, EMPTY]
    labels[image] = label((0, 1), ((0.5, 0.5, 0.1, 0.1), box), image_id=torch.tensor([37]))
    with pytest.raises(ValueError, match=rf"object 1 of image {image} of the batch \(image_id 37\)") as error:
        gather(labels)
    assert "center x, center y, width, height" in str(error.value)


@pytest.mark.checklist("5. Loss", "class id checks")
@pytest.mark.known_issue(6)
@pytest.mark.parametrize("class_id", [3, 4, -1])
def test_the_error_for_an_unknown_class_names_its_image(class_id):
    with pytest.raises(
        ValueError, match=rf"object 0 of image 1 of the batch has class {class_id}; .* 0\.\.2"
    ):
        gather([label(), label((class_id, 0))])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"boxes": torch.rand(2, 4)}, "class_labels is missing"),
        ({"class_labels": torch.tensor([1])}, "boxes is missing"),
        ({"class_labels": [1], "boxes": torch.rand(1, 4)}, "class_labels is list, not a tensor"),
        (label((0,)), r"boxes is torch.float64 \[2, 4\] for 1 class_labels"),
        (label((0, 1, 2)), "for 3 class_labels"),
        ({"class_labels": torch.tensor([[1]]), "boxes": torch.rand(1, 4)}, r"torch.int64 \[1, 1\]"),
        ({"class_labels": torch.tensor([1.0]), "boxes": torch.rand(1, 4)}, "class_labels is torch.float32"),
        (
            {"class_labels": torch.tensor([1]), "boxes": torch.ones(1, 4, dtype=torch.int64)},
            "boxes is torch.int64",
        ),
        ({"class_labels": torch.tensor([1]), "boxes": torch.rand(4)}, r"boxes is torch.float32 \[4\]"),
    ],
)
def test_the_error_for_labels_of_wrong_shape_or_type_names_their_image(wrong, message):
    with pytest.raises(ValueError, match=rf"image 1 of the batch \(image_id 5\).*{message}"):
        gather([label(), {**wrong, "image_id": 5}])


@pytest.mark.parametrize("labels", [[label()], label(), [label()] * 3])
def test_there_must_be_one_dict_per_image(labels):
    with pytest.raises(ValueError, match="one dict per image: 2 images"):
        gather_targets(labels, 3, 2, torch.device("cpu"), torch.float32)


def test_faults_of_labels_on_a_device_raise_an_error_when_they_reach_the_host():
    labels = [label(), label((0, 1), ((0.5, 0.5, 0.1, 0.1), (0.5, 0.5, 2.0, 0.1)))]
    raise_faults(torch.tensor([False] * 4), labels, 3)
    with pytest.raises(ValueError, match="object 1 of image 1 of the batch has box"):
        raise_faults(torch.tensor([False, False, False, True]), labels, 3)
