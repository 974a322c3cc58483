"""The results of several updates come together by slot, and the step's outcome is that of all of them."""

from typing import Any

import torch
from small_run import single
from torch import Tensor

from disttrain.handlers.values import fetch_values
from disttrain.run.updates_together import Precisions, ResultsTogether, States


def result(loss: float, **values: Any) -> tuple[Tensor, None, dict[str, Any]]:
    return torch.tensor(loss), None, values


def test_the_values_of_all_updates_of_a_slot_come_together() -> None:
    results = ResultsTogether(["d", "g"])
    for name, losses in (("d", (1.0, 2.0)), ("g", (3.0, 4.0))):
        for loss in losses:
            given = result(loss, seen=torch.tensor(loss * 10)) if name == "d" else result(loss)
            assert results.of(name, None, None, given, given[0]) == loss
        results.norm_of(name, torch.tensor(0.5))
    results.norm_of("g", None)
    fetched = fetch_values(single(), results.take())
    norms = {"d/grad_norm": (0.5, None), "g/grad_norm": (0.5, None)}
    assert fetched == [
        {"d/loss": (1.0, None), "d/seen": (10.0, None), "g/loss": (3.0, None), **norms},
        {"d/loss": (2.0, None), "d/seen": (20.0, None), "g/loss": (4.0, None), **norms},
    ]
    assert results.take() == []  # once


def test_an_update_that_was_not_due_has_no_values() -> None:
    results = ResultsTogether(["d", "g"])
    results.of("d", None, None, result(1.0), torch.tensor(1.0))
    assert [list(kept.numbers) for kept in results.take()] == [["d/loss"]]


class Counter:
    name = "counting"

    def __init__(self, count: int) -> None:
        self.count = count

    def forward(self) -> int:
        return self.count

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def test_states_are_kept_by_name() -> None:
    parts: dict[str, Any] = {"d": Counter(3), "g": Counter(5)}
    together = Precisions(parts)
    assert (together.name, together.forward()) == ("counting", 3)
    others = States({"d": Counter(0), "g": Counter(0), "without": None})
    others.load_state_dict(together.state_dict())
    assert others.state_dict() == {"d": {"count": 3}, "g": {"count": 5}}
