import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from raydetr import storage
from raydetr.data.shards import Manifest, read_faults, read_records, training_targets
from raydetr.data.synthetic import dataset
from raydetr.data.synthetic.dataset import embedded, generate
from raydetr.data.synthetic.scenes import (
    MIN_VISIBLE,
    STUFF,
    THINGS,
    Region,
    Scene,
    make_scene,
    panoptic_map,
    polygons,
)
from raydetr.errors import ConfigError, DataError
from tests.raydetr.s3 import S3

# pycocotools' decode, with numpy 2.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)

COUNT = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated")
    generate(str(folder), COUNT, seed=3)
    return folder


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [make_scene(3, index) for index in range(COUNT)]


def rasterized(polygons: list[list[float]], size: int) -> np.ndarray[Any, Any]:
    parts = coco_mask.decode(coco_mask.frPyObjects(polygons, size, size))
    return parts.any(2)


def test_things_and_stuff_cover_every_pixel_exactly_once(scenes: list[Scene]) -> None:
    for scene in scenes:
        cover = np.sum([region.mask for region in scene.things + scene.stuff], axis=0)
        assert (cover == 1).all()


def test_polygons_rasterize_to_exactly_the_mask(scenes: list[Scene]) -> None:
    for scene in scenes:
        for thing in scene.things:
            assert np.array_equal(rasterized(polygons(thing.mask), len(thing.mask)), thing.mask)


@pytest.mark.slow
def test_a_folder_generated_on_s3_has_the_same_bytes(s3: S3, tmp_path: Path) -> None:
    generate(str(tmp_path), 5, seed=3, size=48)
    generate(s3.uri("coco"), 5, seed=3, size=48)
    keys = s3.keys()
    files = {
        str(file.relative_to(tmp_path)): file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()
    }
    assert {key.removeprefix("coco/") for key in keys if key.startswith("coco/")} == set(files)
    for name, content in files.items():
        assert storage.read_bytes(s3.uri(f"coco/{name}")) == content


@pytest.mark.parametrize("seed", range(30))
def test_the_polygons_of_any_mask_rasterize_to_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((24, 24)) < rng.uniform(0.05, 0.95)
    mask[5:15, 5:15] = True
    mask[8:11, 9:12] = False
    assert np.array_equal(rasterized(polygons(mask), 24), mask)


def test_a_ring_keeps_its_hole() -> None:
    yy, xx = np.mgrid[:40, :40]
    distance = np.hypot(yy - 20, xx - 19)
    mask = (distance < 15) & (distance > 6)
    outline = polygons(mask)
    assert len(outline) == 1
    assert np.array_equal(rasterized(outline, 40), mask)


def test_boxes_are_tight_around_the_visible_pixels(scenes: list[Scene]) -> None:
    for scene in scenes:
        for region in scene.things + scene.stuff:
            x, y, width, height = region.bbox
            inside = region.mask[y : y + height, x : x + width]
            assert inside.sum() == region.mask.sum() == region.area
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()


def test_shapes_have_the_documented_number_and_size_and_stay_visible(scenes: list[Scene]) -> None:
    counts = [len(scene.things) for scene in scenes]
    assert min(counts) == 1
    assert max(counts) == 4
    sides = np.array([thing.bbox[2:] for scene in scenes for thing in scene.things]) / 128
    assert sides.min() > 0.08
    assert sides.max() < 0.53
    assert 0.15 < np.median(sides) < 0.5
    # An occluded shape keeps MIN_VISIBLE of its area. The smallest complete shape is a triangle of the minimum radius.
    smallest = MIN_VISIBLE * 3 * np.sqrt(3) / 4 * (0.11 * 128) ** 2
    assert min(thing.area for scene in scenes for thing in scene.things) > 0.9 * smallest


