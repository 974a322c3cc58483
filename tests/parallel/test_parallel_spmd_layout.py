"""The dimension that the devices of a rank cut, and saved states that any device loads; tests/xla has the rest."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from disttrain.parallel.spmd_layout import SpmdLayout, _SavedWhole


def layout(num_devices: int, shards: bool = True) -> SpmdLayout:
    """Return a layout without a mesh, because only XLA devices have one."""
    bare = SpmdLayout.__new__(SpmdLayout)
    bare.num_devices, bare.shards = num_devices, shards
    return bare


@given(st.integers(2, 8), st.lists(st.integers(0, 64), max_size=4))
def test_the_longest_dimension_that_the_devices_divide_is_cut(num_devices: int, shape: list[int]) -> None:
    cut = layout(num_devices).cut_dimension(shape)
    fitting = [size for size in shape if size and size % num_devices == 0]
    if cut is None:
        assert fitting == []
    else:
        assert shape[cut] == max(fitting)
    assert layout(num_devices, shards=False).cut_dimension(shape) is None


class CountingLayout(SpmdLayout):
    """A layout without a device that counts the tensors it makes whole."""

    def __init__(self) -> None:
        self.count = 0

    def whole(self, tensor: Tensor) -> Tensor:
        self.count += 1
        return tensor.clone()


class Counter:
    def __init__(self) -> None:
        self.state: object = {"steps": [torch.ones(1)], "count": 3}

    def state_dict(self) -> object:
        return self.state

    def load_state_dict(self, state: object) -> None:
        self.state = state


def test_tensors_of_a_saved_state_are_whole() -> None:
    model, counting = nn.Linear(2, 2), CountingLayout()
    saved = _SavedWhole(model, counting).state_dict()
    assert counting.count == 2
    assert torch.equal(saved["weight"], model.weight)
    assert saved["weight"] is not model.weight


def test_the_state_of_another_object_is_loaded_unchanged() -> None:
    counter = Counter()
    _SavedWhole(counter, CountingLayout()).load_state_dict({"count": 4})
    assert counter.state == {"count": 4}
