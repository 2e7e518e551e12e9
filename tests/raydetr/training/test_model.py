"""The model that a run starts from: what is reused of --model, what is reinitialized, what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from raydetr.data.shards import Manifest
from raydetr.errors import ConfigError, DataError
from raydetr.flat_keys import override
from raydetr.training.config import TrainConfig
from raydetr.training.model import build_model, image_processor
from raydetr.training.recipes import RECIPES, detr_r50, fine_tune
from raydetr.training.start import require_own_architecture
from raydetr.training.trainer import check_prerequisites
from tests.awkward import write_awkward
from tests.cluster.recorded_training import config as make_config


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_awkward(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def base(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Return a configuration that starts from a model with the manifest's classes."""
    # Eight heads, because the mask head needs a multiple of eight channels.
    config = override(make_config(manifest.root, "nowhere"), attention_heads=8, seed=1)
    folder = str(tmp_path_factory.mktemp("model"))
    build_model(config, manifest).save_pretrained(folder)
    image_processor(config).save_pretrained(folder)
    return override(config, model=folder, seed=2)


def with_categories(manifest: Manifest, *names: str) -> Manifest:
    return replace(
        manifest, categories=tuple({"id": number, "name": name} for number, name in enumerate(names))
    )


def head(config: TrainConfig, manifest: Manifest) -> torch.Tensor:
    return build_model(config, manifest).state_dict()["class_labels_classifier.weight"]


def test_the_class_head_is_reused_only_for_the_same_classes(base: TrainConfig, manifest: Manifest) -> None:
    trained_head = head(override(base, model="", seed=1), manifest)
    assert torch.equal(head(base, manifest), trained_head)
    for names in (("bee", "ant", "cat"), ("ant", "bee", "dog"), ("ant", "bee")):
        model = build_model(base, with_categories(manifest, *names))
        weight = model.class_labels_classifier.weight
        assert len(weight) == len(names) + 1
        assert not any(torch.equal(one, other) for one in weight for other in trained_head)
        assert list(model.config.id2label.values()) == list(names)
        assert torch.equal(
            model.state_dict()["bbox_predictor.layers.0.weight"],
            build_model(base, manifest).state_dict()["bbox_predictor.layers.0.weight"],
        )


@pytest.mark.parametrize("names", [("bee", "ant", "cat"), ("ant", "bee")])
def test_freezing_a_detector_with_other_classes_is_refused(
    base: TrainConfig, manifest: Manifest, names: tuple[str, ...]
) -> None:
    frozen = override(base, task="panoptic", freeze_detector=True)
    build_model(frozen, manifest)
    with pytest.raises(ConfigError, match=r"detects 3 classes \(ant, bee, cat\), but the data have"):
        build_model(frozen, with_categories(manifest, *names))


def test_architecture_flags_are_refused_with_a_model(base: TrainConfig) -> None:
    for name in ("fine-tune", "masks"):
        default = RECIPES[name]()
        config = override(default, model=base.model.model)
        require_own_architecture(config, default, name)
        with pytest.raises(ConfigError, match="--num-queries, --compat: the architecture is that of --model"):
            require_own_architecture(override(config, num_queries=300, compat="transformers"), default, name)
    require_own_architecture(override(detr_r50(), num_queries=300), detr_r50(), "detr-r50")
    with pytest.raises(ConfigError, match="fine-tune"):
        require_own_architecture(fine_tune(), fine_tune(), "fine-tune")


def test_the_remedy_for_too_few_queries_depends_on_whether_a_model_is_given(
    base: TrainConfig, manifest: Manifest
) -> None:
    crowded = replace(manifest, max_objects_per_image=50)
    with pytest.raises(ConfigError, match="Start from another --model"):
        check_prerequisites(base, crowded)
    with pytest.raises(ConfigError, match="Give --num-queries 50"):
        check_prerequisites(override(base, model=""), crowded)


def test_validation_data_that_cannot_be_scored_are_refused_before_the_first_step(
    base: TrainConfig, manifest: Manifest, tmp_path: Path
) -> None:
    write_awkward(tmp_path / "empty", empty=1.0)
    with pytest.raises(ConfigError, match="with 0 objects: there is nothing to score"):
        check_prerequisites(override(base, val_data=str(tmp_path / "empty")), manifest)
    with pytest.raises(DataError, match=r"the model has no label named \['cat'\]"):
        check_prerequisites(override(base, val_data=manifest.root), with_categories(manifest, "ant", "bee"))
    check_prerequisites(override(base, val_data=manifest.root), manifest)


def test_data_without_trainable_objects_are_refused_before_the_first_step(
    base: TrainConfig, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"no object of the 60 images can be trained on.*\n.*no annotations"):
        check_prerequisites(base, write_awkward(tmp_path / "empty", empty=1.0))
    categories = [{"id": n, "name": "ant"} for n in (3, 7, 90)]
    with pytest.raises(DataError, match="3 and 7 are both named 'ant'"):
        check_prerequisites(base, replace(write_awkward(tmp_path / "names"), categories=tuple(categories)))
