"""Show the progress of a run, on rank 0 only: a bar on a terminal, a plain line from time to time elsewhere."""

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


def value_text(value: Any) -> str:
    """Return a metric's value as text: a float with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class ProgressDisplay:
    """Shows epoch, step, loss, values, gradient norm, samples/s and the time left; the run ends at `total_steps`."""

    def __init__(self, console: Console, *, total_steps: int, max_epochs: int | None, line_every_s: float) -> None:
        self.console = console
        self.total_steps = total_steps
        self.max_epochs = max_epochs
        self.every_s = REDRAW_EVERY_S if console.is_terminal else line_every_s
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._pace: Pace | None = None
        self._values: dict[str, Any] = {}  # a value that is not in every line is shown until the next one
        self._next_show = 0.0
        self._start = (0, 0.0)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.show)

    def start(self, engine: Engine) -> None:
        self._start = (engine.state.iteration, time.monotonic())
        self._next_show = time.monotonic() + self.every_s
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
        """Store the newest loss, pace and values; a LossLog calls this after each fetch."""
        self._pace = pace
        self._values.update({name: value for name, value in pace.values.items() if isinstance(value, int | float)})

    def show(self, engine: Engine) -> None:
        now = time.monotonic()
        if now < self._next_show:
            return
        self._next_show = now + self.every_s
        step = engine.state.iteration
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, description=self._epoch(engine), pace=self._loss_and_pace())
        else:
            first_step, began = self._start
            left_s = (now - began) / max(step - first_step, 1) * (self.total_steps - step)
            self.line(
                f"{self._epoch(engine)}  step {step}/{self.total_steps}  {self._loss_and_pace()}  "
                f"{timedelta(seconds=round(left_s))} left"
            )

    def validated(self, step: int, epoch: int, values: Mapping[str, Any]) -> None:
        """Print the results of an evaluation on one line."""
        of_epochs = f"/{self.max_epochs}" if self.max_epochs else ""
        words = "  ".join(f"{name} {value_text(value)}" for name, value in values.items())
        self.line(f"epoch {epoch}{of_epochs}  step {step}  validation: {words}")

    def line(self, text: str) -> None:
        console = self._bar.console if self._bar is not None else self.console
        # Without markup: rich would read a metric's "[nan, 0.5]" as a style.
        console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Remove the bar from the screen; may be called several times."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _epoch(self, engine: Engine) -> str:
        return f"epoch {engine.state.epoch}" + (f"/{self.max_epochs}" if self.max_epochs else "")

    def _loss_and_pace(self) -> str:
        if self._pace is None:
            return ""
        values = {**self._values, "grad_norm": self._pace.grad_norm}
        words = [f"{name} {value_text(value)}" for name, value in values.items() if value is not None]
        return "  ".join([f"loss {self._pace.loss:.4f}", *words, f"{self._pace.samples_per_second:,.0f} samples/s"])


def warn(console: Console, text: str) -> None:
    """Print a warning; the console of rank 0 alone prints."""
    console.print(f"WARNING: {text}", style="bold yellow", soft_wrap=True)


@contextmanager
def dropping(console: Console, *, line_every_s: float) -> Iterator[Callable[[int, int], None]]:
    """Show the progress of reading and dropping data up to the step of a resumed run.

    The function that this yields takes the number of steps that are done, and their total.
    """
    began = last_line = time.monotonic()
    bar: Progress | None = None

    def show(done: int, total: int) -> None:
        nonlocal bar, last_line
        now = time.monotonic()
        if done == 0:
            warn(
                console,
                f"{total} steps of the training data are read and dropped to get to the position of the run; "
                "data with state_dict() and load_state_dict(state) continues there at once (docs/streams.md)",
            )
            if console.is_terminal:
                columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
                bar = Progress(TextColumn("dropping"), *columns, console=console, transient=True)
                bar.add_task("", total=total)
                bar.start()
        if bar is not None:
            bar.update(bar.task_ids[0], completed=done)
        elif now - last_line >= line_every_s:
            last_line = now
            left = timedelta(seconds=round((now - began) / max(done, 1) * (total - done)))
            console.print(f"read and dropped {done} of {total} steps, {left} left", soft_wrap=True)

    try:
        yield show
    finally:
        if bar is not None:
            bar.stop()
