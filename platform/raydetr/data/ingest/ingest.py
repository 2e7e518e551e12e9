"""COCO JSON and images to shards, by Ray Data.

The driver reads the JSON and the sizes of the image files, and decides from them alone which record goes where;
one task a shard then reads the images, checks them and writes the shard. So the result is a function of the input
and the seed. The driver holds no image and no annotation, these are in tables on its disk (see `index`): it needs the
same memory for any number of images.

Beside the shards, until the manifest is there, `.ingest/` holds what each is made of and what was found in each
finished one: an ingest that was killed goes on from these.
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
from raydetr.data.ingest.box_statistics import BoxStatistics
from raydetr.data.ingest.console import fault_lines
from raydetr.data.ingest.index import disk_errors
from raydetr.data.ingest.inputs import Addresses, Inputs, read_inputs, same_categories
from raydetr.data.ingest.record import AS_USUAL, Reading
from raydetr.data.ingest.shard_tasks import (
    WORK,
    ShardResult,
    read_found,
    record_order,
    run,
    write_checked,
    write_work,
)
from raydetr.data.ingest.shard_writer import write_manifest
from raydetr.data.ingest.split import Split, near_duplicates_of, split_images
from raydetr.data.schema import Fault
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

    on_fault: keep marks and reports faults; skip-image leaves images out that have a fault or whose objects have
        one, repaired ones excepted; fail stops at the first.
    seed: of the order of the records.
    shard_bytes: size at which a shard is closed, in bytes of image files.
    append: add the images to a data set that is there, as new shards.
    check_duplicates_against: addresses of shards that must have no image in common with these, such as the training set's.
    max_fault_share: share of images, or of objects, that may be unusable for training.
    reading: how records are read.
    """

    on_fault: FaultPolicy = "keep"
    seed: int = 0
    shard_bytes: int = 128 * 1024 * 1024
    append: bool = False
    check_duplicates_against: tuple[str, ...] = ()
    max_fault_share: float = 0.2
    reading: Reading = AS_USUAL

    def compared(self) -> list[Manifest]:
        """The data sets of `check_duplicates_against`.

        Raises:
            DataError: one of them is not there.
        """
        return [Manifest.load(storage.absolute(address)) for address in self.check_duplicates_against]

    def __post_init__(self) -> None:
        if self.shard_bytes < 1:
            raise ConfigError(f"--shard-bytes is {self.shard_bytes}; expected a positive number of bytes.")
        require_share(self.max_fault_share)


@dataclass(frozen=True)
class IngestResult:
    """What an ingest made, or found made."""

    manifest: Manifest
    written: bool
    """False: the output was complete before, from the same input; nothing was written."""
    num_images_skipped: int
    """Images left out by on_fault="skip-image"."""


