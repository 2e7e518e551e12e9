"""An optimized model has the outputs of the plain model, which itself is not modified."""

import copy
import gc
import pickle
import threading
import time
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from detr import DetrForObjectDetection, DetrForSegmentation
from detr.inference.onednn import OneDnnConv2d, OneDnnLinear
from tests.detr.conftest import randomize_weights, small_config
from tests.tiers import rest_slow

# residual sums and ReLU; ReLU6 without residual activation; SiLU and gates; pre-activation; no batch norm
BACKBONES = rest_slow(
    ["efficientnet_lite0", "mobilenetv3_small_050", "resnet18", "resnet50", "regnety_002", "convnext_atto"],
    fast=3,
)


ORIGINAL_CALL = nn.Module.__call__


def make_model(backbone: str, **changes: object) -> DetrForObjectDetection:
    model = DetrForObjectDetection(small_config(backbone=backbone, **changes)).eval()
    randomize_weights(model, seed=1)
    return model


def maximum_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return (got.double() - exact).abs().max().item()


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.inference_mode()
def test_an_optimized_model_is_as_exact_as_the_plain_model(backbone: str) -> None:
    plain = make_model(backbone)
    fast = plain.optimize()
    pixels = torch.randn(2, 3, 97, 130, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 97, 130, dtype=torch.int64)
    mask[1, 64:] = 0
    exact = copy.deepcopy(plain).double()(pixels.double(), mask)
    expected, got = plain(pixels, mask), fast(pixels, mask)
    for name in ("logits", "pred_boxes"):
        error, allowed = maximum_error(got[name], exact[name]), maximum_error(expected[name], exact[name])
        assert error <= 3 * allowed + 1e-6, name


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@torch.inference_mode()
def test_linear_layers_are_packed_with_their_own_activation_only(activation: str) -> None:
    plain = make_model("test_resnet", activation_function=activation)
    fast = plain.optimize()
    for part in (fast.model.encoder, fast.model.decoder):
        kinds = {type(module) for module in part.modules()}
        assert OneDnnLinear in kinds
        assert nn.Linear not in kinds
    pixels = torch.randn(1, 3, 64, 80, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fast(pixels).logits, plain(pixels).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("auxiliary_loss", [False, True])
@pytest.mark.parametrize(
    "given", ["nothing", "decoder_attention_mask", "decoder_inputs_embeds", "output_attentions"]
)
@torch.inference_mode()
def test_the_first_self_attention_is_computed_if_it_is_not_constant(given: str, auxiliary_loss: bool) -> None:
    plain = make_model("test_resnet", auxiliary_loss=auxiliary_loss)
    fast = plain.optimize()
    random = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 64, 80, generator=random)
    queries, width = plain.config.num_queries, plain.config.d_model
    options = {
        "nothing": {},
        "decoder_attention_mask": {"decoder_attention_mask": torch.rand(2, queries, generator=random) > 0.5},
        "decoder_inputs_embeds": {"decoder_inputs_embeds": torch.randn(2, queries, width, generator=random)},
        "output_attentions": {"output_attentions": True},
    }[given]
    calls: list[int] = []
    for number, layer in enumerate(fast.model.decoder.layers):
        layer.self_attn.register_forward_hook(lambda *_, number=number: calls.append(number))
    expected = plain(pixels, output_hidden_states=True, **options)
    got = fast(pixels, output_hidden_states=True, **options)
    constant = given in ("nothing", "decoder_attention_mask")
    assert calls == [*range(1 if constant else 0, plain.config.decoder_layers)]
    for name in ("logits", "pred_boxes", "decoder_hidden_states", "decoder_attentions", "cross_attentions"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (3, 3, 50, 171), (1, 3, 224, 96)])
