"""The config that a run keeps is read back, and shows the differences that a resumed run may have."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from config_samples import adam, data, sample

from disttrain.config import (
    Config,
    FieldDifference,
    blocking_differences,
    config_hash,
    describe,
    differences,
    from_json,
    to_json,
    with_num_slots,
)
from disttrain.errors import ConfigError

SCHEDULE = {"schedule": lambda optimizer, total_steps: None}


def blocking(old: Config, new: Config) -> list[str]:
    return [each.field for each in blocking_differences(describe(old), describe(new))]


def test_config_json_gives_back_the_description() -> None:
    config = sample(seed=3)
    stored = from_json(to_json(config))
    assert (stored.fields, stored.hash, stored.folder) == (describe(config), config_hash(config), None)
    assert differences(stored.fields, describe(config)) == []


def test_a_damaged_config_json_names_the_file() -> None:
    with pytest.raises(ConfigError, match=r"runs/x/config\.json: expected the JSON that a run writes, got KeyError"):
        from_json("{}", str(Path("runs/x/config.json")))


def test_a_difference_says_field_old_and_new() -> None:
    old, new = describe(sample(seed=1)), describe(sample(seed=2, optimizer=partial(adam, lr=0.5)))
    found = differences(old, new)
    assert found == [FieldDifference("seed", 1, 2), FieldDifference("optimizer.lr", 0.01, 0.5)]
    assert [str(each) for each in found] == ["seed: 1 in the run, 2 now", "optimizer.lr: 0.01 in the run, 0.5 now"]


def test_a_keyword_that_only_one_has_is_a_difference() -> None:
    old, new = describe(sample()), describe(sample(optimizer=partial(adam, lr=0.01, betas=(0.8, 0.9))))
    assert [str(each) for each in differences(old, new)] == ["optimizer.betas: (not set) in the run, [0.8, 0.9] now"]
    assert [each.field for each in differences(new, old)] == ["optimizer.betas"]


def test_slots_left_to_the_first_launch_are_no_difference() -> None:
    open_, settled = describe(sample()), describe(with_num_slots(sample(), 8))
    assert differences(settled, open_) == differences(open_, settled) == []
    assert blocking(with_num_slots(sample(), 8), sample(num_slots=4)) == ["num_slots"]


def test_a_field_that_an_older_release_did_not_know_is_none_at_its_default() -> None:
    new = describe(sample())
    for name in ("accept_other_data", "handlers", "log.every_s", "schedule"):
        old = {key: value for key, value in new.items() if key != name}
        assert differences(old, new) == differences(new, old) == []
        assert [each.field for each in differences(old, {**new, name: 33})] == [name]
    without_seed = {key: value for key, value in new.items() if key != "seed"}
    assert [each.field for each in differences(without_seed, describe(sample(seed=5)))] == ["seed"]


@pytest.mark.parametrize(
    "changes",
    [
        {"num_workers": 2},
        {"backend": "gloo"},
        {"timeout_s": 5.0},
        {"on_nan": "skip"},
        {"accept_other_data": True},
        {"handlers": [lambda trainer, run: None]},
        {"checkpoint": {"keep": 9, "every_steps": 5}},
        {"log": {"every_s": 1.0, "tensorboard": False}},
        {"validate": {"every_steps": 3}},
        {"max_epochs": 40},
        {"max_epochs": None, "max_steps": 40},
    ],
)
def test_what_may_change_on_resume(changes: dict[str, Any]) -> None:
    assert differences(describe(sample()), describe(sample(**changes))) != []
    assert blocking(sample(), sample(**changes)) == []


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"seed": 3}, ["seed"]),
        ({"global_batch_size": 64}, ["global_batch_size"]),
        ({"precision": "bf16"}, ["precision"]),
        ({"cpu_threads": 2}, ["cpu_threads"]),
        ({"reduction": "fast"}, ["reduction"]),
        ({"train_data": partial(data, root="there")}, ["train_data.root"]),
        ({"optimizer": adam}, ["optimizer.lr"]),
        ({**SCHEDULE, "max_epochs": 40}, ["schedule", "max_epochs"]),
    ],
)
def test_what_blocks_a_resume(changes: dict[str, Any], fields: list[str]) -> None:
    assert blocking(sample(), sample(**changes)) == fields


def test_the_length_of_a_scheduled_run_stays() -> None:
    assert blocking(sample(**SCHEDULE), sample(**SCHEDULE, max_epochs=40)) == ["max_epochs"]
