"""The phrases of error messages: short texts of values, joined words, near names, and pydantic's errors as lines."""

from typing import Annotated, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, ValidationError

from disttrain.config import Config
from disttrain.config.annotations import FieldNote, Positive, leaves
from disttrain.config.wording import OTHER_NAMES, both, did_you_mean, either, explain_field_errors, got, sentence

names = st.text("abcdefghij_", min_size=6, max_size=12)


class Sizes(BaseModel):
    model_config = ConfigDict(extra="forbid")
    width: Positive
    height: Positive = 1
    build: Annotated[list[int], FieldNote(takes="() -> int", within="list of ")] = []


def lines_for(**values: Any) -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Sizes(**values)
    return explain_field_errors(caught.value, Sizes, "sizes.").splitlines()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        (1.5, "1.5"),
        ([1, "a"], "[1, 'a']"),
        (int, "the class int"),
        (len, "the function len"),
        ({}, "a dict"),
        (object(), "an object"),
        ([object()], "a list"),
    ],
)
def test_a_value_has_a_short_text(value: object, text: str) -> None:
    assert got(value) == text


@given(st.text(max_size=500))
def test_a_long_text_is_cut(text: str) -> None:
    assert len(got(text)) <= 60


@given(st.lists(st.integers(), min_size=1, max_size=6))
def test_joined_words_are_in_order_with_one_conjunction(numbers: list[int]) -> None:
    text = either(numbers)
    assert text.replace(" or ", ", ").split(", ") == [str(number) for number in numbers]
    assert text.count(" or ") == min(1, len(numbers) - 1)
    assert both(numbers) == text.replace(" or ", " and ")


@given(st.text())
def test_a_sentence_ends_in_a_mark_and_stays_one(text: str) -> None:
    assert sentence(text).startswith(text)
    assert sentence(text)[-1] in ".?"
    assert sentence(sentence(text)) == sentence(text)


@given(names, st.data())
def test_a_name_with_one_letter_missing_is_near(name: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(name) - 1))
    assert did_you_mean(name[:at] + name[at + 1 :], [name, "0000000"]) == f"; did you mean {name}?"


@given(names, names, st.lists(names))
def test_the_last_part_of_a_dotted_name_is_enough(group: str, name: str, others: list[str]) -> None:
    assert f"{group}.{name}" in did_you_mean(name, [f"{group}.{name}"])
    assert did_you_mean("0000000", [group, f"{group}.{name}", *others]) == ""


def test_pydantics_errors_are_one_line_each() -> None:
    assert lines_for(height=0, widht=3) == [
        "sizes.width: missing; expected int > 0.",
        "sizes.height: expected int > 0, got 0.",
        "sizes.widht: no such field; did you mean sizes.width?",
    ]
    assert lines_for(width=1, build=[2, "x"]) == ["sizes.build.1: expected () -> int, got 'x'."]


def test_names_of_other_frameworks_lead_to_fields_that_exist() -> None:
    fields = {leaf.name for leaf in leaves(Config)}
    assert set(OTHER_NAMES.values()) <= fields
    assert not set(OTHER_NAMES) & fields
    assert did_you_mean("gradient_accumulation_steps", fields).startswith("; did you mean num_slots? The global batch")
    assert did_you_mean("gradient_checkpointing", fields) == "; did you mean activation_checkpointing?"
