"""The default `prepare_batch` moves every value that holds a tensor and returns others unchanged."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from disttrain.engine.step_defaults import prepare_batch, to_device

Pair = namedtuple("Pair", ["left", "right"])


class Movable:
    """A batch of the user's own type, with a `to` method."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    def to(self, device) -> "Movable":
        return Movable(str(device))


def test_without_a_device_the_batch_stays_as_it_is():
    x, y = torch.ones(2), {"label": torch.zeros(1)}
    moved_x, moved_y = prepare_batch([x, y], device=None, non_blocking=True)
    assert moved_x is x
    assert moved_y is y


@pytest.mark.parametrize(
    "container",
    [
        lambda x: [x, x],
        lambda x: (x, "text"),
        lambda x: Pair(x, 3),
        lambda x: {"a": x, "b": [None, x]},
        lambda x: OrderedDict(b=x, a=x),
    ],
)
def test_containers_keep_their_type_and_their_tensors_move(container):
    value = container(torch.ones(2))
    moved = to_device(value, "meta")
    assert type(moved) is type(value)

    def leaves(item):
        if isinstance(item, dict):
            return [leaf for key in item for leaf in [key, *leaves(item[key])]]
        return [leaf for part in item for leaf in leaves(part)] if isinstance(item, list | tuple) else [item]

    for before, after in zip(leaves(value), leaves(moved), strict=True):
        if isinstance(before, torch.Tensor):
            assert (after.device.type, after.shape) == ("meta", before.shape)
        else:
            assert after is before


def test_an_object_with_a_to_method_is_moved_by_it():
    assert to_device(Movable(), "meta").device == "meta"
    packed = to_device(pack_sequence([torch.ones(2, 1)]), "meta")
    assert packed.data.device.type == "meta"


@pytest.mark.parametrize("value", ["text", b"bytes", 3, None, 2.5])
def test_a_value_without_a_tensor_stays(value):
    assert to_device(value, "meta") is value


def test_a_tensor_on_the_device_is_not_copied():
    x = torch.ones(2)
    assert prepare_batch((x, x), device="cpu")[0] is x
