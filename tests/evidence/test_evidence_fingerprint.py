"""`params_sha256` is the hash that its docstring describes, computed here a second time by hand."""

import hashlib

import numpy as np
import pytest
import torch
from torch import nn

from disttrain.errors import CheckpointError
from disttrain.evidence import params_sha256


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.tensor([[1.0, 2.0, 3.0]]))
        self.a = nn.Linear(1, 1, bias=False)
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("halves", torch.tensor([1.0, -2.0], dtype=torch.bfloat16), persistent=False)
        with torch.no_grad():
            self.a.weight.fill_(0.5)


def test_it_is_the_hash_of_names_dtypes_shapes_and_little_endian_bytes() -> None:
    parts = [
        b'["a.weight", "float32", [1, 1]]\n' + np.array([0.5], dtype="<f4").tobytes(),
        b'["b", "float32", [1, 3]]\n' + np.array([1, 2, 3], dtype="<f4").tobytes(),
        b'["halves", "bfloat16", [2]]\n' + np.array([0x3F80, 0xC000], dtype="<u2").tobytes(),
        b'["steps", "int64", []]\n' + np.array(7, dtype="<i8").tobytes(),
    ]
    assert params_sha256(Net()) == hashlib.sha256(b"".join(parts)).hexdigest()


def test_it_does_not_change_with_the_memory_layout_or_with_attributes_that_are_no_state() -> None:
    model = Net()
    expected = params_sha256(model)
    model.b = nn.Parameter(torch.tensor([[1.0], [2.0], [3.0]]).T, requires_grad=False)
    model.eval()
    model.not_registered = torch.ones(3)
    assert params_sha256(model) == expected


@pytest.mark.parametrize("change", ["value", "sign of zero", "shape", "dtype", "name", "buffer"])
def test_it_changes_with_anything_that_counts(change: str) -> None:
    model = Net()
    with torch.no_grad():
        model.b[0, 0] = 0.0
    expected = params_sha256(model)
    with torch.no_grad():
        match change:
            case "value":
                model.b[0, 2] = torch.nextafter(torch.tensor(3.0), torch.tensor(4.0))
            case "sign of zero":
                model.b[0, 0] = -0.0
            case "shape":
                model.b = nn.Parameter(model.b.reshape(3, 1))
            case "dtype":
                model.b = nn.Parameter(model.b.view(torch.int32), requires_grad=False)
            case "name":
                model.c = model.b
                del model.b
            case "buffer":
                model.steps += 1
    assert params_sha256(model) != expected


def test_a_tied_tensor_counts_under_each_of_its_names() -> None:
    tied, copied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    copied.load_state_dict(tied.state_dict())
    copied[1].load_state_dict(tied[0].state_dict())
    tied[1] = tied[0]
    assert params_sha256(tied) == params_sha256(copied)


def test_a_model_without_values_is_refused() -> None:
    with pytest.raises(CheckpointError, match="weight is a tensor on the meta device"):
        params_sha256(nn.Linear(2, 2, bias=False, device="meta"))
