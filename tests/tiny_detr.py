"""Create a tiny DETR folder in a second; its queries give different outputs."""

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from detr.config import DetrConfig
from detr.image_processing.processor import DetrImageProcessor
from detr.model.detection import DetrForObjectDetection
from detr.model.segmentation import DetrForSegmentation


def save_tiny_detr(
    folder: Path, names: Sequence[str], seed: int = 0, edge: int = 96, *, multi_scale: bool = False
) -> Path:
    """Save a resnet18 DETR with 12 queries and these class names; it resizes images to a shortest edge of `edge`."""
    config = DetrConfig(
        backbone="resnet18",
        multi_scale={} if multi_scale else None,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_queries=12,
        id2label=dict(enumerate(names)),
    )
    model = DetrForObjectDetection(config)
    randomize_weights(model, seed)
    model.save_pretrained(folder)
    size = {"shortest_edge": edge, "longest_edge": 2 * edge}
    DetrImageProcessor(size=size).save_pretrained(folder)
    return folder


def add_mask_head(folder: Path, seed: int = 12) -> Path:
    """Replace the model of a folder by one with a mask head and new random weights."""
    model = DetrForSegmentation(DetrConfig.from_pretrained(folder, encoder_attention_heads=8))
    randomize_weights(model, seed)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def randomize_weights(model: torch.nn.Module, seed: int) -> None:
    """Draw weights with a large variance: with default initialization all queries give the same output."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            parameter.copy_(noise * (1.4 if "backbone" in name else 2.0) / fan_in**0.5)
        elif "backbone" not in name:
            parameter.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))


def png(height: int, width: int, seed: int = 0) -> bytes:
    """Encode an image of smooth noise as PNG."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 6, 6, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
    file = io.BytesIO()
    Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()
