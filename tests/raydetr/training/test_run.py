"""Identity of a run in its output folder: the flags it can resume with, and its MLflow run."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from raydetr import storage
from raydetr.errors import ConfigError, TrainingError
from raydetr.flat_keys import flatten, override
from raydetr.registry import models, tracking
from raydetr.training import checkpoint
from raydetr.training.run import RENAMED, open_run, pinned_model, require_same_run
from tests.awkward import write_awkward
from tests.empty_registry import empty_registry
from tests.tiny_detr import save_tiny_detr
from tests.training_config import small_config


@pytest.mark.usefixtures("ray_local")
@pytest.mark.slow
def test_a_run_resumes_with_advised_flags_and_another_mlflow_uri(tmp_path: Path) -> None:
    manifest = write_awkward(tmp_path / "data")
    flags = {"train_data": manifest.root, "output": str(tmp_path / "run")}
    first = small_config(**flags, tracking_uri=empty_registry(tmp_path))
    identity = json.loads(json.dumps(flatten(first))) | {"data_digest": manifest.digest, "val_digest": ""}
    # The driver was killed before it stored the id of the MLflow run that it had started.
    run_id = open_run(first, manifest)
    file = tmp_path / "run" / "run.json"
    started = json.loads(file.read_text())
    assert started["run_id"] == run_id
    file.write_text(json.dumps(started | {"run_id": None}))
    assert open_run(first, manifest) == run_id
    # A field added in a later version, and a copy of the database elsewhere, as on a new head node.
    file.write_text(
        json.dumps(
            started | {"identity": {k: v for k, v in started["identity"].items() if k != "dense_loss_weight"}}
        )
    )
    shutil.copy(tmp_path / "mlflow.db", tmp_path / "moved.db")
    changes = {"on_non_finite": "skip", "max_skipped": 0.5, "checkpoint_every": 10, "name": "other"}
    moved = override(first, tracking_uri=f"sqlite:///{tmp_path}/moved.db", **changes)
    assert open_run(moved, manifest) == run_id
    assert set(json.loads(file.read_text())["identity"]) < set(identity)
    storage.write_bytes(storage.join(checkpoint.uri(first.run.output, 5), checkpoint.MARKER), b"")
    with pytest.raises(TrainingError, match="started with other values of dense_loss_weight, learning_rate:"):
        open_run(override(moved, learning_rate=1.0, dense_loss_weight=2.0), manifest)


@pytest.mark.usefixtures("ray_local")
def test_a_finished_run_is_returned_only_for_its_flags_and_data(tmp_path: Path) -> None:
    manifest = write_awkward(tmp_path / "data")
    done = small_config(
        train_data=manifest.root, output=str(tmp_path / "run"), tracking_uri=empty_registry(tmp_path)
    )
    open_run(done, manifest)
    require_same_run(override(done, max_hours=3.0, max_fault_share=1.0))
    for changes in (
        {"steps": 5000, "num_queries": 50},
        {"train_data": "/does/not/exist"},
        {"task": "instance"},
    ):
        with pytest.raises(
            TrainingError, match=f"finished run with other values of {', '.join(sorted(changes))}:"
        ):
            require_same_run(override(done, **changes))
    file = tmp_path / "run" / "run.json"
    started = json.loads(file.read_text())
    former = {new: old for old, new in RENAMED.items()}
    identity = {former.get(name, name): value for name, value in started["identity"].items()}
    assert identity.keys() != started["identity"].keys()
    file.write_text(json.dumps(started | {"identity": identity}))
    require_same_run(done)
    with pytest.raises(TrainingError, match="other values of max_grad_norm:"):
        require_same_run(override(done, max_grad_norm=9.0))
    write_awkward(tmp_path / "data", seed=1)
    with pytest.raises(TrainingError, match="other values of data_digest"):
        require_same_run(done)
    shutil.rmtree(tmp_path / "data")
    require_same_run(done)


@pytest.mark.usefixtures("ray_local")
def test_flags_may_change_before_the_first_checkpoint(tmp_path: Path) -> None:
    manifest = write_awkward(tmp_path / "data")
    first = small_config(
        train_data=manifest.root, output=str(tmp_path / "run"), tracking_uri=empty_registry(tmp_path)
    )
    run_id = open_run(first, manifest)
    smaller = override(first, micro_batch_size=1)
    assert open_run(smaller, manifest) == run_id
    storage.write_bytes(storage.join(checkpoint.uri(first.run.output, 5), checkpoint.MARKER), b"")
    assert open_run(smaller, manifest) == run_id
    with pytest.raises(TrainingError, match="other values of micro_batch_size"):
        open_run(first, manifest)


@pytest.mark.usefixtures("ray_local")
def test_the_validation_set_is_fixed_after_the_first_validation(tmp_path: Path) -> None:
    manifest = write_awkward(tmp_path / "data")
    first = small_config(
        train_data=manifest.root, output=str(tmp_path / "run"), tracking_uri=empty_registry(tmp_path)
    )
    run_id = open_run(first, manifest)
    storage.write_bytes(storage.join(checkpoint.uri(first.run.output, 400), checkpoint.MARKER), b"")
    validation = write_awkward(tmp_path / "val", shards=(7,))
    validated = override(first, val_data=validation.root, validate_every=400)
    assert open_run(validated, manifest) == run_id
    checkpoint.write_validation(first.run.output, 400, {"AP": 0.5})
    assert open_run(override(validated, validate_every=800), manifest) == run_id
    for changes in ({"val_data": manifest.root}, {"validation_images": 5}):
        with pytest.raises(TrainingError, match=f"other values of {next(iter(changes))}"):
            open_run(override(validated, **changes), manifest)
    write_awkward(tmp_path / "val", shards=(7,), seed=1)
    with pytest.raises(TrainingError, match="other values of val_digest"):
        open_run(validated, manifest)


@pytest.mark.usefixtures("ray_local")
def test_a_resumed_run_keeps_the_version_that_its_alias_pointed_to_at_the_start(tmp_path: Path) -> None:
    uri = empty_registry(tmp_path)
    data = write_awkward(tmp_path / "data")
    config = small_config(
        train_data=data.root, output=str(tmp_path / "run"), tracking_uri=uri, model="models:/ants@best"
    )
    for version in (1, 2):
        run = tracking.start_run(uri, "training", str(version), {}, {})
        folder = save_tiny_detr(tmp_path / str(version), ["ant", "bee", "cat"], seed=version)
        assert models.register(uri, run, str(folder), name="ants", alias="best") == version
        assert pinned_model(config) == "models:/ants/1"
        if version == 1:
            open_run(override(config, model=pinned_model(config)), data, config.model.model)
    assert pinned_model(override(config, model="models:/ants/1")) == "models:/ants/1"
    for changed in (override(config, output=str(tmp_path / "new")), override(config, model="models:/ants/2")):
        assert pinned_model(changed) == "models:/ants/2"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_workers", -1),
        ("warmup_steps", -1),
        ("ema_decay", 1.5),
        ("lr_drop_at", 7.0),
        ("nms_threshold", 0.0),
        ("num_queries", 0),
        ("validation_cpus", -1.0),
    ],
)
def test_the_error_for_an_invalid_value_names_its_flag(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} is {value}"):
        override(small_config(), **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("flip", 1.5), ("longest_edge", 0), ("shortest_edges", ()), ("crop_sizes", (600, 384))],
)
def test_an_invalid_augmentation_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} is {re.escape(str(value))}"):
        override(small_config(), **{name: value})
