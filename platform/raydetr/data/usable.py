"""Check that enough of a data set can be trained on; shared by ingest, training and doctor."""

from collections.abc import Iterable
from dataclasses import astuple, dataclass

from raydetr.data.fault_codes import FAULTS, Fault, is_trained
from raydetr.data.ingest.console import count_faults, fault_lines
from raydetr.data.schema import Record
from raydetr.data.shards import Manifest, is_target, read_faults, read_records
from raydetr.errors import DataError

CROWDS_REMEDY = (
    "if they are single objects (CVAT writes brush masks this way), ingest with --crowds-as-objects"
)
_COLUMNS = ["fault", "objects.list.element.iscrowd", "objects.list.element.fault"]
_EXCLUDING = {code for code, kind in FAULTS.items() if kind.effect in ("untrained", "left-out")}
_DUPLICATES = {"repeated-annotation", "duplicate-image-id"}
"""Codes of duplicates: the image or object is used once, so nothing is missing from training."""


@dataclass(frozen=True)
class Usable:
    """Counts of a data set or a part of it.

    unusable_images: images with a fault that excludes them from training.
    objects: objects of the usable images, and annotations that belong to no image.
    unusable_objects: those of `objects` that are crowds or have a fault that excludes them from training.
    crowds: those of `unusable_objects` that are crowds.
    lost_objects: objects of the unusable images.
    """

    images: int = 0
    unusable_images: int = 0
    objects: int = 0
    unusable_objects: int = 0
    crowds: int = 0
    lost_objects: int = 0

    def __add__(self, other: "Usable") -> "Usable":
        return Usable(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def add(self, record: Record) -> "Usable":
        """Return the counts with a record added."""
        objects = [o for o in record["objects"] or () if o.get("fault") not in _DUPLICATES]
        if not is_trained(record["fault"]):
            return self + Usable(images=1, unusable_images=1, lost_objects=len(objects))
        crowds = sum(bool(item["iscrowd"]) and is_trained(item.get("fault")) for item in objects)
        unusable = sum(not is_target(item) for item in objects)
        return self + Usable(1, 0, len(objects), unusable, crowds)

    def with_orphans(self, faults: Iterable[Fault]) -> "Usable":
        """Return the counts with the annotations added that belong to no image."""
        orphans = sum(fault.code == "unknown-image" for fault in faults)
        return self + Usable(objects=orphans, unusable_objects=orphans)

    @property
    def shares(self) -> tuple[float, float]:
        """The unusable shares of `images` and of `objects`, each 0 to 1."""
        return self.unusable_images / max(self.images, 1), self.unusable_objects / max(self.objects, 1)

    def text(self) -> str:
        """Describe in words how many images and objects are unusable."""
        images, objects = (f"{100 * share:.3g} %" for share in self.shares)
        words = f"{self.unusable_images:,} of {self.images:,} images ({images})"
        words += f" and {self.unusable_objects:,} of {self.objects:,} objects"
        if self.lost_objects:
            words += " of the remaining images"
        return f"{words} ({objects}{f', {self.crowds:,} crowds' if self.crowds else ''})"


def count_usable(manifest: Manifest) -> Usable:
    """Count over a folder of shards. The shards are read only if ingest found faults, and only their small columns."""
    excluding = {code for code in manifest.faults if code in _EXCLUDING - _DUPLICATES}
    if not excluding and manifest.max_objects_per_image and "crowds" not in manifest.faults:
        return Usable(manifest.num_images, 0, manifest.num_objects)
    usable = Usable()
    for record in read_records(manifest, _COLUMNS):
        usable = usable.add(record)
    orphans = manifest.faults.get("unknown-image", 0)
    return usable + Usable(objects=orphans, unusable_objects=orphans)


def require_usable(name: str, usable: Usable, max_share: float, faults: Iterable[Fault]) -> None:
    """Check that enough of a data set can be trained on.

    Args:
        name: name of the data set, for the message.
        usable: its counts.
        max_share: maximum share of images, and of objects, that may be unusable, 0 to 1.
        faults: its faults; read only for the message.

    Raises:
        DataError: more is unusable. The message has the reasons, what the unusable ones have in common, and the remedy.
    """
    if max(usable.shares) <= max_share:
        return
    lines = reasons(faults, usable)
    raise DataError(
        f"{name}: {usable.text()} cannot be trained on; --max-fault-share allows {100 * max_share:g} %.\n"
        + "\n".join([*lines, "To accept this, raise --max-fault-share."])
    )


def reasons(faults: Iterable[Fault], usable: Usable) -> list[str]:
    """List why images and objects are not trained on: a line per code with its count, then examples and remedies."""
    excluding = [fault for fault in faults if fault.code in _EXCLUDING - _DUPLICATES]
    lines = [f"  {line}" for line in fault_lines(excluding, table="")]
    if usable.crowds:
        what = "all of them are" if usable.crowds == usable.objects else f"{usable.crowds:,} objects are"
        lines.append(f"  {what} crowds (iscrowd 1), which are not trained on.")
    counts = count_faults(excluding)
    remedies = [
        f"  {code}: {FAULTS[code].remedy}{_common_folder(excluding, code)}."
        for code in sorted(counts, key=lambda code: -counts[code][0])[:3]
        if FAULTS[code].remedy
    ]
    if usable.crowds:
        remedies.append(f"  crowds: {CROWDS_REMEDY}.")
    return [*lines, "What to do:", *remedies] if remedies else lines


def trainable(manifest: Manifest, task: str) -> Usable:
    """Count what a task can train on, see `count_usable`. Panoptic tasks train on segments, which are not counted."""
    usable = count_usable(manifest)
    if task in ("detection", "instance"):
        return usable
    return Usable(usable.images, usable.unusable_images)


def require_trainable(name: str, manifest: Manifest, usable: Usable, task: str) -> None:
    """Check that a data set has at least one trainable image and, for detection and instance tasks, one such object.

    Args:
        name: name of the data set, for the message.
        manifest: its manifest.
        usable: its counts, from `trainable`.
        task: the training task.

    Raises:
        DataError: no image or no object can be trained on. The message has the reason.
    """
    missing = ""
    if usable.unusable_images == usable.images:
        missing = f"none of the {usable.images:,} images"
    elif task in ("detection", "instance") and usable.unusable_objects == usable.objects:
        missing = f"no object of the {usable.images - usable.unusable_images:,} images"
    if not missing:
        return
    lines = ["The images have no annotations."]
    if manifest.faults.keys() & _EXCLUDING or usable.crowds:
        lines = reasons(read_faults(manifest.root), usable)
    raise DataError("\n".join([f"{name}: {missing} can be trained on.", *lines]))


def _common_folder(faults: Iterable[Fault], code: str) -> str:
    """Name the folder that contains all images with a fault; empty if they are in several folders or in the root."""
    folders = {fault.file.rpartition("/")[0] for fault in faults if fault.code == code}
    return f" (all are in {folders.pop()}/)" if len(folders) == 1 and "" not in folders else ""
