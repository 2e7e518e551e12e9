"""Exported multi-scale models: batch size, height and width are dynamic, and the pixel mask is an input."""

import numpy as np
import pytest
import torch

from tests.detr.model.test_export import (
    SIZES,
    Tensors,
    compiled,
    converted_by_openvino,
    example,
    export,
    onnx_by_tracing,
    traced,
)
from tests.tiers import rest_slow


def run(model, sizes, make_batch):
    batch = make_batch(sizes, seed=1)
    inputs = {"pixel_values": batch.pixel_values, "pixel_mask": batch.pixel_mask}
    with torch.no_grad():
        return inputs, model(**inputs).to_tuple()


@pytest.mark.slow
def test_an_exported_model_equals_the_model_for_any_batch_and_size(make_model, make_batch):
    model = make_model(dtype=torch.float32)
    program = export(model, make_batch(SIZES[0])).module()
    for sizes in SIZES:
        inputs, expected = run(model, sizes, make_batch)
        with torch.no_grad():
            got = program(**inputs).to_tuple()
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_onnxruntime_equals_the_model_for_any_batch_and_size(make_model, make_batch, tmp_path):
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("capture", rest_slow([traced, compiled, onnx_by_tracing, converted_by_openvino]))
@torch.no_grad()
def test_a_model_captured_with_a_mask_of_ones_equals_the_model_for_any_mask_and_size(
    capture, make_model, make_batch
):
    model = Tensors(make_model(dtype=torch.float32))
    torch._dynamo.reset()
    program = capture(model, example())
    for sizes in SIZES:
        batch = make_batch(sizes, seed=1)
        got = program(batch.pixel_values, batch.pixel_mask)
        for ours, expected in zip(got, model(batch.pixel_values, batch.pixel_mask), strict=True):
            torch.testing.assert_close(torch.as_tensor(np.asarray(ours)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.inference_mode()
def test_openvino_equals_the_model_for_images_of_any_size(make_model, make_batch):
    pytest.importorskip("openvino", reason="needs OpenVINO: pip install 'raydetr[openvino]'")
    model = make_model(dtype=torch.float32)
    fast = model.optimize(engine="openvino")
    for sizes in SIZES:
        batch = make_batch(sizes, seed=1)
        for given in ((batch.pixel_values, batch.pixel_mask), (batch.pixel_values,)):
            for got, expected in zip(fast(*given).to_tuple(), model(*given).to_tuple(), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
