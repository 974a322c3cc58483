"""Text becomes a value of the expected type: the laws of `parse`, and the sources of a keyword's type."""

import inspect
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain.config.parse import Missing, parse, parse_keyword
from disttrain.errors import ConfigError

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
literals = st.recursive(plain, lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner))


def parameter(default: Any = Missing, annotation: Any = Missing) -> inspect.Parameter:
    return inspect.Parameter("size", inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


@given(st.integers() | st.floats(allow_nan=False) | st.text())
def test_the_text_of_a_number_or_a_string_is_parsed_back(value: Any) -> None:
    parsed = parse("size", str(value), [type(value)], "")
    assert (type(parsed), parsed) == (type(value), value)


@given(st.sampled_from([("true", True), ("false", False), ("none", None), ("null", None)]), st.data())
def test_true_false_and_none_may_be_in_any_case(pair: tuple[str, Any], data: st.DataObject) -> None:
    word, value = pair
    text = "".join(data.draw(st.sampled_from([letter, letter.upper()])) for letter in word)
    assert parse("size", f" {text} ", [bool, type(None)], "") is value


@settings(max_examples=30)
@given(literals)
def test_any_python_literal_is_a_value_where_no_type_is_expected(value: Any) -> None:
    parsed = parse_keyword("size", repr(value), Missing, None)
    assert (type(parsed), parsed) == (type(value), value)


@given(st.permutations([type(None), bool, int, float, str]))
def test_narrow_types_come_first_in_any_order_of_the_union(forms: list[Any]) -> None:
    texts = ["none", "true", "3", "3.5", "three"]
    assert [parse("size", text, forms, "") for text in texts] == [None, True, 3, 3.5, "three"]
    assert type(parse("size", "3", forms, "")) is int


def test_an_error_names_the_key_the_text_and_the_expected_type() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("size", "big", [int, type(None), bool], 'int > 0 | bool | None | "auto"')
    assert str(caught.value) == "size=big: expected int > 0 | true | false | none | auto, got 'big'."


@pytest.mark.parametrize(
    ("present", "given_parameter", "text", "value"),
    [
        (3, None, "4", 4),  # the type of the present value
        (Missing, parameter(default=0.5), "4", 4.0),  # of the default
        (Missing, parameter(annotation=int | None), "none", None),  # the annotation
        (Missing, parameter(annotation=tuple[int, ...]), "[1, 2]", (1, 2)),
        (None, parameter(annotation=Literal["a", "b"]), "b", "b"),
        ("a", parameter(default="a", annotation=Literal["a", "b"]), "b", "b"),
    ],
)
def test_the_type_of_a_keyword_has_three_sources(present: Any, given_parameter: Any, text: str, value: Any) -> None:
    parsed = parse_keyword("size", text, present, given_parameter)
    assert (type(parsed), parsed) == (type(value), value)


def test_a_literal_excludes_other_strings() -> None:
    with pytest.raises(ConfigError, match=r"size=c: expected a \| b, got 'c'"):
        parse_keyword("size", "c", "a", parameter(default="a", annotation=Literal["a", "b"]))


def test_text_cannot_replace_an_object() -> None:
    with pytest.raises(ConfigError, match="expected a number, text, tuple, list or dict to replace, got an object"):
        parse_keyword("size", "3", object(), None)
