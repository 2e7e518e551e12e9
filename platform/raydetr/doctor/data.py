"""Check that a data set matches its manifest, and that it fits the task and the model."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from raydetr import storage
from raydetr.data.fault_codes import FAULTS
from raydetr.data.ingest import shard_writer
from raydetr.data.shards import Manifest, read_faults
from raydetr.data.usable import reasons, require_trainable, require_usable, trainable
from raydetr.doctor.config import DoctorConfig
from raydetr.doctor.findings import Finding
from raydetr.doctor.shards import Contents
from raydetr.errors import DataError

_REINGEST = "copy the data again, or ingest again into another folder."
_FATAL_FAULTS = ("boxes-normalised", "boxes-as-corners")
_HIGH_SHARE = 0.05
"""Warn if a larger share of the objects or images is affected."""


def integrity(flag: str, manifest: Manifest, contents: Contents) -> Iterator[Finding]:
    """Check the digest of the manifest, and the files against the manifest."""
    expected = shard_writer._digest(manifest.categories, manifest.shards)
    if expected != manifest.digest:
        yield Finding(
            flag,
            "FAIL",
            f"{manifest.root}: the digest {manifest.digest[:12]}… does not match its categories and shards "
            f"({expected[:12]}…): manifest.json was changed after it was written.",
            _REINGEST,
        )
    if contents.problems:
        yield Finding(flag, "FAIL", f"{manifest.root}: {_join(contents.problems)}.", _REINGEST)
    if expected == manifest.digest and not contents.problems:
        yield Finding(
            flag,
            "ok",
            f"{manifest.num_images:,} images, {manifest.num_objects:,} objects, {len(manifest.categories)} categories; "
            f"digest {manifest.digest[:12]}…, no shard missing, {contents.shards} of {len(manifest.shards)} "
            "read completely.",
        )


def faults(config: DoctorConfig, manifest: Manifest) -> Iterator[Finding]:
    """Report the faults that ingest found, by the rules that training applies."""
    usable = trainable(manifest, config.run.task)
    counts = ", ".join(f"{code} {count:,}" for code, count in manifest.faults.items()) or "none"
    for code in _FATAL_FAULTS:
        if code in manifest.faults:
            yield Finding(
                "faults",
                "FAIL",
                f"{code}: {FAULTS[code].text}.",
                "write boxes in pixels as x, y, width, height, and ingest again.",
            )
    table = storage.join(manifest.root, "faults.parquet")
    try:
        require_trainable(manifest.root, manifest, usable, config.run.task)
        require_usable(
            manifest.root, usable, config.fault_tolerance.max_fault_share, read_faults(manifest.root)
        )
    except DataError as error:
        yield Finding("faults", "FAIL", str(error), f"check {table}, fix the annotations, and ingest again.")
        return
    text = f"{counts}; not trained on: {usable.text()}." if manifest.faults else "ingest found none."
    if max(usable.shares) > _HIGH_SHARE:
        example = next((line.strip() for line in reasons(read_faults(manifest.root), usable)[1:2]), "")
        text += f" For example: {example}." if example else ""
        yield Finding("faults", "warn", text, f"check {table}, fix the annotations, and ingest again.")
    else:
        yield Finding("faults", "ok", text)


def labels(manifest: Manifest, contents: Contents) -> Iterator[Finding]:
    """Compare the categories that objects use with those that the data set declares, and check the names."""
    declared = {category["id"]: category["name"] for category in manifest.categories}
    used = contents.categories + contents.segment_categories
    unknown = {category_id: count for category_id, count in used.items() if category_id not in declared}
    objects = sum(used.values())
    if unknown:
        text = (
            f"{sum(unknown.values()):,} of {objects:,} objects have undeclared category ids: {_join(sorted(unknown))}; "
            f"the declared ids are {_join(sorted(declared))}."
        )
        shift = next((by for by in (1, -1) if {each + by for each in used} <= declared.keys()), None)
        if shift:
            text += f" Adding {shift:+d} makes all of them valid: the labels are off by one."
        serious = shift is not None or sum(unknown.values()) > _HIGH_SHARE * objects or _unmarked(manifest)
        yield Finding(
            "labels",
            "FAIL" if serious else "warn",
            text,
            "use the same category ids in the categories and the annotations, and ingest again.",
        )
    yield from _names(manifest, used, complete=contents.images == manifest.num_images)
    if not unknown:
        yield Finding(
            "labels",
            "ok",
            f"{len(used)} of {len(declared)} categories are used, none is undeclared: "
            f"{_join([f'{name} {used[category_id]:,}' for category_id, name in declared.items()])}.",
        )


def is_trainable(manifest: Manifest, contents: Contents) -> bool:
    """Return whether training can read all categories.

    Training fails on the first object with an undeclared category that ingest did not mark as a fault.
    """
    used = contents.categories.keys() | contents.segment_categories.keys()
    return used <= manifest.labels.keys() or not _unmarked(manifest)


def queries(
    config: DoctorConfig, num_queries: int, manifest: Manifest, contents: Contents
) -> Iterator[Finding]:
    """Check that no image has more objects than the model has queries."""
    segments = config.run.task.startswith("panoptic")
    maximum, what = (
        (contents.max_segments, "segments") if segments else (manifest.max_objects_per_image, "objects")
    )
    # A quarter more queries than objects, at least 5 more.
    flag = f"--num-queries {maximum + max(5, maximum // 4)} or more"
    remedy = (
        f"start from another --model, or train a new one with {flag}."
        if config.model.model
        else f"give {flag}."
    )
    text = f"{num_queries} queries for images with at most {maximum} {what}"
    if maximum > num_queries:
        yield Finding("queries", "FAIL", f"{text}: too few.", remedy)
    elif maximum > 0.9 * num_queries:
        yield Finding("queries", "warn", f"{text}: no slack.", remedy)
    else:
        yield Finding("queries", "ok", f"{text}.")


def masks(config: DoctorConfig, flag: str, contents: Contents) -> Iterator[Finding]:
    """Check that the data have the masks that the task needs."""
    if config.run.task == "detection":
        return
    instance = config.run.task == "instance"
    present, of = (
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
    if not present:
        yield Finding(
            "masks", "FAIL", f"--task is {config.run.task}, but none of {of:,} {what} in --{flag}.", remedy
        )
    elif present < 0.5 * of:
        yield Finding("masks", "warn", f"only {present:,} of {of:,} {what} in --{flag}.", remedy)
    else:
        yield Finding("masks", "ok", f"{present:,} of {of:,} {what} in --{flag}.")


def validation_set(train: Manifest, val: Manifest) -> Iterator[Finding]:
    """Check that the two sets have different images and the same classes."""
    if val.digest == train.digest:
        yield Finding(
            "val-data",
            "warn",
            "the validation set is the training set: its metrics say nothing about new images.",
            "give another --val-data.",
        )
    missing = sorted(set(val.id2label.values()) - set(train.id2label.values()))
    if missing:
        yield Finding(
            "val-data",
            "FAIL",
            f"it has categories that the training set lacks: {_join(missing)}.",
            "use the same category names in both sets.",
        )


def _names(manifest: Manifest, used: Counter[int], complete: bool) -> Iterator[Finding]:
    names = Counter(manifest.id2label.values())
    wrong = sorted(str(name) for name, count in names.items() if count > 1 or not str(name).strip())
    if wrong:
        yield Finding(
            "labels",
            "FAIL" if max(names.values()) > 1 else "warn",
            f"category names that are empty or occur twice: {_join([repr(name) for name in wrong])}.",
            "give every category a unique name.",
        )
    unused = [category["name"] for category in manifest.categories if not used[category["id"]]]
    if unused and complete:
        yield Finding(
            "labels",
            "warn",
            f"no object has the categories {_join(unused)}: a shifted category list or a background class "
            "can cause this.",
            "check in batch.png that the names fit the objects, and remove categories without objects.",
        )


def _unmarked(manifest: Manifest) -> bool:
    return not {"unknown-category", "unknown-segment-category"} & manifest.faults.keys()


def _join(items: Sequence[Any], limit: int = 8) -> str:
    shown = ", ".join(str(item) for item in items[:limit])
    return f"{shown} and {len(items) - limit} more" if len(items) > limit else shown
