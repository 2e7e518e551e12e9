import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from detr.frozen_batch_norm import (
    FoldedConv2d,
    FrozenBatchNorm2d,
    differs_from_transformers,
    fold_into_convolutions,
    freeze_batch_norm,
)


def randomise(norm: nn.BatchNorm2d, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in norm.state_dict().items():
        if tensor.is_floating_point():
            low = 0.5 if name == "running_var" else -1.0
            tensor.uniform_(low, 1.5, generator=generator)


@pytest.mark.checklist("2. Backbone", "frozen BN")
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
@pytest.mark.parametrize("activation", [None, nn.SiLU])
def test_a_frozen_norm_computes_what_it_replaces_in_evaluation(seed, eps, activation):
    norm = BatchNormAct2d(8, eps=eps, apply_act=activation is not None, act_layer=activation or nn.ReLU)
    randomise(norm, seed)
    net = nn.Sequential(norm).eval().double()
    x = torch.randn(2, 8, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = net(x.clone())
    freeze_batch_norm(net)
    assert isinstance(net[0], FrozenBatchNorm2d)
    torch.testing.assert_close(net.double()(x.clone()), expected, rtol=0, atol=1e-6)  # weights passed float32
    assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.checklist("2. Backbone", "frozen BN")
def test_under_transformers_rules_the_activation_and_the_eps_are_lost():
    net = nn.Sequential(BatchNormAct2d(4, eps=1e-3))
    assert differs_from_transformers(frozen := _freeze(net, "original"))
    assert frozen[0].eps == 1e-3
    dropped = _freeze(nn.Sequential(BatchNormAct2d(4, eps=1e-3)), "transformers")
    assert not differs_from_transformers(dropped)
    assert (dropped[0].eps, type(dropped[0].act)) == (1e-5, nn.Identity)


def _freeze(net: nn.Module, compat: str) -> nn.Module:
    freeze_batch_norm(net, compat)
    return net


def test_an_eps_alone_also_differs_from_transformers():
    assert differs_from_transformers(_freeze(nn.Sequential(nn.BatchNorm2d(4, eps=1e-3)), "original"))
    assert not differs_from_transformers(_freeze(nn.Sequential(nn.BatchNorm2d(4)), "original"))


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


def test_a_frozen_norm_keeps_no_activation_for_the_backward_pass():
    saved = []
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        FrozenBatchNorm2d(4)(x).sum()
    assert all(numel < x.numel() for numel in saved)


def test_a_folded_network_is_compiled_as_one_graph():
    """Each split would be a start of its own in every step, and a place where the compiler can fail."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)
    ).eval()
    freeze_batch_norm(net)
    fold_into_convolutions(net)
    assert sum(isinstance(m, FoldedConv2d) for m in net) == 2
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), net(x))
