"""Best checkpoint, retention and early stopping, all computed from the files in the output folder."""

from pathlib import Path

import pytest
import torch

from raydetr import storage
from raydetr.flat_keys import override
from raydetr.training import checkpoint, validation
from raydetr.training.config import TrainConfig
from raydetr.training.state import create_state
from tests.awkward import write_awkward
from tests.cluster.recorded_training import config as make_config


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return override(
        make_config(str(tmp_path / "data"), str(tmp_path / "run")),
        val_data=str(tmp_path / "data"),
        checkpoint_every=5,
        validate_every=10,
        keep_checkpoints=2,
        patience=3,
        steps=200,
    )


def commit(config: TrainConfig, step: int) -> None:
    """Write a complete checkpoint, as far as this module reads it, then prune as the loop does."""
    for name in ("model/config.json", checkpoint.STATE, checkpoint.MARKER):
        storage.write_bytes(storage.join(checkpoint.uri(config.run.output, step), name), b"{}")
    validation.prune_checkpoints(config)


def validate(config: TrainConfig, step: int, ap: float) -> None:
    checkpoint.write_validation(config.run.output, step, {"AP": ap, "AP50": 2 * ap})


def test_the_latest_the_best_and_pending_checkpoints_are_retained(config: TrainConfig) -> None:
    for step in range(5, 45, 5):
        commit(config, step)
    assert checkpoint.committed_steps(config.run.output) == [10, 20, 30, 35, 40], (
        "10, 20, 30 are to be validated"
    )
    validate(config, 10, 0.1)
    validate(config, 20, 0.3)
    commit(config, 45)
    assert checkpoint.committed_steps(config.run.output) == [20, 30, 40, 45], "20 is the best, 30 is pending"
    for step, ap in ((30, 0.2), (40, 0.4)):
        validate(config, step, ap)
    commit(config, 50)
    assert checkpoint.committed_steps(config.run.output) == [40, 45, 50]
    assert len(storage.list_names(storage.join(config.run.output, "checkpoints"))) == 3, (
        "no half-deleted folder"
    )


def test_the_earlier_of_two_equal_checkpoints_is_the_best(config: TrainConfig) -> None:
    for step in (10, 20):
        commit(config, step)
        validate(config, step, 0.25)
    assert validation.best_checkpoint(config) == 10


def test_without_a_validation_no_checkpoint_is_the_best(config: TrainConfig) -> None:
    commit(config, 10)
    assert validation.best_checkpoint(config) is None
    assert not validation.has_stalled(config, 10)


def test_a_failed_validation_is_neither_best_nor_pending(config: TrainConfig) -> None:
    commit(config, 10)
    checkpoint.write_validation(config.run.output, 10, {})
    assert validation.best_checkpoint(config) is None
    assert validation.pending_checkpoints(config) == set()


@pytest.mark.parametrize(("known", "stalled"), [((10, 20, 30), False), ((10, 20, 30, 40), True)])
def test_a_run_has_stalled_after_patience_validations_without_improvement(
    known: tuple[int, ...], stalled: bool, config: TrainConfig
) -> None:
    for step in known:
        commit(config, step)
        validate(config, step, 0.5 if step == 10 else 0.4)
    assert validation.has_stalled(config, known[-1]) is stalled
    # A resumed run has only the same folder.
    assert validation.has_stalled(override(config, workers=1), known[-1]) is stalled
    assert not validation.has_stalled(override(config, patience=0), known[-1])


def test_a_pending_validation_delays_early_stopping(config: TrainConfig) -> None:
    for step in (10, 20, 30, 40):
        commit(config, step)
    for step in (10, 20, 40):
        validate(config, step, 0.5 if step == 10 else 0.4)
    assert not validation.has_stalled(config, 40), "30 may be better yet"
    validate(config, 30, 0.4)
    assert validation.has_stalled(config, 40)


def test_a_lost_validation_is_ignored_once_two_later_ones_are_done(
    config: TrainConfig,
) -> None:
    for step in (10, 20, 30, 40, 50):
        commit(config, step)
        if step != 20:
            validate(config, step, 0.5 if step == 10 else 0.4)
    assert validation.pending_checkpoints(config) == set()
    assert validation.has_stalled(config, 50)
    commit(config, 55)
    assert checkpoint.committed_steps(config.run.output) == [10, 50, 55], (
        "the lost one is not retained forever"
    )
    assert checkpoint.validated_steps(config.run.output) == [10, 30, 40, 50], (
        "metrics outlive their checkpoint"
    )


@pytest.mark.usefixtures("ray_local")
@pytest.mark.slow
def test_lost_validations_are_repeated_before_a_run_resumes(config: TrainConfig) -> None:
    manifest = write_awkward(Path(config.data.train_data), shards=(8,))
    config = override(config, validation_images=4)
    state = create_state(config, manifest, torch.device("cpu"))
    for state.step in (10, 20):
        checkpoint.save(config.run.output, state, checkpoint.History(), {})
    validate(config, 20, 0.4)
    validation.validate_missing_checkpoints(config, "")
    metrics = checkpoint.read_validation(config.run.output, 10)
    assert metrics
    assert 0 <= metrics["AP"] < 0.4
    assert validation.best_checkpoint(config) == 20
    assert checkpoint.read_validation(config.run.output, 20) == {"AP": 0.4, "AP50": 0.8}, "it is not repeated"


def test_without_ground_truth_no_checkpoint_is_the_best(config: TrainConfig) -> None:
    for step in (10, 20):
        commit(config, step)
        validate(config, step, -1.0)
    assert validation.best_checkpoint(config) is None


def test_incomplete_checkpoints_are_deleted(config: TrainConfig) -> None:
    storage.write_bytes(storage.join(checkpoint.uri(config.run.output, 7), "training.pt"), b"half")
    commit(config, 10)
    assert storage.list_names(storage.join(config.run.output, "checkpoints")) == ["step-00000010"]


def test_an_improvement_resets_patience(config: TrainConfig) -> None:
    for step, ap in ((10, 0.5), (20, 0.4), (30, 0.6), (40, 0.5), (50, 0.5)):
        commit(config, step)
        validate(config, step, ap)
    assert not validation.has_stalled(config, 50)


def test_a_failed_validation_is_logged_and_does_not_stop_the_run(
    config: TrainConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    write_awkward(Path(config.data.train_data), shards=(8,))
    commit(config, 10)  # whose model cannot be loaded
    assert validation.validate_checkpoint(config, "", 10) == {}
    assert "step 10: the validation failed" in capfd.readouterr().out
    assert checkpoint.read_validation(config.run.output, 10) == {}


def test_a_failed_validation_between_two_steps_does_not_stop_the_run(
    config: TrainConfig, capfd: pytest.CaptureFixture[str]
) -> None:
    write_awkward(Path(config.data.train_data), shards=(8,))
    commit(config, 10)
    validation.validate_together(config, "", 10, 0, torch.device("cpu"))
    assert "step 10: the validation failed" in capfd.readouterr().out
    assert validation.pending_checkpoints(config) == set()
