"""Recovery in place in simulated trouble: thousands of schedules keep the rules, and planted bugs are found.

`python tests/launching/test_recovery_simulated.py FIRST COUNT` runs the schedules of other seeds (`make soak` does).
"""

import inspect
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import pytest
from recovery_simulator import CALM, Troubles, Violation, simulate

from disttrain.launching import membership, procedures

MODULES = (membership, procedures)
AT_ONCE = 500
# Beside the mixture that a seed chooses: deaths alone, where every wait is short, and ranks that are stopped often.
MIXTURES = (
    Troubles(0.3, *CALM[1:]),
    Troubles(kills=0.1, stops=0.5, agent_stops=0.0, host_losses=0.0, cuts=0.1, loses=0.0, slow=0.0),
)


class Bug(NamedTuple):
    """A change of one function's source."""

    where: str
    old: str
    new: str
    seeds: int = 300
    is_slow: bool = False


# Some rules only save time, since another one holds too: a word of a generation that is over (`left`, `overdue`) would
# end the present one, which is then done again, and a silent member that is ready would be missed in the next one.
BUGS = {
    "a generation without a state": Bug("_obstacle", "if not steps and state.number:", "if False:"),
    "a generation on too few hosts": Bug("_obstacle", "hosts < state.least", "False"),
    "a run that is done is restarted": Bug("settled", "and not state.finished:", "and True:"),
    "living members are not waited for": Bug("settled", "or state.missing:", "or False:"),
    "the first generation begins before all hosts came": Bug("settled", "len(state.came) < state.hosts", "False"),
    "who was ready stays ready": Bug("settled", "ready={}", "ready=state.ready"),
    "a number is used twice": Bug("settled", "state.number + 1", "max(1, state.number)"),
    "a number is left out": Bug("settled", "state.number + 1", "state.number + 1 + (state.number > 2)"),
    "the state of one behind is taken": Bug("step", "max(", "min("),
    "who is behind by a step takes nothing": Bug("behind", "step != self.step", "step is None", 1000),
    "who joins takes nothing": Bug("behind", "step != self.step", "step is not None and step != self.step"),
    "who joins counts as one with a state": Bug("asks", "{name: None,", "{name: 0,"),
    "who joins does not end the generation": Bug("asks", 'None if starting else f"{name} joins"', "None"),
    "who left does not end the generation": Bug("left", "ended=state.ended or reason", "ended=state.ended"),
    "the dead are waited for": Bug("died", "other for other in state.alive if other != name", "state.alive"),
    "the dead are ready": Bug("died", "if other != name}", "}"),
    "who is silent is waited for": Bug("silent", "away=(*state.away, *quiet), ", ""),
    "who has finished is waited for": Bug("missing", "*self.finished, ", "", is_slow=True),
    "a lost race counts as won": Bug("change", "if text == desired:", "if True:"),
    "the old generation is taken for the next": Bug("_found", "state.number > number and ", ""),
    "who is left out waits on": Bug("_found", "if name not in state.ready:", "if False:"),
    "nobody is left out after a wait": Bug("_next", "waited >= patience_s", "False", 1000),
}


@contextmanager
def planted(bug: Bug) -> Iterator[None]:
    """Change the source of a function of the agreement for a while."""
    owners = [*MODULES, membership.Generation, membership.Agreement, procedures.Watch]
    owner = next(owner for owner in owners if bug.where in vars(owner))
    found = vars(owner)[bug.where]
    function = found.fget if isinstance(found, property) else found
    source = inspect.cleandoc("\n" + inspect.getsource(function))
    assert source.count(bug.old) == 1, (bug, source)
    names = vars(sys.modules[function.__module__])
    scope: dict[str, object] = {}
    exec(compile(source.replace(bug.old, bug.new), f"<{bug.where}>", "exec"), names, scope)  # noqa: S102
    users = [owner, *(module for module in MODULES if vars(module).get(bug.where) is found)]
    try:
        for user in users:
            setattr(user, bug.where, scope[bug.where])
        yield
    finally:
        for user in users:
            setattr(user, bug.where, found)


def test_schedules_of_many_seeds_keep_the_rules() -> None:
    counts: Counter[str] = Counter()
    for seed in range(120):
        counts.update(simulate(seed))
        if seed % 20 == 0:
            for troubles in MIXTURES:
                simulate(seed, troubles=troubles)
    # They are no idle schedules.
    assert counts["generations"] > 300
    assert counts["kills"] > 300
    assert counts["behind"] > 10
    assert min(counts[name] for name in ("stops", "cuts", "losses", "restarts", "redone")) > 0


def test_a_seed_is_one_schedule() -> None:
    assert simulate(7) == simulate(7)
    assert simulate(7) != simulate(8)


def test_without_trouble_nothing_happens_but_the_run() -> None:
    calm = Troubles(kills=0.0, stops=0.0, agent_stops=0.0, host_losses=0.0, cuts=0.0, loses=0.0, slow=0.0)
    counts = simulate(1, hosts=2, ranks=2, troubles=calm)
    assert counts["generations"] == 1
    assert counts["restarts"] == 0


SLOW = [pytest.param(name, marks=[pytest.mark.slow] * bug.is_slow) for name, bug in BUGS.items()]


@pytest.mark.parametrize("name", SLOW)
def test_a_planted_bug_is_found(name: str) -> None:
    with planted(BUGS[name]), pytest.raises(Violation):
        for seed in range(BUGS[name].seeds):
            simulate(seed)
            for troubles in MIXTURES:
                simulate(seed, troubles=troubles)


@pytest.mark.slow
def test_thousands_of_schedules_keep_the_rules() -> None:
    for seed in range(1000, 4000):
        simulate(seed)


def _simulate_some(first: int, count: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    for seed in range(first, first + count):
        counts.update(simulate(seed))
    return counts


def main(first: int, count: int) -> None:
    """Run the schedules of `count` seeds on all cores; a Violation ends this with its seed."""
    counts: Counter[str] = Counter()
    with ProcessPoolExecutor() as pool:
        starts = range(first, first + count, AT_ONCE)
        for found in pool.map(_simulate_some, starts, [min(AT_ONCE, first + count - start) for start in starts]):
            counts.update(found)
    print(f"{count} schedules from seed {first}: {dict(counts)}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
