"""The stream as workers get it: resumed at any step with any number of workers, with bad records and failed reads."""

import contextlib
import io
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from PIL import Image

from detr.image_processing.augment_spec import AugmentSpec
from raydetr import filesystems, storage
from raydetr.data.ingest.shard_writer import write_manifest, write_shard
from raydetr.data.schema import SCHEMA
from raydetr.data.shards import Manifest, read_rows
from raydetr.data.stream import in_flight, ray_stream
from raydetr.data.stream.layout import Sizes, Window
from raydetr.data.stream.micro_batch import TrainingBatch
from raydetr.data.stream.plan import PlanSpec
from raydetr.data.stream.source import ShardSource, shard_source
from raydetr.errors import StorageError
from tests.awkward import CATEGORIES, write_awkward
from tests.raydetr.s3 import S3
from tests.run_pipeline import RunPipeline
from tests.tiers import rest_slow
from tests.training_record import checksum

MICRO_BATCHES, BATCH, EPOCHS = 5, 2, 3
BAD = 1021
"""Id of the truncated image of the awkward data set, whose record has no fault."""

Images = dict[int, list[tuple[int, str, str]]]
"""Step → image id, checksum of boxes and labels, checksum of pixels; sorted."""


def job(
    manifest: Manifest, first: int = 0, last: int | None = None, grouped: bool = True
) -> ray_stream.Stream:
    spec = PlanSpec(
        seed=5,
        micro_batch_size=BATCH,
        micro_batches=MICRO_BATCHES,
        augmentation=AugmentSpec(
            shortest_edges=(48, 64), longest_edge=96, crop_shortest_edges=(48, 64), crop_sizes=(32, 64)
        ),
        window_row_groups=1,
        group_sizes=grouped,
    )
    plan = ray_stream.build_plan(manifest, spec)
    end = EPOCHS * plan.steps_per_epoch if last is None else last
    return ray_stream.Stream(
        source=shard_source(manifest), plan=plan, last_step=end, first_step=partial(int, first)
    )


@dataclass(frozen=True, eq=False)
class BlockedSource(ShardSource):
    """Shards whose records cannot be read until a file exists. Logs the windows that are listed."""

    folder: Path

    def sizes(self, window: Window) -> Sizes:
        with Path(self.folder, "listed").open("a") as file:
            file.write(f"{window}\n")
        return super().sizes(window)

    def records(self, window: Window, columns: Sequence[str]) -> pa.Table:
        while not Path(self.folder, "go").exists():
            time.sleep(0.1)
        return super().records(window, columns)


class Share:
    """A worker's rows with the interface of Ray Data's iterator."""

    def __init__(self, rows: list[pa.Table]) -> None:
        self.rows = rows

    def iter_batches(self, **options: object) -> Iterator[pa.Table]:
        del options
        return iter(self.rows)


