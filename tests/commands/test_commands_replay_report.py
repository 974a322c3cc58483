"""A replayed step as a table and as JSON: what is shortened, what is missing, and strict JSON for nan."""

import io
import json

from disttrain.commands.replay_report import SHOWN_SAMPLES, print_step, sources_text, step_json
from disttrain.run.replay import Replayed
from disttrain.run.replay_start import Start
from disttrain.run.replayed_slots import ReplayedSlot

LINE = {"step": 7, "loss": "nan", "grad_norm": None, "learning_rate": (0.5).hex()}


def replayed(*slots: ReplayedSlot, **changes: object) -> Replayed:
    found = Replayed(7, 2, Start(4, label="a state"), list(slots), LINE, None, 3)
    return found._replace(**changes)  # type: ignore[arg-type]


def printed(found: Replayed, *, whole: bool = False) -> list[str]:
    output = io.StringIO()
    print_step("runs/a", found, output, whole=whole)
    return [line.rstrip() for line in output.getvalue().splitlines()]


def test_samples_sources_weights_and_values() -> None:
    many = ReplayedSlot(0, list(range(20)), ["a"] * 15 + ["b"] * 5, 3, 1.5, 0.25, {"ce": 2.0, "pair": [1.0, 2]})
    stream = ReplayedSlot(1, None, None, 0, None, None, {})
    head, columns, first, second, numbers, proof = printed(replayed(many, stream))
    assert head == "runs/a, step 7 (epoch 2), from a state"
    assert columns.split() == ["slot", "loss", "grad", "norm", "weight", "ce", "pair", "sources", "samples"]
    shown = " ".join(map(str, range(SHOWN_SAMPLES)))
    assert " ".join(first.split()) == f"0 1.5 0.25 3 2.0 [1.0, 2] a 15, b 5 {shown} and 8 more"
    assert second.split() == ["1", "-", "-", "0", "-", "-", "of", "a", "stream"]
    assert numbers == "the whole step: loss nan, grad_norm None, learning_rate 0.5"
    assert proof == "proven: each of the steps 5 to 7 has the bits of the run's ledger"
    assert " 19" in printed(replayed(many), whole=True)[2]


def test_one_slot_alone_that_is_not_proven() -> None:
    found = replayed(ReplayedSlot(3, [1]), line={}, num_proven=2)
    assert printed(found)[3:] == [
        "proven: each of the steps 5 to 6 has the bits of the run's ledger",
        "the ledger has no losses of the slots of step 7: without --slot the step is proven too",
    ]
    assert printed(found._replace(num_proven=0))[3:] == [
        "the ledger has no losses of the slots of step 7: without --slot the step is proven too"
    ]
    assert printed(found._replace(num_proven=3))[3:] == [
        "proven: each of the steps 5 to 7 has the bits of the run's ledger"
    ]


def test_json_is_strict() -> None:
    content = json.loads(step_json("runs/a", replayed(ReplayedSlot(0, [5], None, None, float("nan")))))
    assert content["loss"] is None
    assert (content["learning_rate"], content["proven_steps"], content["from"]) == (0.5, 3, "a state")
    assert content["slots"][0]["loss"] is None
    assert content["slots"][0]["indices"] == [5]


def test_sources_are_counted_in_their_order() -> None:
    assert sources_text(["b", "a", "b"]) == "b 2, a 1"
