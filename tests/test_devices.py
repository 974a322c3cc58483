"""Another accelerator is another row: a planted row decides everywhere, and nothing else names a device type.

The planted row is that of "hpu", a device type that torch knows and this package does not. No test machine has one, so
`OnDevice` stands for its tensors: they report that device, and their values are on the CPU.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from disttrain.backend import connect
from disttrain.backend.connect import choose_name
from disttrain.backend.native import choose_device
from disttrain.checkpoint.staging import Staging
from disttrain.data import copy_ahead
from disttrain.data.copy_ahead import copies_for
from disttrain.devices import DEVICE_TYPES, OTHER, DeviceType, backend_names, device_row, process_groups
from disttrain.engine.step_defaults import check_amp_mode
from disttrain.environment import Launch, Topology
from disttrain.errors import BackendError, ConfigError
from disttrain.evidence.hashes import tensor_hashes
from disttrain.precision import AMP, choose_precision

PACKAGE = Path(__file__).parents[1] / "disttrain"
ROW = DeviceType(
    "hccl", ("fp32", "bf16"), "bf16", copies_ahead=True, pins_checkpoints=True, hashes=True, has_index=True
)
DEVICE = torch.device("hpu", 0)
LAUNCH = Launch("torchrun", Topology(0, 2, 0, 2), "localhost", 29999)

Plant = Callable[..., None]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """Plants the row of "hpu", with changes."""
    return lambda **changes: monkeypatch.setitem(DEVICE_TYPES, "hpu", replace(ROW, **changes))


class OnDevice(Tensor):
    """A tensor that reports the planted device; `calls` has the names of the functions that used such tensors."""

    calls: ClassVar[list[str]] = []
    device = DEVICE

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_queued = (kwargs or {}).get("non_blocking", False)
        cls.calls.append(f"{func.__name__} non_blocking" if is_queued else func.__name__)
        result = super().__torch_function__(func, types, args, kwargs)
        return result.as_subclass(Tensor) if func is Tensor.cpu else result


@pytest.fixture
def calls() -> Iterator[list[str]]:
    OnDevice.calls.clear()
    yield OnDevice.calls
    OnDevice.calls.clear()


# --- the decisions that follow from a row

CONFIG = """
import json, sys
from disttrain.devices import DEVICE_TYPES, DeviceType
if sys.argv[1] == "planted":
    DEVICE_TYPES["hpu"] = DeviceType("hccl")
from disttrain.config import Config
from disttrain.config.reference import reference_markdown
from disttrain.errors import ConfigError
made = dict(model=print, train_data=print, loss=print, optimizer=print, global_batch_size=8, max_steps=1)
try:
    answer = Config(**made, backend="hccl").backend
except ConfigError as error:
    answer = str(error)
