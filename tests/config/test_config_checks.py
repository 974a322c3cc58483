"""A Config has one length and one loss; its functions can be called, its slots fit, and its fields fit together."""

import math
from typing import Any

import pytest
import torch
from config_samples import data, loss, net, refused, sample
from torch import nn

from disttrain.config import apply_overrides, check_devices, check_slots
from disttrain.errors import ConfigError


@pytest.mark.parametrize("name", ["../up", "a/b", "a\\b", ".hidden", "", "..", " a", "a\n", "x" * 201])
def test_a_name_is_one_plain_part_of_a_path(name: str) -> None:
    assert "name: expected a folder's name such as 'digits'" in refused(name=name)


@pytest.mark.parametrize("name", ["digits", "digits 2", "v1.2-b_3", "ziffern-äöü"])
def test_plain_names_are_taken(name: str) -> None:
    assert sample(name=name).name == name


def test_exactly_one_length() -> None:
    assert "max_epochs, max_steps: expected one of the two, got both" in refused(max_steps=3)
    assert "max_epochs, max_steps: expected one of the two, got neither" in refused(max_epochs=None)


def test_exactly_one_of_loss_and_forward() -> None:
    assert "loss, forward: expected one of the two, got neither" in refused(loss=None)
    assert "loss, forward: expected one of the two, got both" in refused(forward=lambda model, batch: (0, 0))
    assert sample(loss=None, forward=lambda model, batch: (0, 0)).loss is None


def test_a_global_loss_takes_what_forward_returns_and_excludes_what_weighs_slots() -> None:
    together: dict[str, Any] = {"loss": None, "forward": lambda model, batch: batch, "global_loss": lambda pairs: 0}
    assert sample(**together).global_loss is not None
    assert "beside it, and no loss, got no forward" in refused(**together | {"forward": None})
    assert "beside it, and no loss, got a loss too" in refused(**together | {"loss": loss})
    assert "weight: expected None with global_loss" in refused(**together, weight=len)
    assert 'with global_loss, got "apex"' in refused(**together, precision="apex")
    assert 'fsdp_gather: expected "step"' in refused(**together, strategy="fsdp", fsdp_gather="module")
    two = lambda images, texts: 0  # noqa: E731
    assert "global_loss: expected (embeddings) -> scalar Tensor" in refused(**together | {"global_loss": two})


def test_what_is_built_already_is_no_factory() -> None:
    assert "model: expected () -> Module, got a Linear, built already" in refused(model=nn.Linear(2, 2))
    assert "metrics.a: expected () -> Metric, got a Linear, built already" in refused(metrics={"a": nn.Linear(2, 2)})
    assert sample(loss=nn.CrossEntropyLoss()).loss is not None


def test_functions_can_be_called_as_they_will_be() -> None:
    assert "missing a required argument: 'width'" in refused(model=lambda width: None)
    assert "too many positional arguments" in refused(schedule=lambda optimizer: None)
    assert "handlers.0: expected (trainer, run) -> None" in refused(handlers=[lambda run: None])
    config = sample(model=net, optimizer=torch.optim.AdamW, loss=torch.nn.functional.cross_entropy, collate=max)
    assert config.collate is max


def test_metric_names_can_be_part_of_a_dotted_key() -> None:
    assert "metrics: expected names without '.'" in refused(metrics={"top.5": lambda: None})
    assert "train_metrics: expected names without '.'" in refused(train_metrics={"top.5": lambda: None})
    taken = "train_metrics: expected names of their own, got 'loss', which is a part of every line of the curves"
    assert taken in refused(train_metrics={"loss": lambda: None})
    assert list(sample(metrics={"top-5/all": lambda: None}).metrics) == ["top-5/all"]


def test_an_average_needs_a_decay_between_0_and_1() -> None:
    assert refused(ema={"every_steps": 2}).startswith("ema.decay: missing beside ema.every_steps; expected a number")
    for decay in (0.0, 1.0, 1.5, math.nan):
        assert refused(ema={"decay": decay}).startswith("ema.decay: expected float > 0 and < 1 | None, got")
    assert apply_overrides(sample(ema={"decay": 0.9, "every_steps": 2}), ["ema.decay=none"]).ema.decay is None


def test_jumps_of_the_loss_are_for_policies_that_look_at_losses() -> None:
    assert refused(on_nan="skip", spike_factor=3.0).startswith("spike_factor: expected None with on_nan='skip'")
    assert refused(on_nan="rollback", spike_factor=1.0).startswith("spike_factor: expected float > 1")
    assert sample(on_nan="rollback", spike_factor=3).spike_factor == 3.0