def ingest(
    addresses: Addresses,
    output: str,
    options: Options | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> IngestResult:
    """Write a COCO data set as shards with a manifest, unless the output holds them already.

    Connects to Ray when there is something to do (a job that needs more CPUs later has to connect before). The same
    input, seed, shard size and policy give the same bytes in every file of the output, whatever the number of CPUs
    and however often the ingest was ended and started again.

    Args:
        addresses: of what is read.
        output: address of the folder to write.
        options: how.
        progress: called with (images done, images in all).

    Raises:
        ConfigError: addresses that do not go together.
        StorageError: something cannot be read or written.
        DataError: a JSON is not COCO, the images are not in the folder, the output holds other data, images to
            append are there already, or on_fault stops the ingest.
    """
    options = options or Options()
    return _ingest(read_inputs(addresses), output, options, "", progress, others=options.compared())


def ingest_split(
    addresses: Addresses,
    output: str,
    split: Split,
    options: Options | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, IngestResult]:
    """As `ingest`, cut into parts: `output`/train, `output`/val and, with three fractions, `output`/test.

    Images that are nearly the same in an earlier part are reported in the fault table of the later one.
    """
    inputs = read_inputs(addresses)
    with disk_errors():
        parts = list(split_images(inputs.index, split))
    options = options or Options()
    compared = options.compared()
    results: dict[str, IngestResult] = {}
    for name in parts:
        key = json.dumps([name, *asdict(split).values()])
        earlier = [result.manifest for result in results.values()]
        folder = storage.join(output, name)
        results[name] = _ingest(
            inputs, folder, options, name, progress, key, [*compared, *earlier], tell=not earlier
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
    tell: bool = True,
) -> IngestResult:
    """Write one part of the input, whose key is `key`.

    `others` have no image to share with it; `tell`: the faults of the files as a whole are told with this part.
    """
    output = storage.absolute(output)
    settings = [options.on_fault, options.seed, options.shard_bytes, key, options.append]
    settings += sorted(other.digest for other in others if options.check_duplicates_against)
    if options.reading != AS_USUAL:
        settings.append(json.dumps(asdict(options.reading)))
    source = hashlib.sha256(json.dumps([inputs.digest, settings]).encode()).hexdigest()
    if finished := _find(output, source, options):
        return finished
    if not options.append and not inputs.categories:
        raise DataError(
            f"{inputs.name}: 'categories' is empty: list the classes, also of images without objects."
        )

    def set_faults() -> Iterator[Fault]:
        return inputs.index.faults() if tell else iter(())

    _check_policy(set_faults(), options.on_fault)
    with lease(output, wait_s=WAIT_S) as held:
        if finished := _find(output, source, options):  # written by the process that held the lease
            return finished
        return _write(inputs, output, options, part, progress, source, others, set_faults, held)


def _find(output: str, source: str, options: Options) -> IngestResult | None:
    """The result of an earlier ingest of this input; None where there is something to write.

    Raises:
        DataError: the output holds other data, or nothing to append to.
    """
    if storage.exists(storage.join(output, MANIFEST)):
        base = Manifest.load(output)
        if base.source == source or not options.append:
            return _finished(base, source)
    elif options.append:
        raise DataError(f"{output}: no {MANIFEST}, so nothing to append to: leave --append out.")
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
    """Write the shards of an input and, while the lease is held and everything is there, their manifest."""
    base = Manifest.load(output) if options.append else None
    categories = inputs.categories
    if base:
        _check_appended(base, inputs, part)
        categories = base.categories
    _prepare(output, source, base)
    cluster.connect(cpus=1)
    for folder in inputs.addresses.folders:
        cluster.require_shared(images=folder)
    if inputs.addresses.panoptic_masks:
        cluster.require_shared(panoptic_masks=inputs.addresses.panoptic_masks)
    cluster.require_shared(output=output)
    work = partial(
        write_checked,
        images=tuple(inputs.addresses.folders),
        masks=inputs.addresses.panoptic_masks,
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
        numbers = write_work(output, texts, options.shard_bytes, first)
        num_images = inputs.index.count(part)
    results: dict[int, ShardResult] = {}
    done = 0
    for number, result in run(work, numbers):
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
    usable = sum((result.usable for result in ordered), Usable()).with_lost(set_faults())
    found = chain(set_faults(), read_found(output, numbers))
    require_usable(inputs.name, usable, options.max_fault_share, found)
    boxes = sum((result.boxes for result in ordered), BoxStatistics())
    suspected = list(boxes.suspicions(file))
    if usable.crowds >= max(usable.objects / 2, 1):
        reason = f"{usable.crowds:,} of {usable.objects:,} objects: {CROWDS_REMEDY}"
        suspected.append(Fault("crowds", file, None, None, reason))
    shown = [summary.shard for summary in summaries]
    suspected += [fault for other in others for fault in near_duplicates_of(output, shown, other)]
    _check_policy(suspected, options.on_fault)
    _check_written(output, ordered, num_images)
    held.verify()
    earlier = read_faults(storage.join(output, WORK)) if base else iter(())
    manifest = write_manifest(
        output,
        summaries,
        categories,
        chain(earlier, set_faults(), suspected, read_found(output, numbers)),
        seed=options.seed,
        source=source,
        base=base,
    )
    storage.delete_folder(storage.join(output, WORK))
    skipped = num_images + (base.num_images if base else 0) - manifest.num_images
    return IngestResult(manifest, True, skipped)


def _check_written(output: str, results: Sequence[ShardResult], num_images: int) -> None:
    """Prove that every image was read once and that every shard is what was written.

    Raises:
        DataError: something is missing or was written twice.
    """
    read = sum(result.num_images for result in results)
    shards = [result.summary.shard for result in results if result.summary is not None]
    present = storage.file_sizes(output, [shard.file for shard in shards])
    wrong = [shard.file for shard in shards if present.get(shard.file) != shard.num_bytes]
    if read != num_images or wrong:
        raise DataError(
            f"{output}: {read} of {num_images} images were read, and {len(wrong)} shards are not as they were written "
            f"{wrong[:3]}: another process has changed the folder. Rerun the command."
        )


def _prepare(output: str, source: str, base: Manifest | None) -> None:
    """Make the output ready for this input: what an ingest of it left is kept, anything else that one left deleted.

    The fault table that an append goes on from is kept beside, since the append ends with another in its place.
    """
    begun = storage.join(output, WORK, _SOURCE)
    kept = {shard.file for shard in base.shards} | {FAULTS} if base else set()
    going_on = storage.exists(begun) and storage.read_json(begun).get("source") == source
    for name in storage.list_names(output):
        own = _PARTIAL.fullmatch(name) if going_on else _OWN_FILES.fullmatch(name) or _PARTIAL.fullmatch(name)
        if own and name not in kept:
            storage.delete_file(storage.join(output, name))
    if not going_on:
        storage.delete_folder(storage.join(output, WORK))
        if base:
            table = storage.read_bytes(storage.join(output, FAULTS))
            storage.write_bytes(storage.join(output, WORK, FAULTS), table)
        storage.write_json(begun, {"source": source})


def _finished(manifest: Manifest, source: str) -> IngestResult:
    """The result of an ingest that was completed before."""
    output = manifest.root
    if manifest.source != source:
        raise DataError(
            f"{output}: holds the shards of other input or of other flags: give another --output, delete it, or add "
            "to it with --append."
        )
    present = storage.file_sizes(output, [shard.file for shard in manifest.shards])
    for shard in manifest.shards:
        if present.get(shard.file) != shard.num_bytes:
            raise DataError(
                f"{output}: {shard.file} has {present.get(shard.file, 0)} bytes instead of {shard.num_bytes}: "
                "delete the folder and run the ingest again."
            )
    if not storage.exists(storage.join(output, FAULTS)):
        raise DataError(f"{output}: {FAULTS} is gone: delete the folder and run the ingest again.")
    storage.delete_folder(storage.join(output, WORK))
    return IngestResult(manifest, False, 0)


def _check_appended(base: Manifest, inputs: Inputs, part: str) -> None:
    if not same_categories(inputs.categories, base.categories):
        raise DataError(
            f"{base.root}: its categories are not those of {inputs.name}: --append needs the same list (see --classes)."
        )
    again: list[int] = []
    highest = 0
    collide = False
    for shard in base.shards:
        for image_id, file, _ in read_image_hashes(base.root, shard):
            highest = max(highest, image_id)
            name = inputs.index.name_of(image_id, part)
            collide |= name is not None
            if name == file:
                again.append(image_id)
    if collide and not again:  # other images, of a JSON that has ids of its own
        inputs.index.shift_images(highest, inputs.name.rsplit("/", 1)[-1])
    if again:
        raise DataError(
            f"{base.root}: has {len(again)} of the images to append already, such as image ids {sorted(again)[:5]}: "
            "give only new ones."
        )


def _check_policy(faults: Iterable[Fault], on_fault: FaultPolicy) -> None:
    if on_fault == "fail" and (lines := fault_lines(fault for fault in faults if not fault.is_note)):
        raise DataError("--on-fault fail:\n" + "\n".join(lines))
