"""What is said of a run before its first step: time, resolution, size of the objects."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raydetr.data.ingest.shard_writer import write_manifest
from raydetr.data.shards import Manifest
from raydetr.training.config import TrainConfig
from raydetr.training.model import build_model
from raydetr.training.preview import duration, estimate_step_seconds, resolution_cautions
from raydetr.training.recipes import RECIPES
from tests.raydetr.doctor.set_ups import configure, write_data
from tests.tiny_detr import save_tiny_detr


def found(config: TrainConfig, manifest: Manifest) -> list[str]:
    cautions = resolution_cautions(config, manifest, build_model(config, manifest))
    return [f"{each.found}: {each.remedy}" for each in cautions]


def data(folder: Path, image: int, side: int) -> Manifest:
    """Square images that are said to have `image` pixels a side, each object `side`."""

    def change(_: int, record: dict[str, Any]) -> None:
        record |= {"height": image, "width": image}
        for item in record["objects"]:
            item["bbox"] = [0.0, 0.0, float(side), float(side)]

    return write_data(folder, change)


@pytest.mark.parametrize(
    ("edges", "warns"), [((480, 640, 800), True), ((96,), False), ((48, 64), True), ((64, 128), False)]
)
def test_another_resolution_than_the_models_is_warned_of(
    edges: tuple[int, ...], warns: bool, tmp_path: Path
) -> None:
    folder = save_tiny_detr(tmp_path / "tiny", ["ant", "bee", "cat"], edge=96)
    config = configure(tmp_path, model=str(folder), shortest_edges=edges, longest_edge=1333)
    manifest = data(tmp_path, 100, 90)
    cautions = [line for line in found(config, manifest) if "was trained on images of 96 pixels" in line]
    assert len(cautions) == warns
    if warns:
        assert "--shortest-edges 96 --test-edge 96 --longest-edge 192" in cautions[0]
        followed = replace(config, shortest_edges=(96,), test_edge=96, longest_edge=192)
        assert not [line for line in found(followed, manifest) if "was trained on" in line]


def test_a_fine_tune_of_a_small_model_is_told_how_many_times_more_pixels_it_gets(tmp_path: Path) -> None:
    folder = save_tiny_detr(tmp_path / "tiny", ["ant", "bee", "cat"], edge=128)
    config = replace(RECIPES["fine-tune"], model=str(folder), train_data=str(tmp_path / "data"))
    (line,) = found(config, data(tmp_path, 600, 300))
    assert "feeds it 480 to 800, 25 times the pixels" in line
    assert "--no-crop" in line


@pytest.mark.parametrize(("image", "side", "warns"), [(2048, 200, True), (100, 90, False), (64, 60, False)])
def test_objects_that_shrink_below_the_cells_of_the_feature_map_are_warned_of(
    image: int, side: int, warns: bool, tmp_path: Path
) -> None:
    config = configure(tmp_path, shortest_edges=(128,), longest_edge=213, test_edge=128)  # stride 32
    manifest = data(tmp_path, image, side)
    lines = found(config, manifest)
    assert len(lines) == warns
    if warns:
        assert "half of the objects are smaller than 0.4 cells" in lines[0]
        assert "--shortest-edges 672 --test-edge 672" in lines[0]
        followed = replace(config, shortest_edges=(672,), test_edge=672, longest_edge=1120)
        assert found(followed, manifest) == []
        assert "--crop" not in lines[0]
        assert "--longest-edge 1120 --no-crop," in found(replace(config, crop=True), manifest)[0]


@pytest.mark.parametrize(("height", "width"), [(3000, 500), (500, 3000), (1200, 900)])
def test_the_flags_that_are_advised_are_enough_for_long_images_too(
    height: int, width: int, tmp_path: Path
) -> None:
    def change(_: int, record: dict[str, Any]) -> None:
        record |= {"height": height, "width": width}
        for item in record["objects"]:
            item["bbox"] = [0.0, 0.0, 60.0, 60.0]

    manifest = write_data(tmp_path, change)
    config = configure(tmp_path, shortest_edges=(128,), longest_edge=213, test_edge=128)
    (line,) = found(config, manifest)
    words = line.rpartition("give ")[2].replace(",", "").split()
    edge, longest = int(words[words.index("--test-edge") + 1]), int(words[words.index("--longest-edge") + 1])
    assert (
        found(replace(config, shortest_edges=(edge,), test_edge=edge, longest_edge=longest), manifest) == []
    )


def test_data_without_objects_say_nothing_of_their_size(tmp_path: Path) -> None:
    empty = write_manifest(str(tmp_path / "data"), [], [{"id": 1, "name": "ant"}])
    assert found(configure(tmp_path), empty) == []


def test_a_step_takes_as_long_as_the_micro_batches_of_a_worker(tmp_path: Path) -> None:
    manifest = write_data(tmp_path)
    config = configure(tmp_path, micro_batches=40, workers=1)
    seconds = estimate_step_seconds(config, manifest)
    assert 0.01 < seconds < 120
    assert config == configure(tmp_path, micro_batches=40, workers=1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3, "3 seconds"), (119, "119 seconds"), (300, "5 minutes"), (360_000, "100.0 hours")],
)
def test_durations_are_in_the_unit_that_one_reads(seconds: float, text: str) -> None:
    assert duration(seconds) == text
