"""A step with a non-finite loss or gradient is reported, saved and replayable, and is skipped or stops the run."""

import copy
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from raydetr import storage
from raydetr.data.shards import Manifest
from raydetr.data.stream import ray_stream
from raydetr.data.stream.micro_batch import TrainingBatch, unpack
from raydetr.errors import ConfigError, TrainingError
from raydetr.flat_keys import override
from raydetr.training import loop, non_finite
from raydetr.training.config import TrainConfig
from raydetr.training.distributed import step_totals
from raydetr.training.state import TrainingState, create_state, parallelize
from raydetr.training.step import autocast, is_finite, train_step
from tests.awkward import write_awkward
from tests.cluster.recorded_training import config as make_config
from tests.ranks import process_group, run_ranks
from tests.raydetr.training.test_worker_counts import build_stream
from tests.training_config import small_config


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_awkward(tmp_path_factory.mktemp("data"), shards=(24,), empty=0.0)


@pytest.fixture
def config(manifest: Manifest, tmp_path: Path) -> TrainConfig:
    plain = make_config(manifest.root, str(tmp_path / "run"))
    return override(plain, workers=1, query_groups=2, dropout=0.1, on_non_finite="skip")


@pytest.fixture
def state(config: TrainConfig, manifest: Manifest) -> TrainingState:
    return create_state(config, manifest, torch.device("cpu"))


@pytest.fixture
def batches(config: TrainConfig, manifest: Manifest) -> list[TrainingBatch]:
    return first_step(config, manifest)


def first_step(config: TrainConfig, manifest: Manifest) -> list[TrainingBatch]:
    """Return the micro-batches of step 0."""
    job = build_stream(config, manifest)
    window = next(iter(ray_stream.list_windows(job, 0)))
    first = next(ray_stream.build_micro_batches(window, job, world_size=1))
    return [batch for batch in unpack(first, config.optimizer.micro_batch_size) if batch.step == 0]


def do_step(state: TrainingState, batches: list[TrainingBatch], config: TrainConfig) -> dict[str, float]:
    """Run a step as the training loop does."""
    totals = step_totals(batches, config.model.architecture.num_queries, config.loss.eos_coefficient)
    metrics = train_step(state.module, state, batches, config, totals)
    if not is_finite(metrics):
        non_finite.handle_non_finite(state, batches, config, totals, metrics, rank=0)
    loop.advance(state, config, totals, batches[0].step)
    return metrics


class Explodes(nn.Module):
    """A layer with a non-finite output or gradient."""

    def __init__(self, layer: nn.Module, forwards: float = 1.0, backwards: float = 1.0) -> None:
        super().__init__()
        self.layer, self.forwards, self.backwards = layer, forwards, backwards

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.layer(x) * self.forwards
        out.register_hook(lambda gradient: gradient * self.backwards)
        return out


def break_weights(state: TrainingState) -> None:
    with torch.no_grad():
        state.model.model.encoder.layers[0].fc1.weight[0, 0] = float("nan")


def break_forward(state: TrainingState) -> None:
    layer = state.model.model.encoder.layers[0]
    layer.fc1 = Explodes(layer.fc1, forwards=float("inf"))


def break_backward(state: TrainingState) -> None:
    layer = state.model.model.encoder.layers[0]
    layer.fc1 = Explodes(layer.fc1, backwards=float("nan"))


def break_loss(state: TrainingState) -> None:
    """Make logits finite but so large that the loss overflows."""
    with torch.no_grad():
        state.model.class_labels_classifier.bias[0] = 3e38
        state.model.class_labels_classifier.bias[1] = -3e38


PLACES: dict[str, tuple[Callable[[TrainingState], None], str]] = {
    "weights": (break_weights, "the weights: "),
    "forward": (break_forward, "the forward pass: "),
    "loss": (break_loss, "the loss: "),
    "backward": (break_backward, "the backward pass: "),
}


@pytest.mark.parametrize("place", PLACES)
def test_the_first_non_finite_layer_is_reported(
    place: str,
    state: TrainingState,
    batches: list[TrainingBatch],
    config: TrainConfig,
    capfd: pytest.CaptureFixture[str],
) -> None:
    break_state, message = PLACES[place]
    break_state(state)
    do_step(state, batches, config)
    out = capfd.readouterr().out
    assert f"First non-finite value on rank 0: {message}" in out
    if place != "loss":
        assert "encoder.layers.0.fc1" in out


