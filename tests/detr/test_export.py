"""Exported models: batch size, height and width stay free, and the pixel mask is an input."""

import pytest
import torch
from torch.export import Dim

from tests.tiers import rest_slow

SIZES = (((96, 128), (64, 70)), ((64, 64),), ((100, 70), (33, 70), (100, 41)))
DYNAMIC = {
    "pixel_values": {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},
    "pixel_mask": {0: Dim.AUTO, 1: Dim.AUTO, 2: Dim.AUTO},
}


def export(model, batch):
    inputs = {"pixel_values": batch.pixel_values, "pixel_mask": batch.pixel_mask}
    with torch.no_grad():
        return torch.export.export(model, (), inputs, dynamic_shapes=DYNAMIC, strict=False)


@pytest.mark.checklist("3. Position embeddings and transformer", "outputs")
@pytest.mark.known_issue(20)
@pytest.mark.parametrize("segmentation", rest_slow([False, True]))
def test_an_exported_model_answers_as_the_model_for_any_batch_and_size(
    segmentation, make_twins, make_batch, difference
):
    model = make_twins(segmentation=segmentation).ours
    program = export(model, make_batch(SIZES[0])).module()
    for sizes in SIZES:
        batch = make_batch(sizes, seed=1)
        inputs = {"pixel_values": batch.pixel_values, "pixel_mask": batch.pixel_mask}
        with torch.no_grad():
            outputs, wanted = program(**inputs), model(**inputs)
            assert type(outputs) is type(wanted)
            for got, expected in zip(outputs.values(), wanted.values(), strict=True):
                difference(float((got - expected).abs().max()))
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_pixel_mask_stays_an_input_that_counts(make_twins, make_batch):
    batch = make_batch(SIZES[0])
    program = export(make_twins().ours, batch).module()
    with torch.no_grad():
        masked, unmasked = (
            program(pixel_values=batch.pixel_values, pixel_mask=mask).logits
            for mask in (batch.pixel_mask, torch.ones_like(batch.pixel_mask))
        )
    torch.testing.assert_close(masked[0], unmasked[0], rtol=1e-5, atol=1e-5)  # the image without padding
    assert (masked[1] - unmasked[1]).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.known_issue(20)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("segmentation", [False, True])
def test_onnxruntime_answers_as_the_model_for_any_batch_and_size(
    segmentation, make_twins, make_batch, tmp_path
):
    import onnxruntime

    model = make_twins(segmentation=segmentation).ours
    program = torch.onnx.export(export(model, make_batch(SIZES[0])), dynamo=True, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [i.name for i in session.get_inputs()] == ["pixel_values", "pixel_mask"]
    for sizes in SIZES:
        batch = make_batch(sizes, seed=1)
        inputs = {"pixel_values": batch.pixel_values, "pixel_mask": batch.pixel_mask}
        with torch.no_grad():
            expected = model(**inputs).to_tuple()
        got = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        for ours, onnx in zip(expected, got, strict=True):
            torch.testing.assert_close(torch.from_numpy(onnx), ours, rtol=1e-4, atol=1e-4)
