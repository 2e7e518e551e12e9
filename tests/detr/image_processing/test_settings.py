"""`preprocessor_config.json` is exchanged with transformers in both directions, and old files are read."""

import json

import numpy as np
import pytest
import transformers

from detr.image_processing.processor import DetrImageProcessor

SETTINGS = [
    {},
    {"size": {"shortest_edge": 100, "longest_edge": 200}},
    {"size": 300},
    {"size": {"height": 30, "width": 40}},
    {"do_normalize": False},
    {"do_convert_annotations": False},
    {"do_pad": False, "do_resize": False, "do_rescale": False},
    {"pad_size": {"height": 900, "width": 1000}},
    {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.1, 0.2, 0.3], "rescale_factor": 1.0, "resample": 3},
    {"format": "coco_panoptic"},
]


@pytest.mark.checklist("6. Image processor", "preprocessor_config.json")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_written_file_equals_that_of_transformers(settings, tmp_path):
    (ours,) = DetrImageProcessor(**settings).save_pretrained(tmp_path / "ours")
    (theirs,) = transformers.DetrImageProcessor(**settings).save_pretrained(tmp_path / "theirs")
    with open(ours) as a, open(theirs) as b:
        assert a.read() == b.read()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_settings_round_trip_between_both_libraries(settings, tmp_path):
    transformers.DetrImageProcessor(**settings).save_pretrained(tmp_path / "theirs")
    loaded = DetrImageProcessor.from_pretrained(tmp_path / "theirs")
    loaded.save_pretrained(tmp_path / "ours")
    back = transformers.DetrImageProcessor.from_pretrained(tmp_path / "ours")
    assert back.to_dict() == transformers.DetrImageProcessor(**settings).to_dict()
    assert DetrImageProcessor.from_pretrained(tmp_path / "ours") == loaded


def test_our_own_settings_round_trip(tmp_path):
    processor = DetrImageProcessor(boxes_relative_to="padded_batch", do_convert_rgb=False)
    processor.save_pretrained(tmp_path)
    assert DetrImageProcessor.from_pretrained(tmp_path) == processor
    image = np.zeros((20, 30, 3), np.uint8)
    assert transformers.DetrImageProcessor.from_pretrained(tmp_path)(image).pixel_values.shape == (
        1,
        3,
        800,
        1200,
    )


OLD_FILES = {
    "first": {
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "DetrFeatureExtractor",
        "format": "coco_detection",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "max_size": 1000,
        "size": 600,
    },
    "version 4": {
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "feature_extractor_type": "DetrFeatureExtractor",
        "format": "coco_detection",
        "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "DetrImageProcessor",
        "image_std": [0.229, 0.224, 0.225],
        "pad_and_return_pixel_mask": False,
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "size": {"longest_edge": 1333, "shortest_edge": 800},
    },
    "version 4 fast": {
        "crop_size": None,
        "data_format": "channels_first",
        "default_to_square": False,
        "device": None,
        "disable_grouping": None,
        "do_center_crop": None,
        "do_convert_annotations": True,
        "do_convert_rgb": None,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "format": "coco_detection",
        "image_mean": [0.485, 0.456, 0.406],
        "image_processor_type": "DetrImageProcessorFast",
        "image_std": [0.229, 0.224, 0.225],
        "input_data_format": None,
        "pad_size": None,
        "resample": 2,
        "rescale_factor": 0.00392156862745098,
        "return_tensors": None,
        "size": {"longest_edge": 640, "shortest_edge": 480},
    },
}


@pytest.mark.checklist("6. Image processor", "preprocessor_config.json")
@pytest.mark.parametrize("name", OLD_FILES)
@pytest.mark.parametrize("nested", [False, True])
def test_old_files_are_read_like_transformers(name, nested, tmp_path):
    if nested:
        content, file = {"image_processor": OLD_FILES[name], "processor_class": "X"}, "processor_config.json"
    else:
        content, file = OLD_FILES[name], "preprocessor_config.json"
    (tmp_path / file).write_text(json.dumps(content))
    ours = DetrImageProcessor.from_pretrained(tmp_path)
    theirs = transformers.DetrImageProcessor.from_pretrained(tmp_path)
    assert ours.size == {key: value for key, value in dict(theirs.size).items() if value is not None}
    for field in ("do_pad", "do_resize", "do_rescale", "do_normalize", "do_convert_annotations", "format"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert list(ours.image_mean) == list(theirs.image_mean)
    assert ours == DetrImageProcessor.from_pretrained(tmp_path / file)


def test_overrides_replace_values_of_the_file(tmp_path):
    DetrImageProcessor().save_pretrained(tmp_path)
    processor = DetrImageProcessor.from_pretrained(tmp_path, size={"shortest_edge": 5}, do_pad=False)
    assert processor.size == {"shortest_edge": 5}
    assert not processor.do_pad


def test_the_error_for_a_folder_without_settings_names_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist"):
        DetrImageProcessor.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path.name} is not the folder of an image processor"):
        DetrImageProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_the_error_for_a_file_that_is_not_a_json_object_names_the_file(text, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        DetrImageProcessor.from_pretrained(tmp_path)
