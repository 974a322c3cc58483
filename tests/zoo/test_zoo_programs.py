"""Random programs have the losses of a plain loop on one rank, and the same bits resized and sharded."""

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from ranks import Ranks
from zoo_lives import RESIZED, WHOLE, difference, difference_from_plain, evidence, live_plainly, run_lives
from zoo_programs import Program, programs

NUM_PROGRAMS = 4 if settings.default.derandomize else 500
"""`make soak` runs on new examples."""


@settings(max_examples=NUM_PROGRAMS, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(program=programs())
def test_a_random_program_has_the_same_bits_everywhere(ranks: Ranks, program: Program) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(ranks, program, Path(folder))


def check(ranks: Ranks, program: Program, folder: Path) -> None:
    """Run a program on one rank, resized and sharded; each is whole, or all are refused in the same words."""
    lives = {"one": WHOLE, **RESIZED}
    outcomes = {name: run_lives(ranks, program, each, folder / name) for name, each in lives.items()}
    ends = {name: {(each.status, each.message) for each in of_life} for name, of_life in outcomes.items()}
    if any(status == "ConfigError" for status, _ in ends["one"]):
        assert len(set(map(str, ends.values()))) == 1, ends
        assert not any(each.num_steps for of_life in outcomes.values() for each in of_life)
        return
    assert all(end == {("completed", "")} for end in ends.values()), ends
    found = {name: evidence(folder / name) for name in lives}
    plain = ranks(1, live_plainly, program)[0]
    assert plain is not None
    assert difference_from_plain(found["one"], plain) == ""
    for name, each in found.items():
        assert difference(found["one"], each) == "", name
