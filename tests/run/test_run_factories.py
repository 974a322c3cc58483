"""An error in a factory of the config becomes one message that names the place."""

import pytest
import torch
from small_run import small_config
from torch import nn

from disttrain.errors import ConfigError, DataError, DisttrainError
from disttrain.run.factories import build, built


def test_the_result_is_returned() -> None:
    assert build("model", lambda a, b: (a, b), 1, 2) == (1, 2)


def test_an_error_names_the_field_the_file_and_the_line() -> None:
    def broken() -> None:
        raise KeyError("hidden_size")

    with pytest.raises(ConfigError) as caught:
        build("model", broken)
    line = broken.__code__.co_firstlineno + 1
    assert str(caught.value).startswith("model raised KeyError: 'hidden_size' (")
    assert str(caught.value).endswith(f"test_run_factories.py:{line} in broken)")


def test_the_place_is_the_users_line_and_not_the_librarys() -> None:
    def broken() -> nn.Module:
        return nn.Linear("3", 4)  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match=rf"test_run_factories.py:{broken.__code__.co_firstlineno + 1} in broken\)$"):
        build("model", broken)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConnectionResetError("the hub is down"), 1),
        (torch.OutOfMemoryError("CUDA out of memory"), 1),
        (FileNotFoundError("weights.pt"), 2),  # nothing has begun: a path is wrong more often than a disk
        (Exception("of an unknown kind"), 2),
    ],
)
def test_what_may_pass_leaves_the_launcher_its_restarts(error: Exception, code: int) -> None:
    def broken() -> None:
        raise error

    with pytest.raises(DisttrainError) as caught:
        build("model", broken)
    assert caught.value.exit_code == code
    assert str(error) in str(caught.value)


def test_a_factory_that_returns_another_thing_is_named() -> None:
    config = small_config(model=lambda: (nn.Linear(3, 1), 5))
    with pytest.raises(
        ConfigError, match=r"^model \(.*test_run_factories.py:\d+\): expected .* torch's Module, got a tuple$"
    ):
        built(config, "model", nn.Module)
    linear = nn.Linear(3, 1)
    assert built(small_config(model=lambda: linear), "model", nn.Module) is linear


def test_an_error_of_disttrain_passes_unchanged() -> None:
    def broken() -> None:
        raise DataError("no data")

    with pytest.raises(DataError, match=r"^no data$"):
        build("train_data", broken)
