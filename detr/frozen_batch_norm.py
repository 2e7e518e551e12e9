"""Batch norm that never changes, as DETR uses it in the backbone: batches are too small for statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

TRANSFORMERS_EPS = 1e-5


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine parameters never change, with the activation fused into it if any.

    Args:
        num_features: channels.
        eps: added to the variance.
        activation: applied to the result; timm's ``BatchNormAct2d`` carries one.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, num_features: int, eps: float = TRANSFORMERS_EPS, activation: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.act = nn.Identity() if activation is None else activation

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The affine map that this layer is: float [C] and float [C]."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        """Float [B, C, h, w] to float [B, C, h, w] of the same dtype, also under autocast."""
        scale, shift = (t.to(x.dtype).view(1, -1, 1, 1) for t in self.scale_and_shift())
        # addcmul keeps no activation for the backward pass, F.batch_norm would keep its input
        return self.act(torch.addcmul(shift, x, scale))


@torch.no_grad()
def freeze_batch_norm(module: nn.Module, compat: str = "original") -> None:
    """Replace every ``BatchNorm2d`` inside ``module`` by `FrozenBatchNorm2d`, in place.

    A fused activation (timm's ``BatchNormAct2d``: EfficientNet, MobileNetV3, RegNet) and the net's own eps are
    kept; ``compat="transformers"`` drops the activation and sets eps to 1e-5, as transformers does.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            if compat == "transformers":
                frozen = FrozenBatchNorm2d(child.num_features)
            else:
                frozen = FrozenBatchNorm2d(child.num_features, child.eps, getattr(child, "act", None))
            frozen.load_state_dict(
                {k: v for k, v in child.state_dict().items() if k != "num_batches_tracked"}
            )
            setattr(module, name, frozen)
        else:
            freeze_batch_norm(child, compat)


def differs_from_transformers(module: nn.Module) -> bool:
    """Whether a frozen batch norm inside has an activation or an eps that transformers would have replaced."""
    return any(
        isinstance(m, FrozenBatchNorm2d) and (not isinstance(m.act, nn.Identity) or m.eps != TRANSFORMERS_EPS)
        for m in module.modules()
    )
