"""Layers of a model can be replaced, wrapped, hooked, copied and saved as in any torch model; outputs stay the same."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from detr import DetrForObjectDetection, DetrForSegmentation
from detr.model.frozen_batch_norm import FrozenBatchNorm2d
from tests.detr.conftest import randomize_weights, small_config
from tests.tiers import rest_slow

PIXELS = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> DetrForObjectDetection:
    model = DetrForObjectDetection(small_config()).eval()
    randomize_weights(model, seed=1)
    return model


def net_of(model: DetrForObjectDetection) -> nn.Module:
    return model.model.backbone.conv_encoder.model


def equal_convolution(layer: nn.Conv2d, channels: int | None = None) -> nn.Conv2d:
    arguments = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
    new = nn.Conv2d(
        channels or layer.in_channels, layer.out_channels, *arguments, bias=layer.bias is not None
    )
    with torch.no_grad():
        new.weight.zero_()[:, : layer.weight.shape[1]] = layer.weight
    return new


def replace_all(module: nn.Module, kind: type[nn.Module], make: Callable[[nn.Module], nn.Module]) -> None:
    for name, child in module.named_children():
        if type(child) is kind:
            setattr(module, name, make(child))
        else:
            replace_all(child, kind, make)


def as_batch_norm(frozen: FrozenBatchNorm2d) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(len(frozen.weight), eps=frozen.eps)
    for key in ("weight", "bias", "running_mean", "running_var"):
        getattr(norm, key).data.copy_(getattr(frozen, key))
    return norm.eval()


def first_convolution(net: nn.Module) -> tuple[nn.Module, str]:
    name = next(name for name, module in net.named_modules() if type(module) is nn.Conv2d)
    parent, _, child = name.rpartition(".")
    return net.get_submodule(parent), child


def replace_first(net: nn.Module) -> None:
    parent, name = first_convolution(net)
    setattr(parent, name, equal_convolution(getattr(parent, name)))


def wrap_first(net: nn.Module) -> None:
    parent, name = first_convolution(net)
    setattr(parent, name, nn.Sequential(getattr(parent, name), nn.Identity()))


SURGERY: dict[str, Callable[[nn.Module], object]] = {
    "an equal first convolution": replace_first,
    "all convolutions": lambda net: replace_all(net, nn.Conv2d, equal_convolution),
    "all norms": lambda net: replace_all(net, FrozenBatchNorm2d, as_batch_norm),
    "new frozen norms": lambda net: replace_all(net, FrozenBatchNorm2d, copy.deepcopy),
    "a wrapped convolution": wrap_first,
    "weight_norm": lambda net: nn.utils.parametrizations.weight_norm(net.layer1[0].conv1),
    "old weight_norm": lambda net: nn.utils.weight_norm(net.layer1[0].conv1),
    "hooks on a convolution": lambda net: net.layer1[0].conv1.register_forward_hook(lambda *_: None),
    "hooks on a norm": lambda net: net.layer1[0].bn1.register_forward_pre_hook(lambda *_: None),
    "a compiled stage": lambda net: setattr(net, "layer2", torch.compile(net.layer2, backend="eager")),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("change", rest_slow(SURGERY, fast=len(SURGERY) - 1))  # compiling takes seconds
@pytest.mark.parametrize("used_before", [False, True])
def test_equal_layers_give_equal_outputs(change: str, used_before: bool, model: nn.Module) -> None:
    changed = copy.deepcopy(model)
    if used_before:
        changed(PIXELS)
    SURGERY[change](net_of(changed))
    with torch.no_grad():
        torch.testing.assert_close(changed(PIXELS).logits, model(PIXELS).logits, rtol=1e-4, atol=1e-5)


def test_a_fourth_channel_of_zeros_changes_nothing(model: nn.Module) -> None:
    four = copy.deepcopy(model)
    parent, name = first_convolution(net_of(four))
    setattr(parent, name, equal_convolution(getattr(parent, name), channels=4))
    with torch.no_grad():
        got = four(torch.cat((PIXELS, torch.rand(1, 1, 64, 96)), 1)).logits
        torch.testing.assert_close(got, model(PIXELS).logits, rtol=1e-4, atol=1e-5)


def test_layers_called_directly_compute_what_torch_layers_compute(model: nn.Module) -> None:
    model(PIXELS)
    net = net_of(model)
    assert {type(m) for m in net.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}
    block, x = net.layer1[0], torch.rand(1, net.layer1[0].conv1.in_channels, 9, 9)
    y = block.conv1(x)
    torch.testing.assert_close(
        y, nn.functional.conv2d(x, block.conv1.weight, None, block.conv1.stride, block.conv1.padding)
    )
    expected = nn.functional.batch_norm(
        y, block.bn1.running_mean, block.bn1.running_var, block.bn1.weight, block.bn1.bias, eps=block.bn1.eps
    )
    torch.testing.assert_close(block.bn1(y), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_independent(copied: Callable[[nn.Module], nn.Module], model: nn.Module) -> None:
    model(PIXELS)
    other = copied(model)
    with torch.no_grad():
        expected = model(PIXELS).logits
        assert torch.equal(other(PIXELS).logits, expected)
        for norm in net_of(other).modules():
            if isinstance(norm, FrozenBatchNorm2d):
                norm.weight.mul_(2)
        assert not torch.equal(other(PIXELS).logits, expected)
        assert torch.equal(model(PIXELS).logits, expected)


def test_a_state_dict_has_the_names_of_timm(model: nn.Module) -> None:
    import timm

    plain = timm.create_model("test_resnet", features_only=True).state_dict()
    names = {name for name in plain if not name.endswith("num_batches_tracked")}
    model(PIXELS)
    assert names == net_of(model).state_dict().keys()


def lora_on(model: nn.Module, pattern: str) -> nn.Module:
    """Wrap each layer whose name ends with the pattern in a module that adds an update, as PEFT does."""

    class Updated(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.update = nn.Linear(base.in_features, base.out_features, bias=False)

        @property
        def weight(self) -> Tensor:
            return self.base.weight

        @property
        def bias(self) -> Tensor | None:
            return self.base.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.update(x)

    for name, module in [*model.named_modules()]:
        if name.endswith(pattern):
            model.set_submodule(name, Updated(module))
    return model


def quantized(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)


CHANGED: dict[str, Callable[[nn.Module], object]] = {
    "keys and values": lambda m: lora_on(m, "k_proj"),
    "first layer": lambda m: lora_on(m, "fc1"),
    "a norm": lambda m: nn.utils.parametrizations.weight_norm(m.model.decoder.layers[0].fc2),
    "the projection": lambda m: nn.utils.parametrizations.weight_norm(m.model.input_projection),
    "a hook": lambda m: m.model.decoder.layers[0].self_attn.register_forward_hook(
        lambda module, given, output: (2 * output[0], output[1])
    ),
    "a hook in the backbone": lambda m: net_of(m).layer1.register_forward_hook(
        lambda module, given, output: 2 * output
    ),
    "weight_norm in the backbone": lambda m: nn.utils.parametrizations.weight_norm(net_of(m).layer1[0].conv1),
}


@pytest.mark.parametrize("change", CHANGED)
@torch.no_grad()
def test_optimize_does_not_convert_modified_layers(change: str, model: nn.Module) -> None:
    changed = copy.deepcopy(model)
    CHANGED[change](changed)
    expected = changed(PIXELS).logits
    got = changed.optimize()(PIXELS).logits
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@torch.no_grad()
def test_optimize_does_not_convert_quantized_layers(model: nn.Module) -> None:
    changed = quantized(copy.deepcopy(model))
    expected = changed(PIXELS).last_hidden_state
    torch.testing.assert_close(changed.optimize()(PIXELS).last_hidden_state, expected, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_a_backbone_that_cannot_be_traced_is_not_converted_but_the_rest_is_optimized(
    model: nn.Module, tmp_path
) -> None:
    class Branches(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> list[Tensor]:
            return self.net(x if x.sum() > 0 else -x)

    changed = copy.deepcopy(model)
    changed.model.backbone.conv_encoder.model = Branches(net_of(changed))
    fast = changed.optimize()
    torch.testing.assert_close(fast(PIXELS).logits, model(PIXELS).logits, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="cannot be saved"):
        fast.save_pretrained(tmp_path)


@pytest.mark.parametrize(
    "convert",
    [
        nn.Module.half,
        nn.Module.double,
        nn.Module.bfloat16,
        lambda m: m.to("meta"),
        lambda m: m.to(torch.float16),
    ],
)
def test_an_optimized_model_rejects_conversion_to_another_dtype_or_device(
    convert: Callable[[nn.Module], object], model
) -> None:
    fast = model.optimize()
    with pytest.raises(ValueError, match="convert the original model"):
        convert(fast)
    fast.to("cpu").float().requires_grad_(False)  # no conversion: it already has this device and dtype
    torch.testing.assert_close(fast(PIXELS).logits, model(PIXELS).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("change", ["hook", "wrapped"])
@torch.no_grad()
def test_a_modified_first_convolution_of_the_mask_head_is_called(change: str) -> None:
    model = DetrForSegmentation(small_config(encoder_attention_heads=8, decoder_attention_heads=8)).eval()
    randomize_weights(model, seed=1)
    expected, calls = model(PIXELS).pred_masks, []
    if change == "hook":
        model.mask_head.lay1.register_forward_hook(lambda *given: calls.append(given) and None)
    else:
        model.mask_head.lay1 = nn.Sequential(model.mask_head.lay1)
    for changed in (model, model.optimize()):
        torch.testing.assert_close(changed(PIXELS).pred_masks, expected, rtol=1e-3, atol=1e-3)
    assert len(calls) == (2 if change == "hook" else 0)
