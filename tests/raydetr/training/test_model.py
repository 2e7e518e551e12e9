"""The model that a run starts from: what a model at --model keeps, what starts anew, what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.train import main
from raydetr.data.shards import Manifest
from raydetr.errors import ConfigError, DataError
from raydetr.training.config import TrainConfig
from raydetr.training.model import build_model, image_processor
from raydetr.training.recipes import RECIPES, require_model_flags
from raydetr.training.trainer import check
from tests.awkward import write_awkward
from tests.cluster.recorded_training import config as make_config


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_awkward(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def base(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A configuration that starts from a model of the manifest's classes."""
    # Eight heads: the mask head wants multiples of eight channels.
    config = replace(make_config(manifest.root, "nowhere"), attention_heads=8, seed=1)
    folder = str(tmp_path_factory.mktemp("model"))
    build_model(config, manifest).save_pretrained(folder)
    image_processor(config).save_pretrained(folder)
    return replace(config, model=folder, seed=2)


def named(manifest: Manifest, *names: str) -> Manifest:
    return replace(
        manifest, categories=tuple({"id": number, "name": name} for number, name in enumerate(names))
    )


def head(config: TrainConfig, manifest: Manifest) -> torch.Tensor:
    return build_model(config, manifest).state_dict()["class_labels_classifier.weight"]


def test_the_class_head_of_a_model_is_kept_for_its_own_classes_alone(
    base: TrainConfig, manifest: Manifest
) -> None:
    learned = head(replace(base, model="", seed=1), manifest)
    assert torch.equal(head(base, manifest), learned)
    for names in (("bee", "ant", "cat"), ("ant", "bee", "dog"), ("ant", "bee")):
        model = build_model(base, named(manifest, *names))
        weight = model.class_labels_classifier.weight
        assert len(weight) == len(names) + 1
        assert not any(torch.equal(one, other) for one in weight for other in learned)
        assert list(model.config.id2label.values()) == list(names)
        assert torch.equal(
            model.state_dict()["bbox_predictor.layers.0.weight"],
            build_model(base, manifest).state_dict()["bbox_predictor.layers.0.weight"],
        )


@pytest.mark.parametrize("names", [("bee", "ant", "cat"), ("ant", "bee")])
def test_a_detector_of_other_classes_is_not_frozen(
    base: TrainConfig, manifest: Manifest, names: tuple[str, ...]
) -> None:
    frozen = replace(base, task="panoptic", freeze_detector=True)
    build_model(frozen, manifest)
    with pytest.raises(ConfigError, match=r"finds 3 classes \(ant, bee, cat\), the data have"):
        build_model(frozen, named(manifest, *names))


def test_flags_of_an_architecture_are_refused_beside_a_model(base: TrainConfig) -> None:
    for name in ("fine-tune", "masks"):
        recipe = replace(RECIPES[name], model=base.model)
        require_model_flags(recipe, name)
        with pytest.raises(ConfigError, match="--num-queries, --compat: the architecture is that of --model"):
            main(replace(recipe, num_queries=300, compat="transformers"), name)
    require_model_flags(replace(RECIPES["detr-r50"], num_queries=300), "detr-r50")
    with pytest.raises(ConfigError, match="fine-tune"):
        main(RECIPES["fine-tune"], "fine-tune")


def test_too_few_queries_of_a_model_are_not_mended_by_a_flag(base: TrainConfig, manifest: Manifest) -> None:
    crowded = replace(manifest, max_objects_per_image=50)
    with pytest.raises(ConfigError, match="Start from another --model"):
        check(base, crowded)
    with pytest.raises(ConfigError, match="Give --num-queries 50"):
        check(replace(base, model=""), crowded)


def test_validation_data_that_cannot_be_scored_are_refused_before_the_first_step(
    base: TrainConfig, manifest: Manifest, tmp_path: Path
) -> None:
    write_awkward(tmp_path / "empty", empty=1.0)
    with pytest.raises(ConfigError, match="with 0 objects: there is nothing to score"):
        check(replace(base, val_data=str(tmp_path / "empty")), manifest)
    with pytest.raises(DataError, match=r"no label of the model is called \['cat'\]"):
        check(replace(base, val_data=manifest.root), named(manifest, "ant", "bee"))
    check(replace(base, val_data=manifest.root), manifest)


def test_data_without_anything_to_learn_are_refused_before_the_first_step(
    base: TrainConfig, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"no object of the 60 images can be trained on.*\n.*no annotations"):
        check(base, write_awkward(tmp_path / "empty", empty=1.0))
    categories = [{"id": n, "name": "ant"} for n in (3, 7, 90)]
    with pytest.raises(DataError, match="3 and 7 are both named 'ant'"):
        check(base, replace(write_awkward(tmp_path / "names"), categories=tuple(categories)))
