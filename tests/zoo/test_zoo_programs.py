"""Random programs have the losses of a plain loop on one rank, and the same bits resized and sharded."""

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, settings
from ranks import Ranks
from zoo_lives import (
    ONE_RANK_SHARDED,
    RESIZED,
    WHOLE,
    Outcome,
    difference,
    difference_from_plain,
    evidence,
    live_plainly,
    run_lives,
)
from zoo_programs import Program, programs

NUM_PROGRAMS = 4 if settings.default.derandomize else 500
"""`make soak` runs on new examples."""


@settings(
    max_examples=NUM_PROGRAMS,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # not shrunk: one that hangs would take its timeout each time
)
@given(program=programs())
def test_a_random_program_has_the_same_bits_everywhere(ranks: Ranks, program: Program) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(ranks, program, Path(folder))


def check(ranks: Ranks, program: Program, folder: Path) -> None:
    """Run a program on one rank, resized and sharded: the same bits, or a refusal, which one rank gets too."""
    lives = {"one": WHOLE, **RESIZED}
    outcomes = {name: run_lives(ranks, program, each, folder / name) for name, each in lives.items()}
    if refused(outcomes["fsdp"]) and not refused(outcomes["one"]):
        alone = run_lives(ranks, program, ONE_RANK_SHARDED, folder / "alone")
        assert {each.message for each in alone} == {each.message for each in outcomes.pop("fsdp")}
        assert refused(alone)
    if refused(outcomes["one"]):
        assert all(refused(each) for each in outcomes.values())
        assert len({each.message for of_life in outcomes.values() for each in of_life}) == 1
        return
    for name, of_life in outcomes.items():
        assert {(each.status, each.message) for each in of_life} == {("completed", "")}, (name, of_life)
    found = {name: evidence(folder / name) for name in outcomes}
    plain = ranks(1, live_plainly, program)[0]
    assert plain is not None
    assert difference_from_plain(found["one"], plain) == ""
    for name, each in found.items():
        assert difference(found["one"], each) == "", name


def refused(outcomes: list[Outcome]) -> bool:
    """Return whether a life ended by a ConfigError before its first step, on all ranks."""
    return all(each.status == "ConfigError" and each.num_steps == 0 for each in outcomes)
