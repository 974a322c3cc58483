"""The log file of each rank: log records, warnings, and the error that ended the run."""

import logging
import re
import warnings
from pathlib import Path

import pytest

from disttrain.run.rank_log import RankLog

logger = logging.getLogger("disttrain.somewhere")


def test_records_go_to_the_file_of_the_rank(tmp_path: Path) -> None:
    with RankLog(tmp_path / "logs", 1):
        logger.info("step %d is skipped", 7)
        logger.debug("not this")
    logger.error("too late")
    line = r"\d{4}-\d\d-\d\d [\d:,]+ rank 1 INFO disttrain\.somewhere: step 7 is skipped\n"
    assert re.fullmatch(line, (tmp_path / "logs" / "rank-1.log").read_text())


def test_a_resumed_run_goes_on_in_the_same_file(tmp_path: Path) -> None:
    for words in ("first", "second"):
        with RankLog(tmp_path, 0):
            logger.warning(words)
    assert re.findall(r"somewhere: (\w+)", (tmp_path / "rank-0.log").read_text()) == ["first", "second"]


def test_rank_0_shows_warnings_and_the_others_log_them(tmp_path: Path) -> None:
    with RankLog(tmp_path, 1):
        warnings.warn("a slow path", UserWarning, stacklevel=1)
    assert "UserWarning: a slow path" in (tmp_path / "rank-1.log").read_text()
    with RankLog(tmp_path, 0), pytest.warns(UserWarning, match="a slow path"):
        warnings.warn("a slow path", UserWarning, stacklevel=1)
    assert (tmp_path / "rank-0.log").read_text() == ""


def test_the_error_that_ended_the_run_is_logged_with_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RankLog(tmp_path, 0):
        1 / 0
    text = (tmp_path / "rank-0.log").read_text()
    assert "ERROR disttrain.run.rank_log: the run ended with ZeroDivisionError: division by zero" in text
    assert "Traceback" in text
    assert "1 / 0" in text


def test_the_settings_of_logging_are_restored(tmp_path: Path) -> None:
    root, show = logging.getLogger(), warnings.showwarning
    before = root.level, list(root.handlers)
    with RankLog(tmp_path, 1):
        assert root.level <= logging.INFO
    assert (root.level, root.handlers) == before
    assert warnings.showwarning is show


def test_a_full_disk_is_reported_once_and_the_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rank-0.log").symlink_to("/dev/full")
    with RankLog(tmp_path, 0) as log:
        logger.warning("first")
        logger.warning("second")
        log._file.stream = None  # otherwise closing the file would try to write the rest once more
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1
    assert re.fullmatch(r"the log .*rank-0\.log cannot be written: .*No space left on device", printed[0])
