"""A killed rank is named in one line, with a hint where the kernel wanted memory; torchrun's own log is suppressed."""

import logging
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing import api

from disttrain.launching import killed_ranks
from disttrain.launching.killed_ranks import KilledRanks, suppress


def test_the_agent_that_recovers_prints_itself() -> None:
    assert suppress(logging.LogRecord("torch", logging.ERROR, "api.py", 1, "failed", (), None)) is False


def test_torchruns_log_is_suppressed_and_a_killed_rank_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    text = "failed (exitcode: %s) local_rank: %s (pid: %s) of fn: %s (start_method: %s)"
    for arguments in ((-9, 1, 77, "_run_rank", "forkserver"), (1, 0, 78, "_run_rank", "forkserver")):
        record = logging.LogRecord("torch.distributed.elastic", logging.ERROR, "api.py", 1, text, arguments, None)
        assert not KilledRanks().report(record)
    assert capsys.readouterr().err == "the rank with local rank 1 was ended by SIGKILL\n"


@pytest.mark.parametrize(
    ("before", "now", "code", "hints"),
    [(3, 4, -9, True), (3, 3, -9, False), (3, 4, -15, False), (None, 4, -9, False), (3, None, -9, False)],
)
def test_a_kill_for_want_of_memory_is_hinted_at(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    before: int | None,
    now: int | None,
    code: int,
    hints: bool,
) -> None:
    counts = iter([before, now])
    monkeypatch.setattr(killed_ranks, "num_killed_for_memory", lambda: next(counts))
    record = logging.LogRecord(
        "torch", logging.ERROR, "api.py", 1, "failed (exitcode: %s) local_rank: %s", (code, 0), None
    )
    KilledRanks().report(record)
    assert ("has killed a process for want of memory meanwhile; --memory tells" in capsys.readouterr().err) == hints


def test_torch_logs_a_failed_rank_in_the_words_that_are_matched() -> None:
    assert '"failed (exitcode: %s)' in Path(api.__file__).read_text()  # launching/killed_ranks.py matches this text