def test_some_shapes_partly_occlude_others(scenes: list[Scene]) -> None:
    touching = 0
    for scene in scenes:
        for behind, front in zip(scene.things, scene.things[1:], strict=False):
            grown = np.pad(front.mask, 1)
            grown = grown[:-2, 1:-1] | grown[2:, 1:-1] | grown[1:-1, :-2] | grown[1:-1, 2:]
            touching += bool((grown & behind.mask).any())
    assert touching > COUNT / 10


def test_all_classes_occur_about_equally_often(scenes: list[Scene]) -> None:
    classes = [thing.category_id for scene in scenes for thing in scene.things]
    shares = {name: classes.count(category_id) / len(classes) for name, category_id in THINGS.items()}
    assert all(0.15 < share < 0.35 for share in shares.values()), shares


def test_color_does_not_predict_the_class() -> None:
    features, labels = [], []
    for index in range(400):
        scene = make_scene(11, index)
        for thing in scene.things:
            pixels = scene.pixels[thing.mask].astype(float)
            features.append([*pixels.mean(0), *pixels.std(0), 1.0])
            labels.append(list(THINGS.values()).index(thing.category_id))
    x, y = np.array(features), np.array(labels)
    half = len(x) // 2
    weights = np.linalg.lstsq(x[:half], np.eye(len(THINGS))[y[:half]], rcond=None)[0]
    accuracy = ((x[half:] @ weights).argmax(1) == y[half:]).mean()
    assert accuracy < 0.35, f"mean and spread of the colors predict {accuracy:.2f} of the classes"


@pytest.mark.parametrize("size", [32, 64, 200])
def test_scenes_of_other_sizes_are_consistent(size: int) -> None:
    for index in range(20):
        scene = make_scene(0, index, size)
        assert scene.pixels.shape == (size, size, 3)
        assert (np.sum([region.mask for region in scene.things + scene.stuff], axis=0) == 1).all()
        for thing in scene.things:
            assert np.array_equal(rasterized(polygons(thing.mask), size), thing.mask)


def test_the_panoptic_map_matches_its_json_in_segments_areas_and_boxes(folder: Path) -> None:
    content = json.loads((folder / "annotations" / "panoptic.json").read_text())
    isthing = {category["id"]: category["isthing"] for category in content["categories"]}
    assert isthing == {**dict.fromkeys(THINGS.values(), 1), **dict.fromkeys(STUFF.values(), 0)}
    instances = json.loads((folder / "annotations" / "instances.json").read_text())["annotations"]
    for annotation in content["annotations"]:
        colors = np.asarray(Image.open(folder / "annotations" / "panoptic" / annotation["file_name"]))
        ids = colors.astype(int) @ [1, 256, 65536]
        segments = {segment["id"]: segment for segment in annotation["segments_info"]}
        assert len(segments) == len(annotation["segments_info"])
        assert set(np.unique(ids)) == set(segments)
        for segment_id, segment in segments.items():
            region = Region(segment["category_id"], ids == segment_id)
            assert (region.area, region.bbox) == (segment["area"], segment["bbox"])
        things = [s for s in annotation["segments_info"] if isthing[s["category_id"]]]
        objects = [item for item in instances if item["image_id"] == annotation["image_id"]]
        for thing, item in zip(things, objects, strict=True):
            assert (thing["category_id"], thing["bbox"], thing["area"]) == (
                item["category_id"],
                item["bbox"],
                item["area"],
            )


def test_pycocotools_loads_the_folder_and_its_masks_have_the_stated_areas(folder: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(folder / "annotations" / "instances.json"))
    assert len(coco.getImgIds()) == COUNT
    assert {c["name"]: c["id"] for c in coco.loadCats(coco.getCatIds())} == THINGS
    annotations = coco.loadAnns(coco.getAnnIds())
    assert len({item["id"] for item in annotations}) == len(annotations)
    assert min(item["id"] for item in annotations) > 0
    for item in annotations:
        assert coco_mask.area(coco.annToRLE(item)) == item["area"]
    for image in coco.loadImgs(coco.getImgIds()):
        with Image.open(folder / "images" / image["file_name"]) as file:
            assert file.size == (image["width"], image["height"])


