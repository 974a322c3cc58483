"""The log file of each rank, `logs/rank-N.log`, open while the run lasts."""

import logging
import sys
from pathlib import Path
from types import TracebackType

logger = logging.getLogger(__name__)

LINE_FORMAT = "%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"


class _LogFile(logging.FileHandler):
    """A log file that reports a full disk once, so that the run's own message is not buried."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.failed:
            self.failed = True
            print(f"the log {self.baseFilename} cannot be written: {sys.exc_info()[1]}", file=sys.stderr)


class RankLog:
    """A context in which all log records go to the rank's file; on ranks other than 0 all warnings too.

    An exception that leaves the context is logged with its traceback; a person sees the message alone.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rank-{rank}.log"
        self._file = _LogFile(self.path, encoding="utf-8")
        self._file.setFormatter(logging.Formatter(LINE_FORMAT.format(rank=rank)))
        self._capture = rank != 0
        self._level = logging.WARNING

    def __enter__(self) -> "RankLog":
        root = logging.getLogger()
        self._level = root.level
        root.setLevel(min(root.level, logging.INFO))
        root.addHandler(self._file)
        if self._capture:
            logging.captureWarnings(True)  # rank 0 shows them
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            logger.error("the run ended with %s: %s", type(error).__name__, error, exc_info=error)
        root = logging.getLogger()
        root.removeHandler(self._file)
        root.setLevel(self._level)
        if self._capture:
            logging.captureWarnings(False)
        self._file.close()
