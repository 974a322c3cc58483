"""The progress display: a bar on a terminal, plain lines in a file, the same content in both."""

import re
import time
from dataclasses import replace
from io import StringIO

from rich.console import Console

from disttrain.engine import Engine, Events
from disttrain.handlers.losses import Pace
from disttrain.handlers.progress import ProgressDisplay, dropping

PACE = Pace(step=3, epoch=1, loss=0.123456, learning_rate=0.1, samples_per_second=12345.6)


def shown(console: Console, *, line_every_s: float = 0.0, resume_at: int = 0, wait_s: float = 0.0) -> ProgressDisplay:
    """Run two epochs of five steps with a loss and an evaluation; return the closed display."""
    display = ProgressDisplay(console, total_steps=10, max_epochs=2, line_every_s=line_every_s)
    display.every_s = line_every_s
    trainer = Engine(lambda engine, batch: time.sleep(wait_s))
    display.attach(trainer)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=resume_at + 3), lambda: display.pace(PACE))
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED(once=1 + resume_at // 5),
        lambda e: display.validated(e.state.iteration, e.state.epoch, {"loss": 0.25, "per_class": [float("nan"), 0.5]}),
    )
    if resume_at:
        trainer.load_state_dict({"iteration": resume_at, "max_epochs": 2, "epoch_length": 5})
    trainer.run(range(5), max_epochs=2)
    display.close()
    display.close()
    return display


def terminal() -> tuple[Console, StringIO]:
    screen = StringIO()
    return Console(force_terminal=True, file=screen, width=100), screen


def plain(screen: StringIO) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())


def test_a_terminal_gets_a_bar_with_epoch_step_loss_and_pace() -> None:
    console, screen = terminal()
    shown(console, wait_s=0.03)
    bar = next(line for line in re.split(r"[\r\n]+", plain(screen)) if "samples/s" in line)
    assert re.search(r"epoch [12]/2 .* \d+/10 loss 0\.1235  12,346 samples/s \d:\d\d:\d\d|-:--:--", bar), bar
    assert "epoch 1/2  step 5  validation: loss 0.25  per_class [nan, 0.5]\n" in plain(screen)


def test_values_are_shown_until_the_next_ones() -> None:
    out = StringIO()
    display = ProgressDisplay(Console(file=out, width=200), total_steps=10, max_epochs=None, line_every_s=0.0)
    trainer = Engine(lambda engine, batch: None)
    display.attach(trainer)
    for values in ({"ce": 0.125, "accuracy": 0.5, "per_class": [0.5, 0.25]}, {"ce": 0.25, "accuracy": None}):
        trainer.add_event_handler(
            Events.ITERATION_STARTED, lambda v: display.pace(replace(PACE, values=v, grad_norm=2.5)), values
        )
        trainer.run(range(1), max_epochs=1)
        trainer.load_state_dict({"iteration": 0, "max_epochs": 1, "epoch_length": 1})
    first, last = (line for line in out.getvalue().splitlines() if "samples/s" in line)
    assert "loss 0.1235  ce 0.125  accuracy 0.5  grad_norm 2.5  12,346 samples/s" in first
    assert "loss 0.1235  ce 0.25  accuracy 0.5  grad_norm 2.5  12,346 samples/s" in last


def test_the_bar_of_a_resumed_run_begins_at_its_step() -> None:
    console, screen = terminal()
    display = ProgressDisplay(console, total_steps=10, max_epochs=None, line_every_s=60.0)
    display.every_s = 60.0
    trainer = Engine(lambda engine, batch: None)
    trainer.load_state_dict({"iteration": 7, "max_epochs": 2, "epoch_length": 5})
    display.attach(trainer)
    trainer.run(range(5), max_epochs=2)
    display.close()
    # A bar that began at 0 would count the steps of the first run as done in no time, and show too little time left.
    assert " 7/10 " in plain(screen)


def test_plain_lines_elsewhere() -> None:
    screen = StringIO()
    shown(Console(file=screen, width=40))
    lines = screen.getvalue().splitlines()
    assert len(lines) == 11  # ten steps and the evaluation, no line wrapped
    assert lines[5] == "epoch 1/2  step 5  validation: loss 0.25  per_class [nan, 0.5]"
    assert re.fullmatch(r"epoch 1/2  step 1/10    \d:\d\d:\d\d left", lines[0])
    assert lines[-1] == "epoch 2/2  step 10/10  loss 0.1235  12,346 samples/s  0:00:00 left"


def test_there_is_at_most_one_line_in_line_every_s() -> None:
    screen = StringIO()
    shown(Console(file=screen), line_every_s=3600.0)
    assert screen.getvalue() == "epoch 1/2  step 5  validation: loss 0.25  per_class [nan, 0.5]\n"


def test_a_resumed_run_counts_the_whole_run() -> None:
    screen = StringIO()
    shown(Console(file=screen), resume_at=5)
    steps = re.findall(r"step (\d+)/10", screen.getvalue())
    assert steps == ["6", "7", "8", "9", "10"]


def drop(console: Console, line_every_s: float) -> None:
    with dropping(console, line_every_s=line_every_s) as show:
        for done in range(4):
            show(done, 3)


def test_dropped_steps_are_reported_and_shown_by_a_bar() -> None:
    console, screen = terminal()
    drop(console, 0.0)
    text = plain(screen)
    assert text.count("WARNING: 3 steps of the training data are read and dropped") == 1
    assert "dropping" in text
    assert "3/3" in text


def test_dropped_steps_are_reported_in_plain_lines_elsewhere() -> None:
    for line_every_s, count in ((0.0, 4), (60.0, 0)):
        screen = StringIO()
        drop(Console(file=screen, width=200), line_every_s)
        assert screen.getvalue().count("WARNING: 3 steps") == 1
        assert screen.getvalue().count("\nread and dropped ") == count
    with dropping(Console(file=StringIO()), line_every_s=0.0):
        pass  # nothing is dropped, so nothing is printed
