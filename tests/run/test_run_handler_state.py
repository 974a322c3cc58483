"""State that a handler holds and no checkpoint saves is found in every place; saved state is not reported."""

from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_run import small_run
from torch import nn
from torch.optim.swa_utils import AveragedModel

from disttrain.engine import Engine, Events
from disttrain.run.handler_state import MAX_VALUES, unkept_objects, unkept_values
from disttrain.run.state import Run

GLOBAL: dict[str, Any] = {}
AVERAGE = torch.full((3,), 0.5)


class Average:
    """A running average with a state."""

    def __init__(self) -> None:
        self.value = torch.zeros(2)
        self.count = 0

    def __call__(self, engine: Engine) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self.count = state["value"], state["count"]


class Bare:
    """An object with state and without `state_dict`."""

    def __init__(self) -> None:
        self.history = deque([1.0, 2.0])
        self.weights = {"a": [np.arange(3)]}

    def act(self) -> None:
        return


def by_closure(trainer: Engine, run: Run) -> None:
    average = Average()
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: average(engine))


def by_object(trainer: Engine, run: Run) -> None:
    trainer.add_event_handler(Events.ITERATION_COMPLETED, Average())


def by_argument(trainer: Engine, run: Run) -> None:
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine, average: None, Average())


def by_partial(trainer: Engine, run: Run) -> None:
    trainer.add_event_handler(Events.ITERATION_COMPLETED, partial(lambda average, engine: None, Average()))


def by_global(trainer: Engine, run: Run) -> None:
    GLOBAL["average"] = Average()
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: GLOBAL["average"])


def in_a_list(trainer: Engine, run: Run) -> None:
    averages = [{"of": Average()}]
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: averages)


@pytest.mark.parametrize(
    ("handler", "path"),
    [
        (by_closure, "by_closure.average"),
        (by_object, "by_object"),
        (by_argument, "by_argument(0)"),
        (by_partial, "by_partial(0)"),
        (by_global, "by_global.GLOBAL['average']"),
        (in_a_list, "in_a_list.averages[0]['of']"),
    ],
)
def test_an_object_with_a_state_is_found(tmp_path: Path, handler: Any, path: str) -> None:
    run = small_run(tmp_path, handlers=[handler])
    by_path = unkept_objects(run.attached, run)
    assert list(by_path) == [path]
    assert type(by_path[path]) is Average


def test_a_kept_object_is_not_reported(tmp_path: Path) -> None:
    def kept(trainer: Engine, run: Run) -> None:
        average = run.keep("average", Average())
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: average.value)

    run = small_run(tmp_path, handlers=[kept])
    assert unkept_objects(run.attached, run) == {}
    assert unkept_values(run.attached, run) == {}


def test_the_parts_of_the_run_are_not_reported(tmp_path: Path) -> None:
    def reader(trainer: Engine, run: Run) -> None:
        model, optimizer, layer = run.model, run.optimizer, run.model[0]  # type: ignore[index]
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: (model, optimizer, layer, run, trainer))

    run = small_run(tmp_path, handlers=[reader])
    assert unkept_objects(run.attached, run) == {}
    assert unkept_values(run.attached, run) == {}


def test_torchs_own_average_is_found(tmp_path: Path) -> None:
    def averaged(trainer: Engine, run: Run) -> None:
        average = AveragedModel(run.model)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: average.update_parameters(run.model))

    run = small_run(tmp_path, handlers=[averaged])
    assert next(iter(unkept_objects(run.attached, run))) == "averaged.average"


def test_plain_values_of_objects_without_state_dict_are_found(tmp_path: Path) -> None:
    def counter(trainer: Engine, run: Run) -> None:
        count, bare = 0, Bare()

        def more() -> None:
            nonlocal count
            count += 1
            AVERAGE.add_(0)

        trainer.add_event_handler(Events.ITERATION_COMPLETED, more)
        trainer.add_event_handler(Events.COMPLETED, bare.act)

    run = small_run(tmp_path, handlers=[counter])
    by_path = unkept_values(run.attached, run)
    assert set(by_path) == {
        "counter.count",
        "counter.AVERAGE",
        "counter.history[0]",
        "counter.history[1]",
        "counter.weights['a'][0]",
    }
    assert torch.equal(by_path["counter.AVERAGE"], AVERAGE)


def test_a_structure_that_holds_itself_is_searched_once(tmp_path: Path) -> None:
    def circular(trainer: Engine, run: Run) -> None:
        ring: list[Any] = [1]
        ring.append(ring)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: ring)

    run = small_run(tmp_path, handlers=[circular])
    assert unkept_values(run.attached, run) == {"circular.ring[0]": 1}


def test_a_module_without_a_state_is_not_reported(tmp_path: Path) -> None:
    def stateless(trainer: Engine, run: Run) -> None:
        relu = nn.ReLU()
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: relu)

    run = small_run(tmp_path, handlers=[stateless])
    assert unkept_objects(run.attached, run) == {}


def test_an_object_whose_state_dict_raises_is_reported_without_an_error(tmp_path: Path) -> None:
    class Early(Average):
        def state_dict(self) -> dict[str, Any]:
            raise RuntimeError("not before the first step")

    def early(trainer: Engine, run: Run) -> None:
        average = Early()
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: average)

    run = small_run(tmp_path, handlers=[early])
    assert list(unkept_objects(run.attached, run)) == ["early.average"]


def test_a_proxy_that_raises_for_every_attribute_is_passed_over(tmp_path: Path) -> None:
    class Lazy:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("not connected yet")

    def connected(trainer: Engine, run: Run) -> None:
        service = Lazy()
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: service)

    run = small_run(tmp_path, handlers=[connected])
    assert unkept_objects(run.attached, run) == {}
    assert unkept_values(run.attached, run) == {}


class Rows(Mapping[int, int]):
    """A table of many rows, which counts the rows that are read."""

    num_read = 0

    def __getitem__(self, key: int) -> int:
        self.num_read += 1
        return key

    def __iter__(self) -> Iterator[int]:
        return iter(range(10 * MAX_VALUES))

    def __len__(self) -> int:
        return 10 * MAX_VALUES


def test_data_is_not_read_to_its_end_and_is_no_state(tmp_path: Path) -> None:
    rows = Rows()

    def table(trainer: Engine, run: Run) -> None:
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: rows)

    run = small_run(tmp_path, handlers=[table])
    assert unkept_values(run.attached, run) == {}
    assert 0 < rows.num_read <= MAX_VALUES
