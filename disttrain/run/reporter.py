"""Ledger, curves, progress display and progress posts of a run, fed together.

*Contract*: every rank has a ledger, for its hashes are gathered; rank 0 alone has curves and a display, and posts if
an operator asks for them. All see the same lines in the same order, so what is shown is what is written.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from disttrain.evidence import Ledger
from disttrain.handlers.curves import Curves
from disttrain.handlers.losses import Pace
from disttrain.handlers.posts import ProgressPosts
from disttrain.handlers.progress import ProgressDisplay


class Reporter:
    """Writes and shows the results of training and validation steps; all but the ledger are None but on rank 0."""

    def __init__(
        self,
        ledger: Ledger,
        curves: Curves | None,
        display: ProgressDisplay | None,
        posts: ProgressPosts | None = None,
    ) -> None:
        self._ledger = ledger
        self._curves = curves
        self._display = display
        self._posts = posts

    def fetched(self, lines: list[dict[str, Any]], pace: Pace) -> None:
        """Report training steps whose losses were fetched."""
        self._ledger.fetched(lines)
        if self._curves is not None:
            self._curves.trained(lines, pace)
        if self._display is not None:
            self._display.pace(pace)
        if self._posts is not None:
            self._posts.pace(pace)

    def validated(self, step: int, epoch: int, values: Mapping[str, Any]) -> None:
        """Report the results of an evaluation."""
        if self._curves is not None:
            self._curves.validated(step, epoch, values)
        if self._display is not None:
            self._display.validated(step, epoch, values)
        if self._posts is not None:
            self._posts.validated(values)

    def newest(self) -> dict[str, Any]:
        """Return the values of the last training line, of this launch or an earlier one; empty but on rank 0."""
        return {} if self._curves is None else self._curves.newest()

    def warn(self, text: str) -> None:
        """Show a warning above the progress display."""
        if self._display is not None:
            self._display.line(f"WARNING: {text}")

    def sync(self) -> None:
        """Flush ledger and curves to the disk."""
        self._ledger.sync()
        if self._curves is not None:
            self._curves.sync()

    def close(self) -> None:
        """Remove the display and close the files, each even if another cannot be closed; any number of times."""
        with ExitStack() as stack:
            for part in (self._ledger, self._curves, self._display, self._posts):
                if part is not None:
                    stack.callback(part.close)
