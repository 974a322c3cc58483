"""A hash changes with every bit, and does not depend on the layout of the tensor in memory."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from disttrain.evidence import batch_hash, state_tensors, tensor_hashes

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


def hash_of(tensor: torch.Tensor) -> str:
    return tensor_hashes({"": tensor})[""]


@given(
    size=st.sampled_from([1, 2, 100, 255, 256, 257, 5000, 70_001]),
    place=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 31),
)
def test_any_flipped_bit_gives_another_hash(size: int, place: float, bit: int) -> None:
    tensor = torch.arange(size, dtype=torch.float32) / 7
    changed = tensor.clone()
    changed.view(torch.int32)[int(place * size)] ^= -(2**31) if bit == 31 else 1 << bit
    assert hash_of(changed) != hash_of(tensor)
    assert hash_of(tensor.clone()) == hash_of(tensor)


@given(size=st.integers(2, 20_000), data=st.data())
def test_two_values_that_swap_places_give_another_hash_unless_they_are_neighbours(size: int, data: Any) -> None:
    first = data.draw(st.integers(0, size - 1))
    second = data.draw(st.integers(0, size - 1))
    tensor = torch.arange(size, dtype=torch.float32)
    swapped = tensor.clone()
    swapped[[first, second]] = tensor[[second, first]]
    width = max(1, size // 256)
    neighbours = first // width == second // width
    assert (hash_of(swapped) == hash_of(tensor)) == neighbours


def test_rows_that_change_sign_together_are_seen() -> None:
    # The two rows of a classifier of two classes do so. An exclusive or over the whole tensor would not see it.
    row = torch.randn(3000)
    one, other = torch.stack([row, -row]), torch.stack([2 * row, -2 * row])
    assert torch.equal(torch.hash_tensor(one), torch.hash_tensor(other))
    assert hash_of(one) != hash_of(other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_has_a_hash_that_sees_one_value(dtype: torch.dtype) -> None:
    for size in (3, 5000):
        values = (torch.arange(size) % 2).to(dtype)
        changed = values.clone()
        changed[size // 2] = (1 - (size // 2) % 2) if dtype != torch.bool else not bool(values[size // 2])
        assert hash_of(values) != hash_of(changed)
    assert len(hash_of(torch.zeros(0, dtype=dtype))) == 16


def test_shape_dtype_and_signs_of_zero_count_and_layout_does_not() -> None:
    tensor = torch.randn(8, 6, 4, 4)
    assert hash_of(tensor.to(memory_format=torch.channels_last)) == hash_of(tensor)
    assert hash_of(tensor.transpose(0, 1).contiguous().transpose(0, 1)) == hash_of(tensor)
    assert hash_of(tensor.reshape(6, 8, 4, 4)) != hash_of(tensor)
    assert hash_of(torch.zeros(4)) != hash_of(torch.zeros(4, dtype=torch.float64))
    assert hash_of(torch.tensor([0.0])) != hash_of(torch.tensor([-0.0]))
    sparse = torch.eye(3).to_sparse()
    assert hash_of(sparse) == hash_of(torch.eye(3))


def test_a_hash_does_not_depend_on_the_tensors_beside_it() -> None:
    tensors = {str(n): torch.randn(n) for n in (0, 1, 7, 2000, 3000)}
    together = tensor_hashes(tensors)
    assert together == {name: hash_of(tensor) for name, tensor in tensors.items()}
    assert tensor_hashes({}) == {}


class Sample:
    def __init__(self, x: float) -> None:
        self.x = torch.tensor([x])


BATCHES: list[Any] = [
    torch.zeros(2),
    [torch.zeros(2)],
    (torch.zeros(2),),
    (torch.zeros(2), torch.zeros(2)),
    {"a": torch.zeros(2)},
    {"b": torch.zeros(2)},
    {"a": torch.zeros(1), "b": torch.zeros(1)},
    np.zeros(2),
    np.zeros(2, dtype=np.float32),
    np.array([0.0, -0.0]),
    ["ab", "c"],
    ["a", "bc"],
    b"ab",
    "ab",
    1,
    1.0,
    True,
    None,
    Sample(1.0),
    Sample(2.0),
]


def test_different_batches_have_different_hashes() -> None:
    assert len({batch_hash(batch) for batch in BATCHES}) == len(BATCHES)
    assert batch_hash([Sample(1.0), "x"]) == batch_hash([Sample(1.0), "x"])


def test_the_state_is_named_after_the_models_parameters() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    frozen = model[0].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    before = state_tensors({"model": model}, optimizer)
    names = ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert list(before) == [f"model.{name}" for name in names]
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    added = set(state_tensors({"model": model}, optimizer)) - set(before)
    assert added == {
        f"optimizer.{name}.{key}"
        for name in ("0.weight", "1.weight", "1.bias")
        for key in ("step", "exp_avg", "exp_avg_sq")
    }
    assert frozen.grad is None


class Kept:
    """An object with a state of a tensor, plain values and a nested dict."""

    def __init__(self, **changes: Any) -> None:
        self.state = {"learned": torch.ones(2), "count": 3, "names": ["a", "b"], "inner": {"rate": 0.5}, **changes}

    def state_dict(self) -> dict[str, Any]:
        return self.state


def test_the_state_of_kept_objects_is_named_by_its_path_and_every_value_counts() -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())

    def hashes(**changes: Any) -> dict[str, str]:
        return tensor_hashes(state_tensors({"model": model}, optimizer, {"ema": Kept(**changes)}))

    plain = hashes()
    paths = ["learned", "count", "names", "inner.rate"]
    assert list(plain) == ["model.weight", "model.bias", *(f"kept.ema.{path}" for path in paths)]
    assert hashes() == plain
    changes = {"learned": torch.ones(2) * 2, "count": 4, "names": ["a", "c"], "inner": {"rate": 0.25}}
    for (name, value), path in zip(changes.items(), paths, strict=True):
        changed = hashes(**{name: value})
        assert [key for key in plain if changed[key] != plain[key]] == [f"kept.ema.{path}"]
    mixed = hashes(names=[torch.ones(1), 2])
    assert set(mixed) - set(plain) == {"kept.ema.names.0", "kept.ema.names.1"}
