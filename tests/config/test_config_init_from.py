"""`init_from` has a short form in a cfg.py and on the command line, and a resumed run may have another one."""

from pathlib import Path
from typing import Any

import pytest
from config_samples import sample

from disttrain.config import InitFromConfig, apply_overrides, blocking_differences, describe
from disttrain.errors import ConfigError


@pytest.mark.parametrize("given", ["runs/a@best", Path("runs/a@best"), {"path": "runs/a@best"}])
def test_a_path_alone_is_the_short_form(given: Any) -> None:
    assert sample(init_from=given).init_from == InitFromConfig(path="runs/a@best")
    assert sample(init_from=None).init_from == sample().init_from == InitFromConfig()


def test_the_command_line_takes_the_short_form_and_keeps_the_rest() -> None:
    config = sample(init_from={"path": "a", "skip": "head."})
    assert config.init_from.skip == ("head.",)
    assert apply_overrides(config, ["init_from=b@40"]).init_from == InitFromConfig(path="b@40", skip=("head.",))
    assert apply_overrides(config, ["init_from=none"]).init_from.path is None
    words = ["init_from.rename={'encoder.': 'backbone.'}", "init_from.skip=('head.', '*.lora_*')"]
    changed = apply_overrides(config, [*words, "init_from.strict=false"]).init_from
    assert (changed.path, changed.skip, changed.strict) == ("a", ("head.", "*.lora_*"), False)
    assert changed.rename == {"encoder.": "backbone."}
    assert apply_overrides(config, ["init_from.skip=tail."]).init_from.skip == ("tail.",)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (5, "init_from: expected str | None or a InitFromConfig or a dict of its fields, got 5."),
        ({"pth": "a"}, "init_from.pth: no such field; did you mean init_from.path?"),
        ({"skip": 5}, "init_from.skip: expected str | tuple, got 5."),
        ({"rename": "encoder."}, "init_from.rename: expected dict, got 'encoder.'."),
        ("", "init_from: expected a run directory, such as 'runs/base@best', or a file of weights, or None, got ''."),
    ],
)
def test_what_is_wrong_is_said_in_one_line(given: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sample(init_from=given)
    assert str(caught.value) == message


def test_a_resumed_run_may_have_another_one_or_none() -> None:
    plain = describe(sample())
    for rename in ({"encoder.": "backbone."}, {"encoder": "backbone"}):  # the latter has keys of its own
        described = describe(sample(init_from={"path": "a", "rename": rename, "skip": ("head.",)}))
        assert blocking_differences(plain, described) == blocking_differences(described, plain) == []
