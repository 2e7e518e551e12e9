"""A job that only streams data, to count the micro-batches that were decoded on their consumer's node and elsewhere.

    ray job submit -- python tests/cluster/locality_probe.py TRAIN_DATA STEPS OUTPUT

Two workers, one per node, each write OUTPUT/RANK.json: their node, and the number of batches by node of origin.
"""

import collections
import sys
import time
from typing import Any

import ray
import ray.train
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from detr.image_processing.augment_spec import AugmentSpec
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
    """Count the batches of this worker by the node that decoded them."""
    context = ray.train.get_context()
    own_node = ray.get_runtime_context().get_node_id()
    counts: collections.Counter[str] = collections.Counter()
    shard = ray.train.get_dataset_shard("train")
    for batches in ray_stream.steps(shard, SPEC.micro_batch_size, SPEC.micro_batches // WORKERS):
        counts.update(batch.node for batch in batches)
        time.sleep(0.02)  # about the time of a step of a small model
    result = {"node": own_node, "batches": dict(counts)}
    storage.write_json(storage.join(config["output"], f"{context.get_world_rank()}.json"), result)


def main(train_data: str, steps: int, output: str) -> None:
    cluster.connect(WORKERS + 1)
    manifest = Manifest.load(train_data)
    stream = ray_stream.Stream(
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
        datasets={"train": stream},  # type: ignore[dict-item]
        dataset_config=ray_stream.PlanDataConfig(),
    )
    trainer.fit()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
