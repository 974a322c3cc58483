"""Nested states come back from JSON and safetensors with their types, order and bits."""

import datetime
import enum
import json
from collections import OrderedDict, defaultdict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_states import STATES, same, tensor_of, training_state
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import nn

from disttrain.checkpoint import DamagedError
from disttrain.checkpoint.manifest import TENSORS, FileRecord, Manifest
from disttrain.checkpoint.state_reader import StateReader
from disttrain.checkpoint.state_tree import MAX_STATE_DEPTH, NUMPY_DTYPES, check_plain, flatten, restore_state
from disttrain.checkpoint.tensor_writer import check_dtypes, write_tensors
from disttrain.errors import CheckpointError


def round_trip(state: Any, folder: Path) -> Any:
    flat = flatten(state)
    check_dtypes(flat.tensors)
    path = folder / TENSORS
    path.unlink(missing_ok=True)
    size_bytes, sha256 = write_tensors(path, flat.tensors)
    record = FileRecord(size_bytes=size_bytes, sha256=sha256)
    with StateReader(folder, Manifest(step=0, files={TENSORS: record})) as reader:
        return restore_state(json.loads(json.dumps(flat.tree, allow_nan=False)), reader.fetch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tree")


@given(state=STATES)
@example(state=tensor_of(torch.float4_e2m1fn_x2, [1]).expand(2))  # torch 2.9 copies no such numbers
@settings(max_examples=100, deadline=None)
@pytest.mark.filterwarnings("ignore:ComplexHalf support")
def test_any_state_comes_back_the_same(state: Any, folder: Path) -> None:
    assert same(round_trip(state, folder), state)


def test_a_training_state_comes_back_with_the_version_of_each_module(tmp_path: Path) -> None:
    state = training_state()
    back = round_trip(state, tmp_path)
    assert same(back, state)
    assert back["model"]._metadata == state["model"]._metadata
    assert back["model"]._metadata["1"] == {"version": nn.BatchNorm1d._version}


def test_names_are_the_dotted_path() -> None:
    state = {"model": OrderedDict({"0.weight": torch.ones(2)}), "optimizer": {"state": {0: {"step": torch.tensor(1)}}}}
    assert list(flatten(state).tensors) == ["model.0.weight", "optimizer.state.0.step"]


def test_paths_that_flatten_alike_get_different_names(tmp_path: Path) -> None:
    state = {"a": {"b": torch.tensor(1)}, "a.b": torch.tensor(2), "__metadata__": torch.tensor(3), "": torch.tensor(4)}
    state |= {"x": {0: torch.tensor(5), "0": torch.tensor(6)}}
    assert len(flatten(state).tensors) == 6
    assert same(round_trip(state, tmp_path), state)


def test_a_tied_tensor_is_held_once_and_comes_back_tied(tmp_path: Path) -> None:
    tied = torch.arange(6.0).reshape(2, 3)
    state = {"a": tied, "b": tied, "part": tied[0], "transposed": tied.T, "parameter": nn.Parameter(tied)}
    assert list(flatten(state).tensors) == ["a", "part", "transposed"]
    back = round_trip(state, tmp_path)
    assert back["a"] is back["b"] is back["parameter"]
    assert same([back["part"], back["transposed"]], [tied[0].clone(), tied.T.clone()])


def test_conjugate_and_negative_views_are_held_with_their_values(tmp_path: Path) -> None:
    z = torch.tensor([1 + 2j, 3 - 4j])
    back = round_trip({"z": z, "conjugate": z.conj(), "imaginary": z.conj().imag}, tmp_path)
    assert torch.equal(back["conjugate"], torch.tensor([1 - 2j, 3 + 4j]))
    assert torch.equal(back["imaginary"], torch.tensor([-2.0, 4.0]))


def test_a_loaded_state_does_not_need_the_file_any_more(tmp_path: Path) -> None:
    back = round_trip({"a": torch.arange(5000)}, tmp_path)
    (tmp_path / "t.safetensors").write_bytes(b"")
    assert torch.equal(back["a"], torch.arange(5000))


class Color(enum.IntEnum):
    RED = 1


class Tagged(torch.Tensor):
    pass


Pair = namedtuple("Pair", "a b")

REFUSED = {
    "numpy time": (np.datetime64("2026-01-01"), "numpy.datetime64"),
    "numpy complex": (np.complex64(1), "numpy.complex64"),
    "numpy array of objects": (np.array([None]), "numpy.ndarray"),
    "numpy array of another byte order": (np.zeros(2, dtype=">f4"), "numpy.ndarray"),
    "enum": (Color.RED, "Color"),
    "set": ({1}, "set"),
    "bytes": (b"x", "bytes"),
    "object": (datetime.date(2026, 1, 1), "datetime.date"),
    "function": (len, "builtin_function_or_method"),
    "named tuple": (Pair(1, 2), "Pair"),
    "defaultdict": (defaultdict(int), "collections.defaultdict"),
    "dtype": (torch.float32, "torch.dtype"),
    "tensor subclass": (torch.ones(1).as_subclass(Tagged), "Tagged"),
    "sparse": (torch.eye(2).to_sparse(), "sparse"),
    "meta": (torch.ones(2, device="meta"), "meta device"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("take_apart", [flatten, check_plain])
def test_a_value_that_cannot_be_held_is_refused_with_its_path(kind: str, take_apart: Any) -> None:
    value, name = REFUSED[kind]
    with pytest.raises(CheckpointError) as caught:
        take_apart({"trainer": {"history": [1, (2, value)]}})
    assert "state['trainer']['history'][1][1] is a" in str(caught.value)
    assert name in str(caught.value)


NUMBERS = st.sampled_from(sorted(NUMPY_DTYPES)).flatmap(
    lambda name: arrays(name, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
)


@given(NUMBERS, st.sampled_from(["plain", "transposed", "reversed", "read-only", "packed", "scalar"]))
@settings(deadline=None)
def test_numpys_numbers_and_arrays_come_back_as_they_were(folder: Path, array: Any, form: str) -> None:
    value = {"transposed": array.T, "reversed": array[::-1] if array.ndim else array}.get(form, array)
    if form == "packed":  # its steps are of no whole items
        value = np.zeros(array.shape, [("before", "i1"), ("value", array.dtype)])["value"]
        value[...] = array
    if form == "read-only":
        value.flags.writeable = False
    if form == "scalar":
        value = array.flat[0] if array.size else np.float32(0.1)
    (back,) = round_trip([value], folder)
    assert type(back) is type(value)
    assert (back.dtype, back.shape, back.tobytes()) == (value.dtype, value.shape, value.tobytes())


@pytest.mark.parametrize(
    "tree",
    [
        {"$numpy": "int8", "value": 300},
        {"$numpy": "float64", "value": "x"},
        {"$numpy": "object", "value": 1},
        {"$numpy": "float64", "value": [1, 2]},
        {"$numpy": "bool", "value": "x"},
        {"$numpy": "int64", "value": 2.5},
        {"$array": {"$tensor": "a", "dtype": "bfloat16", "shape": [1]}},
        {"$array": 3},
        {"$array": {"$tuple": []}},
    ],
)
def test_a_damaged_number_is_damage(tree: Any) -> None:
    with pytest.raises(DamagedError):
        restore_state(tree, no_tensor)


def test_a_file_of_torch_save_holds_no_numpy() -> None:
    for value in (np.float64(1.0), np.zeros(2)):
        with pytest.raises(CheckpointError, match="numpy"):
            check_plain({"value": value})


@pytest.mark.parametrize("key", [True, 1.5, None, (1, 2), Color.RED])
def test_a_key_that_would_come_back_as_another_is_refused(key: Any) -> None:
    with pytest.raises(CheckpointError, match=r"state\['a'\] has the key .*; expected str or int"):
        flatten({"a": {key: 1}})


def test_a_state_that_contains_itself_is_refused() -> None:
    state: list[Any] = [1]
    state += [state, state]
    with pytest.raises(CheckpointError, match="does the state contain itself"):
        flatten(state)


@pytest.mark.parametrize("wrap", [lambda x: [x], lambda x: (x,), lambda x: {1: x}, lambda x: OrderedDict({1: x})])
def test_the_deepest_state_that_is_written_can_be_read(wrap: Any, tmp_path: Path) -> None:
    state: Any = 7
    for _ in range(MAX_STATE_DEPTH):
        state = wrap(state)
    assert same(round_trip(state, tmp_path), state)
    with pytest.raises(CheckpointError, match="nested deeper"):
        flatten(wrap(state))


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                [
                    "$int",
                    "$float",
                    "$tuple",
                    "$size",
                    "$dict",
                    "$ordered",
                    "$counter",
                    "$metadata",
                    "$tensor",
                    "dtype",
                    "shape",
                ]
            ),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=10,
)


def no_tensor(name: str, dtype: str, shape: tuple[int, ...], path: str) -> torch.Tensor:
    raise DamagedError("no such tensor")


@given(tree=JSON)
@settings(max_examples=200, deadline=None)
def test_any_tree_is_restored_or_refused(tree: Any) -> None:
    try:
        state = restore_state(tree, no_tensor)
    except DamagedError:
        return
    flat = flatten(state)
    json.dumps(flat.tree, allow_nan=False)
    assert repr(restore_state(flat.tree, no_tensor)) == repr(state)  # equal for nan too


def test_a_tree_nested_without_end_is_refused() -> None:
    tree: Any = []
    for _ in range(900):
        tree = [tree]
    with pytest.raises(DamagedError, match="nested deeper"):
        restore_state(tree, no_tensor)
