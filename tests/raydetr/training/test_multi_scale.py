"""A run that trains the multi-scale architecture: its steps, what its flags refuse, and starting from its model."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from detr import DetrForObjectDetection
from raydetr.data.shards import Manifest
from raydetr.errors import ConfigError
from raydetr.training.config import TrainConfig
from raydetr.training.model import build_model, image_processor
from raydetr.training.recipes import RECIPES
from raydetr.training.state import create_state
from tests.awkward import write_awkward
from tests.cluster.recorded_training import config as make_config
from tests.training_steps import batches_of_steps, train_here

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_awkward(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(manifest: Manifest) -> TrainConfig:
    return replace(
        make_config(manifest.root, "nowhere"), multi_scale=True, steps=3, precision="float64", seed=1
    )


def test_micro_batches_add_up_to_the_steps_of_a_single_batch(config: TrainConfig, manifest: Manifest) -> None:
    runs = []
    for size, count in ((8, 1), (1, 8)):
        of_size = replace(config, micro_batch_size=size, micro_batches=count, workers=1)
        state = create_state(of_size, manifest, CPU)
        metrics = train_here(of_size, manifest, state)
        assert len(metrics) == 3
        assert all(math.isfinite(value) for each in metrics for value in each.values())
        assert {"loss_ce", "loss_dense_giou"} <= metrics[0].keys()
        runs.append((metrics, state.model.state_dict()))
    sizes = {batch.shape for each in batches_of_steps(config, manifest) for batch in each}
    assert len(sizes) > 1
    for ours, theirs in zip(*(metrics for metrics, _ in runs), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-9)
    for name, value in runs[0][1].items():
        torch.testing.assert_close(value, runs[1][1][name], rtol=1e-6, atol=1e-9, msg=name)


def test_the_recipe_builds_the_architecture(manifest: Manifest) -> None:
    recipe = replace(RECIPES["multi-scale"], backbone_weights="")
    model = build_model(recipe, manifest)
    assert isinstance(model, DetrForObjectDetection)
    assert model.config.multi_scale is not None
    assert model.multi_scale.backbone.conv_encoder.strides == [4, 8, 16]


@pytest.mark.parametrize(
    "changes", [{"query_groups": 2}, {"cell_loss": 1.0}, {"local_attention": True}, {"task": "instance"}]
)
def test_flags_that_the_architecture_has_no_place_for_are_refused(
    changes: dict[str, object], config: TrainConfig
) -> None:
    (name,) = changes
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}"):
        replace(config, **changes)


def test_a_model_of_the_architecture_is_tuned_on_other_classes(
    config: TrainConfig, manifest: Manifest, tmp_path: Path
) -> None:
    learned = build_model(config, manifest)
    learned.save_pretrained(tmp_path)
    image_processor(config).save_pretrained(tmp_path)
    tuned = replace(config, model=str(tmp_path), multi_scale=False, seed=2)
    name = "multi_scale.dense_head.class_labels_classifier.weight"
    assert torch.equal(build_model(tuned, manifest).state_dict()[name], learned.state_dict()[name])
    for names in (("bee", "ant", "cat"), ("ant", "bee")):
        categories = tuple({"id": i, "name": each} for i, each in enumerate(names))
        model = build_model(tuned, replace(manifest, categories=categories))
        assert model.config.multi_scale is not None
        assert len(model.state_dict()[name]) == len(names)
        assert not torch.equal(model.state_dict()[name][0], learned.state_dict()[name][0])
