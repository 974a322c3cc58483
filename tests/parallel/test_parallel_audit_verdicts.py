"""The faulty rank follows from the answers alone; laws over all ranks, and the cases that stay open."""

import pytest

from disttrain.parallel.audit_verdicts import Fault, judge, judge_at_once


def test_ranks_that_agree_have_no_fault() -> None:
    assert judge("slot 1", {0: ["a"], 1: ["a"]}) == []
    assert judge("slot 1", {0: ["a", "a"]}) == []
    assert judge_at_once("state", ["a", "a", "a"]) == []


@pytest.mark.parametrize("faulty", [0, 1, 2])
@pytest.mark.parametrize(("again", "kind"), [("right", "transient"), ("wrong", "persistent"), ("other", "persistent")])
def test_of_three_ranks_the_one_that_is_alone_is_faulty(faulty: int, again: str, kind: str) -> None:
    answers = {rank: ["right", "right"] for rank in range(3)} | {faulty: ["wrong", again]}
    assert judge("slot 4", answers) == [Fault("slot 4", (faulty,), kind)]  # type: ignore[arg-type]


def test_a_third_rank_that_is_asked_once_may_be_the_faulty_one() -> None:
    faults = judge("slot 0", {0: ["right", "right"], 1: ["wrong", "wrong"], 2: ["odd"]})
    assert faults == [Fault("slot 0", (0, 1, 2), "undecided")]
    faults = judge("slot 0", {0: ["right", "right"], 1: ["wrong", "right"], 2: ["odd"]})
    assert faults == [Fault("slot 0", (1,), "transient"), Fault("slot 0", (2,), "transient")]


def test_of_two_ranks_the_one_that_changes_its_answer_is_faulty() -> None:
    assert judge("slot 2", {0: ["a", "a"], 1: ["b", "a"]}) == [Fault("slot 2", (1,), "transient")]
    assert judge("slot 2", {0: ["a", "c"], 1: ["b", "b"]}) == [Fault("slot 2", (0,), "persistent")]


@pytest.mark.parametrize("answers", [{0: ["a", "a"], 1: ["b", "b"]}, {0: ["a", "b"], 1: ["b", "a"]}])
def test_what_two_ranks_cannot_decide_is_said(answers: dict[int, list[str]]) -> None:
    assert judge("slot 2", answers) == [Fault("slot 2", (0, 1), "undecided")]


def test_one_rank_is_judged_by_its_own_answers() -> None:
    assert judge("slot 2", {0: ["wrong", "right", "right"]}) == [Fault("slot 2", (0,), "transient")]
    assert judge("slot 2", {0: ["a", "b", "c"]}) == [Fault("slot 2", (0,), "persistent")]


def test_most_states_are_the_right_one() -> None:
    assert judge_at_once("state", ["a", "b", "a"]) == [Fault("state", (1,), "transient")]
    assert judge_at_once("state", ["a", "b"]) == [Fault("state", (0, 1), "undecided")]
    assert judge_at_once("state", ["a", "b", "c", "a"]) == [Fault("state", (0, 1, 2, 3), "undecided")]
