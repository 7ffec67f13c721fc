import pytest

from unime_st.columns import Columns, negative_column, training_columns


def test_parts_go_by_position_and_the_first_label_name_wins():
    names = ["dataset_name", "query", "score", "answer", "wrong_1", "wrong_2", "label"]
    assert training_columns(names) == Columns("query", "score", ("answer", "wrong_1", "wrong_2"), "label")
    assert training_columns(["a", "b"]) == Columns("a", "b")
    assert training_columns(["text", "label"]) == Columns("text", label="label")
    assert training_columns(["a", "b", "kind"], ["kind"]) == Columns("a", "b", label="kind")


@pytest.mark.parametrize("names", [[], ["label"], ["label", "dataset_name"]])
def test_a_data_set_without_inputs_is_refused(names):
    with pytest.raises(ValueError, match="needs a column of inputs"):
        training_columns(names)


def test_negatives_are_counted_from_one():
    assert negative_column(2) == "negative_2"
    with pytest.raises(ValueError, match="counted from 1"):
        negative_column(0)
