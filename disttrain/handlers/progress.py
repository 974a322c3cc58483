"""What a person sees of a run, on rank 0 only: a bar on a terminal, now and then a plain line elsewhere."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from disttrain.engine import Engine, Events
from disttrain.handlers.losses import Pace

REDRAW_EVERY_S = 0.1


def number(value: Any) -> str:
    """Return a metric's value as a person wants to read it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class ProgressDisplay:
    """Shows epoch, step, loss, samples/s and time left; `total_steps` is where the run ends."""

    def __init__(self, console: Console, *, total_steps: int, max_epochs: int | None, line_every_s: float) -> None:
        self.console = console
        self.total_steps = total_steps
        self.max_epochs = max_epochs
        self.every_s = REDRAW_EVERY_S if console.is_terminal else line_every_s
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._pace: Pace | None = None
        self._next = 0.0
        self._started = (0, 0.0)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.show)

    def start(self, engine: Engine) -> None:
        self._started = (engine.state.iteration, time.monotonic())
        self._next = time.monotonic() + self.every_s
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[pace]}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._task = self._bar.add_task(
                self._epoch(engine), total=self.total_steps, completed=engine.state.iteration, pace=""
            )
            self._bar.start()

    def pace(self, pace: Pace) -> None:
        """Take note of the newest loss; listens to a LossLog."""
        self._pace = pace

    def show(self, engine: Engine) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self.every_s
        step = engine.state.iteration
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, description=self._epoch(engine), pace=self._words())
        else:
            first, since = self._started
            left = (now - since) / max(step - first, 1) * (self.total_steps - step)
            self.line(
                f"{self._epoch(engine)}  step {step}/{self.total_steps}  {self._words()}  "
                f"{timedelta(seconds=round(left))} left"
            )

    def validated(self, step: int, epoch: int, values: Mapping[str, Any]) -> None:
        """Print one line of validation results."""
        of = f"/{self.max_epochs}" if self.max_epochs else ""
        words = "  ".join(f"{name} {number(value)}" for name, value in values.items())
        self.line(f"epoch {epoch}{of}  step {step}  validation: {words}")

    def line(self, text: str) -> None:
        console = self._bar.console if self._bar is not None else self.console
        # Without markup: a metric's "[nan, 0.5]" is no style.
        console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bar off the screen; any number of times."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _epoch(self, engine: Engine) -> str:
        return f"epoch {engine.state.epoch}" + (f"/{self.max_epochs}" if self.max_epochs else "")

    def _words(self) -> str:
        if self._pace is None:
            return ""
        return f"loss {self._pace.loss:.4f}  {self._pace.samples_per_second:,.0f} samples/s"


@contextmanager
def dropping(console: Console, *, line_every_s: float) -> Iterator[Callable[[int, int], None]]:
    """Show how data that lies before a resumed run's place is read and dropped; the function takes (done, total)."""
    began = shown = time.monotonic()
    bar: Progress | None = None

    def show(done: int, total: int) -> None:
        nonlocal bar, shown
        now = time.monotonic()
        if done == 0:
            console.print(
                f"WARNING: {total} steps of the training data are read and dropped to come to where the run stands; "
                "data goes on at once with a state_dict() that holds all, and load_state_dict(state) (docs/streams.md)",
                style="bold yellow",
                soft_wrap=True,
            )
            if console.is_terminal:
                columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
                bar = Progress(TextColumn("dropping"), *columns, console=console, transient=True)
                bar.add_task("", total=total)
                bar.start()
        if bar is not None:
            bar.update(bar.task_ids[0], completed=done)
        elif now - shown >= line_every_s:
            shown = now
            left = timedelta(seconds=round((now - began) / max(done, 1) * (total - done)))
            console.print(f"read and dropped {done} of {total} steps, {left} left", soft_wrap=True)

    try:
        yield show
    finally:
        if bar is not None:
            bar.stop()
