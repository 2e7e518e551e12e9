"""The assignment of micro-batches to workers, over many layouts, and the limits of what is in flight; without Ray."""

import itertools

import pytest

from detr.image_processing.augment import Augmentation
from detr.image_processing.augment_spec import AugmentSpec
from raydetr.data.stream import ray_stream
from raydetr.data.stream.in_flight import ROW_BYTES, InFlight, bound_concurrency
from raydetr.data.stream.plan import MicroBatch, PlanSpec, Slot
from tests.tiers import rest_slow


def spec(micro_batches: int, batch: int = 2) -> PlanSpec:
    return PlanSpec(seed=0, micro_batch_size=batch, micro_batches=micro_batches, augmentation=AugmentSpec())


def run_of(first: int, last: int, per_step: int, shape: tuple[int, int] = (64, 64)) -> list[MicroBatch]:
    slots = (Slot(0, 0, Augmentation(shape, False, ())),) * 2
    return [MicroBatch(n // per_step, n % per_step, 0, 0, slots, shape) for n in range(first, last)]


@pytest.mark.parametrize(("world_size", "per_step"), [(w, m) for m in (1, 2, 5, 8) for w in range(1, m + 1)])
@pytest.mark.parametrize("row_bytes", rest_slow([5 * 2 * 64 * 64 * 3, 1, 10**9]))
def test_every_rank_gets_its_micro_batches_of_each_step_in_order(
    world_size: int, per_step: int, row_bytes: int
) -> None:
    steps = 7
    for cuts in itertools.combinations(range(0, steps * per_step, 3), 2):
        bounds = sorted({0, *cuts, steps * per_step})
        windows = [run_of(first, last, per_step) for first, last in itertools.pairwise(bounds)]
        rows = [
            row
            for window in windows
            for row in ray_stream.assign_to_ranks(window, spec(per_step), world_size, row_bytes)
        ]
        share = -(-per_step // world_size)
        for rank in range(world_size):
            actual = [(b.step, b.position) for row in rows[rank::world_size] for b in row]
            expected = [(s, p) for s in range(steps) for p in range(rank, share * world_size, world_size)]
            assert actual == expected
        assert all(b.window == -1 and not b.slots for row in rows for b in row if b.position >= per_step)


def test_a_row_packs_steps_up_to_its_maximum_size() -> None:
    shape = (1024, 1024)
    (first, *_, last) = list(ray_stream.assign_to_ranks(run_of(0, 100, 1, shape), spec(1), 1))
    assert len(first) == ROW_BYTES // (2 * 1024 * 1024 * 3)
    assert 0 < len(last) <= len(first)


GIB = 2**30


@pytest.mark.parametrize(
    ("store_bytes", "cpus", "world_size", "expected"),
    [
        # A window of 128 images of 640 x 1024 pixels is 240 MiB.
        (20 * GIB, 16, 4, InFlight()),
        (GIB, 16, 1, InFlight(96 * 2**20, tasks=2)),
        (2 * GIB, 16, 1, InFlight(tasks=5)),
        (2 * GIB, 4, 1, InFlight()),
        (GIB // 2, 2, 1, InFlight(48 * 2**20, tasks=1)),
    ],
)
def test_rows_and_tasks_are_limited_by_the_object_store(
    store_bytes: int, cpus: int, world_size: int, expected: InFlight
) -> None:
    assert bound_concurrency(spec(4), world_size, store_bytes, cpus) == expected


@pytest.mark.parametrize("world_size", [1, 8, 100])
@pytest.mark.parametrize("store_bytes", [GIB // 4, GIB, 7 * GIB, 100 * GIB])
def test_rows_and_waiting_windows_stay_below_the_size_at_which_ray_spills(
    world_size: int, store_bytes: int
) -> None:
    limits = bound_concurrency(spec(4), world_size, store_bytes, 10**9)
    assert limits.tasks is not None
    rows = 4 * world_size * limits.row_bytes
    assert rows + (limits.tasks - 1) * 4 * 32 * 640 * 1024 * 3 < 0.8 * store_bytes
