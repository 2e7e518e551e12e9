"""Console output of an ingest: progress while it runs, faults when it is done."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from raydetr import storage
from raydetr.data.fault_codes import FAULTS, Fault
from raydetr.data.shards import FAULTS as FAULTS_FILE
from raydetr.data.shards import Manifest, read_faults

MAX_EXAMPLES = 3


def count_faults(faults: Iterable[Fault]) -> dict[str, tuple[int, list[Fault]]]:
    """Return code → number of faults and the first few of them, in order of severity."""
    counts: Counter[str] = Counter()
    examples: dict[str, list[Fault]] = {}
    for fault in faults:
        counts[fault.code] += 1
        if counts[fault.code] <= MAX_EXAMPLES:
            examples.setdefault(fault.code, []).append(fault)
    return {code: (counts[code], examples[code]) for code in FAULTS if code in counts}


def fault_lines(faults: Iterable[Fault], table: str = " in faults.parquet") -> list[str]:
    """Summarize faults: a line for each code with its count and effect, followed by its first examples.

    An example shows the file, the image or annotation, and what was found.

    Args:
        faults: all faults.
        table: where to find the faults that are not shown.
    """
    lines = []
    for code, (count, examples) in count_faults(faults).items():
        kind = FAULTS[code]
        lines.append(f"{code}: {count:,} ({kind.text}; {kind.effect})")
        lines += [f"    {place(fault)}: {fault.reason}" for fault in examples]
        if count > len(examples):
            lines.append(f"    … and {count - len(examples):,} more{table}")
    return lines


def print_faults(manifest: Manifest) -> None:
    """Print a summary of a data set's faults, if it has any."""
    if lines := fault_lines(read_faults(manifest.root)):
        print(f"\nfaults and notes of {manifest.root}", *lines, sep="\n  ", flush=True)


def counts(manifest: Manifest) -> dict[str, Any]:
    """Return the counts of a data set for a summary."""
    return {
        "output": manifest.root,
        "images": manifest.num_images,
        "objects": manifest.num_objects,
        "images with a fault": manifest.num_faulty_images,
        "objects with a fault": manifest.num_faulty_objects,
        "categories": len(manifest.categories),
        "shards": len(manifest.shards),
        "megabytes": round(sum(shard.num_bytes for shard in manifest.shards) / 1e6, 1),
        "faults": manifest.faults,
        "fault table": storage.join(manifest.root, FAULTS_FILE),
        "digest": manifest.digest,
        "parent": manifest.parent,
    }


def print_progress(what: str) -> Callable[[int, int], None]:
    """Create a function of (done, total) that prints the rate and the remaining time, at most once a second.

    The rate is measured from the first call, which excludes the start of the workers. The last line has the rate over
    the whole time.
    """
    start = time.monotonic()
    first: tuple[float, int] | None = None
    printed = start - 1

    def show(done: int, total: int) -> None:
        nonlocal first, printed
        now = time.monotonic()
        first = first or (now, done)
        if now - printed < 1 and done < total:
            return
        printed = now
        line = f"{what}: {done:,} of {total:,} images"
        if done == total:
            line += f", {done / max(now - start, 1e-9):,.0f} images/s"
        elif done > first[1]:
            rate = (done - first[1]) / max(now - first[0], 1e-9)
            line += f", {rate:,.0f} images/s, {(total - done) / rate:.0f} s left"
        print(line, flush=True)

    return show


def place(fault: Fault) -> str:
    """Describe the file, image and annotation of a fault in words."""
    words = fault.file
    if fault.image_id is not None:
        words += f", image {fault.image_id}"
    if fault.annotation_id is not None:
        words += f", annotation {fault.annotation_id}"
    return words
