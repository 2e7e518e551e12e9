"""Compare fifty optimizer steps with transformers' model in a plain loop, from the same weights on the same batches."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raydetr.data.shards import Manifest
from raydetr.training.config import TrainConfig
from raydetr.training.state import TrainingState, create_state
from raydetr.training.step import to_arguments
from tests.awkward import write_awkward
from tests.training_config import small_config
from tests.training_steps import batches_of_steps, train_here

STEPS = 50


def make_config(folder: str, precision: Any) -> TrainConfig:
    return small_config(
        train_data=folder,
        workers=1,
        steps=STEPS,
        backbone="test_resnet",
        backbone_out_indices=(1, 2, 3, 4),
        backbone_weights="",
        trainable_backbone_stages=5,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        attention_heads=4,
        ffn_dim=32,
        num_queries=8,
        compat="transformers",
        ema_decay=0.0,
        micro_batch_size=4,
        micro_batches=1,
        learning_rate=1e-4,
        backbone_learning_rate=1e-5,
        max_grad_norm=0.1,
        warmup_steps=0,
        schedule="constant",
        precision=precision,
        shortest_edges=(48, 64),
        longest_edge=96,
        window_row_groups=1,
        max_skipped=1.0,
    )


def reference_losses(
    config: TrainConfig, manifest: Manifest, state: TrainingState, model: nn.Module
) -> list[float]:
    """Train in a plain loop, as a user of transformers would write it, on the images that can be decoded."""
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if "backbone" not in n and p.requires_grad]},
        {"params": [p for n, p in named if "backbone" in n and p.requires_grad], "lr": 1e-5},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=config.optimizer.learning_rate, weight_decay=config.optimizer.weight_decay
    )
    losses = []
    for (batch,) in batches_of_steps(config, manifest):
        inputs, valid = to_arguments(batch, state), batch.weights.bool()
        for label in inputs["labels"]:
            label["boxes"] = label["boxes"].to(inputs["pixel_values"].dtype)
        loss = model(
            pixel_values=inputs["pixel_values"][valid],
            pixel_mask=inputs["pixel_mask"][valid].long(),
            labels=[label for label, is_valid in zip(inputs["labels"], valid, strict=True) if is_valid],
        ).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "tolerance"), [("float64", 1e-8), pytest.param("float32", 1e-2, marks=pytest.mark.slow)]
)
def test_the_losses_of_fifty_steps_equal_those_of_transformers(
    precision: Any,
    tolerance: float,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import transformers

    if precision == "float64":
        request.getfixturevalue("exact_reference")

    manifest = write_awkward(tmp_path / "data")
    config = make_config(manifest.root, precision)
    state = create_state(config, manifest, torch.device("cpu"))
    with torch.no_grad():  # initially all queries are equal, and rounding would decide the matching
        state.model.model.query_position_embeddings.weight.normal_(generator=torch.Generator().manual_seed(0))
    state.model.save_pretrained(tmp_path / "model")
    reference = transformers.DetrForObjectDetection.from_pretrained(
        tmp_path / "model", dtype=getattr(torch, precision)
    ).train()
    reference.requires_grad_(True)
    expected = reference_losses(config, manifest, state, reference)
    losses = [metrics["loss"] for metrics in train_here(config, manifest, state)]
    difference = max(abs(loss - other) for loss, other in zip(losses, expected, strict=True))
    with capsys.disabled():
        print(f"\n{precision}: the largest difference of {STEPS} losses is {difference:.1e}")
    assert len(losses) == STEPS
    assert max(expected) - min(expected) > 0.5, "the losses hardly move"
    assert difference <= tolerance
