"""The results of a step's slots are taken once, in order; a step that failed leaves nothing behind."""

import pytest
import torch

from disttrain.backend import connect
from disttrain.engine import Engine
from disttrain.handlers.values import KeptValues, fetch_values
from disttrain.run.slot_results import SlotResults


def names(kept: list[KeptValues]) -> list[list[str]]:
    return [list(values.numbers) for values in kept]


def test_values_are_taken_once_in_slot_order() -> None:
    results, loss = SlotResults(), torch.ones((), requires_grad=True) * 2
    output = results(None, None, (loss, "outputs", {"a": loss, "b": 3.0}), loss)
    results(None, None, (loss, "outputs", {}), loss)
    assert not output.requires_grad
    kept = results.take()
    assert names(kept) == [["a", "b"], []]
    with connect("single") as backend:
        assert fetch_values(backend, kept) == [{"a": (2.0, None), "b": (3.0, None)}, {}]
    assert results.take() == []
    results(None, None, (loss, "outputs", {}), loss)
    assert results.take() == []  # no slot has any


def test_a_step_that_failed_leaves_nothing() -> None:
    results = SlotResults()
    fails = [True]

    def step(engine: Engine, batch: int) -> None:
        results(None, None, (torch.ones(()), None, {"a": 1.0}), torch.ones(()))
        if fails.pop():
            raise ValueError("lost")

    trainer = Engine(step)
    results.attach(trainer)
    with pytest.raises(ValueError, match="lost"):
        trainer.run([0], max_epochs=1)
    fails.append(False)
    trainer.run([0], max_epochs=2)
    assert names(results.take()) == [["a"]]
