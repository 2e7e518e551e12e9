"""Checkpoints saved by transformers 4 (`make_v4_files.py`) give the same predictions as there."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from detr import DetrForObjectDetection, DetrForSegmentation
from detr.checkpoint.state_dict import read_model_weights

FOLDER = Path(__file__).parent / "v4_files"
SECTION = "8. Weights, saving, pipeline, evaluation"


@pytest.mark.checklist(SECTION, "files")
@pytest.mark.checklist(SECTION, "keys on disk")
@pytest.mark.checklist(SECTION, "learned position keys")
@pytest.mark.known_issue(16)
@pytest.mark.parametrize("case", ["detection", "segmentation", "learned", "no_timm"])
def test_a_version_4_folder_gives_the_recorded_predictions(case, difference, caplog, tmp_path):
    model_class = DetrForSegmentation if case == "segmentation" else DetrForObjectDetection
    model = model_class.from_pretrained(FOLDER / case, dtype=torch.float32)
    assert "newly initialized" not in caplog.text
    answer = load_file(FOLDER / case / "answer.safetensors")
    with torch.no_grad():
        outputs = model(answer.pop("pixel_values"), answer.pop("pixel_mask"))
    for name, expected in answer.items():
        assert expected.std(1).mean() > 1e-2, f"{name}: the queries are alike"
        difference(float((outputs[name] - expected).abs().max()))
        torch.testing.assert_close(outputs[name], expected, rtol=1e-4, atol=1e-4)
    model.to(torch.float16).save_pretrained(tmp_path)
    old, new = read_model_weights(FOLDER / case), read_model_weights(tmp_path)
    renamed = {name.replace("backbone.position_embedding", "position_embedding") for name in old}
    counters = {name for name in old if name.endswith("num_batches_tracked")}
    assert renamed - counters == set(new), "the saved file does not have the layout of the loaded one"
