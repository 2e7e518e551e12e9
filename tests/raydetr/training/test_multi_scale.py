"""Training of the multi-scale architecture: its steps, refused flags, and fine-tuning of its models."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from detr import DetrForObjectDetection, DetrForSegmentation
from raydetr.data.shards import Manifest
from raydetr.errors import ConfigError
from raydetr.flat_keys import override
from raydetr.training.config import TrainConfig
from raydetr.training.distributed import step_totals
from raydetr.training.model import build_model, image_processor
from raydetr.training.recipes import DEFAULT, RECIPES
from raydetr.training.state import TrainingState, create_state
from raydetr.training.step import compute_gradients, to_device
from raydetr.training.trainer import check_prerequisites
from tests.awkward import write_awkward
from tests.cluster.recorded_training import config as make_config
from tests.training_steps import batches_of_steps, train_here

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_awkward(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(manifest: Manifest) -> TrainConfig:
    return override(
        make_config(manifest.root, "nowhere"), multi_scale=True, steps=3, precision="float64", seed=1
    )


@pytest.fixture(scope="module")
def with_masks(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_awkward(tmp_path_factory.mktemp("masks"), masks=True)


def gradients(state: TrainingState) -> dict[str, torch.Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in state.module.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("task", ["detection", "instance"])
def test_micro_batches_add_up_to_the_gradient_of_the_whole_step(
    task: str, config: TrainConfig, manifest: Manifest, with_masks: Manifest
) -> None:
    if task == "instance":
        config, manifest = override(config, train_data=with_masks.root, task=task), with_masks
    config = override(config, micro_batch_size=1, micro_batches=8, steps=1)
    state = create_state(config, manifest, CPU)
    for batches in batches_of_steps(config, manifest):
        totals = step_totals(batches, config.model.architecture.num_queries, 0.1)
        compute_gradients(state.module, state, batches, config, totals.num_boxes, totals.class_weight_sum)
        accumulated = gradients(state)
        state.module.zero_grad()
        pixel_values, pixel_mask = zip(*(to_device(batch, state) for batch in batches), strict=True)
        state.module(
            torch.cat(pixel_values),
            torch.cat(pixel_mask),
            labels=[label for batch in batches for label in batch.labels],
            image_weights=torch.cat([batch.weights for batch in batches]),
        ).loss.backward()
        whole = gradients(state)
        state.module.zero_grad()
        assert accumulated.keys() == whole.keys()
        for name, expected in whole.items():
            torch.testing.assert_close(accumulated[name], expected, rtol=1e-9, atol=1e-9, msg=name)


def test_steps_are_finite_in_bf16(config: TrainConfig, manifest: Manifest) -> None:
    config = override(config, precision="bf16")
    metrics = train_here(config, manifest, create_state(config, manifest, CPU))
    assert len(metrics) == 3
    assert all(math.isfinite(value) for each in metrics for value in each.values())
    assert {"loss_ce", "loss_dense_giou"} <= metrics[0].keys()


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_masks_train_on_a_frozen_detector(
    precision: str, config: TrainConfig, manifest: Manifest, with_masks: Manifest, tmp_path: Path
) -> None:
    boxes = build_model(config, manifest)
    boxes.save_pretrained(tmp_path)
    image_processor(config).save_pretrained(tmp_path)
    changes = {"multi_scale": False, "task": "instance", "model": str(tmp_path), "freeze_detector": True}
    config = override(config, train_data=with_masks.root, precision=precision, **changes)
    state = create_state(config, with_masks, CPU)
    assert isinstance(state.model, DetrForSegmentation)
    before = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    metrics = train_here(config, with_masks, state)
    assert all(math.isfinite(value) for each in metrics for value in each.values())
    assert {"loss_mask", "loss_dice"} <= metrics[0].keys()
    changed = {name for name, tensor in state.model.state_dict().items() if not tensor.equal(before[name])}
    assert "mask_head.kernels.weight" in changed
    assert all(name.startswith("mask_head.") for name in changed)
    own = boxes.state_dict()
    for name, tensor in state.model.detr.state_dict().items():
        torch.testing.assert_close(tensor, own[name].to(tensor.dtype), msg=name)


@pytest.mark.parametrize(("name", "strides"), [(DEFAULT, [4, 8, 16]), ("scenes", [8, 16])])
def test_the_recipes_build_the_architecture(name: str, strides: list[int], manifest: Manifest) -> None:
    model = build_model(override(RECIPES[name](), backbone_weights=""), manifest)
    assert isinstance(model, DetrForObjectDetection)
    assert model.config.multi_scale is not None
    assert model.multi_scale.backbone.conv_encoder.strides == strides
    assert model.config.multi_scale.nms_threshold == RECIPES[name]().model.architecture.nms_threshold


@pytest.mark.parametrize(
    "changes", [{"query_groups": 2}, {"dense_loss_weight": 1.0}, {"locality_init": True}]
)
def test_flags_that_the_architecture_does_not_support_are_refused(
    changes: dict[str, object], config: TrainConfig
) -> None:
    (name,) = changes
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}"):
        override(config, **changes)


def test_a_multi_scale_model_is_fine_tuned_on_other_classes(
    config: TrainConfig, manifest: Manifest, tmp_path: Path
) -> None:
    original = build_model(config, manifest)
    original.save_pretrained(tmp_path)
    image_processor(config).save_pretrained(tmp_path)
    tuned = override(config, model=str(tmp_path), multi_scale=False, seed=2)
    name = "multi_scale.dense_head.class_labels_classifier.weight"
    assert torch.equal(build_model(tuned, manifest).state_dict()[name], original.state_dict()[name])
    for names in (("bee", "ant", "cat"), ("ant", "bee")):
        categories = tuple({"id": i, "name": each} for i, each in enumerate(names))
        model = build_model(tuned, replace(manifest, categories=categories))
        assert model.config.multi_scale is not None
        assert len(model.state_dict()[name]) == len(names)
        assert not torch.equal(model.state_dict()[name][0], original.state_dict()[name][0])


def test_the_recipe_must_fit_the_model(config, manifest, tmp_path):
    check_prerequisites(config, manifest)
    build_model(config, manifest).save_pretrained(tmp_path / "multi")
    image_processor(config).save_pretrained(tmp_path / "multi")
    plain = make_config(manifest.root, str(tmp_path / "run"))
    build_model(plain, manifest).save_pretrained(tmp_path / "plain")
    image_processor(config).save_pretrained(tmp_path / "plain")
    with pytest.raises(ConfigError, match="use --recipe detr-small"):
        check_prerequisites(override(plain, model=str(tmp_path / "multi"), query_groups=2), manifest)
    with pytest.raises(ConfigError, match="is not a multi-scale model"):
        check_prerequisites(override(config, model=str(tmp_path / "plain")), manifest)
