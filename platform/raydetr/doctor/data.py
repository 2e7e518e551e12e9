"""Whether a data set is what its manifest says, and fits the model that is to learn it."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from raydetr import storage
from raydetr.data.ingest import shard_writer
from raydetr.data.schema import FAULTS
from raydetr.data.shards import Manifest, read_faults
from raydetr.data.usable import reasons, require_trainable, require_usable, trainable
from raydetr.doctor.config import DoctorConfig
from raydetr.doctor.findings import Finding
from raydetr.doctor.shards import Contents
from raydetr.errors import DataError

_INGEST_AGAIN = "copy the data again, or ingest it again into another folder."
_FATAL_FAULTS = ("boxes-normalised", "boxes-as-corners")
_MUCH = 0.05
"""Share of the objects or images that are left out, from which on it is worth a look."""


def integrity(flag: str, manifest: Manifest, contents: Contents) -> Iterator[Finding]:
    """The digest against the manifest, and the manifest against the files."""
    expected = shard_writer._digest(manifest.categories, manifest.shards)
    if expected != manifest.digest:
        yield Finding(
            flag,
            "FAIL",
            f"{manifest.root}: the digest {manifest.digest[:12]}… is not that of its categories and shards "
            f"({expected[:12]}…): manifest.json was changed after it was written.",
            _INGEST_AGAIN,
        )
    if contents.problems:
        yield Finding(flag, "FAIL", f"{manifest.root}: {_some(contents.problems)}.", _INGEST_AGAIN)
    if expected == manifest.digest and not contents.problems:
        yield Finding(
            flag,
            "ok",
            f"{manifest.num_images:,} images, {manifest.num_objects:,} objects, {len(manifest.categories)} categories; "
            f"digest {manifest.digest[:12]}…, no shard missing, {contents.shards} of {len(manifest.shards)} read whole.",
        )


def faults(config: DoctorConfig, manifest: Manifest) -> Iterator[Finding]:
    """What ingest found wrong, as far as it matters to training: judged as training does."""
    usable = trainable(manifest, config.task)
    counted = ", ".join(f"{code} {count:,}" for code, count in manifest.faults.items()) or "none"
    for code in _FATAL_FAULTS:
        if code in manifest.faults:
            yield Finding(
                "faults",
                "FAIL",
                f"{code}: {FAULTS[code].text}.",
                "write them in pixels as x, y, width, height, and ingest again.",
            )
    table = storage.join(manifest.root, "faults.parquet")
    try:
        require_trainable(manifest.root, manifest, usable, config.task)
        require_usable(manifest.root, usable, config.max_fault_share, read_faults(manifest.root))
    except DataError as error:
        yield Finding("faults", "FAIL", str(error), f"look into {table}, fix the annotations, ingest again.")
        return
    text = f"{counted}; not trained on: {usable.text()}." if manifest.faults else "ingest found none."
    if max(usable.shares) > _MUCH:
        example = next((line.strip() for line in reasons(read_faults(manifest.root), usable)[1:2]), "")
        text += f" Such as {example}." if example else ""
        yield Finding("faults", "warn", text, f"look into {table}, fix the annotations, ingest again.")
    else:
        yield Finding("faults", "ok", text)


def labels(manifest: Manifest, contents: Contents) -> Iterator[Finding]:
    """The categories that objects have against those that the data set declares; their names."""
    declared = {category["id"]: category["name"] for category in manifest.categories}
    used = contents.categories + contents.segment_categories
    unknown = {category_id: count for category_id, count in used.items() if category_id not in declared}
    objects = sum(used.values())
    if unknown:
        text = (
            f"{sum(unknown.values()):,} of {objects:,} objects have categories that are not declared: ids "
            f"{_some(sorted(unknown))}; declared are {_some(sorted(declared))}."
        )
        shift = next((by for by in (1, -1) if {each + by for each in used} <= declared.keys()), None)
        if shift:
            text += f" With {shift:+d} each would have one: the labels are off by one."
        serious = shift is not None or sum(unknown.values()) > _MUCH * objects or _unmarked(manifest)
        yield Finding(
            "labels",
            "FAIL" if serious else "warn",
            text,
            "number the categories as the annotations do, and ingest again.",
        )
    yield from _names(manifest, used, complete=contents.images == manifest.num_images)
    if not unknown:
        yield Finding(
            "labels",
            "ok",
            f"{len(used)} of {len(declared)} categories are used, none is unknown: "
            f"{_some([f'{name} {used[category_id]:,}' for category_id, name in declared.items()])}.",
        )


def is_trainable(manifest: Manifest, contents: Contents) -> bool:
    """Whether no object lacks its category unmarked by ingest: training would end on the first one."""
    used = contents.categories.keys() | contents.segment_categories.keys()
    return used <= manifest.labels.keys() or not _unmarked(manifest)


def queries(
    config: DoctorConfig, num_queries: int, manifest: Manifest, contents: Contents
) -> Iterator[Finding]:
    """The model can find one object a query."""
    segments = config.task.startswith("panoptic")
    most, what = (
        (contents.max_segments, "segments") if segments else (manifest.max_objects_per_image, "objects")
    )
    more = f"--num-queries {most + max(5, most // 4)} or so"
    remedy = (
        f"start from another --model, or train a new one with {more}." if config.model else f"give {more}."
    )
    text = f"{num_queries} for images of at most {most} {what}"
    if most > num_queries:
        yield Finding("queries", "FAIL", f"{text}: too few.", remedy)
    elif most > 0.9 * num_queries:
        yield Finding("queries", "warn", f"{text}: no slack.", remedy)
    else:
        yield Finding("queries", "ok", f"{text}.")


def masks(config: DoctorConfig, flag: str, contents: Contents) -> Iterator[Finding]:
    """The masks that the task learns from."""
    if config.task == "detection":
        return
    instance = config.task == "instance"
    there, of = (
        (contents.masks, sum(contents.categories.values()))
        if instance
        else (contents.panoptic, contents.images)
    )
    what = "objects have a mask" if instance else "images have a panoptic PNG"
    remedy = (
        "ingest annotations with a segmentation, or give --task detection."
        if instance
        else "ingest with --panoptic-annotations and --panoptic-masks, or give --task detection."
    )
    if not there:
        yield Finding(
            "masks", "FAIL", f"--task is {config.task}, but none of {of:,} {what} in --{flag}.", remedy
        )
    elif there < 0.5 * of:
        yield Finding("masks", "warn", f"only {there:,} of {of:,} {what} in --{flag}.", remedy)
    else:
        yield Finding("masks", "ok", f"{there:,} of {of:,} {what} in --{flag}.")


def validation_set(train: Manifest, val: Manifest) -> Iterator[Finding]:
    """Whether the two sets are different images of the same classes."""
    if val.digest == train.digest:
        yield Finding(
            "val-data",
            "warn",
            "the validation set is the training set: its figures say nothing.",
            "give another one.",
        )
    missing = sorted(set(val.id2label.values()) - set(train.id2label.values()))
    if missing:
        yield Finding(
            "val-data",
            "FAIL",
            f"it has categories that the training set lacks: {_some(missing)}.",
            "name the categories alike in both.",
        )


def _names(manifest: Manifest, used: Counter[int], complete: bool) -> Iterator[Finding]:
    names = Counter(manifest.id2label.values())
    wrong = sorted(str(name) for name, count in names.items() if count > 1 or not str(name).strip())
    if wrong:
        yield Finding(
            "labels",
            "FAIL" if max(names.values()) > 1 else "warn",
            f"category names that are empty or occur twice: {_some([repr(name) for name in wrong])}.",
            "give every category a name of its own.",
        )
    idle = [category["name"] for category in manifest.categories if not used[category["id"]]]
    if idle and complete:
        yield Finding(
            "labels",
            "warn",
            f"no object has the categories {_some(idle)}: a list that is shifted, or a background class, looks so too.",
            "see that each name is that of its objects (batch.png), and drop categories without any.",
        )


def _unmarked(manifest: Manifest) -> bool:
    return not {"unknown-category", "unknown-segment-category"} & manifest.faults.keys()


def _some(items: Sequence[Any], most: int = 8) -> str:
    shown = ", ".join(str(item) for item in items[:most])
    return f"{shown} and {len(items) - most} more" if len(items) > most else shown
