"""A Config that cannot be run is one ConfigError, with a line for each problem: field, expected, got, nearest name."""

import pickle
import subprocess
import sys
from functools import partial

import pytest
from config_samples import accuracy, data, net, refused, sample

from disttrain.config import CheckpointConfig, Config, LogConfig, ValidateConfig, replace, with_num_slots
from disttrain.errors import ConfigError


def test_defaults_are_those_of_the_table() -> None:
    config = sample()
    assert (config.name, config.seed, config.num_slots, config.precision) == (None, 0, None, "fp32")
    assert (config.strategy, config.reduction, config.backend, config.on_nan) == ("ddp", "invariant", "auto", "stop")
    assert (config.checkpoint.every_steps, config.checkpoint.keep, config.checkpoint.target) == (0, 3, None)
    assert (config.log.every_steps, config.log.every_s, config.log.tensorboard) == (10, 10.0, "auto")
    assert (config.ledger.every_steps, config.validate.every_steps, config.timeout_s) == (100, 0, 300.0)
    assert (config.cpu_threads, config.num_workers, config.compile, config.accept_other_data) == (1, 0, False, False)
    assert config.deterministic is True


def test_it_is_frozen_its_groups_too() -> None:
    config = sample(handlers=[lambda trainer, run: None])
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3
    with pytest.raises(ValueError, match="frozen"):
        config.checkpoint.keep = 3
    assert isinstance(config.handlers, tuple)


def test_groups_are_given_as_objects_or_dicts() -> None:
    as_objects = sample(checkpoint=CheckpointConfig(keep=5), validate=ValidateConfig(every_steps=7))
    as_dicts = sample(checkpoint={"keep": 5}, validate={"every_steps": 7})
    assert as_objects.checkpoint == as_dicts.checkpoint == CheckpointConfig(keep=5)
    assert as_objects.validate.every_steps == as_dicts.validate.every_steps == 7


def test_an_unknown_field_names_the_nearest() -> None:
    assert refused(lerning_rate=1) == "lerning_rate: no such field."
    assert refused(max_epoch=3) == "max_epoch: no such field; did you mean max_epochs?"
    assert refused(checkpoint={"kep": 3}) == "checkpoint.kep: no such field; did you mean checkpoint.keep?"


def test_a_missing_field_says_what_belongs_there() -> None:
    with pytest.raises(ConfigError) as caught:
        Config(model=net, train_data=data, max_epochs=1)  # type: ignore[call-arg]
    assert str(caught.value).splitlines() == [
        "optimizer: missing; expected (parameters) -> Optimizer.",
        "global_batch_size: missing; expected int > 0.",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_size": 0}, "global_batch_size: expected int > 0, got 0."),
        ({"global_batch_size": "128"}, "global_batch_size: expected int > 0, got '128'."),
        ({"seed": True}, "seed: expected int, got True."),
        ({"num_workers": -1}, "num_workers: expected int >= 0, got -1."),
        ({"max_epochs": 1.5}, "max_epochs: expected int > 0 | None, got 1.5."),
        ({"timeout_s": float("nan")}, "timeout_s: expected float > 0, got nan."),
        ({"grad_clip_norm": 0.0}, "grad_clip_norm: expected float > 0 | None, got 0.0."),
        ({"compile": 1}, "compile: expected bool, got 1."),
        ({"activation_checkpointing": [3]}, "activation_checkpointing: expected bool | str | tuple, got [3]."),
        (
            {"gradient_accumulation_steps": 4},
            "gradient_accumulation_steps: no such field; did you mean num_slots? The global batch has this many parts; "
            "a rank runs its own one by one, and adds up their gradients.",
        ),
        ({"strategy": "dp"}, 'strategy: expected "ddp" | "fsdp", got \'dp\'.'),
        ({"log": {"tensorboard": "yes"}}, "log.tensorboard: expected bool | \"auto\", got 'yes'."),
        ({"log": 3}, "log: expected a LogConfig or a dict of its fields, got 3."),
        ({"train_data": [1, 2]}, "train_data: expected () -> Dataset or iterable, got [1, 2]."),
        ({"metrics": {"f1": 3}}, "metrics.f1: expected () -> Metric, got 3."),
        ({"metrics": [accuracy]}, "metrics: expected dict of name: () -> Metric, got a list."),
        ({"handlers": [print, 3]}, "handlers.1: expected (trainer, run) -> None, got 3."),
    ],
)
def test_an_ill_typed_field_says_expected_and_got(changes: dict[str, object], message: str) -> None:
    assert refused(**changes) == message


def test_all_problems_come_in_one_error() -> None:
    lines = refused(global_batch_size=0, precision="fp23", seeds=3, checkpoint={"keep": 0, "ever_s": 3}).splitlines()
    assert len(lines) == 5
    assert [line.split(":")[0] for line in lines] == [
        "global_batch_size",
        "precision",
        "checkpoint.keep",
        "checkpoint.ever_s",
        "seeds",
    ]


def test_a_group_alone_names_its_fields_in_full() -> None:
    with pytest.raises(ConfigError, match=r"^log\.every_s: expected float > 0, got 0\.$"):
        LogConfig(every_s=0)


def test_replace_checks_the_whole_and_keeps_the_rest() -> None:
    config = sample(seed=3)
    changed = replace(config, max_epochs=None, max_steps=10)
    assert (changed.seed, changed.max_epochs, changed.max_steps) == (3, None, 10)
    assert config.max_epochs == 20
    with pytest.raises(ConfigError, match="got neither"):
        replace(config, max_epochs=None)


def test_with_num_slots_settles_the_slots() -> None:
    assert with_num_slots(sample(), 8).num_slots == 8
    with pytest.raises(ConfigError, match="num_slots=3"):
        with_num_slots(sample(), 3)


def test_a_config_survives_pickling() -> None:
    config = sample(model=partial(net, width=3))
    again = pickle.loads(pickle.dumps(config))
    assert again.model.keywords == {"width": 3}
    assert again.checkpoint == config.checkpoint


def test_importing_warns_of_nothing_and_leaves_torch_alone() -> None:
    program = (
        "import sys, types; sys.modules['disttrain'] = types.ModuleType('disttrain')\n"  # without its __init__
        "sys.modules['disttrain'].__path__ = [sys.argv[1]]\n"
        "import disttrain.config; print('torch' in sys.modules)"
    )
    package = __import__("disttrain").__path__[0]
    done = subprocess.run([sys.executable, "-W", "error", "-c", program, package], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_a_precision_is_a_name_or_makes_one() -> None:
    def fifth(device: object) -> None:
        raise AssertionError("making a Config builds nothing")

    assert sample(precision=fifth).precision is fifth
    assert refused(precision=3) == 'precision: expected "fp32" | "bf16" | "fp16" | "apex" | "auto" | ' + (
        "(device) -> Precision, got 3."
    )
