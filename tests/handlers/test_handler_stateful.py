"""Named objects and their states: nested dicts and lists go to a checkpoint and back, all of them or none."""

import copy
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stateful_objects import Number
from torch import nn

from disttrain.checkpoint import save
from disttrain.engine import Engine
from disttrain.errors import CheckpointError
from disttrain.handlers.stateful import bare, load_objects, map_objects, strongly, weakly

NAMES = st.text("abc", min_size=1, max_size=2)
TREES = st.recursive(
    st.integers(1, 99).map(Number),
    lambda inner: st.lists(inner, min_size=1, max_size=3) | st.dictionaries(NAMES, inner, min_size=1, max_size=3),
    max_leaves=6,
)
# Two names at least: the checkpoint of a single object is its state, without a name.
OBJECTS = st.dictionaries(NAMES, TREES, min_size=2, max_size=3)


def numbers(objects: Any) -> Iterator[Number]:
    found: list[Number] = []
    map_objects(objects, lambda obj, path: found.append(obj))
    yield from found


def zeros(objects: Any) -> Any:
    return map_objects(objects, lambda obj, path: Number(0))


def states(objects: Any) -> Any:
    return map_objects(objects, lambda obj, path: obj.state_dict())


@settings(max_examples=40)
@given(OBJECTS)
def test_every_object_gets_its_own_state_back(objects: dict[str, Any]) -> None:
    loaded = zeros(objects)
    load_objects(loaded, states(objects))
    assert states(loaded) == states(objects)


@settings(max_examples=40)
@given(OBJECTS, st.data())
def test_nothing_is_loaded_if_one_state_is_missing(objects: dict[str, Any], data: st.DataObject) -> None:
    checkpoint = copy.deepcopy(states(objects))
    parts = [checkpoint]  # every dict and list above the states
    for part in parts:
        inner = part.values() if isinstance(part, dict) else part
        parts += [value for value in inner if isinstance(value, list) or "value" not in value]
    part = data.draw(st.sampled_from(parts))
    part.pop(data.draw(st.sampled_from(sorted(part) if isinstance(part, dict) else range(len(part)))))
    loaded = zeros(objects)
    with pytest.raises(ValueError, match="the checkpoint"):
        load_objects(loaded, checkpoint)
    assert {number.value for number in numbers(loaded)} == {0}


def test_every_object_is_named_by_its_path() -> None:
    paths = map_objects({"pair": [Number(), {"x": Number()}], "one": Number()}, lambda obj, path: path)
    assert paths == {"pair": ["to_save['pair'][0]", {"x": "to_save['pair'][1]['x']"}], "one": "to_save['one']"}


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_bare_model_is_inside_any_number_of_wrappers(depth: int) -> None:
    model = nn.Linear(1, 1)
    wrapped: Any = model
    for _ in range(depth):
        wrapped = nn.DataParallel(wrapped)
    assert bare(wrapped) is model
    number = Number()
    assert bare(number) is number


def test_an_engine_is_held_weakly_and_other_objects_strongly() -> None:
    engine, number = Engine(lambda engine, batch: None), Number()
    held = weakly(engine, "to_save['trainer']")
    assert isinstance(held, weakref.ref)
    assert strongly(held, "") is engine
    assert strongly(weakly(number, ""), "") is number
    del engine
    with pytest.raises(CheckpointError, match=r"the engine to_save\['trainer'\] is gone"):
        strongly(held, "to_save['trainer']")
    with pytest.raises(TypeError, match=r"expected to_save\['x'\] to have a state_dict method, got int"):
        weakly(3, "to_save['x']")


def test_a_directory_of_checkpoints_is_read_from_the_newest_one(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, {"a": {"value": step}, "b": {"value": 10 * step}})
    for path, value in ((tmp_path, 2), (tmp_path / "step-00000001", 1), (str(tmp_path), 2)):
        a, b = Number(), Number()
        load_objects({"a": a, "b": b}, path)
        assert (a.value, b.value) == (value, 10 * value)


def test_an_object_may_come_and_go_with_a_warning() -> None:
    model, average = Number(1), Number(2)
    saved = {"model": {"value": 5}, "old": {"value": 6}}
    with pytest.warns(UserWarning, match="the checkpoint holds") as warned:
        load_objects({"model": model, "average": average}, saved, allow_missing=True)
    assert [str(each.message) for each in warned] == [
        "the checkpoint holds no 'average': it begins anew",
        "the checkpoint holds 'old', which no object takes",
    ]
    assert (model.value, average.value) == (5, 2)
    with pytest.raises(ValueError, match="'average' from `to_load` is not found"):
        load_objects({"model": model, "average": average}, saved)
