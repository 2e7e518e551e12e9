"""The `Auto` classes select the class for a folder, and reject folders that are not DETR."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import detr

AUTO = (
    detr.AutoConfig,
    detr.AutoImageProcessor,
    detr.AutoModelForObjectDetection,
    detr.AutoModelForImageSegmentation,
)


@pytest.fixture(scope="module")
def folder(make_twins, tmp_path_factory):
    """A model folder written by transformers."""
    folder = tmp_path_factory.mktemp("theirs")
    make_twins(segmentation=True).theirs.save_pretrained(folder)
    transformers.DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 90}).save_pretrained(folder)
    return folder


def test_each_auto_class_loads_the_same_model_as_transformers(folder):
    config = detr.AutoConfig.from_pretrained(folder)
    assert type(config) is detr.DetrConfig
    assert config.id2label == transformers.AutoConfig.from_pretrained(folder).id2label
    assert config.d_model == 64
    assert type(detr.AutoModelForObjectDetection.from_pretrained(folder)) is detr.DetrForObjectDetection
    model = detr.AutoModelForImageSegmentation.from_pretrained(str(folder), device_map="cpu")
    assert type(model) is detr.DetrForSegmentation
    theirs = transformers.AutoModelForImageSegmentation.from_pretrained(folder)
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = model(pixels).logits - theirs(pixels).logits
    assert difference.abs().max() < 1e-4


def test_arguments_reach_the_class(folder):
    assert detr.AutoConfig.from_pretrained(folder, num_queries=7).num_queries == 7
    model = detr.AutoModelForObjectDetection.from_pretrained(folder, dtype=torch.float64, num_labels=9)
    assert model.dtype == torch.float64
    assert model.class_labels_classifier.out_features == 10
    processor = detr.AutoImageProcessor.from_pretrained(folder, do_pad=False)
    assert not processor.do_pad
    assert processor.size == {"shortest_edge": 64, "longest_edge": 90}


@pytest.mark.filterwarnings("ignore:.*use_fast.*")
@pytest.mark.parametrize(
    "arguments", [{}, {"backend": "pil"}, {"backend": "torchvision"}, {"use_fast": False}, {"use_fast": True}]
)
def test_the_same_backend_is_selected_as_in_transformers(folder, arguments):
    ours = detr.AutoImageProcessor.from_pretrained(folder, **arguments)
    theirs = transformers.AutoImageProcessor.from_pretrained(folder, **arguments)
    assert type(ours).__name__ == type(theirs).__name__
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (50, 77, 3), dtype=np.uint8))
    got = ours(image, return_tensors="pt").pixel_values
    expected = theirs(image, return_tensors="pt").pixel_values
    assert (got - expected).abs().max() <= (0 if type(ours).__name__.endswith("Pil") else 1 / 255 / 0.224)


@pytest.mark.parametrize(
    "name", ["DetrFeatureExtractor", "DetrImageProcessorFast", "DetrImageProcessorPil", None]
)
def test_processor_files_of_all_versions_are_read(name, tmp_path):
    key = "feature_extractor_type" if name == "DetrFeatureExtractor" else "image_processor_type"
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({key: name, "size": 320, "max_size": 500} if name else {"size": 320, "max_size": 500})
    )
    processor = detr.AutoImageProcessor.from_pretrained(tmp_path)
    assert type(processor) is detr.DetrImageProcessor
    assert processor.size == {"shortest_edge": 320, "longest_edge": 500}


def test_another_architecture_is_rejected(tmp_path):
    transformers.YolosConfig().save_pretrained(tmp_path)
    transformers.YolosImageProcessor().save_pretrained(tmp_path)
    for auto in AUTO:
        if auto is detr.AutoImageProcessor:
            message = "has the image processor 'YolosImageProcessor', which is not one of DETR's"
        else:
            message = "is the configuration of a 'yolos' model, not of DETR"
        with pytest.raises(ValueError, match=message):
            auto.from_pretrained(tmp_path)


def test_errors_for_missing_and_empty_folders_name_the_reason(tmp_path):
    for auto in AUTO:
        with pytest.raises(FileNotFoundError, match="does not exist"):
            auto.from_pretrained(tmp_path / "a" / "b")
        with pytest.raises(FileNotFoundError, match=r"config\.json"):
            auto.from_pretrained(tmp_path)
        with pytest.raises(
            FileNotFoundError, match="folder nobody/nothing does not exist, and it could not be fetched"
        ):
            auto.from_pretrained("nobody/nothing", local_files_only=True)


def test_an_unknown_backend_is_rejected(folder):
    with pytest.raises(ValueError, match="backend is 'opencv': expected one of"):
        detr.AutoImageProcessor.from_pretrained(folder, backend="opencv")