def test_the_saved_batch_replays_to_the_same_layer(
    state: TrainingState, batches: list[TrainingBatch], config: TrainConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    break_weights(state)
    do_step(state, batches, config)
    out = capfd.readouterr().out
    file = out.split("--replay ", 1)[1].split()[0]
    replayed = non_finite.replay(override(config, replay=file))
    assert replayed.pop("step") == 0
    assert len(replayed) == config.optimizer.micro_batches
    first = next(iter(replayed.values()))
    assert first.startswith("the weights: ")
    assert first in out


def test_a_saved_batch_replays_with_the_same_loss(
    state: TrainingState, batches: list[TrainingBatch], config: TrainConfig
) -> None:
    """Weights, query groups, dropout, precision and normalizers come from the saved step, not from flags."""
    config = override(config, seed=5, precision="bf16")
    totals = step_totals(batches, config.model.architecture.num_queries, config.loss.eos_coefficient)
    file = non_finite.save_batch(config, 0, state, batches, totals)
    losses = []

    def record_loss(model: nn.Module, arguments: dict, chosen: TrainConfig) -> str:
        with autocast(chosen, torch.device("cpu")):
            losses.append(float(model(**arguments).loss.detach()))
        return ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(non_finite, "find_non_finite", record_loss)
        assert non_finite.find_non_finite_in_step(state, batches, config, totals) == ""
        non_finite.replay(small_config(replay=file))
    half = len(losses) // 2
    assert half == config.optimizer.micro_batches
    assert losses[:half] == losses[half:]


def test_a_skipped_step_changes_only_the_counters(
    state: TrainingState, batches: list[TrainingBatch], config: TrainConfig, manifest: Manifest
) -> None:
    do_step(state, batches, config)  # so that the optimizer has moments
    before = copy.deepcopy(
        (state.module.state_dict(), state.optimizer.state_dict(), state.average.state_dict())
    )
    later = [dataclasses.replace(batch, step=1) for batch in batches]
    hook = state.model.class_labels_classifier.register_forward_hook(lambda _, __, out: out * float("nan"))
    metrics = do_step(state, later, config)
    hook.remove()
    assert not is_finite(metrics)
    after = state.module.state_dict(), state.optimizer.state_dict(), state.average.state_dict()
    for name, value in before[0].items():
        assert torch.equal(value, after[0][name]), name
    for index, moments in before[1]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, after[1]["state"][index][name]), (index, name)
    assert all(torch.equal(a, b) for a, b in zip(before[2], after[2], strict=True))
    assert (state.step, state.non_finite) == (2, 1)
    assert all(parameter.grad is None for parameter in state.module.parameters())


def test_the_error_names_step_images_layer_and_file(
    state: TrainingState, batches: list[TrainingBatch], config: TrainConfig
) -> None:
    break_forward(state)
    with pytest.raises(TrainingError) as raised:
        do_step(state, batches, override(config, on_non_finite="stop"))
    message = str(raised.value)
    ids = sorted(image_id for batch in batches for image_id in batch.image_ids)
    assert "Step 0: loss nan" in message or "Step 0: loss inf" in message
    assert f"images {ids}" in message
    assert "encoder.layers.0.fc1" in message
    file = message.split("--replay ", 1)[1].split()[0].rstrip(".")
    assert storage.exists(file)
    assert "--on-non-finite skip" in message, "the remedy"


def run_rank(rank: int, config: TrainConfig, manifest: Manifest, folder: str) -> None:
    """Run one worker's half of step 0 with both policies; the network of rank 1 is broken."""
    for choice in ("stop", "skip"):
        with process_group(f"{folder}/{choice}", rank, 2):
            result = run_half_step(rank, override(config, on_non_finite=choice), manifest)
        Path(folder, f"{choice}-{rank}.txt").write_text(result)


def run_half_step(rank: int, config: TrainConfig, manifest: Manifest) -> str:
    state, batches = (
        create_state(config, manifest, torch.device("cpu")),
        first_step(config, manifest)[rank::2],
    )
    before = copy.deepcopy(state.model.state_dict())
    parallel = parallelize(state.module)
    if rank == 1:
        break_forward(state)
    totals = step_totals(batches, config.model.architecture.num_queries, config.loss.eos_coefficient)
    try:
        metrics = train_step(parallel, state, batches, config, totals)
        assert not is_finite(metrics), "both ranks see the sum of the gradients"
        non_finite.handle_non_finite(state, batches, config, totals, metrics, rank)
        unchanged = all(
            torch.equal(value, state.model.state_dict().get(name, value)) for name, value in before.items()
        )
        return f"skipped, unchanged: {unchanged}"
    except TrainingError as error:
        return str(error)


def test_both_workers_report_the_rank_with_the_non_finite_layer(
    manifest: Manifest, config: TrainConfig, tmp_path: Path
) -> None:
    both = override(config, workers=2)
    run_ranks(2, run_rank, both, manifest, str(tmp_path))
    stop, skip = (
        [(tmp_path / f"{choice}-{rank}.txt").read_text() for rank in range(2)] for choice in ("stop", "skip")
    )
    assert skip == ["skipped, unchanged: True"] * 2
    assert stop[0] == stop[1]
    ids = sorted(image_id for batch in first_step(both, manifest) for image_id in batch.image_ids)
    assert f"images {ids}" in stop[0], "of both ranks"
    assert "First non-finite value on rank 1: the forward pass: " in stop[0]
    (file,) = re.findall(r"--replay (\S+rank-1\.pt)", stop[0])
    assert storage.exists(file)


def test_too_many_skipped_steps_stop_the_run(
    state: TrainingState, batches: list[TrainingBatch], config: TrainConfig
) -> None:
    break_forward(state)
    few = override(config, max_non_finite=2)
    for step in (0, 1):
        do_step(state, [dataclasses.replace(batch, step=step) for batch in batches], few)
    with pytest.raises(TrainingError, match="Step 2: "):
        do_step(state, [dataclasses.replace(batch, step=2) for batch in batches], few)


def test_replay_refuses_a_file_that_is_not_a_saved_batch(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"no batch")
    torch.save({"step": 1}, tmp_path / "y.pt")
    for name in ("x.pt", "y.pt"):
        with pytest.raises(ConfigError, match="not a batch saved by a training run"):
            non_finite.replay(override(config, replay=str(tmp_path / name)))


def test_the_error_is_complete_when_the_batch_cannot_be_saved(
    state: TrainingState, batches: list[TrainingBatch], config: TrainConfig, tmp_path: Path
) -> None:
    """If the batch cannot be saved, the message still contains everything else."""
    (tmp_path / "file").write_text("")
    break_forward(state)
    nowhere = override(config, on_non_finite="stop", output=str(tmp_path / "file"))
    with pytest.raises(TrainingError, match=r"Step 0: .*encoder.layers.0.fc1.*could not be saved"):
        do_step(state, batches, nowhere)
