"""Exported and traced models: batch size, height and width are dynamic, and the pixel mask is an input."""

import io

import numpy as np
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
def test_an_exported_model_equals_the_model_for_any_batch_and_size(
    segmentation, make_twins, make_batch, difference
):
    model = make_twins(segmentation=segmentation).ours
    program = export(model, make_batch(SIZES[0])).module()
    for sizes in SIZES:
        batch = make_batch(sizes, seed=1)
        inputs = {"pixel_values": batch.pixel_values, "pixel_mask": batch.pixel_mask}
        with torch.no_grad():
            outputs, expected_outputs = program(**inputs), model(**inputs)
            assert type(outputs) is type(expected_outputs)
            for got, expected in zip(outputs.values(), expected_outputs.values(), strict=True):
                difference(float((got - expected).abs().max()))
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_pixel_mask_stays_an_input_with_an_effect(make_twins, make_batch):
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
def test_onnxruntime_equals_the_model_for_any_batch_and_size(segmentation, make_twins, make_batch, tmp_path):
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


class Tensors(torch.nn.Module):
    """Wrap a model so that its outputs are a tuple of tensors, which can be traced."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, pixel_mask):
        outputs = self.model(pixel_values, pixel_mask, return_dict=False)
        return tuple(x for x in outputs if isinstance(x, torch.Tensor))


def example():
    """Return the usual example input for tracing: random images without padding, with a mask of ones."""
    generator = torch.Generator().manual_seed(3)
    return torch.rand(1, 3, 64, 96, generator=generator), torch.ones(1, 64, 96, dtype=torch.int64)


def traced(model, given):
    return torch.jit.trace(model, given, check_trace=False)


def compiled(model, given):
    program = torch.compile(model, backend="eager", fullgraph=True)
    program(*given)
    return program


def onnx_by_tracing(model, given):
    import onnxruntime

    file = io.BytesIO()
    axes = {"pixel_values": {0: "b", 2: "h", 3: "w"}, "pixel_mask": {0: "b", 1: "h", 2: "w"}}
    torch.onnx.export(
        model, given, file, input_names=list(axes), dynamic_axes=axes, dynamo=False, opset_version=17
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file.getvalue(), options)
    assert [each.name for each in session.get_inputs()] == list(axes)
    return lambda x, mask: session.run(None, {"pixel_values": x.numpy(), "pixel_mask": mask.numpy()})


def converted_by_openvino(model, given):
    from detr.inference.openvino import _openvino

    openvino = _openvino()
    network = openvino.convert_model(model, example_input=given)
    program = openvino.Core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x, mask: list(program([x.numpy(), mask.numpy()]).values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "capture",
    [
        traced,
        pytest.param(compiled, marks=pytest.mark.slow),
        pytest.param(onnx_by_tracing, marks=pytest.mark.slow),
        pytest.param(converted_by_openvino, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "changes", [{}, {"segmentation": True}, {"position_embedding_type": "learned"}], ids=str
)
@torch.no_grad()
def test_a_model_captured_with_a_mask_of_ones_equals_the_model_for_any_mask_and_size(
    changes, capture, make_twins, make_batch
):
    model = Tensors(make_twins(**changes).ours).eval()
    torch._dynamo.reset()
    program = capture(model, example())
    for sizes in SIZES:
        batch = make_batch(sizes, seed=1)
        got = program(batch.pixel_values, batch.pixel_mask)
        for ours, expected in zip(got, model(batch.pixel_values, batch.pixel_mask), strict=True):
            torch.testing.assert_close(torch.as_tensor(np.asarray(ours)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_an_optimized_model_without_packed_layers_can_be_traced_with_its_mask_head(make_twins, make_batch):
    plain = make_twins(segmentation=True).ours
    program = traced(Tensors(plain.optimize(pack=False)), example())
    for sizes in SIZES:
        batch = make_batch(sizes, seed=1)
        got, expected = (
            program(batch.pixel_values, batch.pixel_mask),
            plain(batch.pixel_values, batch.pixel_mask),
        )
        torch.testing.assert_close(got[2], expected.pred_masks, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("capture", [traced, lambda model, given: torch.export.export(model, given)])
def test_packed_models_and_losses_cannot_be_captured(capture, make_twins, make_batch):
    model = make_twins().ours
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"from optimize\(\) cannot be traced or exported"),
    ):
        capture(Tensors(model.optimize()), example())

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x, mask):
            labels = [{"class_labels": torch.tensor([1]), "boxes": torch.full((1, 4), 0.3)}]
            return self.model(x, mask, labels=labels).loss

    with pytest.raises(RuntimeError, match="the loss cannot be traced or exported"):
        capture(Loss(), example())


def test_fake_tensors_give_the_shapes_of_outputs(make_twins):
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = make_twins().ours
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        outputs = model(torch.zeros(2, 3, 64, 96), torch.ones(2, 64, 96, dtype=torch.int64))
    assert outputs.logits.shape == (2, 12, 6)
