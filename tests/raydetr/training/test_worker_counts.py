"""W workers with the real data stream receive and compute the same as one process on the global batch."""

import dataclasses
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from raydetr.data.shards import Manifest, read_rows
from raydetr.data.stream import ray_stream
from raydetr.data.stream.micro_batch import unpack
from raydetr.data.stream.source import shard_source
from raydetr.flat_keys import override
from raydetr.training.config import TrainConfig
from raydetr.training.distributed import step_totals
from raydetr.training.loop import micro_batches_per_worker
from raydetr.training.optim import set_learning_rates
from raydetr.training.run import plan_spec
from raydetr.training.state import create_state, parallelize
from raydetr.training.step import to_device, train_step
from tests import training_record
from tests.awkward import write_awkward
from tests.training_config import small_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]

STEPS = 24
CONFIG = small_config(
    workers=1,
    steps=STEPS,
    backbone="test_resnet",
    backbone_out_indices=(1, 2, 3, 4),
    backbone_weights="",
    d_model=32,
    encoder_layers=1,
    decoder_layers=2,
    attention_heads=4,
    ffn_dim=32,
    num_queries=8,
    micro_batch_size=1,
    micro_batches=8,
    precision="float64",
    warmup_steps=0,
    shortest_edges=(48, 64),
    longest_edge=96,
    crop=True,
    crop_shortest_edges=(48, 64),
    crop_sizes=(32, 64),
    window_row_groups=1,
)


Images = list[tuple[int, str, str]]
"""Id, checksum of the boxes and checksum of the pixels of each image."""


def first_step(step: int) -> int:
    return step


def gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def record_worker(arguments: dict[str, Any]) -> None:
    """Record, in a Train worker, what the model receives, the loss and the clipped gradient of every step."""
    config, folder = arguments["config"], Path(arguments["folder"])
    state = create_state(config, Manifest.load(config.data.train_data), torch.device("cpu"))
    rank = ray.train.get_context().get_world_rank()
    step = -1

    def hook(module: torch.nn.Module, args: tuple[()], kwargs: dict[str, Any]) -> None:
        images = training_record.fingerprints(kwargs)
        training_record.append(folder / f"{rank}.jsonl", {"step": step, "images": images})

    def save_gradient(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        torch.save(gradient(state.module), folder / f"gradient-{step}.pt")

    state.module.register_forward_pre_hook(hook, with_kwargs=True)
    if rank == 0:
        state.optimizer.register_step_pre_hook(save_gradient)
    parallel = parallelize(state.module)
    for batches in ray_stream.steps(
        ray.train.get_dataset_shard("train"),
        config.optimizer.micro_batch_size,
        micro_batches_per_worker(config),
    ):
        step = batches[0].step
        totals = step_totals(
            batches, config.model.architecture.num_queries, state.model.config.eos_coefficient
        )
        metrics = train_step(parallel, state, batches, config, totals)
        if rank == 0:
            training_record.append(folder / "losses.json", {"step": step, "loss": metrics["loss"]})


def build_stream(
    config: TrainConfig, manifest: Manifest, start: int = 0, stop: int = STEPS
) -> ray_stream.Stream:
    plan = ray_stream.build_plan(manifest, plan_spec(config))
    return ray_stream.Stream(
        source=shard_source(manifest),
        plan=plan,
        last_step=stop,
        first_step=partial(first_step, start),
        masks=config.run.masks,
    )


def run_workers(
    config: TrainConfig, manifest: Manifest, folder: Path, start: int = 0, stop: int = STEPS
) -> None:
    folder.mkdir()
    TorchTrainer(
        record_worker,
        train_loop_config={"config": config, "folder": str(folder)},
        scaling_config=ScalingConfig(num_workers=config.cluster.workers, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(storage_path=str(folder / "ray")),
        datasets={"train": build_stream(config, manifest, start, stop)},
        dataset_config=ray_stream.PlanDataConfig(),
    ).fit()


def sorted_images(rows: list[dict[str, Any]]) -> Images:
    return sorted((row["image_id"], row["boxes"], row["pixels"]) for row in rows)


def received(folder: Path) -> dict[int, Images]:
    """Return step → what the model received in it on all ranks, sorted."""
    rows = [row for file in sorted(folder.glob("*.jsonl")) for row in training_record.read(file)]
    rows.sort(key=lambda row: row["step"])
    return {
        step: sorted_images([image for row in group for image in row["images"]])
        for step, group in itertools.groupby(rows, key=lambda row: row["step"])
    }


@dataclasses.dataclass
class Reference:
    """By step: what one process receives and computes, and the number of boxes of each micro-batch."""

    images: dict[int, Images]
    losses: dict[int, float]
    gradients: dict[int, torch.Tensor]
    boxes: dict[int, list[int]]


def one_process(config: TrainConfig, manifest: Manifest) -> Reference:
    """Train on each global batch in one forward pass, with the normalizers that the criterion computes itself."""
    job = build_stream(config, manifest)
    rows = [
        batch
        for window in ray_stream.list_windows(job, 0)
        for row in ray_stream.build_micro_batches(window, job, world_size=1)
        for batch in unpack(row, config.optimizer.micro_batch_size)
    ]
    state = create_state(config, manifest, torch.device("cpu"))
    reference = Reference({}, {}, {}, {})
    for step, group in itertools.groupby(rows, key=lambda row: row.step):
        batches = list(group)
        pixel_values, pixel_mask = zip(*(to_device(batch, state) for batch in batches), strict=True)
        valid = torch.cat([batch.weights for batch in batches]).bool()
        labels = [label for batch in batches for label in batch.labels]
        arguments = {
            "pixel_values": torch.cat(pixel_values)[valid],
            "pixel_mask": torch.cat(pixel_mask)[valid],
            "labels": [label for label, is_valid in zip(labels, valid, strict=True) if is_valid],
        }
        reference.images[step] = sorted_images(
            training_record.fingerprints(arguments | {"image_weights": torch.ones(int(valid.sum()))})
        )
        loss = state.module(**arguments).loss
        state.module.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(state.module.parameters(), config.optimizer.max_grad_norm)
        set_learning_rates(state.optimizer, step, config.optimizer)
        state.optimizer.step()
        reference.losses[step] = loss.item()
        reference.gradients[step] = gradient(state.module)
        reference.boxes[step] = [sum(len(label["boxes"]) for label in batch.labels) for batch in batches]
    return reference


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_awkward(tmp_path_factory.mktemp("awkward"), empty=0.85)


@pytest.fixture(scope="module")
def config(manifest: Manifest) -> TrainConfig:
    return override(CONFIG, train_data=manifest.root)


@pytest.fixture(scope="module")
def reference(config: TrainConfig, manifest: Manifest) -> Reference:
    return one_process(config, manifest)


def test_the_data_set_has_the_difficult_cases(manifest: Manifest, reference: Reference) -> None:
    sizes = {
        (record["height"], record["width"])
        for shard in manifest.shards
        for record in read_rows(manifest.root, shard.file).to_pylist()
    }
    assert len(sizes) >= 30
    assert manifest.num_images == 61
    boxes = list(reference.boxes.values())
    assert any(sum(each) == 0 for each in boxes), "no step in which all ranks are without boxes"
    assert any(0 < sum(each) < 8 for each in boxes), "no step with fewer boxes than workers"
    assert any(sum(each) > 4 and 0 in each for each in boxes), "no step in which one rank is without boxes"


def test_every_image_is_received_once_per_epoch(
    config: TrainConfig, manifest: Manifest, reference: Reference
) -> None:
    per_epoch = build_stream(config, manifest).plan.steps_per_epoch
    ids = [image_id for step in range(per_epoch) for image_id, _, _ in reference.images[step]]
    assert len(ids) == len(set(ids)) == 61 - 2, "two of the 61 images have no pixels"


@pytest.mark.parametrize(
    "workers", [2, 3, *(pytest.param(workers, marks=pytest.mark.nightly) for workers in (1, 4, 5, 6, 7, 8))]
)
def test_any_number_of_workers_receives_the_same_images_and_trains_like_one_process(
    workers: int,
    config: TrainConfig,
    manifest: Manifest,
    reference: Reference,
    tmp_path: Path,
    ray_local: None,
) -> None:
    assert_trains_like_one_process(override(config, workers=workers), manifest, reference, tmp_path / "run")


@pytest.mark.parametrize("workers", [3, pytest.param(2, marks=pytest.mark.nightly)])
def test_masks_query_groups_and_dense_supervision_train_like_one_process(
    workers: int, config: TrainConfig, tmp_path: Path, ray_local: None
) -> None:
    manifest = write_awkward(tmp_path / "data", empty=0.85, masks=True)
    config = override(
        config,
        train_data=manifest.root,
        task="instance",
        attention_heads=8,  # the mask head needs a multiple of eight channels
        query_groups=2,
        dense_loss_weight=1.0,
    )
    reference = one_process(config, manifest)
    assert_trains_like_one_process(override(config, workers=workers), manifest, reference, tmp_path / "run")


@pytest.mark.parametrize("workers", [3, pytest.param(2, marks=pytest.mark.nightly)])
def test_the_multi_scale_architecture_trains_like_one_process(
    workers: int, config: TrainConfig, tmp_path: Path, ray_local: None
) -> None:
    manifest = write_awkward(tmp_path / "data", empty=0.85, masks=True)
    config = override(config, train_data=manifest.root, multi_scale=True, task="instance")
    reference = one_process(config, manifest)
    assert_trains_like_one_process(override(config, workers=workers), manifest, reference, tmp_path / "run")


def assert_trains_like_one_process(
    config: TrainConfig, manifest: Manifest, reference: Reference, folder: Path
) -> None:
    run_workers(config, manifest, folder)
    assert received(folder) == reference.images
    losses = {row["step"]: row["loss"] for row in training_record.read(folder / "losses.json")}
    assert sorted(losses) == sorted(reference.losses) == list(range(STEPS))
    for step, expected in reference.gradients.items():
        assert losses[step] == pytest.approx(reference.losses[step], rel=1e-9), f"step {step}"
        actual = torch.load(folder / f"gradient-{step}.pt")
        assert (actual - expected).norm() <= 1e-9 * expected.norm(), f"step {step}"


def test_a_run_resumes_with_another_number_of_workers(
    config: TrainConfig, manifest: Manifest, reference: Reference, tmp_path: Path, ray_local: None
) -> None:
    """After seven steps, for example with four workers, continue with three, then with four."""
    received_images: dict[int, Images] = {}
    for workers, start, stop in ((3, 7, 15), (4, 15, STEPS)):
        folder = tmp_path / f"from-{start}"
        run_workers(override(config, workers=workers), manifest, folder, start, stop)
        received_images |= received(folder)
    assert received_images == {step: images for step, images in reference.images.items() if step >= 7}
