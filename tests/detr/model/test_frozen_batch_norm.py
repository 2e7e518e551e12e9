import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from detr.model.frozen_batch_norm import (
    ConvolutionFolding,
    FrozenBatchNorm2d,
    differs_from_transformers,
    freeze_batch_norm,
)


def randomize(norm: nn.BatchNorm2d, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in norm.state_dict().items():
        if tensor.is_floating_point():
            low = 0.5 if name == "running_var" else -1.0
            tensor.uniform_(low, 1.5, generator=generator)


@pytest.mark.checklist("2. Backbone", "frozen BN")
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
@pytest.mark.parametrize("activation", [None, nn.SiLU])
def test_a_frozen_norm_equals_the_norm_it_replaces_in_evaluation_mode(seed, eps, activation):
    norm = BatchNormAct2d(8, eps=eps, apply_act=activation is not None, act_layer=activation or nn.ReLU)
    randomize(norm, seed)
    net = nn.Sequential(norm).eval().double()
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = net(x.clone())
    freeze_batch_norm(net)
    assert isinstance(net[0], FrozenBatchNorm2d)
    torch.testing.assert_close(net.double()(x.clone()), expected, rtol=0, atol=1e-6)  # weights were float32
    assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.checklist("2. Backbone", "frozen BN")
def test_compat_transformers_drops_the_activation_and_the_eps():
    net = nn.Sequential(BatchNormAct2d(4, eps=1e-3))
    assert differs_from_transformers((frozen := _freeze(net, "original")).modules())
    assert frozen[0].eps == 1e-3
    dropped = _freeze(nn.Sequential(BatchNormAct2d(4, eps=1e-3)), "transformers")
    assert not differs_from_transformers(dropped.modules())
    assert (dropped[0].eps, type(dropped[0].act)) == (1e-5, nn.Identity)


def _freeze(net: nn.Module, compat: str) -> nn.Module:
    freeze_batch_norm(net, compat)
    return net


def test_an_eps_alone_also_differs_from_transformers():
    assert differs_from_transformers(
        _freeze(nn.Sequential(nn.BatchNorm2d(4, eps=1e-3)), "original").modules()
    )
    assert not differs_from_transformers(_freeze(nn.Sequential(nn.BatchNorm2d(4)), "original").modules())


def test_no_activation_of_an_efficientnet_is_lost():
    net = timm.create_model("efficientnet_b0", features_only=True)
    before = sum(isinstance(m, nn.SiLU) for m in net.modules())
    freeze_batch_norm(net)
    assert sum(isinstance(m, nn.SiLU) for m in net.modules()) == before == 48
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half_precision(dtype):
    norm = FrozenBatchNorm2d(4)
    assert norm(torch.randn(1, 4, 2, 2).to(dtype)).dtype == dtype


def test_a_frozen_norm_stores_no_activation_for_the_backward_pass():
    saved = []
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        FrozenBatchNorm2d(4)(x).sum()
    assert all(numel < x.numel() for numel in saved)


def two_pairs() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)
    )
    for norm in (net[1], net[4]):
        randomize(norm, 1)
    freeze_batch_norm(net)
    return net.eval()


class CountNorms(TorchFunctionMode):
    """Count the frozen batch norms that are computed separately, and not folded into a convolution."""

    number = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.number += func is torch.addcmul
        return func(*args, **(kwargs or {}))


def run_folded(net: nn.Module, x: torch.Tensor, folding: ConvolutionFolding) -> tuple[torch.Tensor, int]:
    with CountNorms() as counter, folding.running(net):
        return net(x), counter.number


def test_a_folded_network_is_compiled_as_one_graph():
    """A graph break would cost a separate launch in every step, and is a place where the compiler can fail."""
    net, folding = two_pairs(), ConvolutionFolding()

    def run(x: torch.Tensor) -> torch.Tensor:
        with folding.running(net):
            return net(x)

    x = torch.randn(1, 3, 8, 8)
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))


def test_folded_convolutions_give_the_outputs_and_gradients_of_the_layers():
    net, folding, x = two_pairs(), ConvolutionFolding(), torch.randn(2, 3, 9, 7)
    expected = net(x)
    got, norms = run_folded(net, x, folding)
    assert norms == 0
    torch.testing.assert_close(got, expected)
    weights = [net[0].weight, net[3].weight, net[0].bias]
    gradients = (torch.autograd.grad(y.square().sum(), weights) for y in (got, expected))
    for ours, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    "kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook", "forward"]
)
def test_layers_are_called_separately_if_a_hook_or_an_own_forward_is_set(layer, kind):
    net, folding, x = two_pairs(), ConvolutionFolding(), torch.randn(2, 3, 9, 7, requires_grad=True)
    run_folded(net, x, folding)  # without the hook, the layers are folded
    expected, calls = net(x), []
    if kind == "forward":
        forward = net[layer].forward
        net[layer].forward = lambda y: calls.append(y) or forward(y)
    else:
        getattr(net[layer], kind)(lambda *given: calls.append(given) and None)
    got, norms = run_folded(net, x, folding)
    got.sum().backward()
    assert (norms, len(calls)) == (2, 1)
    torch.testing.assert_close(got, expected)


def test_an_operation_between_the_layers_that_was_not_traced_is_an_error():
    class Switched(nn.Module):
        doubles = False

        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 1), FrozenBatchNorm2d(8)

        def forward(self, x):
            x = self.conv(x)
            return self.norm(2 * x if self.doubles else x)

    net, folding, x = Switched(), ConvolutionFolding(), torch.randn(1, 3, 4, 4)
    assert run_folded(net, x, folding)[1] == 0
    net.doubles = True
    with pytest.raises(RuntimeError, match="register a forward hook"):
        run_folded(net, x, folding)
    net.conv.register_forward_hook(lambda *_: None)
    assert run_folded(net, x, folding)[1] == 1


def test_a_weight_that_two_convolutions_share_is_not_folded():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.one, self.two = FrozenBatchNorm2d(3), FrozenBatchNorm2d(3)
            self.second.weight = self.first.weight
            self.two.weight.fill_(3.0)

        def forward(self, x):
            return self.two(self.second(self.one(self.first(x))))

    net, x = Shared(), torch.randn(1, 3, 4, 4)
    got, norms = run_folded(net, x, ConvolutionFolding())
    assert norms == 2
    torch.testing.assert_close(got, net(x))


def test_activation_checkpointing_inside_the_network_changes_no_gradient():
    net, x = two_pairs(), torch.randn(1, 3, 8, 8, requires_grad=True)
    inner = net.forward

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return checkpoint(inner, x, use_reentrant=False)

    outer = Checkpointed()
    got, _ = run_folded(outer, x, ConvolutionFolding())
    (gradient,) = torch.autograd.grad(got.sum(), x)
    (expected,) = torch.autograd.grad(net(x).sum(), x)
    torch.testing.assert_close(gradient, expected)
