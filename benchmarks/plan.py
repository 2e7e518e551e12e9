"""Measure the plan of an epoch at COCO's size: seconds, share of padding, number of padded shapes.

    python benchmarks/plan.py

The 118,287 records, in shards of 780 (128 MB each), have image sizes drawn at random from those of coco128.
"""

import json
import time

import numpy as np
from shards_of_coco128 import SOURCE

from detr.image_processing.augment_spec import AugmentSpec
from raydetr.data.stream.layout import Layout, Sizes, Window
from raydetr.data.stream.plan import Plan, PlanSpec

RECORDS, SHARD = 118_287, 780


def main() -> None:
    """Print the table."""
    content = json.loads((SOURCE / "annotations" / "instances_train2017.json").read_text())
    known = np.array([(image["height"], image["width"]) for image in content["images"]])
    drawn = known[np.random.default_rng(0).integers(len(known), size=RECORDS)]
    layout = Layout(np.array([SHARD] * (RECORDS // SHARD) + [RECORDS % SHARD]), 32)

    def look_up(window: Window) -> Sizes:
        first = window.shard * SHARD + window.row_groups[0] * 32
        rows = np.arange(first, first + window.size)
        return Sizes(rows, drawn[rows, 0], drawn[rows, 1])

    print("| B x M | window | grouped | multiple | plan of an epoch, s | padding | shapes | empty slots |")
    print("|---|---|---|---|---|---|---|---|")
    for batch, micro_batches in ((2, 8), (2, 32), (8, 8)):
        for row_groups, grouped, multiple in (
            (4, False, 32),
            (4, True, 32),
            (4, True, 64),
            (4, True, 128),
            (16, False, 32),
            (16, True, 32),
            (16, True, 64),
            (16, True, 128),
        ):
            spec = PlanSpec(
                seed=0,
                micro_batch_size=batch,
                micro_batches=micro_batches,
                augmentation=AugmentSpec(),
                window_row_groups=row_groups,
                group_sizes=grouped,
                size_multiple=multiple,
            )
            plan = Plan(layout, spec)
            start = time.perf_counter()
            tasks = list(plan.tasks(0, plan.steps_per_epoch, look_up))
            seconds = time.perf_counter() - start
            shapes = np.array([shape for task in tasks for shape in task.shapes], dtype=np.int64)
            slots, pixels = 0, 0
            for task in tasks[::20]:
                for each in plan.run(task, look_up(plan.windows[task.window])):
                    slots += len(each.slots)
                    pixels += sum(np.prod(slot.augmentation.output_size) for slot in each.slots)
            padded = sum(
                each.shape[0] * each.shape[1] * len(each.slots)
                for task in tasks[::20]
                for each in plan.run(task, look_up(plan.windows[task.window]))
            )
            empty = 1 - RECORDS / (plan.steps_per_epoch * batch * micro_batches)
            print(
                f"| {batch} x {micro_batches} | {row_groups} | {grouped} | {multiple} | {seconds:.2f} "
                f"| {1 - pixels / padded:.3f} | {len(np.unique(shapes, axis=0))} | {empty:.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
