"""Fixtures: the same network in `detr` and in transformers with the same weights, and batches with labels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detr.checkpoint.key_maps import to_file_name
from detr.config import DetrConfig
from detr.model.detection import DetrForObjectDetection
from detr.model.segmentation import DetrForSegmentation
from tests.exact_reference import exact_reference

__all__ = ["exact_reference"]

SMALL = {
    "backbone": "test_resnet",
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_queries": 12,
    "num_labels": 5,
    "dropout": 0.0,
    "trainable_backbone_stages": 5,
}


MAX_TWINS = 6
"""Number of most recently used twins that are cached; all of them would take gigabytes."""


def small_config(**changes: Any) -> DetrConfig:
    settings = {**SMALL, **changes}
    if "backbone_config" in changes:
        settings.pop("backbone", None)
    return DetrConfig(**settings)


@torch.no_grad()
def randomize_weights(model: nn.Module, seed: int, backbone_gain: float = 1.0) -> None:
    """Draw random weights with which queries, classes and boxes differ; in a new model all queries are alike."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if name.endswith("running_var"):
            value = 0.75 + 0.5 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        elif name.endswith("running_mean"):
            value = 0.1 * noise
        elif "position_embedding" in name:
            value = noise
        elif tensor.ndim == 1:
            value = 0.1 * noise + (1.0 if name.endswith("weight") else 0.0)
        else:
            fan_in = tensor[0].numel()
            gain = 2.0
            if "backbone" in name:
                gain = backbone_gain
            elif ".encoder." in name or "input_projection" in name:
                gain = 1.0
            elif "encoder_attn" in name:
                gain = 3.0
            value = noise * gain / fan_in**0.5
        tensor.copy_(value)


@dataclass
class Twins:
    """The same network twice: ``ours`` and transformers' ``theirs``."""

    ours: Any
    theirs: Any

    def to(self, dtype: torch.dtype) -> Twins:
        """Copy both and convert the copies."""
        return Twins(copy.deepcopy(self.ours).to(dtype), copy.deepcopy(self.theirs).to(dtype))


def transformers_config(config: DetrConfig) -> Any:
    import transformers

    values = {f.name: getattr(config, f.name) for f in fields(config)}
    own = ("compat", "trainable_backbone_stages", "use_pretrained_backbone", "multi_scale")
    for name in (*own, "architectures", "dtype"):
        del values[name]
    return transformers.DetrConfig(**copy.deepcopy(values))


def load_into_transformers(model: nn.Module, theirs: Any) -> None:
    state = model.state_dict()
    theirs.load_state_dict({name: state[to_file_name(name)] for name in theirs.state_dict()}, strict=True)


@pytest.fixture(scope="session")
def make_twins() -> Callable[..., Twins]:
    """Return ``make_twins(seed=0, **config)``, which returns twins in float32 and evaluation mode.

    Twins are shared between tests: modify copies only. With ``segmentation=True`` they are DetrForSegmentation.
    """
    import transformers

    cache: dict[str, Twins] = {}

    def make(seed: int = 0, **changes: Any) -> Twins:
        key = f"{seed} {sorted(changes.items())}"
        cache[key] = cache.pop(key) if key in cache else build(seed, **changes)
        if len(cache) > MAX_TWINS:
            del cache[next(iter(cache))]
        return cache[key]

    def build(seed: int = 0, backbone_gain: float = 1.0, segmentation: bool = False, **changes: Any) -> Twins:
        heads = {"encoder_attention_heads": 8, "decoder_attention_heads": 8} if segmentation else {}
        config = small_config(**{**heads, **changes})
        our_class = DetrForSegmentation if segmentation else DetrForObjectDetection
        ours = our_class(config).eval()
        randomize_weights(ours, seed, backbone_gain)
        theirs = getattr(transformers, our_class.__name__)(transformers_config(config)).eval()
        load_into_transformers(ours, theirs)
        return Twins(ours, theirs)

    return make


@dataclass
class Batch:
    """Images float [B, 3, H, W], pixel mask int64 [B, H, W] and labels."""

    pixel_values: Tensor
    pixel_mask: Tensor
    labels: list[dict[str, Tensor]]


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    """Return ``make_batch(sizes, objects, seed, masks)``: images of these (height, width), padded to the largest."""

    def make(
        sizes: tuple[tuple[int, int], ...] = ((96, 128), (64, 70)),
        objects: tuple[int, ...] | None = None,
        seed: int = 0,
        num_labels: int = 5,
        dtype: torch.dtype = torch.float32,
        masks: bool = False,
    ) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
        pixels = torch.zeros(len(sizes), 3, height, width, dtype=dtype)
        mask = torch.zeros(len(sizes), height, width, dtype=torch.int64)
        for i, (h, w) in enumerate(sizes):
            pixels[i, :, :h, :w] = torch.randn(3, h, w, generator=generator, dtype=torch.float64).to(dtype)
            mask[i, :h, :w] = 1
        labels = []
        for n in objects if objects is not None else tuple(3 + 2 * i for i in range(len(sizes))):
            classes = torch.randint(num_labels, (n,), generator=generator)
            size = 0.05 + 0.45 * torch.rand(n, 2, generator=generator, dtype=torch.float64)
            center = size / 2 + (1 - size) * torch.rand(n, 2, generator=generator, dtype=torch.float64)
            labels.append({"class_labels": classes, "boxes": torch.cat((center, size), 1).to(dtype)})
            if masks:
                h, w = sizes[len(labels) - 1]
                labels[-1]["masks"] = torch.rand(n, h, w, generator=generator) > 0.6
        return Batch(pixels, mask, labels)

    return make
