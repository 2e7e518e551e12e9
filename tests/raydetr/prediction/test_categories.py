import pytest

from raydetr.errors import DataError
from raydetr.prediction.categories import UNKNOWN, match_categories

CATEGORIES = [{"id": 90, "name": "cat"}, {"id": 3, "name": "ant"}]


def test_labels_map_to_categories_of_the_same_name_in_any_order():
    assert match_categories({0: "cat", 1: "ant"}, CATEGORIES) == [90, 3]
    assert match_categories({1: "cat", 0: "ant"}, CATEGORIES) == [3, 90]


def test_a_model_may_have_more_classes_than_the_data_set():
    assert match_categories({0: "N/A", 1: "ant", 2: "N/A", 3: "cat"}, CATEGORIES) == [UNKNOWN, 3, UNKNOWN, 90]


@pytest.mark.parametrize(
    ("id2label", "problem"),
    [
        ({0: "LABEL_0", 1: "LABEL_1"}, r"the model has no label named \['ant', 'cat'\]"),
        ({0: "ant", 1: "Cat"}, r"the model has no label named \['cat'\]"),
        ({0: "ant", 1: "cat", 2: "cat"}, r"\['cat'\] occur more than once"),
    ],
)
def test_a_category_without_exactly_one_label_is_an_error_that_lists_labels_and_categories(id2label, problem):
    with pytest.raises(DataError, match=problem) as error:
        match_categories(id2label, CATEGORIES)
    assert str(list(id2label.values())) in str(error.value)
    assert "['ant', 'cat']" in str(error.value)


def test_a_duplicate_category_name_is_an_error():
    with pytest.raises(DataError, match=r"\['ant'\] occur more than once"):
        match_categories({0: "ant"}, [{"id": 1, "name": "ant"}, {"id": 2, "name": "ant"}])
