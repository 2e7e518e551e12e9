"""How much of a data set can be trained on, and whether that is enough: one judgment for ingest, training and doctor."""

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

from raydetr.data.ingest.console import count_faults, fault_lines
from raydetr.data.schema import FAULTS, Fault, is_trained
from raydetr.data.shards import Manifest, is_target, read_faults, read_records
from raydetr.errors import DataError

CROWDS_REMEDY = "where they are single objects (CVAT writes brush masks so), ingest with --crowds-as-objects"
_COLUMNS = ["fault", "objects.list.element.iscrowd", "objects.list.element.fault"]
_EXCLUDING = {code for code, kind in FAULTS.items() if kind.effect in ("untrained", "left-out")}
_NOTHING_LOST = {"repeated-annotation", "duplicate-image-id"}
"""Codes of what is there once more, and is used there."""


@dataclass(frozen=True)
class Usable:
    """Counts of a data set, or of a part of it.

    unusable_images: with a fault that keeps them out of training.
    objects: of the usable images, and those of no image.
    unusable_objects: of these, with a fault that keeps them out of training, or crowds.
    crowds: of these.
    lost_objects: of the unusable images.
    """

    images: int = 0
    unusable_images: int = 0
    objects: int = 0
    unusable_objects: int = 0
    crowds: int = 0
    lost_objects: int = 0

    def __add__(self, other: "Usable") -> "Usable":
        return Usable(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))

    def add(self, record: Mapping[str, Any]) -> "Usable":
        """With a record."""
        objects = [o for o in record["objects"] or () if o.get("fault") not in _NOTHING_LOST]
        if not is_trained(record["fault"]):
            return self + Usable(images=1, unusable_images=1, lost_objects=len(objects))
        crowds = sum(bool(item["iscrowd"]) and is_trained(item.get("fault")) for item in objects)
        unusable = sum(not is_target(item) for item in objects)
        return self + Usable(1, 0, len(objects), unusable, crowds)

    def with_lost(self, faults: Iterable[Fault]) -> "Usable":
        """With the objects that are part of no record."""
        lost = sum(fault.code == "unknown-image" for fault in faults)
        return self + Usable(objects=lost, unusable_objects=lost)

    @property
    def shares(self) -> tuple[float, float]:
        """Of the images, and of the objects of usable images, how much is unusable: 0 to 1."""
        return self.unusable_images / max(self.images, 1), self.unusable_objects / max(self.objects, 1)

    def text(self) -> str:
        """What is not trained on, in words."""
        images, objects = (f"{100 * share:.3g} %" for share in self.shares)
        words = f"{self.unusable_images:,} of {self.images:,} images ({images})"
        words += f" and {self.unusable_objects:,} of {self.objects:,} objects"
        if self.lost_objects:
            words += " of the others"
        return f"{words} ({objects}{f', {self.crowds:,} crowds' if self.crowds else ''})"


def count_usable(manifest: Manifest) -> Usable:
    """Count over a folder of shards; of the shards small columns are read, and those only where ingest found faults."""
    excluding = {code for code in manifest.faults if code in _EXCLUDING - _NOTHING_LOST}
    if not excluding and manifest.max_objects_per_image and "crowds" not in manifest.faults:
        return Usable(manifest.num_images, 0, manifest.num_objects)
    usable = Usable()
    for record in read_records(manifest, _COLUMNS):
        usable = usable.add(record)
    lost = manifest.faults.get("unknown-image", 0)
    return usable + Usable(objects=lost, unusable_objects=lost)


def require_usable(name: str, usable: Usable, max_share: float, faults: Iterable[Fault]) -> None:
    """Check that enough of a data set can be trained on.

    Args:
        name: of the data set, for the message.
        usable: counts of it.
        max_share: share of images or objects that may be unusable, 0 to 1.
        faults: of the data set; read only for the message.

    Raises:
        DataError: it is not, with what the unusable ones have in common and the remedy.
    """
    if max(usable.shares) <= max_share:
        return
    lines = reasons(faults, usable)
    raise DataError(
        f"{name}: {usable.text()} cannot be trained on; --max-fault-share allows {100 * max_share:g} %.\n"
        + "\n".join([*lines, "A higher --max-fault-share accepts it."])
    )


def reasons(faults: Iterable[Fault], usable: Usable) -> list[str]:
    """Lines on why something is not trained on: each code with its count, examples and remedy."""
    excluding = [fault for fault in faults if fault.code in _EXCLUDING - _NOTHING_LOST]
    lines = [f"  {line}" for line in fault_lines(excluding, table="")]
    if usable.crowds:
        what = "all of them are" if usable.crowds == usable.objects else f"{usable.crowds:,} objects are"
        lines.append(f"  {what} crowds (iscrowd 1), which are not trained on.")
    counted = count_faults(excluding)
    remedies = [
        f"  {code}: {FAULTS[code].remedy}{_common_folder(excluding, code)}."
        for code in sorted(counted, key=lambda code: -counted[code][0])[:3]
        if FAULTS[code].remedy
    ]
    if usable.crowds:
        remedies.append(f"  crowds: {CROWDS_REMEDY}.")
    return [*lines, "What to do:", *remedies] if remedies else lines


def trainable(manifest: Manifest, task: str) -> Usable:
    """`count_usable`, of what a task learns from: panoptic ones from segments, which are not counted."""
    usable = count_usable(manifest)
    if task in ("detection", "instance"):
        return usable
    return Usable(usable.images, usable.unusable_images)


def require_trainable(name: str, manifest: Manifest, usable: Usable, task: str) -> None:
    """Check that there is anything to learn.

    Args:
        name: of the data set, for the message.
        manifest: of it.
        usable: from `trainable`.
        task: what is learned.

    Raises:
        DataError: no image, or no object, with the reason.
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
    """The folder that all images with a fault are in, in words; empty where there is none of its own."""
    folders = {fault.file.rpartition("/")[0] for fault in faults if fault.code == code}
    return f" (all are in {folders.pop()}/)" if len(folders) == 1 and "" not in folders else ""
