"""A checkpoint is complete or ignored, and a run resumes from it exactly."""

import json
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from raydetr import storage
from raydetr.data.shards import Manifest
from raydetr.errors import LeaseError, StorageError, TrainingError
from raydetr.flat_keys import override
from raydetr.lease import lease
from raydetr.training import checkpoint
from raydetr.training.checkpoint import History
from raydetr.training.config import TrainConfig
from raydetr.training.state import TrainingState, create_state
from tests.awkward import write_awkward
from tests.cluster.recorded_training import config as make_config


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_awkward(tmp_path_factory.mktemp("data"), shards=(8,))


@pytest.fixture
def config(manifest: Manifest, tmp_path: Path) -> TrainConfig:
    return make_config(manifest.root, str(tmp_path / "run"))


def trained_state(config: TrainConfig, manifest: Manifest, step: int) -> TrainingState:
    """Return a state whose weights, optimizer and average have all changed."""
    state = create_state(config, manifest, torch.device("cpu"))
    generator = torch.Generator().manual_seed(step)
    for parameter in state.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    state.optimizer.step()
    state.average.update(step)
    state.step, state.images, state.skipped = step, 8 * step, 1
    return state


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_weights_optimizer_average_and_counts_are_restored_exactly(
    precision: str, config: TrainConfig, manifest: Manifest
) -> None:
    config = override(config, precision=precision)
    saved = trained_state(config, manifest, 5)
    checkpoint.save(config.run.output, saved, History([(4, 12345, {"loss": 1.5})], 7.5), {"data_digest": "d"})
    loaded = create_state(config, manifest, torch.device("cpu"))
    assert checkpoint.load(config.run.output, 5, loaded) == History([(4, 12345, {"loss": 1.5})], 7.5)
    assert (loaded.step, loaded.images, loaded.skipped) == (5, 40, 1)
    for name, value in saved.model.state_dict().items():
        assert torch.equal(value, loaded.model.state_dict()[name]), name
        assert value.dtype == loaded.model.state_dict()[name].dtype
    for left, right in zip(saved.average.values, loaded.average.values, strict=True):
        assert torch.equal(left, right)
    moments = [state.optimizer.state_dict()["state"] for state in (saved, loaded)]
    assert moments[0].keys() == moments[1].keys()
    for index, own in moments[0].items():
        assert torch.equal(own["exp_avg"], moments[1][index]["exp_avg"])
        assert torch.equal(own["exp_avg_sq"], moments[1][index]["exp_avg_sq"])


@pytest.mark.parametrize("failing", ["model.safetensors", "training.pt", "state.json", checkpoint.MARKER])
def test_a_checkpoint_counts_only_when_all_files_are_written(
    failing: str, config: TrainConfig, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(config.run.output, trained_state(config, manifest, 3), History(), {})
    open_output = storage.open_output
    written = []

    def fail(address: str) -> AbstractContextManager[BinaryIO]:
        if address.endswith(failing):
            raise StorageError("disk full")
        written.append(address)
        return open_output(address)

    monkeypatch.setattr(storage, "open_output", fail)
    with pytest.raises(StorageError):
        checkpoint.save(config.run.output, trained_state(config, manifest, 6), History(), {})
    assert checkpoint.last_committed_step(config.run.output) == 3
    assert not any(address.endswith(checkpoint.MARKER) for address in written)
    monkeypatch.undo()
    checkpoint.save(config.run.output, trained_state(config, manifest, 6), History(), {})
    assert checkpoint.last_committed_step(config.run.output) == 6


def test_a_driver_whose_lease_was_taken_commits_nothing(
    config: TrainConfig, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = trained_state(config, manifest, 3)
    with lease(config.run.output, 60.0) as held:
        checkpoint.save(config.run.output, state, History(), {}, held)
        other = json.dumps({"owner": "other", "expires": time.time() + 9}).encode()
        original = checkpoint.read_state(config.run.output, 3)

        def take_lease(*_: object) -> None:  # while the second checkpoint is being written
            storage.write_bytes(held.uri, other)

        monkeypatch.setattr(torch, "save", take_lease)
        state.step = 6
        with pytest.raises(LeaseError, match="another process has taken the lease"):
            checkpoint.save(config.run.output, state, History(), {}, held)
        assert checkpoint.committed_steps(config.run.output) == [3]
        monkeypatch.undo()
        state.step = 3
        with pytest.raises(LeaseError):  # before it touches the other driver's checkpoint
            checkpoint.save(config.run.output, state, History(seconds=1.0), {}, held)
    assert checkpoint.committed_steps(config.run.output) == [3]
    assert checkpoint.read_state(config.run.output, 3) == original
    assert storage.read_bytes(held.uri) == other


def test_only_the_latest_checkpoints_are_retained(config: TrainConfig, manifest: Manifest) -> None:
    state = trained_state(config, manifest, 1)
    for step in (1, 2, 3, 4):
        state.step = step
        checkpoint.save(config.run.output, state, History(), {})
        checkpoint.delete_surplus(config.run.output, keep=2, best=None, pending=set())
    assert checkpoint.committed_steps(config.run.output) == [3, 4]
    assert len(storage.list_names(storage.join(config.run.output, "checkpoints"))) == 2


def test_the_error_for_a_missing_checkpoint_names_it(config: TrainConfig, manifest: Manifest) -> None:
    state = create_state(config, manifest, torch.device("cpu"))
    with pytest.raises(TrainingError, match="step-00000009"):
        checkpoint.load(config.run.output, 9, state)


@pytest.mark.parametrize("size", [0, 100])
@pytest.mark.parametrize("file", ["training.pt", "model/model.safetensors"])
def test_the_error_for_a_damaged_checkpoint_names_it_and_the_remedy(
    file: str, size: int, config: TrainConfig, manifest: Manifest
) -> None:
    """A truncated file, as a power failure may leave it."""
    state = trained_state(config, manifest, 3)
    damaged = Path(checkpoint.save(config.run.output, state, History(), {}), file)
    damaged.write_bytes(damaged.read_bytes()[:size])
    with pytest.raises(
        TrainingError, match=r"step-00000003: the checkpoint is damaged .* Delete this folder"
    ):
        checkpoint.load(config.run.output, 3, state)


def test_the_model_of_a_checkpoint_can_be_loaded_separately(config: TrainConfig, manifest: Manifest) -> None:
    from detr.inference.detector import ObjectDetector
    from tests.tiny_detr import png

    uri = checkpoint.save(config.run.output, trained_state(config, manifest, 2), History(), {})
    detector = ObjectDetector.from_pretrained(storage.join(uri, "model"))
    assert (
        len(detector.detect([detector.prepare(png(40, 60))])[0].scores)
        == config.model.architecture.num_queries
    )
