"""Ingest a COCO data set: check every record, report faults, write Parquet shards and a manifest.

On a cluster, to shared storage:
    ray job submit --working-dir . -- python pipelines/ingest.py \
        --annotations /shared/coco/annotations/instances_train2017.json --images /shared/coco/train2017 \
        --output /shared/shards/train

On one machine:
    python pipelines/ingest.py --annotations my/train.json --images my/images --output runs/data/my-train

Rerun the command to resume an interrupted ingest; a complete output is not changed. More options:
    --panoptic-annotations panoptic.json --panoptic-masks panoptic/     with or without --annotations
    --split 0.8,0.1,0.1 --group-by site         write folders train, val and test; no site is in two of them
    --append                                    add new images to the output, in new shards
    --annotations a.json b.json --images a b    several files, whose ids may overlap
    --classes classes.json                      merge, rename and drop classes: {"car": "vehicle", "dog": null}
"""

import time
from typing import Any

from raydetr.command import require_writable, run
from raydetr.config import IngestConfig
from raydetr.data.ingest.console import counts, print_faults, print_progress
from raydetr.data.ingest.ingest import IngestResult, Options, ingest, ingest_split
from raydetr.data.ingest.inputs import InputPaths
from raydetr.data.ingest.record import Reading
from raydetr.data.ingest.split import Split
from raydetr.reports.data_report import write_report


def main(config: IngestConfig) -> dict[str, Any]:
    """Ingest one data set; return a summary of its content."""
    start = time.monotonic()
    if config.report:
        require_writable(config.report, "--report")
    panoptic = config.panoptic_annotations, config.panoptic_masks
    paths = InputPaths.of(config.annotations, config.images, *panoptic, config.classes, config.follow_links)
    options = Options(
        *(config.on_fault, config.seed, config.shard_bytes, config.append, config.check_duplicates_against),
        max_fault_share=config.max_fault_share,
        reading=Reading(config.orientation, config.crowds_as_objects),
    )
    progress = print_progress("ingest")
    if config.split:
        split = Split(config.fractions, config.group_by, config.seed)
        results = ingest_split(paths, config.output, split, options, progress)
        parts = {name: summarize(result) for name, result in results.items()}
        report(config, results["train"])
        return {"output": config.output, **parts, "seconds": round(time.monotonic() - start, 1)}
    result = ingest(paths, config.output, options, progress)
    seconds = time.monotonic() - start
    summary = summarize(result)
    report(config, result)
    return {
        **summary,
        "output": config.output,
        "seconds": round(seconds, 1),
        "images per second": round(result.manifest.num_images / seconds, 1) if result.written else 0.0,
    }


def report(config: IngestConfig, result: IngestResult) -> None:
    """Write the data report to --report, if given."""
    if config.report:
        write_report(result.manifest, config.report, config.num_queries)
        print(f"report: {config.report}")


def summarize(result: IngestResult) -> dict[str, Any]:
    """Print the faults of a data set; return the counts of its content."""
    manifest = result.manifest
    if not result.written:
        print(f"{manifest.root} is complete and was made from the same input: nothing to do.")
    print_faults(manifest)
    return counts(manifest) | {"written": result.written, "images skipped": result.num_images_skipped}


if __name__ == "__main__":
    run(main, IngestConfig)