def test_the_image_file_shows_the_scene(folder: Path, scenes: list[Scene]) -> None:
    for index in (0, 1, COUNT - 1):
        pixels = np.asarray(Image.open(folder / "images" / f"{index + 1:06d}.jpg")).astype(int)
        assert np.abs(pixels - scenes[index].pixels).mean() < 12


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_bytes_depend_on_the_seed_and_not_on_the_chunk_size(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "_CHUNK", 7)
    generate(str(tmp_path / "same"), COUNT, seed=3)
    generate(str(tmp_path / "other"), COUNT, seed=4)
    assert tree(tmp_path / "same") == tree(folder)
    images = {path.read_bytes() for path in (folder / "images").iterdir()}
    assert len(images) == COUNT
    assert not images & {path.read_bytes() for path in (tmp_path / "other" / "images").iterdir()}


@pytest.mark.parametrize(("num_images", "size"), [(0, 128), (1, 31)])
def test_invalid_sizes_are_refused(tmp_path: Path, num_images: int, size: int) -> None:
    with pytest.raises(ConfigError, match=f"num_images {num_images} and size {size}"):
        generate(str(tmp_path / "x"), num_images, seed=0, size=size)
    assert not (tmp_path / "x").exists()


def test_panoptic_segments_are_in_the_order_of_the_regions(scenes: list[Scene]) -> None:
    for scene in scenes[:10]:
        _, segments = panoptic_map(scene)
        regions = [*scene.stuff, *scene.things]
        assert [s["category_id"] for s in segments] == [region.category_id for region in regions]


@pytest.mark.usefixtures("ray_local")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")
@pytest.mark.slow
def test_the_demo_scenes_are_generated_once_and_again_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Fewer images than the demo scenes have, to save time.
    monkeypatch.setattr(dataset, "EMBEDDED", {"train": (80, 0), "val": (40, 1)})
    root = str(tmp_path / "data")
    train, val = embedded("train", root), embedded("val", root)
    assert train == f"{root}/train"
    manifests = Manifest.load(train), Manifest.load(val)
    assert [manifest.num_images for manifest in manifests] == [80, 40]
    assert manifests[0].id2label == dict(enumerate(THINGS))
    assert list(read_faults(train)) == []
    for row in read_records(manifests[0]):
        boxes, labels = training_targets(row, manifests[0].labels)
        scene = make_scene(0, row["image_id"] - 1)
        assert [manifests[0].category_ids[label] for label in labels] == [t.category_id for t in scene.things]
        assert [[x, y, x2 - x, y2 - y] for x, y, x2, y2 in boxes] == [t.bbox for t in scene.things]
    images = [{row["image"] for row in read_records(manifest, ["image"])} for manifest in manifests]
    assert not images[0] & images[1]

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert embedded("train", root) == train
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

    (tmp_path / "data" / "coco" / "train" / "generated.json").unlink()  # like a generation that was killed
    embedded("train", root)
    assert Manifest.load(train) == manifests[0]
    monkeypatch.setattr(dataset, "GENERATOR_VERSION", 99)
    embedded("train", root)
    assert Manifest.load(train).digest == manifests[0].digest


def test_the_demo_splits_have_the_documented_sizes_and_different_seeds() -> None:
    (train, train_seed), (val, val_seed) = dataset.EMBEDDED["train"], dataset.EMBEDDED["val"]
    assert (train, val) == (4000, 500)
    assert train_seed != val_seed


def test_a_users_data_set_in_the_folder_of_the_demo_scenes_is_refused_and_not_changed(tmp_path: Path) -> None:
    shards = tmp_path / "train"
    shards.mkdir()
    (shards / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=f"{shards}: holds a data set other than the demo scenes"):
        embedded("train", str(tmp_path))
    assert (shards / "manifest.json").read_text() == "{}"
