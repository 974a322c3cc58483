"""The config that a run keeps is read back, and shows the differences that a resumed run may have."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from config_samples import adam, data, sample

from disttrain.config import (
    Config,
    FieldDifference,
    binding_fields,
    blocking_differences,
    config_hash,
    describe,
    differences,
    differences_that_matter,
    read_stored,
    to_json,
    with_num_slots,
)
from disttrain.errors import ConfigError

SCHEDULE = {"schedule": lambda optimizer, total_steps: None}


def blocking(old: Config, new: Config) -> list[str]:
    return [each.field for each in blocking_differences(describe(old), describe(new))]


def test_config_json_gives_back_the_description(tmp_path: Path) -> None:
    config = sample(seed=3)
    (tmp_path / "config.json").write_text(to_json(config))
    stored = read_stored(tmp_path / "config.json")
    assert (stored.fields, stored.hash, stored.folder) == (describe(config), config_hash(config), None)
    assert differences(stored.fields, describe(config)) == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{}", "KeyError: 'fields'"),
        (b'{"fields": [["seed", 1]], "hash": "", "folder": null}', "TypeError: fields, hash and folder are not"),
        (b'{"fields": {}, "hash": "", "folder": 5}', "TypeError: fields, hash and folder are not"),
        (b'{"fields": {}, "hash": "", "folder": "a\\u0000b"}', "ValueError: the folder has a name that no folder"),
        (b'{"fields": {"seed": NaN}, "hash": "", "folder": null}', "ValueError: NaN is not a JSON number"),
        (
            b'{"fields": {"a": ' + b"[" * 90 + b"]" * 90 + b'}, "hash": "", "folder": null}',
            "ValueError: its values lie",
        ),
        (b"[" * 200_000, "ValueError: its values lie too deep in each other"),
        (b"\xff\xfe{}", "UnicodeDecodeError"),
        (b"[]", "TypeError"),
    ],
)
def test_a_damaged_config_json_names_the_file(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_stored(file)
    assert str(caught.value).startswith(f"{file}: expected the JSON that a run writes, got {reason}")
    assert "\n" not in str(caught.value)


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
        {"train_metrics": {"accuracy": partial(data, num_classes=3)}},
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


def test_binding_fields_are_those_that_a_resumed_run_must_have_too() -> None:
    binding = binding_fields(describe(sample(grad_clip_norm=0.5)))
    assert (binding["grad_clip_norm"], binding["optimizer.lr"], binding["seed"]) == (
        0.5,
        0.01,
        describe(sample())["seed"],
    )
    assert not {"name", "max_epochs", "max_steps", "num_workers", "handlers", "checkpoint.keep"} & binding.keys()
    assert "max_epochs" in binding_fields(describe(sample(**SCHEDULE)))


def test_a_long_binding_value_is_kept_as_its_hash() -> None:
    one, same, other = (
        binding_fields(describe(sample(train_data=partial(data, paths))))
        for paths in (["a" * 500], ["a" * 500], ["b" * 500])
    )
    assert str(one["train_data"]).startswith("sha256:")
    assert one["train_data"] == same["train_data"] != other["train_data"]


def test_a_compiled_run_keeps_what_it_recomputes() -> None:
    for compiled in (False, True):
        old = sample(compile=compiled)
        new = sample(compile=compiled, activation_checkpointing=["Block"])
        fields = ["activation_checkpointing"] if compiled else []
        assert blocking(old, new) == blocking(new, old) == fields
        assert [each.field for each in differences_that_matter(describe(old), describe(new))] == fields
        assert ("activation_checkpointing" in binding_fields(describe(old))) == compiled
    before = {key: value for key, value in describe(old).items() if key != "activation_checkpointing"}
    assert blocking_differences(before, describe(old)) == []  # a run of a release that did not know the field
