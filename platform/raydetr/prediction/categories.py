"""A model's labels and a data set's categories, matched by name."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from raydetr.errors import DataError

UNKNOWN = -1
"""Category id of a model's label that the data set does not have."""


def match_categories(id2label: Mapping[int, str], categories: Sequence[Mapping[str, Any]]) -> list[int]:
    """The data set's category id of each of the model's labels.

    A model may know more classes than the data set has (the 91 labels of the original weights on COCO's 80
    categories); the surplus labels get `UNKNOWN`. Each category needs exactly one label.

    Args:
        id2label: label → name, of the model's configuration.
        categories: COCO categories with `id` and `name`.

    Returns:
        label → category id, a list as long as the labels.

    Raises:
        DataError: a category has no label of its name, or a name occurs twice; lists both sides.
    """
    ids = {str(category["name"]): int(category["id"]) for category in categories}
    names = [id2label[label] for label in sorted(id2label)]
    category_counts = Counter(str(category["name"]) for category in categories)
    label_counts = Counter(name for name in names if name in ids)
    missing = sorted(set(ids) - set(label_counts))
    repeated = sorted(name for name, n in {**category_counts, **label_counts}.items() if n > 1)
    if missing or repeated or category_counts.total() != len(ids):
        twice = repeated or sorted(name for name, n in category_counts.items() if n > 1)
        problem = f"no label of the model is called {missing}" if missing else f"{twice} occur more than once"
        raise DataError(
            f"The model's labels and the data set's categories do not match by name: {problem}. "
            f"Labels: {names}. Categories: {sorted(category_counts)}. Score a model that was trained on these "
            "categories, or correct the names."
        )
    return [ids.get(name, UNKNOWN) for name in names]
