"""The copy for a save: exact, in memory that is kept, and with an error if a tensor changed before it was copied."""

import pytest
import torch
from checkpoint_states import raw_bytes, tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from disttrain.checkpoint.staging import WORTH_COPYING_LATER_BYTES, Staging
from disttrain.errors import CheckpointError

LARGE = WORTH_COPYING_LATER_BYTES // 4
"""float32 numbers of the smallest tensor that may be copied later."""


@given(states=st.lists(st.dictionaries(st.sampled_from("abc"), tensors()), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
@pytest.mark.filterwarnings("ignore:ComplexHalf support")
def test_any_tensors_are_copied_bit_by_bit_whatever_was_copied_before(states: list[dict[str, torch.Tensor]]) -> None:
    staging = Staging()
    for state in states:
        copies, copy_rest = staging.copy(state)
        copy_rest()
        assert list(copies) == list(state)
        for name, tensor in state.items():
            assert (copies[name].dtype, copies[name].shape) == (tensor.dtype, tensor.shape)
            assert raw_bytes(copies[name]) == raw_bytes(tensor)
            assert tensor.numel() == 0 or copies[name].data_ptr() != tensor.data_ptr()


def test_conjugate_and_negative_views_are_copied_as_their_values() -> None:
    z = torch.tensor([1 + 2j, 3 - 4j])
    copies, _ = Staging().copy({"conjugate": z.conj(), "negative": z.conj().imag})
    assert torch.equal(copies["conjugate"], torch.tensor([1 - 2j, 3 + 4j]))
    assert torch.equal(copies["negative"], torch.tensor([-2.0, 4.0]))


def test_memory_is_used_again_where_it_fits() -> None:
    staging = Staging()
    first = dict(staging.copy({"same": torch.ones(3), "longer": torch.ones(3), "dtype": torch.ones(3)})[0])
    tensors = {"same": torch.zeros(3), "longer": torch.zeros(4), "dtype": torch.zeros(3, dtype=torch.int32)}
    second, _ = staging.copy(tensors)
    assert [second[name] is first[name] for name in tensors] == [True, False, False]
    assert all(torch.equal(second[name], tensor) for name, tensor in tensors.items())
    assert staging.copies == second


def test_only_large_tensors_that_are_selected_are_copied_later() -> None:
    state = {name: torch.zeros(size) for name, size in (("large", LARGE), ("small", LARGE - 1), ("other", LARGE))}
    staging = Staging()
    copies, copy_rest = staging.copy(state, lambda name: name != "other")
    for copy in copies.values():
        copy.fill_(7)  # to see which copies are made again
    copy_rest()
    assert {name: copy[0].item() for name, copy in copies.items()} == {"large": 0, "small": 7, "other": 7}


def test_a_tensor_that_changed_before_it_was_copied_is_an_error_with_its_name() -> None:
    state = {"optimizer.a": torch.zeros(LARGE), "optimizer.b": torch.zeros(LARGE)}
    _, copy_rest = Staging().copy(state, lambda name: True)
    copy_rest()
    state["optimizer.b"].add_(1)
    with pytest.raises(CheckpointError, match=r"^optimizer\.b was changed while it was copied for a checkpoint"):
        copy_rest()


def test_an_inference_tensor_has_no_count_of_changes_and_is_copied() -> None:
    with torch.inference_mode():
        tensor = torch.ones(LARGE)
    copies, copy_rest = Staging().copy({"t": tensor}, lambda name: True)
    copy_rest()
    assert torch.equal(copies["t"], torch.ones(LARGE))
