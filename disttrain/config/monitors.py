"""The rules for the fields that follow a result of evaluations: checkpoint.monitor, schedule_monitor, early_stop."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from disttrain.config.annotations import value_of
from disttrain.config.wording import either, got

if TYPE_CHECKING:
    from disttrain.config.fields import Config


def monitor_problems(config: "Config") -> Iterator[str]:
    """Yield the problems of a config's monitors, each a sentence without a full stop."""
    yield from _monitor(config)
    yield from _schedule_monitor(config)
    yield from _early_stop(config)


def _monitor(config: "Config") -> Iterator[str]:
    if config.checkpoint.monitor is None and config.checkpoint.mode != "auto":
        yield (
            f"checkpoint.mode: expected 'auto' without checkpoint.monitor, got {got(config.checkpoint.mode)}; "
            "set checkpoint.monitor too"
        )
    yield from _result("checkpoint.monitor", config)


def _schedule_monitor(config: "Config") -> Iterator[str]:
    if config.schedule_monitor is not None and config.schedule is None:
        yield (
            f"schedule_monitor: expected None without schedule, got {got(config.schedule_monitor)}; "
            "set schedule too, for example to ReduceLROnPlateau"
        )
    yield from _result("schedule_monitor", config)


def _early_stop(config: "Config") -> Iterator[str]:
    given = sorted(config.early_stop.model_fields_set)
    if given and "monitor" not in given:
        yield (
            f"early_stop.monitor: missing beside early_stop.{given[0]}; expected the result that is to improve, "
            "such as 'loss', or None to end no run early"
        )
    yield from _result("early_stop.monitor", config)


def _result(name: str, config: "Config") -> Iterator[str]:
    """Yield a problem unless a field is None, or names a result of the validation data that there will be."""
    monitor, results = value_of(config, name), list(dict.fromkeys(["loss", *config.metrics]))
    if isinstance(config.valid_data, Mapping):
        results = [f"{each}/{result}" for each in config.valid_data for result in results]
    if monitor is not None and config.valid_data is None:
        yield f"{name}: expected None without valid_data, got {got(monitor)}; set valid_data too"
    elif monitor is not None and monitor not in results:
        yield from _value_of_forward(name, monitor, results, config)


def _value_of_forward(name: str, monitor: str, results: Sequence[str], config: "Config") -> Iterator[str]:
    """Yield a problem unless a result can be a value that `forward` returns, and somebody says which ones are good."""
    of_a_set = not isinstance(config.valid_data, Mapping) or monitor.partition("/")[0] in config.valid_data
    if config.forward is None or config.global_loss is not None or not of_a_set:
        yield f"{name}: expected {either(map(repr, results))}, got {got(monitor)}"
        return
    mode = name.replace("monitor", "mode")
    if name != "schedule_monitor" and value_of(config, mode) == "auto":
        yield (
            f"{name}: expected {either(map(repr, results))}, got {got(monitor)}; if forward returns a value of that "
            f"name, set {mode} to 'min' or 'max' too"
        )
