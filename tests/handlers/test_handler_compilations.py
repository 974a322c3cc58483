"""Programs that a device compiles during a run are counted, those of the validation apart; fallbacks are named once."""

import logging

import pytest
import torch

from disttrain.backend import connect
from disttrain.backend.base import Programs
from disttrain.backend.single import SingleBackend
from disttrain.engine import Engine
from disttrain.handlers.compilations import Compilations


class Compiling(SingleBackend):
    """The CPU, with the programs of a device that compiles."""

    num_compiled = 0
    fallback_ops: tuple[str, ...] = ()

    def programs(self) -> Programs:
        return Programs(self.num_compiled, self.fallback_ops)


def run(backend: Compiling, compiled_in_step: dict[int, int], validated_after: int = 0) -> dict[str, object]:
    compilations = Compilations(backend)

    def step(engine: Engine, batch: int) -> None:
        backend.num_compiled += compiled_in_step.get(engine.state.iteration, 0)
        if engine.state.iteration == validated_after:
            with compilations.apart():
                backend.num_compiled += 7

    engine = Engine(step)
    compilations.attach(engine)
    engine.run(range(6))
    return compilations.report()


@pytest.mark.parametrize(
    ("compiled", "validated_after", "total", "steady"),
    [
        ({1: 9, 2: 1}, 0, 10, 0),
        ({1: 9, 2: 1}, 4, 17, 0),
        ({1: 9, 2: 1}, 2, 17, 0),
        ({1: 9, 3: 2, 6: 1}, 4, 19, 3),
    ],
)
def test_programs_compiled_after_step_2_are_counted(
    compiled: dict[int, int], validated_after: int, total: int, steady: int
) -> None:
    report = run(Compiling(torch.device("cpu")), compiled, validated_after)
    assert report["xla_compilations"] == total
    assert report["xla_compilations_after_step_2"] == steady


def test_operations_that_fell_back_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    backend = Compiling(torch.device("cpu"))
    backend.fallback_ops = ("aten::_local_scalar_dense", "aten::_unique2")
    with caplog.at_level(logging.WARNING):
        report = run(backend, {})
    assert report["xla_fallback_ops"] == ["aten::_local_scalar_dense", "aten::_unique2"]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "a value was read from the device" in messages[0]
    assert "aten::_unique2 is not compiled" in messages[1]


def test_there_is_no_report_for_a_device_that_does_not_compile() -> None:
    with connect("single", device="cpu") as backend:
        compilations = Compilations(backend)
        engine = Engine(lambda engine, batch: None)
        compilations.attach(engine)
        engine.run(range(3))
        assert compilations.report() == {}