print(json.dumps([answer, '"hccl"' in reference_markdown(), "torch" in sys.modules]))
"""


@pytest.mark.parametrize("planted", [True, False])
def test_a_config_accepts_the_backend_of_a_row(planted: bool) -> None:
    words = [sys.executable, "-c", CONFIG, "planted" if planted else "as it is"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    answer, is_documented, has_torch = json.loads(done.stdout)
    assert not has_torch
    assert is_documented == planted
    if planted:
        assert answer == "hccl"
    else:
        assert "'hccl'" in answer
        assert "nccl" in answer  # one of the names that are accepted


def test_connect_accepts_the_backend_of_a_row_and_asks_for_its_device(plant: Plant) -> None:
    with pytest.raises(ConfigError, match="expected backend to be one of auto, gloo, nccl, single, xla, got 'hccl'"):
        connect("hccl")
    plant()
    assert backend_names() == ("auto", "gloo", "nccl", "hccl", "single", "xla")
    with pytest.raises(BackendError, match=r"backend='hccl' expected a hpu device, got .*; use backend='gloo' on CPUs"):
        connect("hccl")
    with pytest.raises(ConfigError, match="expected a cpu device for backend='gloo', got device='hpu:0'"):
        connect("gloo", device=DEVICE)


def test_ranks_use_the_backend_of_the_devices_row(plant: Plant) -> None:
    assert choose_name(LAUNCH, DEVICE) == "gloo"  # without a row the ranks connect on the CPU
    plant()
    assert choose_name(LAUNCH, DEVICE) == "hccl"
    assert choose_name(None, DEVICE) == "single"
    assert [choose_device("hpu", 2, Topology(rank, 2, rank, 2)).index for rank in range(2)] == [0, 1]
    with pytest.raises(BackendError, match="one for each hpu device, got 4; start fewer ranks"):
        choose_device("hpu", 2, Topology(0, 4, 0, 4))


@pytest.mark.parametrize(("has_index", "index"), [(True, 0), (False, None)])
def test_one_process_takes_the_first_device_of_a_type_with_several(
    plant: Plant, has_index: bool, index: int | None
) -> None:
    plant(has_index=has_index)
    with connect("single", device="hpu") as backend:
        assert (backend.device.type, backend.device.index) == ("hpu", index)


def test_the_precisions_are_those_of_the_row(plant: Plant) -> None:
    plant()
    for name in ("auto", "bf16"):
        precision = choose_precision(name, DEVICE)
        assert isinstance(precision, AMP)
        with precision.forward():
            assert torch.is_autocast_enabled("hpu")
            assert torch.get_autocast_dtype("hpu") == torch.bfloat16
    with pytest.raises(ConfigError, match="'fp16' does not work on a device of type 'hpu'; use fp32 or bf16 or auto"):
        choose_precision("fp16", DEVICE)
    plant(precisions=("fp32", "bf16", "fp16"))
    assert isinstance(choose_precision("fp16", DEVICE), AMP)
    plant(precisions=("fp32",), auto_precision=None)
    assert not isinstance(choose_precision("auto", DEVICE), AMP)


def test_the_factories_take_amp_where_the_device_autocasts(plant: Plant) -> None:
    plant()
    check_amp_mode("amp", DEVICE, ("amp", "apex"))
    plant(autocasts=False)
    with pytest.raises(ValueError, match="amp_mode='amp' cannot be used with a device of type hpu; use amp_mode=None"):
        check_amp_mode("amp", DEVICE, ("amp", "apex"))


@pytest.mark.parametrize("copies", [True, False])
def test_batches_are_copied_ahead_where_the_row_says_so(
    plant: Plant, copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(copies_ahead=copies)
    monkeypatch.setattr(copy_ahead, "Copies", lambda *arguments: arguments)  # a real one opens a stream on the device

    def move(batch: Any, device: torch.device, non_blocking: bool) -> Any:
        return batch

    assert copies_for(DEVICE, move) == ((DEVICE, move) if copies else None)


@pytest.mark.parametrize("on_device", [True, False])
def test_a_tensor_is_hashed_on_its_device_where_the_row_says_so(
    plant: Plant, on_device: bool, calls: list[str]
) -> None:
    plant(hashes=on_device)
    values = torch.arange(1000, dtype=torch.float32)
    assert tensor_hashes({"x": values.as_subclass(OnDevice)}) == tensor_hashes({"x": values})
    assert ("hash_tensor" in calls) == on_device
    assert calls.count("cpu") == 1  # of the hashes or of the values


@pytest.mark.parametrize("pins", [True, False])
@pytest.mark.parametrize("views", [True, False])
def test_a_checkpoint_is_staged_as_the_row_says(
    plant: Plant, pins: bool, views: bool, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(pins_checkpoints=pins, views_bytes=views)
    pinned, waits = list[bool](), list[torch.device]()

    def empty(shape: Any, dtype: torch.dtype, pin_memory: bool) -> Tensor:
        pinned.append(pin_memory)
        return torch.zeros(shape, dtype=dtype)  # without the device's driver no memory can be pinned

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.accelerator, "synchronize", waits.append)
    values = torch.tensor([[1.5, -0.0, float("nan")]])
    copies, copy_rest = Staging().copy({"x": values.as_subclass(OnDevice)}, later=lambda name: True)
    copy_rest()
    assert copies["x"].view(torch.int32).tolist() == values.view(torch.int32).tolist()
    assert pinned == [pins]
    assert waits == [DEVICE] * pins
    moved = [name for name in calls if name.startswith(("view", "copy_"))]
    assert moved == ["view"] * views + ["copy_ non_blocking" if pins else "copy_"]


# --- the table


@given(st.sampled_from(sorted(DEVICE_TYPES)), st.none() | st.integers(0, 99))
def test_a_device_has_the_row_of_its_type(kind: str, index: int | None) -> None:
    device = torch.device(kind) if index is None else torch.device(kind, index)
    assert device_row(device) is device_row(str(device)) is DEVICE_TYPES[kind]


def test_a_type_without_a_row_trains_in_one_process() -> None:
    assert device_row("meta") is OTHER
    assert OTHER.process_group is None
    assert [OTHER.copies_ahead, OTHER.pins_checkpoints, OTHER.hashes] == [False] * 3


def test_each_row_is_consistent() -> None:
    groups = process_groups()
    assert groups.items() >= {("cpu", "gloo"), ("cuda", "nccl")}
    assert len({*groups.values()}) == len(groups)  # the name of a backend means one device type
    assert len({*backend_names()}) == len(backend_names())
    for row in (*DEVICE_TYPES.values(), OTHER):
        assert "fp32" in row.precisions
        assert row.auto_precision in (None, *row.precisions)


# --- nothing else names a device type

# "cpu" alone means the memory of the host, which no row can change. So only the accelerators count here.
ACCELERATORS = {*DEVICE_TYPES} - {"cpu"} | {*process_groups().values()} - {"gloo"}
TORCH_XLA = "torch_xla has functions of its own for it, which no other device type has"
EXCEPTIONS = {
    ("backend/connect.py", "xla"): TORCH_XLA,
    ("backend/determinism.py", "xla"): "torch has no device module for it, which would name the processor",
    ("config/checks.py", "xla"): "a field that only this backend has",
    ("engine/step_defaults.py", "xla"): "ignite's contract: the factories choose the step of torch_xla by the device",
    ("parallel/strategies.py", "xla"): TORCH_XLA,
    ("parallel/spmd_layout.py", "xla"): TORCH_XLA,
    ("precision/table.py", "xla"): TORCH_XLA,
}
"""Places that name an accelerator, each with the reason why no row of the table stands for it."""


def named_accelerators(tree: ast.AST) -> Iterator[str]:
    """Yield the device types that code compares with, has a table of, or chooses by an attribute of torch."""
    for node in ast.walk(tree):
        inside: list[ast.AST] = []
        if isinstance(node, ast.Compare | ast.Dict | ast.Set | ast.List | ast.Tuple | ast.Subscript | ast.MatchValue):
            inside = [*ast.iter_child_nodes(node)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            inside = node.args if node.func.attr in ("get", "startswith", "endswith", "setdefault") else []
        elif isinstance(node, ast.Attribute):
            is_module = isinstance(node.value, ast.Name) and node.value.id == "torch"
            name = node.attr if is_module else node.attr.removeprefix("is_") if node.attr.startswith("is_") else ""
            yield from {name.removesuffix("_available")} & ACCELERATORS
        for constant in inside:
            if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                yield from {constant.value.partition(":")[0]} & ACCELERATORS


def test_only_the_table_names_accelerators() -> None:
    texts = {path: path.read_text() for path in PACKAGE.rglob("*.py") if path.name != "devices.py"}
    found = {
        (str(path.relative_to(PACKAGE)), name)
        for path, text in texts.items()
        if any(accelerator in text for accelerator in ACCELERATORS)  # to parse every file takes a second
        for name in named_accelerators(ast.parse(text))
    }
    assert sorted(found - EXCEPTIONS.keys()) == [], "write a column of DEVICE_TYPES, and read it by device_row()"
    assert sorted(EXCEPTIONS.keys() - found) == [], "this exception is not needed"


@pytest.mark.parametrize(
    "line",
    [
        "device.type == 'cuda'",
        "'cuda' != kind",
        "device.type in ('cpu', 'mps')",
        "TABLE = {'xpu': 1}",
        "TABLE = {1: 'nccl'}",
        "TABLE['xla']",
        "TABLE.get('mps', 0)",
        "str(device).startswith('cuda:')",
        "match kind:\n    case 'xpu': pass",
        "tensor.is_cuda",
        "torch.cuda.is_available()",
        "dist.is_nccl_available()",
    ],
)
def test_a_planted_name_is_found(line: str) -> None:
    assert list(named_accelerators(ast.parse(line)))


@pytest.mark.parametrize(
    "line",
    [
        "'''cuda'''\ndevice.type == 'cpu'",
        "torch.autocast('xla')",
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "f'{name} on cuda' in text",
        "tensor.is_contiguous()",
    ],
)
def test_other_code_is_not_found(line: str) -> None:
    assert not list(named_accelerators(ast.parse(line)))
