"""Masks of detection and panoptic annotations equal transformers', also for inputs on which transformers fails."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from pycocotools import mask as coco_mask

from detr import DetrImageProcessor, DetrImageProcessorPil
from detr.image_processing.masks import pillow_nearest_indices, resize_map, torch_nearest_indices
from detr.image_transforms import id_to_rgb, rgb_to_id
from tests.detr.image_processing.test_processor import DATA, SMALL, random_image

# transformers uses torchvision's PNG reader, which is deprecated
pytestmark = pytest.mark.filterwarnings(
    "ignore:The image decoding and encoding capabilities:DeprecationWarning"
)
SECTION = "6. Image processor"
CLASSES = {
    DetrImageProcessor: transformers.DetrImageProcessor,
    DetrImageProcessorPil: transformers.DetrImageProcessorPil,
}
CATS = DATA / "coco_cats"


def polygon_annotation(rng, height, width, objects=5):
    entries = []
    for _ in range(objects):
        corners = rng.uniform(0, 1, (2, 4, 2)) * (width, height)
        x, y = corners.reshape(-1, 2).min(0)
        w, h = corners.reshape(-1, 2).max(0) - (x, y)
        entries.append(
            {
                "bbox": [x, y, w, h],
                "category_id": int(rng.integers(90)),
                "area": float(w * h),
                "iscrowd": 0,
                "segmentation": [polygon.flatten().tolist() for polygon in corners],
            }
        )
    return {"image_id": 7, "annotations": entries}


def assert_same_labels(got, expected):
    for mine, wanted in zip(got["labels"], expected["labels"], strict=True):
        for name, value in wanted.items():
            value = torch.as_tensor(value)
            assert mine[name].shape == value.shape, name
            if name == "boxes":
                torch.testing.assert_close(mine[name], value.float(), rtol=3e-7, atol=1e-7)
            else:
                assert torch.equal(mine[name], value.to(mine[name].dtype)), name


@pytest.mark.checklist(SECTION, "masks")
@pytest.mark.checklist(SECTION, "return_segmentation_masks")
@pytest.mark.parametrize("ours", CLASSES)
@pytest.mark.parametrize("size", [SMALL, {"height": 37, "width": 91}, {"height": 150, "width": 150}])
def test_masks_of_polygons_equal_transformers(ours, size):
    rng = np.random.default_rng(0)
    images = [random_image(rng, 70, 90), random_image(rng, 51, 120)]
    annotations = [polygon_annotation(rng, *image.shape[:2]) for image in images]
    options = {
        "return_tensors": "pt",
        "return_segmentation_masks": True,
        "input_data_format": "channels_last",
    }
    got = ours(size=size, boxes_relative_to="padded_batch")(images, annotations, **options)
    expected = CLASSES[ours](size=size)(images, annotations, **options)
    assert_same_labels(got, expected)
    assert got["labels"][0]["masks"].any()
    assert "masks" not in ours(size=size)(images, annotations, return_tensors="pt")["labels"][0]


@pytest.mark.checklist(SECTION, "RLE segmentation")
@pytest.mark.parametrize("form", ["uncompressed", "text", "bytes"])
def test_all_forms_of_rle_decode_to_the_encoded_mask(form):
    rng = np.random.default_rng(1)
    image = random_image(rng, 40, 60)
    mask = rng.random((40, 60)) > 0.5
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    if form == "text":
        rle["counts"] = rle["counts"].decode()
    elif form == "uncompressed":
        flat = np.concatenate(([0], mask.flatten(order="F"), [2]))
        edges = np.flatnonzero(np.diff(flat))
        rle["counts"] = np.diff(np.concatenate(([0], edges))).tolist()
    annotation = {
        "image_id": 1,
        "annotations": [{"bbox": [0, 0, 60, 40], "area": 1, "category_id": 1, "segmentation": rle}],
    }
    labels = DetrImageProcessor(do_resize=False)(image, annotation, return_segmentation_masks=True)["labels"]
    assert torch.equal(labels[0]["masks"][0], torch.from_numpy(mask))


@pytest.mark.known_issue(10)
@pytest.mark.checklist(SECTION, "masks")
def test_crowds_are_dropped_from_masks_as_from_boxes_where_transformers_fails():
    rng = np.random.default_rng(2)
    image = random_image(rng, 40, 60)
    annotation = polygon_annotation(rng, 40, 60, objects=3)
    annotation["annotations"][1] |= {"iscrowd": 1, "segmentation": {"size": [40, 60], "counts": [2400]}}
    options = {"return_tensors": "pt", "return_segmentation_masks": True}
    labels = DetrImageProcessor(size=SMALL)(image, annotation, **options)["labels"][0]
    alone = {"image_id": 7, "annotations": [annotation["annotations"][0], annotation["annotations"][2]]}
    expected = DetrImageProcessor(size=SMALL)(image, alone, **options)["labels"][0]
    assert torch.equal(labels["masks"], expected["masks"])
    with pytest.raises(IndexError):
        transformers.DetrImageProcessor(size=SMALL)(image, annotation, **options)


@pytest.mark.known_issue(9)
@pytest.mark.parametrize("ours", CLASSES)
def test_an_image_without_objects_has_no_masks_where_transformers_fails(ours):
    image = random_image(np.random.default_rng(3), 40, 60)
    annotation = {"image_id": 1, "annotations": []}
    options = {"return_tensors": "pt", "return_segmentation_masks": True}
    labels = ours(size=SMALL)(image, annotation, **options)["labels"][0]
    assert labels["masks"].shape == (0, 64, 96)
    assert labels["masks"].dtype == torch.bool
    assert labels["boxes"].shape == (0, 4)
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        CLASSES[ours](size=SMALL)(image, annotation, **options)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (None, "image_id 1: object 0 has the segmentation None"),
        ([[1, 2, 3, 4]], "polygons of at least 3 points"),
        ([[1, 2, 3, 4, 5, 1e9]], r"image_id 1: object 0 has a polygon with coordinates .* beyond 1e\+06"),
        ([[1, 2, 3, 4, 5, float("nan")]], "coordinates that are NaN"),
        ({"size": [9, 9], "counts": [81]}, r"RLE of \[9, 9\], the image is \[40, 60\]"),
    ],
)
def test_errors_for_invalid_segmentations_name_image_and_object(segmentation, message):
    entry = {"bbox": [0, 0, 9, 9], "area": 1, "category_id": 1, "segmentation": segmentation}
    with pytest.raises(ValueError, match=message):
        DetrImageProcessor()(
            random_image(np.random.default_rng(0), 40, 60),
            {"image_id": 1, "annotations": [entry]},
            return_segmentation_masks=True,
        )


@pytest.mark.parametrize("lengths", [(7, 19), (640, 1066), (1, 5), (100, 33), (501, 500)])
def test_resizing_a_stack_of_maps_equals_resizing_each_map(lengths):
    before, after = lengths
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 2, (3, before, before), dtype=np.uint8))
    torchs = torch.nn.functional.interpolate(values[None].float(), size=(after, after), mode="nearest-exact")[
        0
    ]
    assert torch.equal(resize_map(values, (after, after), torch_nearest_indices), torchs.byte())
    pillows = [
        np.array(Image.fromarray(v.numpy()).resize((after, after), Image.Resampling.NEAREST)) for v in values
    ]
    assert np.array_equal(resize_map(values, (after, after), pillow_nearest_indices), np.stack(pillows))


def random_panoptic(rng, folder, name, height, width):
    """Write a PNG of Voronoi cells with ids beyond 8 bits, and return its annotation."""
    seeds = rng.uniform(0, 1, (6, 2)) * (height, width)
    ids = rng.choice(2**24, 6, replace=False)
    cells = np.linalg.norm(
        np.indices((height, width)).transpose(1, 2, 0)[:, :, None] - seeds, axis=-1
    ).argmin(-1)
    Image.fromarray(id_to_rgb(ids[cells])).save(folder / name)
    segments = [
        {
            "id": int(i),
            "category_id": int(rng.integers(200)),
            "iscrowd": int(k == 0),
            "area": int((cells == k).sum()),
        }
        for k, i in enumerate(ids)
        if (cells == k).any()
    ]
    return {"image_id": int(rng.integers(1000)), "file_name": name, "segments_info": segments}


@pytest.mark.checklist(SECTION, "coco_panoptic")
@pytest.mark.parametrize("ours", CLASSES)
@pytest.mark.parametrize("masks", [None, True, False])
def test_panoptic_annotations_equal_transformers(ours, masks, tmp_path):
    rng = np.random.default_rng(4)
    images = [random_image(rng, 70, 90), random_image(rng, 51, 120)]
    annotations = [
        random_panoptic(rng, tmp_path, f"{i}.png", *image.shape[:2]) for i, image in enumerate(images)
    ]
    options = {"return_tensors": "pt", "masks_path": tmp_path, "input_data_format": "channels_last"}
    if masks is not None:
        options["return_segmentation_masks"] = masks
    settings = {"size": SMALL, "format": "coco_panoptic"}
    got = ours(**settings, boxes_relative_to="padded_batch")(images, annotations, **options)
    expected = CLASSES[ours](**settings)(images, annotations, **options)
    assert_same_labels(got, expected)
    assert ("masks" in got["labels"][0]) == (masks is not False)


def test_a_segment_without_pixels_has_a_box_of_zeros(tmp_path):
    rng = np.random.default_rng(5)
    annotation = random_panoptic(rng, tmp_path, "a.png", 30, 30)
    annotation["segments_info"].append({"id": 1, "category_id": 3, "iscrowd": 0, "area": 0})
    processor = DetrImageProcessor(size=SMALL, format="coco_panoptic")
    labels = processor(random_image(rng, 30, 30), annotation, masks_path=tmp_path)["labels"][0]
    assert labels["boxes"][-1].tolist() == [0, 0, 0, 0]
    assert not labels["masks"][-1].any()


@pytest.mark.parametrize("mode", ["L", "I;16"])
def test_the_values_of_a_gray_panoptic_png_are_ids(mode, tmp_path):
    ids = np.zeros((40, 60), np.uint16 if mode == "I;16" else np.uint8)
    ids[:20], ids[20:] = 7, 26001 if mode == "I;16" else 201
    Image.fromarray(ids).save(tmp_path / "a.png")
    segments = [{"id": int(id), "category_id": 0, "area": 1200, "iscrowd": 0} for id in np.unique(ids)]
    annotation = {"image_id": 1, "file_name": "a.png", "segments_info": segments}
    processor = DetrImageProcessor(format="coco_panoptic", do_resize=False)
    image = random_image(np.random.default_rng(0), 40, 60)
    labels = processor(image, annotation, masks_path=tmp_path)["labels"][0]
    assert labels["masks"].sum((1, 2)).tolist() == [1200, 1200]
    for number, segment in enumerate(segments, 1):
        segment["id"] += 1
        with pytest.raises(ValueError, match=rf"image_id 1: {number} of its 2 segments .*a\.png: .* are \[8"):
            processor(image, annotation, masks_path=tmp_path)


def test_a_segment_of_only_the_first_pixel_is_valid(tmp_path):
    ids = np.full((40, 60), 5, np.uint8)
    ids[0, 0] = 9
    Image.fromarray(ids).save(tmp_path / "a.png")
    segments = [{"id": id, "category_id": 0, "area": 1, "iscrowd": 0} for id in (5, 9)]
    annotation = {"image_id": 1, "file_name": "a.png", "segments_info": segments}
    processor = DetrImageProcessor(format="coco_panoptic", do_resize=False)
    image = random_image(np.random.default_rng(0), 40, 60)
    labels = processor(image, annotation, masks_path=tmp_path)["labels"][0]
    assert labels["masks"].sum((1, 2)).tolist() == [2399, 1]


def test_panoptic_errors_name_the_file(tmp_path):
    rng = np.random.default_rng(6)
    image = random_image(rng, 30, 40)
    processor = DetrImageProcessor(format="coco_panoptic")
    annotation = random_panoptic(rng, tmp_path, "a.png", 20, 40)
    with pytest.raises(ValueError, match="give masks_path"):
        processor(image, annotation)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        processor(image, annotation, masks_path=tmp_path / "none")
    with pytest.raises(ValueError, match=r"a\.png is 20 x 40, the image 30 x 40"):
        processor(image, annotation, masks_path=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"b\.png does not exist"):
        processor(image, annotation | {"file_name": "b.png"}, masks_path=tmp_path)
    with pytest.raises(ValueError, match="Invalid COCO panoptic annotations"):
        processor(image, {"image_id": 1, "annotations": []}, masks_path=tmp_path)
    for change, error in (
        ({"area": "large"}, "TypeError|ValueError"),
        ({"iscrowd": None}, "TypeError|RuntimeError"),
    ):
        matching = random_panoptic(rng, tmp_path, "c.png", 30, 40)
        matching["segments_info"][0] |= change
        with pytest.raises(
            ValueError, match=rf"image_id {matching['image_id']}: each segment needs.*({error})"
        ):
            processor(image, matching, masks_path=tmp_path)
    with pytest.raises(ValueError, match="do not match"):
        processor([image, image], annotation, masks_path=tmp_path)


@pytest.mark.skipif(not CATS.is_dir(), reason=f"no images under {CATS}")
@pytest.mark.parametrize("ours", CLASSES)
def test_the_labels_of_a_real_photo_equal_transformers(ours):
    with Image.open(CATS / "000000039769.png") as image:
        image.load()
    detection = {"image_id": 39769, "annotations": json.loads((CATS / "coco_annotations.txt").read_text())}
    panoptic = {
        "file_name": "000000039769.png",
        "image_id": 39769,
        "segments_info": json.loads((CATS / "coco_panoptic_annotations.txt").read_text()),
    }
    for annotation, options in (
        (detection, {"return_segmentation_masks": True}),
        (panoptic, {"format": "coco_panoptic", "masks_path": CATS / "coco_panoptic"}),
    ):
        got = ours()(image, annotation, return_tensors="pt", **options)
        expected = CLASSES[ours]()(image, annotation, return_tensors="pt", **options)
        assert torch.equal(got["pixel_values"], expected["pixel_values"])
        assert_same_labels(got, expected)


@pytest.mark.known_issue(11)
@pytest.mark.checklist(SECTION, "keypoints")
def test_keypoints_stay_aligned_and_are_scaled_on_request():
    rng = np.random.default_rng(7)
    image = random_image(rng, 40, 60)
    points = [10.0, 20.0, 2.0, 30.0, 5.0, 1.0]
    entries = [{"bbox": [0, 0, 9, 9], "area": 1, "category_id": c} for c in range(3)]
    entries[1]["keypoints"] = points
    annotation = {"image_id": 1, "annotations": entries}
    plain = DetrImageProcessor(size={"height": 80, "width": 180})(image, annotation)["labels"][0]["keypoints"]
    assert plain.reshape(3, 6).tolist() == [[0] * 6, points, [0] * 6]
    scaled = DetrImageProcessor(size={"height": 80, "width": 180}, scale_keypoints=True)
    scaled = scaled(image, annotation)["labels"][0]["keypoints"].reshape(3, 2, 3)
    assert scaled[1].tolist() == [[30, 40, 2], [90, 10, 1]]


def test_colors_and_ids_equal_transformers():
    from transformers import image_transforms

    rng = np.random.default_rng(8)
    for color in (rng.integers(0, 256, (5, 4, 3), dtype=np.uint8), (1, 2, 3), [255, 255, 255]):
        assert np.array_equal(rgb_to_id(color), image_transforms.rgb_to_id(color))
    ids = rng.integers(0, 2**24, (5, 4))
    assert np.array_equal(id_to_rgb(ids), image_transforms.id_to_rgb(ids))
    assert id_to_rgb(70000) == image_transforms.id_to_rgb(70000)
    assert np.array_equal(rgb_to_id(id_to_rgb(ids)), ids)
    assert torch.equal(rgb_to_id(torch.from_numpy(id_to_rgb(ids))).long(), torch.from_numpy(ids))
    assert torch.equal(id_to_rgb(torch.from_numpy(ids)), torch.from_numpy(id_to_rgb(ids)))