@torch.inference_mode()
def test_one_model_accepts_images_of_any_size(shape: tuple[int, ...]) -> None:
    plain = make_model("test_resnet")
    fast = plain.optimize()
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # twice: the first call must not overwrite the state of the model
        torch.testing.assert_close(fast(pixels).logits, plain(pixels).logits, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_feature_maps_and_masks_equal_those_of_the_plain_model() -> None:
    plain = DetrForSegmentation(
        small_config(backbone="resnet50", encoder_attention_heads=8, decoder_attention_heads=8)
    ).eval()
    randomize_weights(plain, seed=2)
    fast = plain.optimize()
    pixels = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    maps = [m.detr.model.backbone(pixels) for m in (plain, fast)]
    assert len(maps[0]) == 4
    for expected, got in zip(*maps, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(fast(pixels).pred_masks, plain(pixels).pred_masks, atol=1e-3, rtol=1e-3)


def test_the_plain_model_is_not_modified() -> None:
    plain = make_model("test_resnet").train()
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    fast = plain.optimize()
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.add_(1)
    assert plain.training
    assert all(parameter.requires_grad for parameter in plain.parameters())
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@torch.inference_mode()
def test_an_engine_computes_the_plain_model_but_not_its_optimized_copy() -> None:
    plain, calls = make_model("test_resnet"), []
    pixels = torch.randn(1, 3, 64, 80, generator=torch.Generator().manual_seed(0))
    expected = plain(pixels).logits
    plain.model.engine = lambda compute, *inputs, **options: (
        calls.append(inputs) or compute(*inputs, **options)
    )
    torch.testing.assert_close(plain.optimize()(pixels).logits, expected, atol=1e-5, rtol=1e-5)
    assert not calls
    assert torch.equal(plain(pixels).logits, expected)
    assert len(calls) == 1


def test_an_optimized_resnet_has_no_norm_and_no_addition() -> None:
    fast = make_model("resnet18").optimize()
    graph = fast.model.backbone.conv_encoder.model.graph_module
    kinds = {type(graph.get_submodule(n.target)) for n in graph.graph.nodes if n.op == "call_module"}
    # A returned feature map must not be overwritten, but no addition reads one: stages start with a downsampling conv.
    assert kinds <= {OneDnnConv2d, nn.MaxPool2d, nn.ReLU}
    assert OneDnnConv2d in kinds


def test_an_optimized_model_cannot_be_saved(tmp_path) -> None:
    with pytest.raises(ValueError, match="optimize"):
        make_model("test_resnet").optimize().save_pretrained(tmp_path)


def test_an_optimized_model_cannot_load_other_weights() -> None:
    """Weights of folded and packed layers have other names: only a part of the model would be updated."""
    plain = make_model("test_resnet")
    for other in (plain.state_dict(), plain.optimize().state_dict()):
        for strict in (True, False):
            with pytest.raises(ValueError, match="cannot load other weights"):
                plain.optimize().load_state_dict(other, strict=strict)
    make_model("test_resnet").load_state_dict(plain.state_dict())


@torch.inference_mode()
def test_an_empty_batch_has_empty_outputs() -> None:
    plain = make_model("test_resnet")
    fast = plain.optimize()
    none = torch.zeros(0, 3, 64, 96)
    for model in (plain, fast):
        outputs = model(none)
        assert outputs.logits.shape == (0, *fast(torch.zeros(1, 3, 64, 96)).logits.shape[1:])
        assert outputs.pred_boxes.shape[0] == 0


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.inference_mode()
def test_a_copy_of_a_used_model_has_the_same_outputs(make_copy: Callable[[nn.Module], nn.Module]) -> None:
    fast = make_model("test_resnet").optimize()
    pixels = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    expected = fast(pixels).logits
    assert torch.equal(make_copy(fast)(pixels).logits, expected)


def test_an_optimized_model_keeps_its_dtype() -> None:
    fast = make_model("test_resnet").optimize(dtype=torch.bfloat16)
    assert fast.optimize(dtype=torch.bfloat16) is fast.optimize() is fast
    with pytest.raises(ValueError, match="is already optimized in"):
        fast.optimize(dtype=torch.float32)


@pytest.mark.parametrize("optimize", [False, True])
def test_an_unused_model_is_freed_without_the_garbage_collector(optimize: bool) -> None:
    gc.collect()
    gc.disable()
    try:
        model = make_model("test_resnet")
        if optimize:
            model = model.optimize()
            model(torch.zeros(1, 3, 64, 64))
        references = [weakref.ref(module) for module in model.modules()]
        del model
        assert not [each() for each in references if each() is not None]
    finally:
        gc.enable()


@pytest.mark.slow
def test_models_run_and_are_optimized_while_others_are_optimized() -> None:
    # torch.fx changes nn.Module for the whole process while it traces
    plain = make_model("test_resnet")
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = plain(pixels).logits
    until = time.monotonic() + 5
    errors: list[BaseException] = []

    @torch.inference_mode()
    def repeat(run: Callable[[], torch.Tensor]) -> None:
        try:
            while time.monotonic() < until and not errors:
                torch.testing.assert_close(run(), expected, atol=1e-4, rtol=1e-4)
        except BaseException as error:
            errors.append(error)

    calls = [lambda: plain(pixels).logits] * 2 + [lambda: plain.optimize()(pixels).logits] * 2
    threads = [threading.Thread(target=repeat, args=(run,)) for run in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
    assert nn.Module.__call__ is ORIGINAL_CALL


def test_a_network_that_cannot_be_traced_is_not_changed() -> None:
    class Branches(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return self.net(x if x.sum() > 0 else -x)

    plain = make_model("test_resnet")
    encoder = plain.model.backbone.conv_encoder
    encoder.model = Branches(encoder.model)
    fast = plain.optimize()
    assert isinstance(fast.model.backbone.conv_encoder.model, Branches)


def test_float64_convolutions_are_folded_but_not_packed() -> None:
    plain = make_model("test_resnet").double()
    fast = plain.optimize()
    pixels = torch.randn(1, 3, 64, 80, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(fast(pixels).logits, plain(pixels).logits, atol=1e-10, rtol=1e-10)
