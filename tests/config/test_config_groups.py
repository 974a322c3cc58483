"""The groups of a Config: frozen, without unknown fields, given as objects or as dicts."""

import pytest
from config_samples import refused, sample

from disttrain.config import CheckpointConfig, LogConfig
from disttrain.errors import ConfigError


def test_a_group_is_an_object_or_a_dict_of_its_fields() -> None:
    assert sample(checkpoint={"keep": 5}).checkpoint == CheckpointConfig(keep=5)
    assert sample(checkpoint=CheckpointConfig(keep=5)).checkpoint.keep == 5


def test_an_unknown_field_of_a_group_is_named_with_the_nearest() -> None:
    assert refused(checkpoint={"kep": 5}).startswith("checkpoint.kep: no such field; did you mean checkpoint.keep?")
    with pytest.raises(ConfigError, match=r"^log.every_stps: no such field; did you mean log.every_steps"):
        LogConfig(every_stps=3)


def test_a_group_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        CheckpointConfig().keep = 3
