"""An error in a factory of the config becomes one message that names the place."""

import pytest

from disttrain.errors import ConfigError, DataError
from disttrain.run.factories import build


def test_the_result_is_returned() -> None:
    assert build("model", lambda a, b: (a, b), 1, 2) == (1, 2)


def test_an_error_names_the_field_the_file_and_the_line() -> None:
    def broken() -> None:
        raise KeyError("hidden_size")

    with pytest.raises(ConfigError) as caught:
        build("model", broken)
    line = broken.__code__.co_firstlineno + 1
    assert str(caught.value) == f"model raised KeyError: 'hidden_size' ({__file__}, line {line}, in broken)"


def test_an_error_of_disttrain_passes_unchanged() -> None:
    def broken() -> None:
        raise DataError("no data")

    with pytest.raises(DataError, match=r"^no data$"):
        build("train_data", broken)
