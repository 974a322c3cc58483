"""The message of a step that differs: both values, what was the same before, and what is known to be the cause."""

from disttrain.evidence import LedgerDifference
from disttrain.run.mismatch import UNEXPLAINED, Mismatch
from disttrain.run.replay_start import Start


def text(step: int, *reasons: str) -> str:
    difference = LedgerDifference(step, "loss", ("slot 2",), "1.5 (0x)", "2.5 (0x)", (), None)
    return str(Mismatch(difference, Start(4, label="a state"), reasons))


def test_what_was_the_same_before() -> None:
    begins = "is not the run's: the loss (slot 2): expected 1.5 (0x), as the ledger has it, got 2.5 (0x);"
    assert text(4).startswith(f"step 4 {begins} it is the state of a state. ")
    assert text(5).startswith(f"step 5 {begins} it is the first step from a state. ")
    assert text(6).startswith(f"step 6 {begins} step 5 was the same. ")
    assert text(9).startswith(f"step 9 {begins} steps 5 to 8 were the same. ")


def test_the_causes_that_are_known() -> None:
    assert text(5).endswith(UNEXPLAINED)
    assert text(5, "torch: 1 then, 2 now", "other").endswith("to be expected: torch: 1 then, 2 now; other")
