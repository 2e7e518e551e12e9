"""Predictions about a run before its first step: time, resolution, size of the objects."""

from pathlib import Path
from typing import Any

import pytest

from raydetr.data.ingest.shard_writer import write_manifest
from raydetr.data.shards import Manifest
from raydetr.flat_keys import override
from raydetr.training.config import TrainConfig
from raydetr.training.model import build_model
from raydetr.training.preview import estimate_step_seconds, format_duration, resolution_cautions
from raydetr.training.recipes import RECIPES
from tests.raydetr.doctor.set_ups import configure, write_data
from tests.tiny_detr import save_tiny_detr


def warnings(config: TrainConfig, manifest: Manifest) -> list[str]:
    cautions = resolution_cautions(config, manifest, build_model(config, manifest))
    return [f"{each.problem}: {each.remedy}" for each in cautions]


def data(folder: Path, image: int, side: int) -> Manifest:
    """Write records of square images with `image` pixels per side, whose objects have `side` pixels."""

    def change(_: int, record: dict[str, Any]) -> None:
        record |= {"height": image, "width": image}
        for item in record["objects"]:
            item["bbox"] = [0.0, 0.0, float(side), float(side)]

    return write_data(folder, change)


@pytest.mark.parametrize(
    ("edges", "warns"), [((480, 640, 800), True), ((96,), False), ((48, 64), True), ((64, 128), False)]
)
def test_a_resolution_other_than_the_models_causes_a_warning(
    edges: tuple[int, ...], warns: bool, tmp_path: Path
) -> None:
    folder = save_tiny_detr(tmp_path / "tiny", ["ant", "bee", "cat"], edge=96)
    config = configure(tmp_path, model=str(folder), shortest_edges=edges, longest_edge=1333)
    manifest = data(tmp_path, 100, 90)
    cautions = [line for line in warnings(config, manifest) if "was trained on images of 96 pixels" in line]
    assert len(cautions) == warns
    if warns:
        assert "--shortest-edges 96 --test-edge 96 --longest-edge 192" in cautions[0]
        followed = override(config, shortest_edges=(96,), test_edge=96, longest_edge=192)
        assert not [line for line in warnings(followed, manifest) if "was trained on" in line]


def test_the_warning_for_fine_tuning_a_small_model_states_the_pixel_ratio(tmp_path: Path) -> None:
    folder = save_tiny_detr(tmp_path / "tiny", ["ant", "bee", "cat"], edge=128)
    config = override(RECIPES["fine-tune"](), model=str(folder), train_data=str(tmp_path / "data"))
    (line,) = warnings(config, data(tmp_path, 600, 300))
    assert "this run uses 480 to 800, 25 times the pixels" in line
    assert "--no-crop" in line


@pytest.mark.parametrize(("image", "side", "warns"), [(2048, 200, True), (100, 90, False), (64, 60, False)])
def test_objects_smaller_than_two_cells_cause_a_warning(
    image: int, side: int, warns: bool, tmp_path: Path
) -> None:
    config = configure(tmp_path, shortest_edges=(128,), longest_edge=213, test_edge=128)  # stride 32
    manifest = data(tmp_path, image, side)
    lines = warnings(config, manifest)
    assert len(lines) == warns
    if warns:
        assert "half of the objects are smaller than 0.4 cells" in lines[0]
        assert "--shortest-edges 672 --test-edge 672" in lines[0]
        followed = override(config, shortest_edges=(672,), test_edge=672, longest_edge=1120)
        assert warnings(followed, manifest) == []
        assert "--crop" not in lines[0]
        assert "--longest-edge 1120 --no-crop," in warnings(override(config, crop=True), manifest)[0]


@pytest.mark.parametrize(("height", "width"), [(3000, 500), (500, 3000), (1200, 900)])
def test_the_advised_flags_work_for_elongated_images(height: int, width: int, tmp_path: Path) -> None:
    def change(_: int, record: dict[str, Any]) -> None:
        record |= {"height": height, "width": width}
        for item in record["objects"]:
            item["bbox"] = [0.0, 0.0, 60.0, 60.0]

    manifest = write_data(tmp_path, change)
    config = configure(tmp_path, shortest_edges=(128,), longest_edge=213, test_edge=128)
    (line,) = warnings(config, manifest)
    words = line.rpartition("set ")[2].replace(",", "").split()
    edge, longest = int(words[words.index("--test-edge") + 1]), int(words[words.index("--longest-edge") + 1])
    assert (
        warnings(override(config, shortest_edges=(edge,), test_edge=edge, longest_edge=longest), manifest)
        == []
    )


def test_data_without_objects_cause_no_warning(tmp_path: Path) -> None:
    empty = write_manifest(str(tmp_path / "data"), [], [{"id": 1, "name": "ant"}])
    assert warnings(configure(tmp_path), empty) == []


def test_the_step_estimate_covers_the_micro_batches_of_a_worker(tmp_path: Path) -> None:
    manifest = write_data(tmp_path)
    config = configure(tmp_path, micro_batches=40, workers=1)
    seconds = estimate_step_seconds(config, manifest)
    assert 0.01 < seconds < 120
    assert config == configure(tmp_path, micro_batches=40, workers=1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3, "3 seconds"), (119, "119 seconds"), (300, "5 minutes"), (360_000, "100.0 hours")],
)
def test_durations_use_a_readable_unit(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
