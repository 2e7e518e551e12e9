"""A job that only streams: which micro-batches were decoded on their consumer's node, and which on another.

    ray job submit -- python tests/cluster/locality_probe.py TRAIN_DATA STEPS OUTPUT

Each of two workers, one a node, writes OUTPUT/RANK.json: its node and the number of batches by the node they come from.
"""

import collections
import sys
import time
from typing import Any

import ray
import ray.train
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from detr.image_processing.augment import AugmentSpec
from raydetr import cluster, storage
from raydetr.data.shards import Manifest
from raydetr.data.stream import ray_stream
from raydetr.data.stream.plan import PlanSpec
from raydetr.data.stream.source import shard_source

WORKERS = 2
SPEC = PlanSpec(
    seed=0,
    micro_batch_size=4,
    micro_batches=4,
    window_row_groups=1,
    augmentation=AugmentSpec(shortest_edges=(96, 128), longest_edge=160),
)


def first_step() -> int:
    return 0


def consume(config: dict[str, Any]) -> None:
    """Count the batches of this worker."""
    context = ray.train.get_context()
    own = ray.get_runtime_context().get_node_id()
    seen: collections.Counter[str] = collections.Counter()
    shard = ray.train.get_dataset_shard("train")
    for batches in ray_stream.steps(shard, SPEC.micro_batch_size, SPEC.micro_batches // WORKERS):
        seen.update(batch.node for batch in batches)
        time.sleep(0.02)  # about what a small model's step takes
    found = {"node": own, "batches": dict(seen)}
    storage.write_json(storage.join(config["output"], f"{context.get_world_rank()}.json"), found)


def main(train_data: str, steps: int, output: str) -> None:
    cluster.connect(WORKERS + 1)
    manifest = Manifest.load(train_data)
    job = ray_stream.Stream(
        source=shard_source(manifest),
        plan=ray_stream.build_plan(manifest, SPEC),
        last_step=steps,
        first_step=first_step,
    )
    trainer = TorchTrainer(
        consume,
        train_loop_config={"output": storage.absolute(output)},
        scaling_config=ScalingConfig(num_workers=WORKERS, placement_strategy="SPREAD"),
        run_config=RunConfig(name="locality", storage_path=storage.join(storage.absolute(output), "ray")),
        datasets={"train": job},  # type: ignore[dict-item]
        dataset_config=ray_stream.PlanDataConfig(),
    )
    trainer.fit()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
