"""How a new model's parameters start, in the original and in transformers; backbones are timm's business."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from detr.attention import MultiheadAttention
from detr.mask_head import BoxAttention, MaskHead


@torch.no_grad()
def init_as_original(module: nn.Module) -> None:
    """Initialise as facebookresearch/detr: Xavier for every matrix, zero for the attentions' biases.

    There q, k and v are one matrix [3 D, D], whose Xavier bound is smaller than that of three [D, D].
    """
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.xavier_uniform_(child.weight)
        if isinstance(child, MultiheadAttention):
            for projection in (child.q_proj, child.k_proj, child.v_proj, child.out_proj):
                nn.init.zeros_(projection.bias)
    for child in module.modules():
        if isinstance(child, MultiheadAttention):
            for projection in (child.q_proj, child.k_proj, child.v_proj):
                nn.init.xavier_uniform_(projection.weight, gain=math.sqrt(0.5))


@torch.no_grad()
def init_as_transformers(modules: Sequence[nn.Module], std: float) -> None:
    """Initialise as transformers: matrices normal(0, std), biases 0, norms 1 and 0, in place."""
    for module in modules:
        for child in module.modules():
            if isinstance(child, nn.Linear | nn.Conv2d | nn.Embedding):
                nn.init.normal_(child.weight, std=std)
            bias = getattr(child, "bias", None)
            if isinstance(child, nn.Linear | nn.Conv2d) and bias is not None:
                nn.init.zeros_(bias)


@torch.no_grad()
def init_mask_head(mask_head: MaskHead, attention: BoxAttention, gain: float = 1.0) -> None:
    """Initialise as both references: Kaiming for the convolutions, Xavier times ``gain`` for the attention."""
    for child in mask_head.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_uniform_(child.weight, a=1)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
    for projection in (attention.q_linear, attention.k_linear):
        nn.init.xavier_uniform_(projection.weight, gain=gain)
        nn.init.zeros_(projection.bias)
