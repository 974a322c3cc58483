"""Shared by the tests of this room: a strategy for any nested state, exact comparison, and a small training state."""

import math
import struct
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from disttrain.checkpoint.state_tree import dtype_name
from disttrain.checkpoint.tensor_writer import AS_BYTES

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.complex32,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
    torch.float4_e2m1fn_x2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32,
    torch.uint16, torch.uint8, torch.bool,
]  # fmt: skip
COMMON_DTYPES = [dtype for dtype in DTYPES if dtype_name(dtype) not in AS_BYTES]
"""The dtypes that the safetensors format has."""


def flip(path: Path, position: int) -> None:
    """Change one bit of the byte at `position` of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << (position % 8)
    path.write_bytes(content)


def tensor_of(dtype: torch.dtype, shape: list[int], seed: int = 0) -> torch.Tensor:
    """Return a tensor of random bits; a bool tensor has random truth values."""
    numbers = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=numbers)
    return (raw % 2 if dtype == torch.bool else raw).view(dtype).reshape(shape)


def tensor_examples(dtypes: list[torch.dtype]) -> dict[str, torch.Tensor]:
    """Return tensors of each dtype in several shapes, one that is not contiguous, and one with an unusual name."""
    shapes: list[list[int]] = [[], [0], [3], [2, 3]]
    tensors = {f"{dtype}.{n}": tensor_of(dtype, shape) for dtype in dtypes for n, shape in enumerate(shapes)}
    tensors["not contiguous"] = torch.arange(12.0).reshape(3, 4).T[::2]
    tensors['name with ünïcode and "quotes"'] = torch.ones(1)
    return tensors


def raw_bytes(tensor: torch.Tensor) -> bytes:
    if tensor.numel() == 0:
        return b""
    if tensor.dtype.itemsize == 1:
        tensor = tensor.view(torch.uint8)  # torch 2.9 cannot copy a float4
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().tobytes()


def same(a: Any, b: Any) -> bool:
    """Return whether two states are equal in types, order, values and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and raw_bytes(a) == raw_bytes(b)
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, dict):
        pairs = zip(a.items(), b.items(), strict=False)
        return len(a) == len(b) and all(same(one, other) for one, other in pairs)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    tensor = tensor_of(dtype, shape, draw(st.integers(0, 5)))
    form = draw(st.sampled_from(["plain", "transposed", "every second", "expanded"]))
    if form == "transposed":
        return tensor.permute(tuple(reversed(range(tensor.ndim))))
    if form == "every second" and tensor.ndim:
        return tensor[::2]
    return tensor.unsqueeze(0).expand(2, *tensor.shape) if form == "expanded" else tensor


KEYS = st.one_of(st.text(max_size=4), st.sampled_from(["$int", "$", "a.b", "a"]), st.integers(-(2**70), 2**70))
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(2**200), 2**200), st.floats(), st.text(max_size=8),
    st.sampled_from([2**63, -(2**63), 2**63 - 1, -0.0, "$float", "\ud800", ""]), tensors(),
    st.lists(st.integers(0, 9), max_size=3).map(torch.Size),
)  # fmt: skip
STATES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(KEYS, inner, max_size=4),
        st.dictionaries(KEYS, inner, max_size=3).map(OrderedDict),
        st.dictionaries(KEYS, st.integers(), max_size=3).map(Counter),
    ),
    max_leaves=12,
)


def marked(step: int, size: int = 1000) -> dict[str, Any]:
    """Return a state in which every part depends on the step."""
    return {
        "model": OrderedDict({f"{i}.weight": torch.full((size,), float(step)) for i in range(3)}),
        "count": torch.tensor(step),
        "lr": step / 7,
        "history": [step] * 3,
    }


def mark_of(state: dict[str, Any]) -> int:
    """Return the step of a `marked` state, after a check that all parts have it."""
    step = state["history"][0]
    assert same(state, marked(step, len(state["model"]["0.weight"])))
    return int(step)


def training_state() -> dict[str, Any]:
    """Return the state of a model, an optimizer, a schedule and a scaler after two steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 1, 5])
    for _ in range(2):
        model(torch.randn(5, 3)).sum().backward()
        optimizer.step()
        schedule.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
    }


def files(directory: Path) -> dict[str, bytes]:
    """Return the content of every file below a directory, by its relative path."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
