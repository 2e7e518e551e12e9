"""Exported multi-scale models: batch size, height and width stay free, and the pixel mask is an input."""

import pytest
import torch

from tests.detr.test_export import SIZES, export

pytestmark = pytest.mark.slow


def run(model, sizes, make_batch):
    batch = make_batch(sizes, seed=1)
    inputs = {"pixel_values": batch.pixel_values, "pixel_mask": batch.pixel_mask}
    with torch.no_grad():
        return inputs, model(**inputs).to_tuple()


def test_an_exported_model_answers_as_the_model_for_any_batch_and_size(make_model, make_batch):
    model = make_model(dtype=torch.float32)
    program = export(model, make_batch(SIZES[0])).module()
    for sizes in SIZES:
        inputs, expected = run(model, sizes, make_batch)
        with torch.no_grad():
            got = program(**inputs).to_tuple()
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_onnxruntime_answers_as_the_model_for_any_batch_and_size(make_model, make_batch, tmp_path):
    import onnxruntime

    model = make_model(dtype=torch.float32)
    program = torch.onnx.export(export(model, make_batch(SIZES[0])), dynamo=True, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for sizes in SIZES:
        inputs, expected = run(model, sizes, make_batch)
        got = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        for ours, onnx in zip(expected, got, strict=True):
            torch.testing.assert_close(torch.from_numpy(onnx), ours, rtol=1e-4, atol=1e-4)
