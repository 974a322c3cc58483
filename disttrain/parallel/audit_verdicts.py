"""Tells which rank is faulty, from the answers of several ranks to the same question; pure Python.

*Contract*: every rank that works gives the same bits for the same work, however often it is asked. So an answer that
two ranks give is right, and whoever has given another one is faulty. Where no two ranks agree, whoever changes its own
answer is faulty. What is still open then is said to be undecided, and names all ranks that may be it. One rank that is
asked three times is judged by its own answers: two that are the same are right.

A fault is transient if the faulty rank's last answer was right, or if it was asked once; else it is persistent.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["transient", "persistent", "undecided"]


@dataclass(frozen=True)
class Fault:
    """Something that a rank got wrong; `ranks` is that rank alone, or all that may be it if `kind` is "undecided"."""

    what: str
    ranks: tuple[int, ...]
    kind: Kind


def judge(what: str, answers: Mapping[int, Sequence[Any]]) -> list[Fault]:
    """Return the faults that show in the answers of ranks to one question, each rank's in the order it gave them."""
    given = {rank: list(each) for rank, each in answers.items() if each}
    if len({answer for each in given.values() for answer in each}) < 2:
        return []
    right = _right(given)
    if right is None:
        return _judged_by_themselves(what, given)
    return [
        Fault(what, (rank,), "transient" if each[-1] == right or (len(each) == 1 and len(given) > 1) else "persistent")
        for rank, each in sorted(given.items())
        if any(answer != right for answer in each)
    ]


def _right(given: Mapping[int, Sequence[Any]]) -> Any:
    """Return the answer on which the most ranks agree, at least two; None if there is none."""
    if len(given) == 1:
        [own] = given.values()
        votes = Counter(own)
    else:
        votes = Counter(answer for each in given.values() for answer in dict.fromkeys(each))
    (answer, count), *others = votes.most_common()
    tied = bool(others) and others[0][1] == count
    return None if count < 2 or tied else answer


def _judged_by_themselves(what: str, given: Mapping[int, Sequence[Any]]) -> list[Fault]:
    """Name the ranks that have changed their own answer; if all have, or none, the fault is undecided."""
    changed = [rank for rank, each in sorted(given.items()) if len(set(each)) > 1]
    if len(given) == 1:
        return [Fault(what, tuple(given), "persistent")]
    if changed and len(given) - len(changed) == 1:
        return [Fault(what, (rank,), "persistent") for rank in changed]
    return [Fault(what, tuple(sorted(given)), "undecided")]


def judge_at_once(what: str, answers: Sequence[Any]) -> list[Fault]:
    """As `judge`, for one answer of each rank, of which the same is right for more than half; they are not asked again.

    The kind is "transient" where a rank is named: whether the fault comes again only shows when it does.
    """
    votes = Counter(answers).most_common()
    if len(votes) < 2:
        return []
    right, count = votes[0]
    if 2 * count <= len(answers):
        return [Fault(what, tuple(range(len(answers))), "undecided")]
    return [Fault(what, (rank,), "transient") for rank, answer in enumerate(answers) if answer != right]