def test_slots_that_do_not_divide_name_what_fits() -> None:
    expected = (
        "global_batch_size=100 cannot be cut into num_slots=8 equal slots; use 96 or 104, or num_slots=4, 5 or 10."
    )
    assert refused(global_batch_size=100, num_slots=8) == expected


def test_slots_that_default_to_the_world_size_say_so() -> None:
    assert check_slots(96, None, 3) == 3
    with pytest.raises(
        ConfigError, match=r"num_slots=3 \(the world size\) equal slots; use 126 or 129, or num_slots=4"
    ):
        check_slots(128, None, 3)


def test_a_batch_smaller_than_the_slots_grows() -> None:
    with pytest.raises(ConfigError, match=r"use 8, or num_slots=1, 2 or 4\."):
        check_slots(4, 8)


def test_more_ranks_than_slots_says_what_to_do() -> None:
    assert check_slots(96, 4, 4) == 4
    with pytest.raises(
        ConfigError, match=r"num_slots=4 is too few for 6 ranks, since .* use at most 4 ranks.*num_slots=6, 8 or 12\."
    ):
        check_slots(96, 4, 6)
    with pytest.raises(ConfigError, match=r"use at most 1 rank\."):
        check_slots(1, 1, 2)


@pytest.mark.parametrize("batch", [1, 2, 12, 97, 100, 128])
def test_every_suggestion_of_check_slots_is_accepted(batch: int) -> None:
    for world_size in range(1, 9):
        for slots in range(1, 20):
            try:
                assert check_slots(batch, slots, world_size) == slots
            except ConfigError as error:
                text = str(error).rpartition("num_slots=")[2] if str(error).count("num_slots=") > 1 else ""
                for suggested in text.replace(",", " ").replace(".", " ").replace(" or ", " ").split():
                    assert check_slots(batch, int(suggested), world_size) == int(suggested)
            else:
                assert batch % slots == 0
                assert slots >= world_size


def test_the_sample_is_sound() -> None:
    assert sample().loss is loss


def test_only_xla_devices_have_a_mode_in_which_one_rank_drives_all() -> None:
    assert "spmd: expected False with backend='gloo', got True; use backend='xla'" in refused(spmd=True, backend="gloo")
    assert all(sample(spmd=True, backend=backend).spmd for backend in ("xla", "auto"))


@pytest.mark.parametrize(("size", "slots", "devices"), [(96, 8, 4), (96, 8, 12), (40, 4, 1), (8, 1, 8)])
def test_devices_that_divide_a_slot_are_taken(size: int, slots: int, devices: int) -> None:
    check_devices(size, slots, devices)


@pytest.mark.parametrize(
    ("size", "slots", "devices", "advice"),
    [
        (
            40,
            4,
            4,
            "slots of 10 samples, .* over 4 devices equally; use 32 or 48, or in a new run num_slots=1, 2 or 5,",
        ),
        (
            90,
            3,
            8,
            "slots of 30 samples, .* over 8 devices equally; use 72 or 96, or a number of devices .* divides 30",
        ),
        (2, 1, 4, "slots of 2 samples, .* over 4 devices equally; use 4, or a number of devices that divides 2"),
    ],
)
def test_a_slot_that_the_devices_cannot_share_names_what_fits(size: int, slots: int, devices: int, advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        check_devices(size, slots, devices)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"valid_data": {}}, "valid_data: expected a function, a dict of them by name, or None, got an empty dict."),
        (
            {"valid_data": {"a/b": data}},
            "valid_data: expected names without '.', '=', '/' and spaces, such as 'clean', got 'a/b'.",
        ),
        ({"valid_data": {"a": 5}}, "valid_data.a: expected () -> Dataset, got 5."),
        (
            {"valid_data": {"a": data, "b": data}, "checkpoint": {"monitor": "loss"}, "metrics": {}},
            "checkpoint.monitor: expected 'a/loss' or 'b/loss', got 'loss'.",
        ),
    ],
)
def test_several_validation_sets(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sample(**changes)
    assert str(caught.value) == message


def test_a_batch_of_an_evaluation_is_cut_over_the_devices_of_a_rank() -> None:
    check_devices(32, 4, 2, 6)
    with pytest.raises(ConfigError, match=r"validate\.batch_size=7 cannot be cut over 2 devices equally"):
        check_devices(32, 4, 2, 7)