def steps_of(share: Any, world_size: int) -> list[list[TrainingBatch]]:
    return list(ray_stream.steps(share, BATCH, -(-MICRO_BATCHES // world_size)))


def without_ray(work: ray_stream.Stream, world_size: int) -> list[list[list[TrainingBatch]]]:
    """Return the steps of each rank, from the functions of the stream with its rows assigned round-robin."""
    rows = [
        row
        for window in ray_stream.list_windows(work, work.first_step())
        for row in ray_stream.build_micro_batches(window, work, world_size, row_bytes=100_000)
    ]
    return [steps_of(Share(rows[rank::world_size]), world_size) for rank in range(world_size)]


def through_ray(work: ray_stream.Stream, world_size: int) -> list[list[list[TrainingBatch]]]:
    splits = ray_stream.dataset(work, world_size, work.first_step()).streaming_split(world_size, equal=False)
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(lambda split: steps_of(split, world_size), splits))


def images(ranks: list[list[list[TrainingBatch]]]) -> Images:
    by_step: Images = {}
    for batch in itertools.chain.from_iterable(itertools.chain.from_iterable(ranks)):
        of_step = by_step.setdefault(batch.step, [])
        for image, label in zip(batch.images, batch.labels, strict=True):
            if image is not None:
                targets = torch.cat([label["boxes"].double(), label["class_labels"][:, None].double()], 1)
                of_step.append((int(label["image_id"]), checksum(targets), checksum(image)))
    return {step: sorted(of_step) for step, of_step in by_step.items()}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_awkward(tmp_path_factory.mktemp("awkward"))


@pytest.fixture(scope="module")
def uninterrupted(manifest: Manifest) -> Images:
    """The images of one worker from the first step to the last."""
    return images(without_ray(job(manifest), 1))


def test_every_decodable_image_occurs_once_per_epoch(manifest: Manifest, uninterrupted: Images) -> None:
    per_epoch = job(manifest).plan.steps_per_epoch
    assert sorted(uninterrupted) == list(range(EPOCHS * per_epoch))
    for epoch in range(EPOCHS):
        ids = [i for step in range(per_epoch) for i, _, _ in uninterrupted[epoch * per_epoch + step]]
        assert sorted(ids) == [1000 + 7 * n for n in range(manifest.num_images) if n not in (3, 5)]


@pytest.mark.parametrize("seed", range(10))
def test_runs_resumed_at_random_steps_with_any_number_of_workers_have_the_same_images(
    manifest: Manifest, uninterrupted: Images, seed: int
) -> None:
    rng = random.Random(seed)
    cuts = sorted(rng.sample(range(1, len(uninterrupted)), 2))
    workers = [4, 3, 4] if seed < 3 else [rng.randint(1, MICRO_BATCHES) for _ in range(3)]
    actual: Images = {}
    for first, last, world_size in zip([0, *cuts], [*cuts, len(uninterrupted)], workers, strict=True):
        part = images(without_ray(job(manifest, first, last), world_size))
        assert sorted(part) == list(range(first, last))
        actual |= part
    assert actual == uninterrupted, f"workers {workers} from steps {cuts}"


@pytest.mark.usefixtures("ray_local")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context", "ignore::ResourceWarning")
@pytest.mark.parametrize("seed", rest_slow(range(2)))
def test_ray_data_delivers_the_same_images(manifest: Manifest, uninterrupted: Images, seed: int) -> None:
    rng = random.Random(seed)
    first, world_size = rng.randrange(len(uninterrupted)), rng.randint(1, 4)
    actual = images(through_ray(job(manifest, first), world_size))
    expected = {step: of_step for step, of_step in uninterrupted.items() if step >= first}
    assert actual == expected, f"{world_size} workers from step {first}"


def test_a_bad_record_is_reported_and_does_not_change_the_others(
    manifest: Manifest, uninterrupted: Images, tmp_path: Path
) -> None:
    ranks = without_ray(job(manifest), 2)
    batches = [batch for rank in ranks for step in rank for batch in step]
    skipped = [reason for batch in batches for reason in batch.skipped]
    assert len(skipped) == EPOCHS
    assert all(reason.startswith(f"{BAD}: ") for reason in skipped)
    for batch in batches:
        for image_id, weight in zip(batch.image_ids, batch.weights.tolist(), strict=False):
            assert weight == float(image_id not in (BAD, 1035))  # 1035: its record has the fault missing-file

    # Replace the bad image by a good one of the same size, so that the plan stays the same.
    good = [read_rows(manifest.root, shard.file, None, SCHEMA.names).to_pylist() for shard in manifest.shards]
    row = good[0][3]
    file = io.BytesIO()
    Image.new("RGB", (row["width"], row["height"]), (90, 30, 60)).save(file, "PNG")
    row["image"] = file.getvalue()
    summaries = [write_shard(str(tmp_path), number, rows) for number, rows in enumerate(good)]
    other = write_manifest(str(tmp_path), [s for s in summaries if s is not None], CATEGORIES)
    full = images(without_ray(job(other), 1))
    assert {step: [i for i in of_step if i[0] != BAD] for step, of_step in full.items()} == uninterrupted
    assert sum(i[0] == BAD for of_step in full.values() for i in of_step) == EPOCHS


@pytest.mark.slow
def test_transient_read_errors_change_nothing_and_permanent_ones_stop_the_run(
    manifest: Manifest, uninterrupted: Images, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.upload_folder(manifest.root, s3.uri("shards"))
    uploaded = Manifest.load(s3.uri("shards"))
    s3.faults.fail, s3.faults.cut = 6, 2
    assert images(without_ray(job(uploaded), 2)) == uninterrupted
    assert s3.faults.fail == s3.faults.cut == 0
    monkeypatch.setattr(filesystems, "RETRY_SECONDS", 1.0)
    s3.faults.down = True
    with pytest.raises(StorageError, match=r"shard-00000\d\.parquet: cannot be read"):
        without_ray(job(uploaded), 2)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_local")
def test_too_many_bad_records_stop_the_run_with_a_message_that_has_their_share(
    manifest: Manifest, pipeline: RunPipeline, tmp_path: Path
) -> None:
    flags = {
        "train-data": manifest.root,
        "output": str(tmp_path / "run"),
        "workers": "1",
        "steps": "40",
        "name": "",
        "tracking-uri": f"sqlite:///{tmp_path}/mlflow.db",
        "max-failures": "0",
        "test-edge": "64",
        "longest-edge": "96",
        # The share is of at least a thousand images, so only 0 stops this short run.
        "max-skipped": "0",
    }
    command = [part for name, value in flags.items() for part in (f"--{name}", value)]
    done = pipeline("train", *command, "--shortest-edges", "48", "64", cwd=tmp_path)
    assert done.returncode == 2, done.stdout[-3000:]
    output = done.stdout + done.stderr
    assert "1 of " in output, output[-3000:]
    assert "could not be decoded, more than --max-skipped 0" in output


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_the_listing_of_windows_is_throttled(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run has thousands of windows. Backpressure runs in this process, so the test can lower its limit."""
    monkeypatch.setattr(in_flight, "WINDOWS_AHEAD", 10)
    work = job(manifest, last=10_000)
    work = replace(work, source=BlockedSource(**vars(shard_source(manifest)), folder=tmp_path))
    rows: Any = iter(ray_stream.dataset(work, 1, 0).iter_batches(batch_size=None, batch_format="pyarrow"))
    with contextlib.closing(rows), ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, rows)
        listed, before, count = tmp_path / "listed", 0, 0
        while not count or count != before:
            time.sleep(2)
            before, count = count, len(listed.read_text().splitlines()) if listed.exists() else 0
        (tmp_path / "go").touch()
        assert isinstance(first.result(), pa.Table)
    assert count < 50
