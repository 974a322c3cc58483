"""Values beside the loss: copied when they are kept, folded like losses, and the same names in every slot."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import Ranks

from disttrain.backend import Backend, connect
from disttrain.errors import ConfigError
from disttrain.handlers.values import SlotValues, ValueNames, fetch_values, fold_values, keep


def fetched(*values: dict[str, Any]) -> list[SlotValues]:
    with connect("single") as backend:
        return fetch_values(backend, [keep(of_slot) for of_slot in values])


def test_values_of_any_dtype_are_fetched_exactly() -> None:
    large = 2**24 + 1  # no float32
    slot = {
        "half": torch.tensor(0.5, dtype=torch.bfloat16),
        "count": (torch.tensor(large), torch.tensor(3)),
        "double": torch.tensor(0.1, dtype=torch.float64),
        "mixed": (torch.tensor(2.5), 4),
        "plain": 7,
        "flag": torch.tensor(True),
    }
    expected = {
        "half": (0.5, None),
        "count": (float(large), 3.0),
        "double": (0.1, None),
        "mixed": (2.5, 4.0),
        "plain": (7.0, None),
        "flag": (1.0, None),
    }
    assert fetched(slot, {}, slot) == [expected, {}, expected]


def test_what_is_kept_does_not_change_with_a_parameter_and_holds_no_large_tensor() -> None:
    parameter, activations = torch.nn.Parameter(torch.tensor(2.0)), torch.arange(1000.0)
    kept = keep({"temperature": parameter, "first": activations[1]})
    with torch.no_grad():
        parameter.fill_(5.0)
    ((_, stack),) = kept.stacks
    assert not stack.requires_grad
    assert stack.untyped_storage().nbytes() == 2 * 4
    with connect("single") as backend:
        assert fetch_values(backend, [kept]) == [{"temperature": (2.0, None), "first": (1.0, None)}]


def test_means_count_like_the_loss_and_pairs_by_their_own_weight() -> None:
    slots: list[SlotValues] = [
        {"ce": (1.0, None), "hits": (3.0, 4.0), "nothing": (math.nan, 0.0)},
        {"ce": (math.nan, None), "hits": (1.0, 1.0), "nothing": (0.0, 0.0)},
        {"ce": (4.0, None), "hits": (math.nan, 0.0), "nothing": (0.0, 0.0)},
    ]
    folded = fold_values(slots, [1, 0, 2], ["a", "b", "c"])
    assert folded == {"ce": (1.0 + 2 * 4.0) / 3, "hits": (3.0 + 1.0) / 5, "nothing": None}
    assert math.isnan(fold_values(slots, [1, 1, 1], ["a", "b", "c"])["ce"])  # type: ignore[arg-type]


@given(
    targets=st.lists(st.integers(-(2**20), 2**20), min_size=1, max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
def test_however_targets_lie_in_slots_their_mean_is_the_same(targets: list[int], cuts: list[int]) -> None:
    ends = [0, *sorted(min(cut, len(targets)) for cut in cuts), len(targets)]
    parts = [targets[first:end] for first, end in itertools.pairwise(ends)]
    weights, places = [len(part) for part in parts], [str(i) for i in range(len(parts))]
    slots: list[SlotValues] = [
        {"pair": (float(sum(part)), float(len(part)))} | ({} if not part else {"total": (float(sum(part)), None)})
        for part in parts
    ]
    folded = fold_values(slots, weights, places)
    assert folded["pair"] == sum(targets) / len(targets)
    assert folded["total"] == sum(sum(part) * len(part) for part in parts) / len(targets)


def test_a_slot_that_counts_for_nothing_may_leave_values_out() -> None:
    slots: list[SlotValues] = [{}, {"ce": (2.0, None)}, {}]
    names = ValueNames()
    for values, weight in zip(slots, [0, 3, 0], strict=True):
        names.check(values, "slot", counts=weight > 0)
    assert fold_values(slots, [0, 3, 0], ["a", "b", "c"]) == {"ce": 2.0}
    assert fold_values(slots, [0, 0, 0], ["a", "b", "c"]) == {"ce": None}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"ce": 1}, "got 'aux' in slot 0 of step 1 but not in slot 1 of step 1"),
        ({"ce": 1, "aux": 1, "kl": 1}, "got 'kl' in slot 1 of step 1 but not in slot 0 of step 1"),
        ({}, "got 'aux' in slot 0 of step 1 but not in slot 1 of step 1"),
    ],
)
def test_another_name_is_refused_with_the_way_out(values: dict[str, Any], words: str) -> None:
    names = ValueNames()
    names.check({"ce": 1, "aux": 1}, "slot 0 of step 1", counts=True)
    with pytest.raises(ConfigError, match=rf"^forward: .*{words}; return it always, as the pair \(0.0, 0\)"):
        names.check(values, "slot 1 of step 1", counts=True)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_weight_that_is_none_is_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match=rf"^forward: .* the value 'ce', got {weight} in slot 3"):
        fold_values([{"ce": (1.0, weight)}], [1], ["slot 3 of step 2"])


def from_slots(backend: Backend) -> list[SlotValues]:
    return fetch_values(backend, [keep({"rank": torch.tensor(backend.rank), "all": (1.5, 2)})])


def test_each_rank_fetches_its_own(ranks: Ranks) -> None:
    assert ranks(2, from_slots) == [[{"rank": (float(rank), None), "all": (1.5, 2.0)}] for rank in range(2)]
