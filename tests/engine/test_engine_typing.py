"""A strict type checker accepts a right program of a user, and reports each wrong line of a wrong one."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="mypy comes with disttrain[dev]")

RIGHT = """
    from typing import Any

    from disttrain.engine import (
        CallableEventWithFilter, Engine, EventEnum, Events, EventsList, RemovableEventHandle, State,
    )


    class MyEvents(EventEnum):
        LOSS = "loss"


    class Trainer(Engine):
        def note(self) -> None:
            self.state.noted = True


    def step(engine: Engine, batch: tuple[list[float], int]) -> float:
        engine.state.total = engine.state.total + 1.0
        return sum(batch[0])


    def own_step(engine: Trainer, batch: int) -> int:
        engine.note()
        return batch


    trainer = Engine(step)
    own = Trainer(own_step)
    quick = Engine(lambda engine, batch: batch)
    trainer.register_events(MyEvents.LOSS, *MyEvents, "other", event_to_attr={MyEvents.LOSS: "losses"})


    @trainer.on(Events.ITERATION_COMPLETED(every=10) | Events.COMPLETED)
    def log(engine: Engine) -> None:
        print(engine.state.iteration, engine.state.output, engine.state.times[Events.COMPLETED])


    @trainer.on(MyEvents.LOSS, 3, name="x")
    def on_loss(engine: Engine, number: int, name: str) -> int:
        return number + len(name)


    @trainer.on(Events.EXCEPTION_RAISED)
    def failed(error: BaseException) -> None:
        raise error


    def sometimes(engine: Engine, event: int) -> bool:
        return event % 7 == 0


    def check(handle: RemovableEventHandle, state: State, length: int | None, result: int) -> None:
        handle.remove()


    with trainer.add_event_handler(Events.STARTED(event_filter=sometimes), log):
        state = trainer.run([1, 2], max_epochs=2)
    check(trainer.add_event_handler("other", print, "x"), state, state.epoch_length, on_loss(trainer, 3, "x"))
    filtered: CallableEventWithFilter = Events.STARTED(once=[1, 2])
    joined: EventsList = filtered | Events.COMPLETED
    first: CallableEventWithFilter = joined[0]
    stopped: bool = trainer.should_terminate
    trainer.should_terminate = True
    keys: list[str] = trainer.state_dict_user_keys
    saved: dict[str, Any] = trainer.state_dict()
    trainer.load_state_dict(saved)
    log(trainer)
"""

WRONG = """
    from disttrain.engine import Engine, Events

    def one_argument(batch: int) -> int:
        return batch

    trainer = Engine(lambda engine, batch: batch)

    @trainer.on(Events.STARTED)
    def log(engine: Engine) -> None:
        print(engine.state.iteration)

    Engine(one_argument)  # wrong
    Engine(None)  # wrong
    log("text")  # wrong
    log(trainer).something  # wrong
    trainer.add_event_handler(Events.STARTED, 3)  # wrong
    trainer.on(3)  # wrong
    trainer.run(5)  # wrong
    trainer.run([1], max_epochs="two")  # wrong
    Events.STARTED(every="two")  # wrong
    Events.STARTED(evry=2)  # wrong
    Events.STARTED | "COMPLETED"  # wrong
    Events.NOTHING  # wrong
    trainer.run([1]).iteration.upper()  # wrong
    trainer.state.max_epochs + 1  # wrong
    trainer.register_events(3)  # wrong
    trainer.terminate(skip="yes")  # wrong
"""


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """Return, for each program, the lines with an error of mypy --strict, and the whole output."""
    root, folder = Path(__file__).parents[2], tmp_path_factory.mktemp("typing")
    programs = {"right": textwrap.dedent(RIGHT), "wrong": textwrap.dedent(WRONG)}
    for name, text in programs.items():
        (folder / f"{name}.py").write_text(text)
    # Without site-packages torch is not analysed, which takes most of a minute. The engine's types do not need it.
    options = ["--strict", "--no-site-packages", "--ignore-missing-imports", "--follow-imports=silent"]
    command = [sys.executable, "-m", "mypy", *options, "--config-file=", f"--cache-dir={folder / 'cache'}"]
    files = [str(folder / f"{name}.py") for name in programs]
    done = subprocess.run([*command, *files], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    by_program = {}
    for name, text in programs.items():
        numbers = re.findall(rf"{name}\.py:(\d+): error", done.stdout)
        by_program[name] = {text.splitlines()[int(number) - 1] for number in numbers}, done.stdout
    return by_program


def test_a_right_program_passes(errors):
    lines, output = errors["right"]
    assert lines == set(), output


def test_each_wrong_line_has_an_error_and_no_other_line(errors):
    lines, output = errors["wrong"]
    assert lines == {line.strip() for line in WRONG.splitlines() if line.endswith("# wrong")}, output
