"""Training of instance masks and panoptic segments, jointly or in two stages."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from pycocotools import mask as coco_mask

from detr import DetrForObjectDetection, DetrForSegmentation
from detr.inference.detector import ObjectDetector
from detr.loss.mask_loss import mask_losses
from raydetr.data.ingest.ingest import ingest
from raydetr.data.ingest.inputs import InputPaths
from raydetr.data.shards import Manifest
from raydetr.data.synthetic.dataset import generate
from raydetr.errors import ConfigError
from raydetr.evaluation.in_process import predict_share, score_share
from raydetr.flat_keys import override
from raydetr.training.config import TrainConfig
from raydetr.training.recipes import masks, panoptic, panoptic_boxes
from raydetr.training.state import TrainingState, create_state
from raydetr.training.step import to_arguments
from raydetr.training.trainer import check_prerequisites
from tests.awkward import write_awkward, write_whole_masks
from tests.tiers import rest_slow
from tests.training_config import small_config
from tests.training_steps import batches_of_steps, train_here

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def manifest(ray_local: None, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("scenes")
    generate(str(folder / "coco"), 24, seed=3)
    files = [str(folder / "coco" / name) for name in ("annotations/instances.json", "images")]
    panoptic = [str(folder / "coco" / name) for name in ("annotations/panoptic.json", "annotations/panoptic")]
    if not Path(panoptic[1]).is_dir():
        panoptic[1] = str(folder / "coco" / "panoptic")
    return ingest(InputPaths(*files, *panoptic), str(folder / "shards")).manifest


def config(manifest: Manifest, **changes: object) -> TrainConfig:
    return override(
        small_config(
            train_data=manifest.root,
            workers=1,
            steps=6,
            backbone="test_resnet",
            backbone_out_indices=(1, 2, 3, 4),
            backbone_weights="",
            d_model=32,
            encoder_layers=1,
            decoder_layers=2,
            ffn_dim=32,
            num_queries=12,
            micro_batch_size=2,
            micro_batches=2,
            shortest_edges=(64,),
            test_edge=64,
            window_row_groups=1,
            name="",
        ),
        **changes,  # type: ignore[arg-type]
    )


def changed_parts(before: dict[str, torch.Tensor], state: TrainingState) -> set[str]:
    """Return the first name parts of the parameters that changed."""
    after = state.model.state_dict()
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("task", rest_slow(["instance", "panoptic"]))
def test_masks_and_boxes_train_jointly(manifest: Manifest, task: str) -> None:
    chosen = config(manifest, task=task, query_groups=2)
    check_prerequisites(chosen, manifest)
    state = create_state(chosen, manifest, CPU)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    metrics = train_here(chosen, manifest, state)
    assert all(row["loss_mask"] > 0 and row["loss_dice"] > 0 for row in metrics)
    assert changed_parts(before, state) == {"detr", "mask_head", "bbox_attention"}


def test_the_model_config_lists_the_stuff_classes(manifest: Manifest) -> None:
    model = create_state(config(manifest, task="panoptic"), manifest, CPU).model
    stuff = {category["name"] for category in manifest.categories if not category.get("isthing", 1)}
    assert (
        {model.config.id2label[label] for label in model.config.to_dict()["stuff_label_ids"]}
        == stuff
        != set()
    )


@pytest.mark.slow
def test_the_second_stage_trains_masks_and_leaves_the_detector_unchanged(
    manifest: Manifest, tmp_path: Path
) -> None:
    first = config(manifest, task="panoptic-boxes")
    boxes = create_state(first, manifest, CPU)
    assert isinstance(boxes.model, DetrForObjectDetection)
    metrics = train_here(first, manifest, boxes)
    assert "loss_mask" not in metrics[0]
    boxes.model.save_pretrained(tmp_path / "boxes")
    boxes.processor.save_pretrained(tmp_path / "boxes")
    second = config(manifest, task="panoptic", freeze_detector=True, model=str(tmp_path / "boxes"))
    state = create_state(second, manifest, CPU)
    assert isinstance(state.model, DetrForSegmentation)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    for name, value in boxes.model.state_dict().items():
        assert torch.equal(before[f"detr.{name}"], value), (
            "the second stage starts with the detector of the first"
        )
    train_here(second, manifest, state)
    assert changed_parts(before, state) == {"mask_head", "bbox_attention"}


def test_panoptic_boxes_include_stuff(manifest: Manifest) -> None:
    detection, segments = (
        create_state(config(manifest, task=task), manifest, CPU) for task in ("detection", "panoptic-boxes")
    )
    assert detection.model.config.id2label == segments.model.config.id2label
    kinds = {
        task: predict_share(ObjectDetector(state.model, state.processor), manifest, kind)  # type: ignore[arg-type]
        for task, state, kind in (("none", detection, "none"), ("panoptic-boxes", segments, "panoptic-boxes"))
    }
    boxes = {kind: len(share.truth.annotations) for kind, share in kinds.items()}
    assert boxes["panoptic-boxes"] > boxes["none"]


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_ground_truth_as_prediction_scores_one(manifest: Manifest, task: str) -> None:
    state = create_state(config(manifest, task=task), manifest, CPU)
    share = predict_share(ObjectDetector(state.model, state.processor), manifest, task)  # type: ignore[arg-type]
    assert -1 <= score_share(share)["AP"] < 0.9
    for row, image in zip(share.rows, share.truth.images, strict=True):
        row["image_id"] = image["id"]
        own = [item for item in share.truth.annotations if item["image_id"] == image["id"]]
        row |= {
            "score": [1.0] * len(own),
            "category_id": [item["category_id"] for item in own],
            "bbox": [item["bbox"] for item in own],
        }
        if task == "instance":
            row |= {"mask": [run_lengths(item, image) for item in own]}
            row |= {"height": image["height"], "width": image["width"]}
        elif image["id"] in share.truth.panoptic:
            png, segments = share.truth.panoptic[image["id"]]
            predicted = [{"id": s["id"], "category_id": s["category_id"], "score": 1.0} for s in segments]
            row |= {"panoptic": png, "segments": predicted}
    scored = score_share(share)
    assert scored["AP"] == pytest.approx(1)
    assert scored["mask_AP" if task == "instance" else "PQ"] == pytest.approx(1)


def run_lengths(annotation: dict[str, Any], image: dict[str, Any]) -> bytes:
    polygons = coco_mask.frPyObjects(annotation["segmentation"], image["height"], image["width"])
    return coco_mask.merge(polygons)["counts"]


def test_target_masks_align_with_the_output_of_the_mask_head(tmp_path: Path) -> None:
    """Each object covers its image, so the pixel mask of the padded batch is the right mask."""
    shards = write_whole_masks(tmp_path, 12)
    chosen = config(shards, task="instance", steps=3, shortest_edges=(48, 64))
    state = create_state(chosen, shards, CPU)
    masks_seen, padded = 0, 0
    for batch in itertools.chain.from_iterable(batches_of_steps(chosen, shards)):
        inputs = to_arguments(batch, state)
        owners = torch.tensor([slot for slot, label in enumerate(inputs["labels"]) for _ in label["masks"]])
        logits = (inputs["pixel_mask"].float() * 40 - 20)[owners]
        masks = [label["masks"] for label in inputs["labels"]]
        losses = torch.cat(mask_losses(logits, masks, owners, torch.arange(len(owners))))
        torch.testing.assert_close(losses, torch.zeros_like(losses), atol=1e-3, rtol=0)
        masks_seen += len(owners)
        padded += int((~inputs["pixel_mask"]).any())
    assert masks_seen == 12
    assert padded


@pytest.mark.slow
def test_an_epoch_can_end_with_a_partial_step(tmp_path: Path) -> None:
    # Three micro-batches of at most two images make two steps; the last one has a single micro-batch.
    shards = write_whole_masks(tmp_path, 5)
    chosen = config(shards, task="instance", steps=4)
    metrics = train_here(chosen, shards, create_state(chosen, shards, CPU))
    assert len(metrics) == 4
    assert all(row["loss_mask"] > 0 for row in metrics)


def test_data_without_masks_is_refused_before_the_first_step(tmp_path: Path) -> None:
    boxes_only = write_awkward(tmp_path / "data", shards=(8,))
    with pytest.raises(ConfigError, match="no image in the first shard"):
        check_prerequisites(config(boxes_only, task="panoptic"), boxes_only)


def test_the_mask_recipes_are_consistent() -> None:
    assert panoptic().run.segments
    assert masks().model.freeze_detector
    assert panoptic_boxes().run.task == "panoptic-boxes"
    with pytest.raises(ConfigError, match="--freeze-detector"):
        small_config(freeze_detector=True)
