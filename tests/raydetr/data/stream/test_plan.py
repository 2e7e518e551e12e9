"""The guarantees of the plan, checked over complete epochs of many layouts."""

import itertools

import numpy as np
import pytest

from detr.image_processing.augment_spec import AugmentSpec
from raydetr.data.stream.layout import Layout, Sizes, Window, Windows
from raydetr.data.stream.plan import MicroBatch, Plan, PlanSpec
from raydetr.errors import ConfigError
from tests.tiers import rest_slow

AUGMENTATION = AugmentSpec(
    shortest_edges=(96, 128), longest_edge=213, crop_shortest_edges=(64, 96), crop_sizes=(50, 96)
)
LAYOUTS = {
    "unequal shards": (100, 37, 1, 64, 129),
    "an empty shard in between": (40, 0, 33),
    "one record": (1,),
    "one full row group": (32,),
    "a prime number of records": (151,),
}
SPECS = {
    "B4 M4": (4, 4, 2),
    "B3 M5, not dividing 32": (3, 5, 1),
    "B8 M1": (8, 1, 3),
    "a step above the data": (16, 32, 8),
}


def make_plan(
    sizes: tuple[int, ...],
    spec: tuple[int, int, int],
    seed: int = 0,
    group_sizes: bool = False,
    repeats: np.ndarray | None = None,
) -> Plan:
    batch, micro_batches, window = spec
    return Plan(
        Layout(np.array(sizes), 32),
        PlanSpec(
            seed=seed,
            micro_batch_size=batch,
            micro_batches=micro_batches,
            augmentation=AUGMENTATION,
            window_row_groups=window,
            group_sizes=group_sizes,
        ),
        repeats,
    )


def read(plan: Plan, window: Window) -> Sizes:
    """Sizes of a window of a made-up data set: record i of the data set has id 3 i + 7, sizes vary."""
    first = sum(plan.layout.shard_sizes[: window.shard]) + window.row_groups[0] * 32
    number = np.arange(first, first + window.size)
    return Sizes(3 * number + 7, 60 + number * 37 % 200, 60 + number * 91 % 200)


def run(plan: Plan, first: int, last: int) -> list[MicroBatch]:
    def look_up(window: Window) -> Sizes:
        return read(plan, window)

    return [
        batch
        for task in plan.tasks(first, last, look_up)
        for batch in plan.run(task, look_up(plan.windows[task.window]))
    ]


@pytest.fixture(
    params=rest_slow(itertools.product(LAYOUTS, SPECS, (False, True)), fast=16),
    ids=lambda each: f"{each[0]}, {each[1]}{', grouped' * each[2]}",
)
def plan(request: pytest.FixtureRequest) -> Plan:
    layout, spec, grouped = request.param
    return make_plan(LAYOUTS[layout], SPECS[spec], group_sizes=grouped)


def test_every_record_occurs_exactly_once_per_epoch(plan: Plan) -> None:
    batches = run(plan, 0, 3 * plan.steps_per_epoch)
    expected = [3 * number + 7 for number in range(sum(plan.layout.shard_sizes))]
    for epoch in range(3):
        assert sorted(slot.image_id for b in batches if b.epoch == epoch for slot in b.slots) == expected


def test_steps_are_complete_and_in_order(plan: Plan) -> None:
    steps = 2 * plan.steps_per_epoch + 1
    places = [(batch.step, batch.position) for batch in run(plan, 0, steps)]
    assert places == list(itertools.product(range(steps), range(plan.spec.micro_batches)))


def test_no_step_spans_two_epochs(plan: Plan) -> None:
    for batch in run(plan, 0, 2 * plan.steps_per_epoch):
        assert batch.epoch == batch.step // plan.steps_per_epoch


def test_resuming_at_any_step_continues_exactly(plan: Plan) -> None:
    end = 2 * plan.steps_per_epoch + 2
    all_batches = run(plan, 0, end)
    for first in range(end):
        assert run(plan, first, end) == all_batches[first * plan.spec.micro_batches :]


def test_the_last_step_does_not_change_the_steps_before_it(plan: Plan) -> None:
    end = plan.steps_per_epoch + 2
    all_batches = run(plan, 0, end)
    for last in range(1, end):
        assert run(plan, 0, last) == all_batches[: last * plan.spec.micro_batches]


