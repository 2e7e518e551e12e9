"""A small multi-scale DETR whose tokens and queries all differ."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from detr.config import DetrConfig
from detr.model.detection import DetrForObjectDetection

SMALL = {
    "backbone": "test_resnet",
    "backbone_kwargs": {"out_indices": [2, 3, 4]},
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_queries": 12,
    "num_labels": 5,
    "dropout": 0.0,
    "trainable_backbone_stages": 5,
    "multi_scale": {},
}


def build_model(seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> DetrForObjectDetection:
    """Build a model in evaluation mode."""
    torch.manual_seed(seed)
    model = DetrForObjectDetection(DetrConfig(**{**SMALL, **changes}))
    with torch.no_grad():  # the corrections of new heads are zero
        for name, parameter in model.named_parameters():
            if "class_labels_classifier" in name or "bbox_predictor" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.to(dtype).eval()


@pytest.fixture
def make_model() -> Callable[..., DetrForObjectDetection]:
    """Return `build_model`."""
    return build_model
