"""Ingest COCO JSON and images into shards with Ray Data.

The driver reads the JSON and the sizes of the image files, and decides from these alone which record goes into which
shard. One task per shard then reads the images, checks them and writes the shard. So the result depends only on the
input, the seed and the settings. The driver holds neither images nor annotations in memory: the annotations are in
tables on its disk (see `index`), so it needs the same memory for any number of images.

Until the manifest is written, the folder `.ingest/` next to the shards lists the content of each shard and the faults
of each finished one. An interrupted ingest resumes from these files.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain

from raydetr import cluster, storage
from raydetr.config import FaultPolicy, require_share
from raydetr.data.fault_codes import Fault
from raydetr.data.ingest.box_statistics import BoxStatistics
from raydetr.data.ingest.console import fault_lines
from raydetr.data.ingest.index import disk_errors
from raydetr.data.ingest.inputs import InputPaths, Inputs, are_known_categories, read_inputs
from raydetr.data.ingest.record import DEFAULT_READING, Reading
from raydetr.data.ingest.shard_tasks import (
    WORK,
    ShardResult,
    read_shard_faults,
    record_order,
    run_tasks,
    write_checked,
    write_task_inputs,
)
from raydetr.data.ingest.shard_writer import write_manifest
from raydetr.data.ingest.split import Split, find_near_duplicates, split_images
from raydetr.data.shards import (
    FAULTS,
    MANIFEST,
    Manifest,
    read_faults,
    read_image_hashes,
)
from raydetr.data.usable import CROWDS_REMEDY, Usable, require_usable
from raydetr.errors import ConfigError, DataError
from raydetr.lease import WAIT_S, Held, lease

_SOURCE = "source.json"
_OWN_FILES = re.compile(rf"(shard-\d{{6,}}\.parquet|{re.escape(FAULTS)})(\.[0-9a-f]{{32}}\.partial)?")
_PARTIAL = re.compile(rf"(shard-\d{{6,}}\.parquet|{re.escape(FAULTS)}|{MANIFEST})\.[0-9a-f]{{32}}\.partial")


@dataclass(frozen=True)
class Options:
    """How to ingest.

    on_fault: keep: mark and report faults. skip-image: skip images that have a fault or an object with one, unless it
        was repaired. fail: stop at the first fault.
    seed: seed of the record order.
    shard_bytes: a shard is closed when its image files reach this number of bytes.
    append: add the images to an existing data set, as new shards.
    check_duplicates_against: URIs of shards that should have no image in common with these, such as the training set.
    max_fault_share: maximum share of images, and of objects, that may be unusable for training, 0 to 1.
    reading: how records are read.
    """

    on_fault: FaultPolicy = "keep"
    seed: int = 0
    shard_bytes: int = 128 * 1024 * 1024
    append: bool = False
    check_duplicates_against: tuple[str, ...] = ()
    max_fault_share: float = 0.2
    reading: Reading = DEFAULT_READING

    def load_compared(self) -> list[Manifest]:
        """Load the manifests of `check_duplicates_against`.

        Raises:
            DataError: one of them does not exist.
        """
        return [Manifest.load(storage.absolute(uri)) for uri in self.check_duplicates_against]

    def __post_init__(self) -> None:
        if self.shard_bytes < 1:
            raise ConfigError(f"--shard-bytes is {self.shard_bytes}; expected a positive number of bytes.")
        require_share(self.max_fault_share)


@dataclass(frozen=True)
class IngestResult:
    """The result of an ingest."""

    manifest: Manifest
    written: bool
    """False if the output was already complete and nothing was written."""
    num_images_skipped: int
    """Number of images skipped by on_fault="skip-image"."""


def ingest(
    paths: InputPaths,
    output: str,
    options: Options | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> IngestResult:
    """Write a COCO data set as shards with a manifest, unless the output is already complete.

    Connects to Ray if there is work to do, with 1 CPU: a job that needs more CPUs has to connect first. The same input,
    seed, shard size and policy give the same bytes in every file of the output, for any number of CPUs and also after
    interruptions.

    Args:
        paths: URIs of the input.
        output: URI of the folder to write.
        options: settings.
        progress: called with (images done, total images).

    Raises:
        ConfigError: the URIs of the input cannot be combined.
        StorageError: a file cannot be read or written.
        DataError: a JSON is not COCO, the images are not in the folder, the output holds other data or already has
            images that are to be appended, too much cannot be trained on, or on_fault stops the ingest.
    """
    options = options or Options()
    return _ingest(read_inputs(paths), output, options, "", progress, others=options.load_compared())


def ingest_split(
    paths: InputPaths,
    output: str,
    split: Split,
    options: Options | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, IngestResult]:
    """Like `ingest`, but split into the parts `output`/train, `output`/val and, with three fractions, `output`/test.

    Near-duplicate images in two parts are reported in the fault table of the later part.
    """
    inputs = read_inputs(paths)
    with disk_errors():
        parts = list(split_images(inputs.index, split))
    options = options or Options()
    compared = options.load_compared()
    results: dict[str, IngestResult] = {}
    for name in parts:
        key = json.dumps([name, *asdict(split).values()])
        earlier = [result.manifest for result in results.values()]
        folder = storage.join(output, name)
        results[name] = _ingest(
            inputs, folder, options, name, progress, key, [*compared, *earlier], report_set_faults=not earlier
        )
    return results


def _ingest(
    inputs: Inputs,
    output: str,
    options: Options,
    part: str,
    progress: Callable[[int, int], None] | None,
    key: str = "",
    others: Sequence[Manifest] = (),
    report_set_faults: bool = True,
) -> IngestResult:
    """Write one part of the input.

    Args:
        inputs: the input.
        output: URI of the folder to write.
        options: settings.
        part: name of the part; empty: the whole input.
        progress: called with (images done, total images).
        key: fingerprint of the split and the part; empty without a split.
        others: data sets to check for near-duplicates.
        report_set_faults: whether this part reports the faults of the files as a whole. Only one part does.
    """
    output = storage.absolute(output)
    settings = [options.on_fault, options.seed, options.shard_bytes, key, options.append]
    settings += sorted(other.digest for other in others if options.check_duplicates_against)
    if options.reading != DEFAULT_READING:
        settings.append(json.dumps(asdict(options.reading)))
    source = hashlib.sha256(json.dumps([inputs.digest, settings]).encode()).hexdigest()
    if finished := _find_finished(output, source, options):
        return finished
    if not options.append and not inputs.categories:
        raise DataError(
            f"{inputs.name}: 'categories' is empty: list the classes, even if no image has objects."
        )

    def set_faults() -> Iterator[Fault]:
        return inputs.index.faults() if report_set_faults else iter(())

    _check_policy(set_faults(), options.on_fault)
    with lease(output, wait_s=WAIT_S) as held:
        if finished := _find_finished(output, source, options):  # written by the process that held the lease
            return finished
        return _write(inputs, output, options, part, progress, source, others, set_faults, held)


def _find_finished(output: str, source: str, options: Options) -> IngestResult | None:
    """Return the result of a finished ingest of this input; None if there is work to do.

    Raises:
        DataError: the output holds other data, or has nothing to append to.
    """
    if storage.exists(storage.join(output, MANIFEST)):
        base = Manifest.load(output)
        if base.source == source or not options.append:
            return _check_finished(base, source)
    elif options.append:
        raise DataError(f"{output}: no {MANIFEST}: there is nothing to append to: remove --append.")
    return None


def _write(
    inputs: Inputs,
    output: str,
    options: Options,
    part: str,
    progress: Callable[[int, int], None] | None,
    source: str,
    others: Sequence[Manifest],
    set_faults: Callable[[], Iterator[Fault]],
    held: Held,
) -> IngestResult:
    """Write the shards of an input and then, if the lease is still held and all shards exist, their manifest."""
    base = Manifest.load(output) if options.append else None
    categories = inputs.categories
    if base:
        _check_appended(base, inputs, part)
        categories = base.categories
    _prepare(output, source, base)
    cluster.connect(cpus=1)
    for folder in inputs.paths.folders:
        cluster.require_shared(images=folder)
    if inputs.paths.panoptic_masks:
        cluster.require_shared(panoptic_masks=inputs.paths.panoptic_masks)
    cluster.require_shared(output=output)
    work = partial(
        write_checked,
        images=tuple(inputs.paths.folders),
        masks=inputs.paths.panoptic_masks,
        output=output,
        category_ids=frozenset(category["id"] for category in categories),
        class_map=inputs.class_map,
        skip=options.on_fault == "skip-image",
        reading=options.reading,
        held=held,
    )
    first = 1 + max((int(shard.file[6:-8]) for shard in base.shards), default=-1) if base else 0
    with disk_errors():
        texts = inputs.index.texts(part, record_order(options.seed))
        numbers = write_task_inputs(output, texts, options.shard_bytes, first)
        num_images = inputs.index.count(part)
    results: dict[int, ShardResult] = {}
    done = 0
    for number, result in run_tasks(work, numbers):
        if result.error is not None:
            raise result.error
        _check_policy(result.faults, options.on_fault)
        results[number] = replace(result, faults=[])
        done += result.num_images
        if progress is not None:
            progress(done, num_images)
    ordered = [results[number] for number in numbers]
    summaries = [result.summary for result in ordered if result.summary is not None]
    if not summaries:
        raise DataError(f"{inputs.name}: every image has a fault, so --on-fault skip-image leaves none.")
    file = inputs.name.rsplit("/", 1)[-1]
    usable = sum((result.usable for result in ordered), Usable()).with_orphans(set_faults())
    faults = chain(set_faults(), read_shard_faults(output, numbers))
    require_usable(inputs.name, usable, options.max_fault_share, faults)
    boxes = sum((result.boxes for result in ordered), BoxStatistics())
    suspected = list(boxes.format_faults(file))
    if usable.crowds >= max(usable.objects / 2, 1):
        reason = f"{usable.crowds:,} of {usable.objects:,} objects: {CROWDS_REMEDY}"
        suspected.append(Fault("crowds", file, None, None, reason))
    shards = [summary.shard for summary in summaries]
    suspected += [fault for other in others for fault in find_near_duplicates(output, shards, other)]
    _check_policy(suspected, options.on_fault)
    _check_written(output, ordered, num_images)
    held.verify()
    earlier = read_faults(storage.join(output, WORK)) if base else iter(())
    manifest = write_manifest(
        output,
        summaries,
        categories,
        chain(earlier, set_faults(), suspected, read_shard_faults(output, numbers)),
        seed=options.seed,
        source=source,
        base=base,
    )
    storage.delete_folder(storage.join(output, WORK))
    skipped = num_images + (base.num_images if base else 0) - manifest.num_images
    return IngestResult(manifest, True, skipped)


def _check_written(output: str, results: Sequence[ShardResult], num_images: int) -> None:
    """Check that every image was read exactly once and that every shard has the size that was written.

    Raises:
        DataError: the number of images or the size of a shard is wrong.
    """
    read = sum(result.num_images for result in results)
    shards = [result.summary.shard for result in results if result.summary is not None]
    present = storage.file_sizes(output, [shard.file for shard in shards])
    wrong = [shard.file for shard in shards if present.get(shard.file) != shard.num_bytes]
    if read != num_images or wrong:
        raise DataError(
            f"{output}: {read} of {num_images} images were read, and {len(wrong)} shards have changed since they were "
            f"written {wrong[:3]}: another process has modified the folder. Rerun the command."
        )


def _prepare(output: str, source: str, base: Manifest | None) -> None:
    """Prepare the output folder for this input.

    Files of an interrupted ingest of the same input stay, so that it can be resumed. Files of an interrupted ingest of
    any other input are deleted. Before an append, the fault table is copied to `.ingest/`, because the append replaces
    it.
    """
    marker = storage.join(output, WORK, _SOURCE)
    retained = {shard.file for shard in base.shards} | {FAULTS} if base else set()
    resuming = storage.exists(marker) and storage.read_json(marker).get("source") == source
    for name in storage.list_names(output):
        own = _PARTIAL.fullmatch(name) if resuming else _OWN_FILES.fullmatch(name) or _PARTIAL.fullmatch(name)
        if own and name not in retained:
            storage.delete_file(storage.join(output, name))
    if not resuming:
        storage.delete_folder(storage.join(output, WORK))
        if base:
            table = storage.read_bytes(storage.join(output, FAULTS))
            storage.write_bytes(storage.join(output, WORK, FAULTS), table)
        storage.write_json(marker, {"source": source})


def _check_finished(manifest: Manifest, source: str) -> IngestResult:
    """Check that a finished ingest is one of this input and that its files are complete, and return its result.

    Raises:
        DataError: it is one of another input, or a file is missing or has the wrong size.
    """
    output = manifest.root
    if manifest.source != source:
        raise DataError(
            f"{output}: holds shards of another input or of other flags: choose another --output, delete this one, or "
            "add to it with --append."
        )
    present = storage.file_sizes(output, [shard.file for shard in manifest.shards])
    for shard in manifest.shards:
        if present.get(shard.file) != shard.num_bytes:
            raise DataError(
                f"{output}: {shard.file} has {present.get(shard.file, 0)} bytes instead of {shard.num_bytes}: "
                "delete the folder and rerun the ingest."
            )
    if not storage.exists(storage.join(output, FAULTS)):
        raise DataError(f"{output}: {FAULTS} is missing: delete the folder and rerun the ingest.")
    storage.delete_folder(storage.join(output, WORK))
    return IngestResult(manifest, False, 0)


def _check_appended(base: Manifest, inputs: Inputs, part: str) -> None:
    if not are_known_categories(inputs.categories, base.categories):
        raise DataError(
            f"{base.root}: its categories differ from those of {inputs.name}: --append requires categories that the data set has (see "
            "--classes)."
        )
    repeated: list[int] = []
    highest = 0
    collide = False
    for shard in base.shards:
        for image_id, file, _ in read_image_hashes(base.root, shard):
            highest = max(highest, image_id)
            name = inputs.index.name_of(image_id, part)
            collide |= name is not None
            if name == file:
                repeated.append(image_id)
    if collide and not repeated:  # different images with the same ids
        inputs.index.shift_images(highest, inputs.name.rsplit("/", 1)[-1])
    if repeated:
        raise DataError(
            f"{base.root}: already has {len(repeated)} of the images to append, such as image ids "
            f"{sorted(repeated)[:5]}: append only new images."
        )


def _check_policy(faults: Iterable[Fault], on_fault: FaultPolicy) -> None:
    if on_fault == "fail" and (lines := fault_lines(fault for fault in faults if not fault.is_note)):
        raise DataError("--on-fault fail:\n" + "\n".join(lines))