def test_all_micro_batches_of_a_step_have_the_smallest_shape_that_fits_their_images(plan: Plan) -> None:
    for _, group in itertools.groupby(run(plan, 0, 2 * plan.steps_per_epoch), key=lambda batch: batch.step):
        batches = list(group)
        (shape,) = {batch.shape for batch in batches}
        sizes = [slot.augmentation.output_size for batch in batches for slot in batch.slots]
        assert shape == tuple(-(-max(side) // 32) * 32 for side in zip(*sizes, strict=True))


def test_no_micro_batch_exceeds_the_micro_batch_size(plan: Plan) -> None:
    assert all(len(batch.slots) <= plan.spec.micro_batch_size for batch in run(plan, 0, plan.steps_per_epoch))


def test_empty_slots_occur_only_at_the_ends_of_windows(plan: Plan) -> None:
    batches = run(plan, 0, plan.steps_per_epoch)
    missing = sum(plan.spec.micro_batch_size - len(b.slots) for b in batches if b.window >= 0)
    assert missing <= len(plan.windows) * (plan.spec.micro_batch_size - 1)
    assert sum(batch.window < 0 for batch in batches) < plan.spec.micro_batches


def test_order_and_augmentation_depend_only_on_the_seed() -> None:
    first, again, other = (make_plan((200,), (4, 4, 1), seed) for seed in (1, 1, 2))
    assert run(first, 0, 20) == run(again, 0, 20)
    assert run(first, 0, 20) != run(other, 0, 20)


def test_epochs_differ_in_the_order_of_windows_and_of_their_records_and_in_augmentation() -> None:
    plan = make_plan((320,), (4, 4, 1))
    batches = run(plan, 0, 2 * plan.steps_per_epoch)
    epochs = [[b for b in batches if b.epoch == epoch and b.window >= 0] for epoch in (0, 1)]
    windows = [list(dict.fromkeys(batch.window for batch in epoch)) for epoch in epochs]
    assert windows[0] != windows[1]
    assert sorted(windows[0]) == sorted(windows[1])
    rows = [[slot.row for b in epoch if b.window == 0 for slot in b.slots] for epoch in epochs]
    assert rows[0] != rows[1]
    drawn = [{s.image_id: s.augmentation for b in epoch for s in b.slots} for epoch in epochs]
    assert sum(drawn[0][i] != drawn[1][i] for i in drawn[0]) > len(drawn[0]) / 2


def test_the_augmentation_of_a_record_depends_on_neither_window_nor_batch_size() -> None:
    def drawn(spec: tuple[int, int, int]) -> dict[int, object]:
        plan = make_plan((100, 60), spec)
        return {
            slot.image_id: slot.augmentation
            for batch in run(plan, 0, plan.steps_per_epoch)
            for slot in batch.slots
        }

    assert drawn((4, 4, 1)) == drawn((7, 3, 3))


def test_records_are_shuffled_between_and_within_windows() -> None:
    plan = make_plan((1000, 1000), (4, 4, 4))
    order = [slot.image_id for batch in run(plan, 0, plan.steps_per_epoch) for slot in batch.slots]
    assert abs(np.corrcoef(order, range(len(order)))[0, 1]) < 0.5


def test_a_data_set_without_records_is_refused() -> None:
    with pytest.raises(ConfigError, match="no records"):
        make_plan((0, 0), (4, 4, 1))


@pytest.mark.parametrize("field", ["micro_batch_size", "micro_batches", "window_row_groups", "size_multiple"])
def test_the_error_names_a_field_below_one(field: str) -> None:
    fields = {"seed": 0, "micro_batch_size": 1, "micro_batches": 1, "augmentation": AUGMENTATION}
    with pytest.raises(ConfigError, match=field.replace("_", "-")):
        PlanSpec(**{**fields, field: 0})


def test_a_plan_of_coco_size_resumes_without_reading_earlier_windows() -> None:
    plan = make_plan((1000,) * 118, (2, 16, 4))
    windows: list[Window] = []

    def look_up(window: Window) -> Sizes:
        windows.append(window)
        return read(plan, window)

    task = next(plan.tasks(123_456, 1_000_000, look_up))
    assert task.epoch == 123_456 // plan.steps_per_epoch
    assert len(windows) <= 3


@pytest.mark.parametrize("grouped", rest_slow([True, False]))
def test_records_occur_as_often_as_their_repeat_factors(grouped: bool) -> None:
    rng = np.random.default_rng(0)
    repeats = np.where(rng.random(331) < 0.7, 1.0, rng.uniform(1, 4, 331))
    plan = make_plan((100, 37, 1, 64, 129), (3, 5, 1), group_sizes=grouped, repeats=repeats)
    epochs = 40
    end = epochs * plan.steps_per_epoch
    batches = run(plan, 0, end)
    used = np.zeros((epochs, 331), dtype=int)
    for batch in batches:
        for slot in batch.slots:
            used[batch.epoch, (slot.image_id - 7) // 3] += 1
    # A window rounds the sum of its factors up to a whole number of slots, which is much for a window of one record.
    assert (used >= np.floor(repeats)).all()
    assert (used <= np.ceil(repeats)).all()
    assert np.quantile(np.abs(used.mean(axis=0) - repeats), 0.98) < 0.25
    assert abs(used.mean(axis=0).sum() - repeats.sum()) <= len(plan.windows)
    assert run(plan, 123, end) == batches[123 * 5 :]


def test_repetitions_of_a_record_within_an_epoch_get_different_augmentations() -> None:
    plan = make_plan((64,), (4, 4, 1), repeats=np.full(64, 3.0))
    drawn: dict[int, list[object]] = {}
    for batch in run(plan, 0, plan.steps_per_epoch):
        for slot in batch.slots:
            drawn.setdefault(slot.image_id, []).append(slot.augmentation)
    assert all(len(each) == 3 for each in drawn.values())
    assert sum(len(set(each)) > 1 for each in drawn.values()) > 60


def test_grouping_by_size_reduces_padding_and_does_not_change_the_augmentations() -> None:
    def padding(plan: Plan) -> float:
        batches = run(plan, 0, plan.steps_per_epoch)
        padded = sum(batch.shape[0] * batch.shape[1] * len(batch.slots) for batch in batches)
        images = [slot.augmentation.output_size for batch in batches for slot in batch.slots]
        return 1 - sum(height * width for height, width in images) / padded

    plain, grouped = (make_plan((512, 512), (4, 4, 4), group_sizes=each) for each in (False, True))
    assert padding(grouped) < 0.6 * padding(plain)
    drawn = [
        sorted(
            (s.image_id, s.augmentation.output_size) for b in run(p, 0, p.steps_per_epoch) for s in b.slots
        )
        for p in (plain, grouped)
    ]
    assert drawn[0] == drawn[1]


def test_explain_returns_the_images_of_any_step(plan: Plan) -> None:
    end = 2 * plan.steps_per_epoch
    all_batches = run(plan, 0, end)
    for step in {0, plan.steps_per_epoch - 1, end - 1}:
        explained = plan.explain(step, lambda window: read(plan, window))
        assert explained == [batch for batch in all_batches if batch.step == step]


def test_a_plan_of_a_billion_records_in_a_million_shards_starts_at_any_step() -> None:
    plan = make_plan((1000,) * 1_000_000, (2, 16, 4))

    def look_up(window: Window) -> Sizes:
        number = window.shard * 1000 + window.row_groups[0] * 32 + np.arange(window.size)
        return Sizes(number, 60 + number % 200, 60 + number % 91)

    for first in (0, 12_345_678, 40 * 10**6):
        tasks = list(plan.tasks(first, first + 20, look_up))
        batches = [batch for task in tasks for batch in plan.run(task, look_up(plan.windows[task.window]))]
        assert [(b.step, b.position) for b in batches] == list(
            itertools.product(range(first, first + 20), range(16))
        )


def test_windows_equal_those_of_a_simple_loop() -> None:
    layout = Layout(np.array([100, 0, 37, 1, 64, 129]), 32)
    windows = Windows(layout, 2)
    expected, before = [], 0
    for shard, size in enumerate(layout.shard_sizes.tolist()):
        groups = -(-size // 32)
        for start in range(0, groups, 2):
            stop = min(start + 2, groups)
            records = slice(before + start * 32, before + min(stop * 32, size))
            expected.append((Window(shard, (start, stop), records.stop - records.start), records))
        before += size
    assert [(windows[i], windows.records(i)) for i in range(len(windows))] == expected
    assert windows.sizes(np.arange(len(windows))).tolist() == [window.size for window, _ in expected]
    chosen = windows.of_shards(np.array([5, 1, 0])).tolist()
    assert [windows[i].shard for i in chosen] == [5, 5, 5, 0, 0]
