"""A microbatch comes out of its bytes as it went in, as often as one likes, also where it lay in memory."""

from typing import Any, NamedTuple

import pytest
import torch

from disttrain.parallel.packed_batches import packed, unpacked
from disttrain.parallel.rehearsal import ALIGNMENT


class Pair(NamedTuple):
    batch: Any
    weight: int


def test_a_batch_comes_back() -> None:
    memory = torch.arange(40.0)
    batch = Pair({"x": memory[3:23].view(4, 5), "text": ["a", None]}, 7)
    data = packed(batch)
    memory.zero_()  # as a forward that changes its batch would
    for _ in range(2):
        again = unpacked(data)
        assert isinstance(again, Pair)
        assert (again.weight, again.batch["text"]) == (7, ["a", None])
        assert torch.equal(again.batch["x"], torch.arange(3.0, 23.0).view(4, 5))
        assert again.batch["x"].data_ptr() % ALIGNMENT == batch.batch["x"].data_ptr() % ALIGNMENT
        again.batch["x"].zero_()


def test_a_view_with_gaps_keeps_its_strides() -> None:
    view = torch.arange(12.0).view(3, 4)[:, 1:3]
    again = unpacked(packed(view))
    assert torch.equal(again, view)
    assert again.stride() == view.stride()


def test_what_cannot_be_copied_raises() -> None:
    with pytest.raises(TypeError, match="generator"):
        packed([(i for i in range(3))])
