"""Matching of a model's labels with a data set's categories, by name."""

from collections import Counter
from collections.abc import Mapping, Sequence

from raydetr.data.schema import Category
from raydetr.errors import DataError

UNKNOWN = -1
"""Category id of a label that has no category in the data set."""


def match_categories(id2label: Mapping[int, str], categories: Sequence[Category]) -> list[int]:
    """Map each label of a model to the category id of the same name.

    A model may have more classes than the data set, such as the 91 labels of the original weights on COCO's 80
    categories. Labels without a category get `UNKNOWN`. Each category needs exactly one label.

    Args:
        id2label: label → name, from the model's configuration.
        categories: COCO categories.

    Returns:
        Category ids, indexed by label.

    Raises:
        DataError: a category has no label of its name, or a name occurs twice. The message lists labels and categories.
    """
    ids = {str(category["name"]): int(category["id"]) for category in categories}
    names = [id2label[label] for label in sorted(id2label)]
    category_counts = Counter(str(category["name"]) for category in categories)
    label_counts = Counter(name for name in names if name in ids)
    missing = sorted(set(ids) - set(label_counts))
    repeated = sorted(name for name, n in {**category_counts, **label_counts}.items() if n > 1)
    if missing or repeated or category_counts.total() != len(ids):
        duplicates = repeated or sorted(name for name, n in category_counts.items() if n > 1)
        problem = (
            f"the model has no label named {missing}" if missing else f"{duplicates} occur more than once"
        )
        raise DataError(
            f"The model's labels and the data set's categories do not match by name: {problem}. "
            f"Labels: {names}. Categories: {sorted(category_counts)}. Use a model that was trained on these "
            "categories, or correct the names."
        )
    return [ids.get(name, UNKNOWN) for name in names]
