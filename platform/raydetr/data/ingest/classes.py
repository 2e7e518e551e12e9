"""Merging, renaming and dropping classes while a data set is ingested."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raydetr import storage
from raydetr.data.ingest.repairs import read_int
from raydetr.errors import DataError


@dataclass(frozen=True)
class ClassMap:
    """What becomes of categories.

    categories: the new ones, in the order of the old.
    ids: old category id → new; ids of dropped categories are missing.
    dropped: old category ids whose objects are left out.
    """

    categories: tuple[dict[str, Any], ...]
    ids: dict[int, int]
    dropped: frozenset[int]

    def apply(self, fields: Mapping[str, Any]) -> dict[str, Any] | None:
        """An annotation (or segment) with its new category; None where that is dropped. Others stay as they are."""
        category_id = read_int(fields.get("category_id"))
        if category_id in self.dropped:
            return None
        if category_id is None or category_id not in self.ids:
            return dict(fields)
        return {**fields, "category_id": self.ids[category_id]}


def load_classes(address: str, categories: Sequence[Mapping[str, Any]]) -> ClassMap:
    """Read a class map: a JSON object of old name → new name, or null to drop the class.

    Classes that get the same name become one, with the id of the first; names that are not mentioned stay. For
    example `{"car": "vehicle", "truck": "vehicle", "person": null}`.

    Args:
        address: of the JSON.
        categories: the data set's.

    Raises:
        StorageError: it cannot be read or is not JSON.
        DataError: it is not such an object, names a class that is not there, or drops all.
    """
    names = storage.read_json(address)
    if not isinstance(names, dict) or not all(
        new is None or (isinstance(new, str) and new) for new in names.values()
    ):
        raise DataError(
            f'{address}: expected a JSON object of names, such as {{"car": "vehicle", "person": null}}.'
        )
    known = [category["name"] for category in categories]
    if unknown := sorted(set(names) - set(known)):
        raise DataError(f"{address}: no class is named {unknown}; the data set has {known}.")
    new: dict[str, dict[str, Any]] = {}
    ids: dict[int, int] = {}
    dropped = set()
    for category in categories:
        name = names.get(category["name"], category["name"])
        if name is None:
            dropped.add(category["id"])
            continue
        kept = new.setdefault(name, {**category, "name": name})
        ids[category["id"]] = kept["id"]
    if not new:
        raise DataError(f"{address}: every class is dropped: nothing is left to learn.")
    return ClassMap(tuple(new.values()), ids, frozenset(dropped))
