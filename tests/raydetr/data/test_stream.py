"""How micro-batches are dealt out to workers: over whole epochs of many layouts, without Ray."""

import itertools

import pytest

from detr.augment import AugmentSpec
from raydetr.data import stream
from raydetr.data.plan import MicroBatch, PlanSpec


def spec(micro_batches: int, batch: int = 2) -> PlanSpec:
    return PlanSpec(seed=0, micro_batch_size=batch, micro_batches=micro_batches, augmentation=AugmentSpec())


def run_of(first: int, last: int, per_step: int, shape: tuple[int, int] = (64, 64)) -> list[MicroBatch]:
    return [MicroBatch(n // per_step, n % per_step, 0, 0, (), shape) for n in range(first, last)]


@pytest.mark.parametrize(("world_size", "per_step"), [(w, m) for m in (1, 2, 5, 8) for w in range(1, m + 1)])
@pytest.mark.parametrize("row_bytes", [1, 5 * 2 * 64 * 64 * 3, 10**9])
def test_every_rank_finds_its_micro_batches_of_each_step_in_order(
    world_size: int, per_step: int, row_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "ROW_BYTES", row_bytes)
    steps = 7
    for cuts in itertools.combinations(range(0, steps * per_step, 3), 2):
        bounds = sorted({0, *cuts, steps * per_step})
        windows = [run_of(first, last, per_step) for first, last in itertools.pairwise(bounds)]
        rows = [row for window in windows for row in stream.deal(window, spec(per_step), world_size)]
        share = -(-per_step // world_size)
        for rank in range(world_size):
            got = [(b.step, b.position) for row in rows[rank::world_size] for b in row]
            wanted = [(s, p) for s in range(steps) for p in range(rank, share * world_size, world_size)]
            assert got == wanted
        assert all(b.window == -1 and not b.slots for row in rows for b in row if b.position >= per_step)


def test_a_row_holds_steps_up_to_its_size() -> None:
    shape = (1024, 1024)
    (first, *_, last) = list(stream.deal(run_of(0, 100, 1, shape), spec(1), 1))
    assert len(first) == stream.ROW_BYTES // (2 * 1024 * 1024 * 3)
    assert 0 < len(last) <= len(first)
