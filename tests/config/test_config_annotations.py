"""Annotations: fields by dotted name with their notes, and types in the form that people read."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from disttrain.config import Config
from disttrain.config.annotations import FieldNote, Flag, Positive, alternatives, is_group, leaves, type_text


class Inner(BaseModel):
    size: Annotated[Positive, FieldNote("samples", may_change=True)] = 1
    rate: float = 0.5


class Outer(BaseModel):
    flag: Flag = False
    inner: Annotated[Inner, FieldNote(harmless=True)] = Inner()
    build: Annotated[Any | None, FieldNote(takes="(a, b) -> Thing")] = None


def test_leaves_are_the_fields_in_order_with_dotted_names_and_their_notes() -> None:
    notes = {leaf.name: leaf.note for leaf in leaves(Outer)}
    assert list(notes) == ["flag", "inner.size", "inner.rate", "build"]
    assert notes["flag"] == FieldNote()
    assert notes["inner.size"] == FieldNote("samples", may_change=True)
    assert notes["inner.rate"] == FieldNote(harmless=True)  # the note of its group
    assert [leaf.name for leaf in leaves(Inner, "inner.")] == ["inner.size", "inner.rate"]


def test_only_models_are_groups() -> None:
    assert [is_group(kind) for kind in (Inner, Config, int, Inner | None, "Inner")] == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("takes", "count"),
    [("", 0), ("() -> Module", 0), ("(parameters) -> Optimizer", 1), ("(model, batch) -> (a, b)", 2)],
)
def test_a_note_counts_the_arguments_of_its_function(takes: str, count: int) -> None:
    assert FieldNote(takes=takes).num_arguments == count


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (int, "int"),
        (Positive, "int > 0"),
        (Positive | None, "int > 0 | None"),
        (Literal["a", "b"], '"a" | "b"'),
        (Flag | Literal["auto"], 'bool | "auto"'),
        (Literal["a"] | Annotated[int, FieldNote(takes="(x) -> Y")], '"a" | (x) -> Y'),
    ],
)
def test_a_type_is_read_with_its_bounds(annotation: Any, text: str) -> None:
    assert type_text(annotation) == text


def test_a_function_is_read_by_its_form() -> None:
    (leaf,) = [leaf for leaf in leaves(Outer) if leaf.name == "build"]
    assert leaf.type_text == "(a, b) -> Thing | None"


def test_alternatives_have_none_exactly_where_the_field_accepts_none() -> None:
    for leaf in leaves(Config):
        plain = alternatives(leaf.info.annotation)
        assert Annotated not in map(type, plain)
        try:
            TypeAdapter(Annotated[leaf.info.annotation, *leaf.info.metadata]).validate_python(None)
        except ValidationError:
            assert type(None) not in plain, leaf.name
        else:
            assert type(None) in plain, leaf.name
