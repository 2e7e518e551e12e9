"""Transformers' loss in float64, which fails upstream because its class weights are float32."""

from typing import Any

import pytest
from torch import nn


@pytest.fixture
def exact_reference(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return `ForObjectDetectionLoss` of transformers, patched to accept any dtype."""
    from transformers.loss import loss_for_object_detection as reference

    class Float64Loss(reference.ImageLoss):
        def __init__(self, matcher, num_classes, eos_coef, losses):
            super().__init__(matcher, num_classes, eos_coef, losses)
            self.empty_weight = nn.Buffer(self.empty_weight.double())
            self.empty_weight[-1] = eos_coef

    monkeypatch.setattr(reference, "ImageLoss", Float64Loss)
    return reference.ForObjectDetectionLoss
