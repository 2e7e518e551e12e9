"""Make shards of a COCO data set: check every record, report what is wrong, write Parquet and a manifest.

On a cluster, to shared storage:
    ray job submit --working-dir . -- python pipelines/ingest.py \
        --annotations /shared/coco/annotations/instances_train2017.json --images /shared/coco/train2017 \
        --output /shared/shards/train

On one machine:
    python pipelines/ingest.py --annotations my/train.json --images my/images --output runs/data/my-train

The same command again finds the output complete and changes nothing.
"""

import time
from typing import Any

from raydetr import storage
from raydetr.command import run
from raydetr.config import IngestConfig
from raydetr.data.ingest import ingest
from raydetr.data.report import fault_lines, print_progress
from raydetr.data.shards import FAULTS, read_faults


def main(config: IngestConfig) -> dict[str, Any]:
    """Ingest one data set; the summary counts what is in it."""
    start = time.monotonic()
    result = ingest(
        config.annotations,
        config.images,
        config.output,
        on_fault=config.on_fault,
        seed=config.seed,
        shard_bytes=config.shard_bytes,
        progress=print_progress("ingest"),
    )
    manifest, seconds = result.manifest, time.monotonic() - start
    if not result.written:
        print(f"{config.output} is complete and made from this input: nothing to do.")
    if lines := fault_lines(read_faults(manifest)):
        print("\nfaults", *lines, sep="\n  ")
    return {
        "output": config.output,
        "written": result.written,
        "images": manifest.num_images,
        "images skipped": result.num_images_skipped,
        "objects": manifest.num_objects,
        "images with a fault": manifest.num_faulty_images,
        "objects with a fault": manifest.num_faulty_objects,
        "categories": len(manifest.categories),
        "shards": len(manifest.shards),
        "megabytes": round(sum(shard.num_bytes for shard in manifest.shards) / 1e6, 1),
        "faults": manifest.faults,
        "fault table": storage.join(config.output, FAULTS),
        "digest": manifest.digest,
        "seconds": round(seconds, 1),
        "images per second": round(manifest.num_images / seconds, 1) if result.written else 0.0,
    }


if __name__ == "__main__":
    run(main, IngestConfig)
