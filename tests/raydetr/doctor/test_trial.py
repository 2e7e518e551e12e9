"""The first batch and the overfit: the contact sheet, the findings, the losses."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raydetr.doctor import batch, trial
from raydetr.errors import DataError
from raydetr.flat_keys import override
from raydetr.training.model import build_model, image_processor
from tests.raydetr.doctor.set_ups import configure, lines, write_data


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_first_batch_is_that_of_the_run(tmp_path: Path) -> None:
    manifest, config = write_data(tmp_path), configure(tmp_path)
    sample = batch.first_batches(config, manifest)
    stream = batch.build_stream(config, manifest, 1)
    expected = [
        [slot.image_id for slot in each.slots] for each in stream.plan.explain(0, stream.source.sizes)
    ]
    assert [list(each.image_ids) for each in sample.batches] == expected
    assert {each.step for each in sample.others} == {1, 2, 3}
    assert sample.images_per_second > 0
    (line,) = lines(batch.findings(config, sample))
    assert line.startswith("ok    batch: step 0 has 8 images padded to")


def test_the_contact_sheet_shows_the_boxes_of_the_targets(tmp_path: Path) -> None:
    def gray(_: int, made: dict) -> None:
        file = BytesIO()
        Image.new("RGB", (80, 60), (128, 128, 128)).save(file, "PNG")
        box = {**made["objects"][0], "bbox": [20.0, 15.0, 40.0, 30.0]}
        made |= {"image": file.getvalue(), "height": 60, "width": 80, "objects": [box]}

    manifest = write_data(tmp_path, gray)
    config = configure(tmp_path, flip=0.0)
    (line,) = lines(
        batch.draw_contact_sheet(
            batch.first_batches(config, manifest), manifest.id2label, f"{tmp_path}/batch.png"
        )
    )
    assert line.startswith("ok    picture")
    with Image.open(tmp_path / "batch.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    cell = pixels[10 + 24 : 10 + 24 + 270, 10 : 10 + 360]  # 360 x 270: the first of four in a row
    off = np.abs(cell - 128).max(axis=2) > 20
    rows, columns = np.flatnonzero(off[:, 180:200].any(axis=1)), np.flatnonzero(off[130:150].any(axis=0))
    assert (columns[0], columns[-1]) == (pytest.approx(90, abs=4), pytest.approx(270, abs=4))
    assert rows[-1] == pytest.approx(202, abs=4)
    assert rows[0] == pytest.approx(67, abs=4), "the label is at the left corner"


def test_damaged_images_are_reported(tmp_path: Path) -> None:
    def cut(number: int, made: dict) -> None:
        if number % 3 == 0:
            made["image"] = made["image"][: len(made["image"]) // 2]

    manifest, config = write_data(tmp_path, cut), configure(tmp_path)
    first, *_ = lines(batch.findings(config, batch.first_batches(config, manifest)))
    assert first.startswith("FAIL  images: ")
    assert "images cannot be decoded, for example image 1" in first
    few = override(config, max_skipped=0.9)
    assert lines(batch.findings(few, batch.first_batches(few, manifest)))[0].startswith("warn  images: ")


def test_images_without_objects_are_reported(tmp_path: Path) -> None:
    def empty(number: int, made: dict) -> None:
        if number % 10:
            made["objects"] = []

    manifest, config = write_data(tmp_path, empty), configure(tmp_path)
    (line,) = lines(batch.findings(config, batch.first_batches(config, manifest)))
    assert line.startswith("warn  batch: ")
    assert "of 32 images have objects" in line


def test_boxes_of_a_few_pixels_are_reported(tmp_path: Path) -> None:
    def tiny(_: int, made: dict) -> None:
        for item in made["objects"]:
            item["bbox"][2:] = [3.0, 3.0]

    manifest, config = write_data(tmp_path, tiny), configure(tmp_path)
    line = lines(batch.findings(config, batch.first_batches(config, manifest)))[0]
    assert line.startswith("warn  batch: ")
    assert "% of the boxes are less than 4 pixels wide or high" in line


def test_the_training_step_of_the_run_overfits_eight_images(tmp_path: Path) -> None:
    manifest, config = write_data(tmp_path), configure(tmp_path)
    done = trial.run_in_process(config, manifest, batch.first_batches(config, manifest).batches)
    (line,) = lines(trial.findings(config, done))
    assert line.startswith("ok    overfit: 8 images, "), line
    assert done.stop_reason == "fallen"
    assert done.losses[-1] < 0.95 * done.losses[0]
    assert done.images == 4, "half of the step: the share of one of two workers"
    assert done.step_seconds > 0
    assert done.memory_gib > 0.1
    assert 0 <= done.metrics["AP50"] <= 1


@pytest.mark.slow
def test_a_model_that_cannot_learn_is_reported(tmp_path: Path) -> None:
    manifest = write_data(tmp_path)
    config = configure(tmp_path, learning_rate=0.0, backbone_learning_rate=0.0, overfit_steps=8)
    losses, stop_reason, _, _ = trial.overfit(config, manifest, torch.device("cpu"))
    assert stop_reason == "steps"
    assert max(losses) < 1.001 * min(losses)
    done = trial.TrialRun(1.0, 8, 1.0, None, losses, stop_reason, 1.0, {})
    (line,) = lines(trial.findings(config, done))
    assert line.startswith("FAIL  overfit: 8 images, 8 steps")
    assert "it has not fallen to 0.9 of its initial value. Remedy: check in batch.png" in line


@pytest.mark.slow
def test_the_loss_of_a_frozen_detector_need_not_fall(tmp_path: Path) -> None:
    """Its part of the loss cannot fall, so only the mask losses count."""

    def add_masks(_: int, made: dict) -> None:
        for item in made["objects"]:
            x, y, width, height = item["bbox"]
            corners = [x, y, x + width, y, x + width, y + height, x, y + height]
            item["segmentation"] = {"polygons": [corners], "rle": None}

    manifest = write_data(tmp_path, add_masks)
    boxes = configure(tmp_path, attention_heads=8)
    folder = str(tmp_path / "detector")
    model = build_model(boxes, manifest)
    model.save_pretrained(folder)
    image_processor(boxes).save_pretrained(folder)
    config = configure(
        tmp_path,
        task="instance",
        freeze_detector=True,
        model=folder,
        learning_rate=3e-3,
        loss_share=0.9,
        attention_heads=8,
    )
    config = override(config, overfit_steps=150)
    losses, stop_reason, _, _ = trial.overfit(config, manifest, torch.device("cpu"))
    assert stop_reason == "fallen", losses


def test_a_non_finite_loss_is_reported(tmp_path: Path) -> None:
    manifest = write_data(tmp_path)
    config = configure(tmp_path, learning_rate=1e30, max_grad_norm=0.0, warmup_steps=0)
    losses, stop_reason, _, metrics = trial.overfit(config, manifest, torch.device("cpu"))
    assert (stop_reason, metrics) == ("not finite", {})
    done = trial.TrialRun(1.0, 8, 1.0, None, losses, stop_reason, 1.0, metrics)
    assert lines(trial.findings(config, done))[0].startswith("FAIL  overfit: ")


def test_images_without_trainable_objects_are_an_error(tmp_path: Path) -> None:
    manifest = write_data(tmp_path, lambda _, made: made.update(objects=[]))
    with pytest.raises(
        DataError, match="none of the first 500 images can be decoded and has trainable objects"
    ):
        trial.select_images(configure(tmp_path), manifest, str(tmp_path / "few"))
