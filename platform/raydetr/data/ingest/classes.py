"""Merge, rename and drop classes during an ingest."""

from collections.abc import Sequence
from dataclasses import dataclass

from raydetr import storage
from raydetr.data.ingest.raw import RawAnnotation
from raydetr.data.ingest.repairs import read_int
from raydetr.data.schema import Category
from raydetr.errors import DataError


@dataclass(frozen=True)
class ClassMap:
    """A map from old to new categories.

    categories: the new categories, in the order of the old ones.
    ids: old category id → new category id, without dropped categories.
    dropped: old category ids whose objects are dropped.
    """

    categories: tuple[Category, ...]
    ids: dict[int, int]
    dropped: frozenset[int]

    def apply(self, fields: RawAnnotation) -> RawAnnotation | None:
        """Give an annotation or segment its new category id.

        Returns:
            The changed fields; None if the category is dropped. A missing or unknown category id stays unchanged.
        """
        category_id = read_int(fields.get("category_id"))
        if category_id in self.dropped:
            return None
        if category_id is None or category_id not in self.ids:
            return fields.copy()
        return {**fields, "category_id": self.ids[category_id]}


def load_classes(uri: str, categories: Sequence[Category]) -> ClassMap:
    """Read a class map: a JSON object of old name → new name, or null to drop the class.

    Example: `{"car": "vehicle", "truck": "vehicle", "person": null}`. Classes with the same new name are merged and
    get the id of the first. Classes that are not mentioned stay unchanged.

    Args:
        uri: URI of the JSON.
        categories: categories of the data set.

    Raises:
        StorageError: the file cannot be read or is not JSON.
        DataError: the JSON is not such an object, has an unknown class, or drops all classes.
    """
    names = storage.read_json(uri)
    if not isinstance(names, dict) or not all(
        new is None or (isinstance(new, str) and new) for new in names.values()
    ):
        raise DataError(
            f'{uri}: expected a JSON object of class names, such as {{"car": "vehicle", "person": null}}.'
        )
    known = [category["name"] for category in categories]
    if unknown := sorted(set(names) - set(known)):
        raise DataError(f"{uri}: no class is named {unknown}; the data set has {known}.")
    new: dict[str, Category] = {}
    ids: dict[int, int] = {}
    dropped = set()
    for category in categories:
        name = names.get(category["name"], category["name"])
        if name is None:
            dropped.add(category["id"])
            continue
        merged = new.setdefault(name, {**category, "name": name})
        ids[category["id"]] = merged["id"]
    if not new:
        raise DataError(f"{uri}: every class is dropped: keep at least one.")
    return ClassMap(tuple(new.values()), ids, frozenset(dropped))
