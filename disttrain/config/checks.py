"""Checks of a whole Config, after each field's type: callable functions, fields that fit together, slots that fit.

*Errors*: each problem is one line: what was expected, what was got, what to do.
"""

import inspect
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

from disttrain.config.annotations import PLAIN_KEY, FieldNote, leaves
from disttrain.config.wording import either, got
from disttrain.errors import ConfigError

if TYPE_CHECKING:
    from disttrain.config.fields import Config


OF_EVERY_LINE = ("step", "epoch", "loss", "grad_norm", "learning_rate", "left_out", "samples_per_second")
"""The names that the training curves of every run have."""


def value_of(config: "Config", name: str) -> Any:
    """Return the value of a field by its dotted name."""
    return reduce(getattr, name.split("."), config)


def problems(config: "Config") -> Iterator[str]:
    """Yield the reasons why a config cannot be run; its fields already have the right types."""
    yield from _name(config.name)
    if config.checkpoint.target is not None and not config.checkpoint.target.strip():
        yield "checkpoint.target: expected a folder or a URL such as 's3://bucket/runs', or None, got ''"
    yield from _one_of(
        "loss", "forward", config, "loss takes y_pred and y; forward replaces it for batches of another form"
    )
    yield from _one_of(
        "max_epochs",
        "max_steps",
        config,
        "each gives the length of the run; set the other to None (on the command line: none)",
    )
    if config.spike_factor is not None and config.on_nan == "skip":
        yield (
            "spike_factor: expected None with on_nan='skip', which checks gradients only, "
            f"got {config.spike_factor}; use it with on_nan='rollback' or 'stop'"
        )
    for leaf in leaves(type(config)):
        yield from _callables(leaf.name, leaf.note, value_of(config, leaf.name))
    yield from _metric_names("metrics", config.metrics)
    yield from _metric_names("train_metrics", config.train_metrics, OF_EVERY_LINE)
    yield from _monitor(config)
    if config.strategy == "fsdp":
        yield from _with_fsdp(config)
    if config.spmd and config.backend not in ("auto", "xla"):
        yield f"spmd: expected False with backend={config.backend!r}, got True; use backend='xla', or leave spmd out"
    if config.num_slots is not None:
        try:
            check_slots(config.global_batch_size, config.num_slots)
        except ConfigError as error:
            yield str(error)


def _name(name: str | None) -> Iterator[str]:
    """Yield a problem unless the name is one plain part of a path, since the run directory is `runs/NAME`."""
    if name is None:
        return
    plain = name.isprintable() and name == name.strip() and not set(name) & set("/\\") and not name.startswith(".")
    if not name or not plain or len(name.encode()) > 200:
        yield f"name: expected a folder's name such as 'digits', no path and no leading '.', got {got(name)}"


def _one_of(first: str, second: str, config: "Config", advice: str) -> Iterator[str]:
    num_given = sum(getattr(config, name) is not None for name in (first, second))
    if num_given != 1:
        yield f"{first}, {second}: expected one of the two, got {'both' if num_given else 'neither'}; {advice}"


def _callables(name: str, note: FieldNote, value: Any) -> Iterator[str]:
    """Yield a problem for each function that cannot be called with its arguments; no function is called."""
    if not note.takes or value is None:
        return
    if note.within:
        functions = value.items() if note.within.startswith("dict") else enumerate(value)
        for key, function in functions:
            yield from _callables(f"{name}.{key}", FieldNote(takes=note.takes), function)
    elif note.num_arguments == 0 and hasattr(value, "state_dict") and not isinstance(value, type):
        yield f"{name}: expected {note.takes}, got {got(value)}, built already; give a function that builds it"
    else:
        try:
            signature = inspect.signature(value)
        except (TypeError, ValueError):  # some built-ins have no signature; the call itself will show it
            return
        try:
            signature.bind(*[None] * note.num_arguments)
        except TypeError as error:
            yield f"{name}: expected {note.takes}, got {got(value)}, which does not take these arguments: {error}"


def _with_fsdp(config: "Config") -> Iterator[str]:
    """Yield the settings that exclude sharded parameters; parallel/groups.py checks the model and the optimizer."""
    if config.precision == "apex":
        yield (
            'precision: expected "fp32", "bf16" or "fp16" with strategy="fsdp", got "apex", which needs whole '
            'parameters; use one of these, or strategy="ddp"'
        )
    if config.compile:
        yield 'compile: expected False with strategy="fsdp", got True; leave it out, or use strategy="ddp"'


def _metric_names(field: str, names: Iterable[Any], taken: Collection[str] = ()) -> Iterator[str]:
    for name in names:
        if not PLAIN_KEY.fullmatch(name):
            yield f"{field}: expected names without '.', '=' and spaces, such as 'accuracy', got {got(name)}"
        elif name in taken:
            yield f"{field}: expected names of their own, got {got(name)}, which is a part of every line of the curves"


def _monitor(config: "Config") -> Iterator[str]:
    monitor, results = config.checkpoint.monitor, list(dict.fromkeys(["loss", *config.metrics]))
    if monitor is None and config.checkpoint.mode != "auto":
        yield (
            f"checkpoint.mode: expected 'auto' without checkpoint.monitor, got {got(config.checkpoint.mode)}; "
            "set checkpoint.monitor too"
        )
    elif monitor is not None and config.valid_data is None:
        yield f"checkpoint.monitor: expected None without valid_data, got {got(monitor)}; set valid_data too"
    elif monitor is not None and monitor not in results:
        yield f"checkpoint.monitor: expected {either(map(repr, results))}, got {got(monitor)}"


def check_slots(global_batch_size: int, num_slots: int | None, world_size: int = 1) -> int:
    """Return the number of slots: `num_slots`, or the world size if that is None.

    *Errors*: ConfigError if the slots do not divide the global batch, or if there are fewer slots than ranks.
    """
    slots = world_size if num_slots is None else num_slots
    if global_batch_size % slots == 0 and slots >= world_size:
        return slots
    fitting = _nearest([d for d in divisors(global_batch_size) if d >= world_size], slots, 3)
    if global_batch_size % slots:
        below = global_batch_size // slots * slots
        sizes = either(size for size in (below, below + slots) if size)
        source = " (the world size)" if num_slots is None else ""
        counts = f", or num_slots={either(fitting)}" if fitting else ""
        raise ConfigError(
            f"global_batch_size={global_batch_size} cannot be cut into num_slots={slots}{source} equal slots; "
            f"use {sizes}{counts}."
        )
    counts = f", or start a new run with num_slots={either(fitting)}" if fitting else ""
    raise ConfigError(
        f"num_slots={slots} is too few for {world_size} ranks, since each rank needs a slot; "
        f"use at most {slots} rank{'s' if slots > 1 else ''}{counts}."
    )


def check_devices(global_batch_size: int, num_slots: int, num_devices: int) -> None:
    """Raise ConfigError unless the devices that share a slot divide its samples into equal parts."""
    samples = global_batch_size // num_slots
    if samples % num_devices == 0:
        return
    unit = num_slots * num_devices
    below = global_batch_size // unit * unit
    sizes = either(size for size in (below, below + unit) if size)
    fitting = _nearest(divisors(global_batch_size // num_devices), num_slots, 3)
    counts = f", or in a new run num_slots={either(fitting)}" if global_batch_size % num_devices == 0 else ""
    raise ConfigError(
        f"global_batch_size={global_batch_size} in num_slots={num_slots} makes slots of {samples} samples, which "
        f"cannot be cut over {num_devices} devices equally; use {sizes}{counts}, or a number of devices that divides "
        f"{samples}."
    )


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number, in ascending order."""
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*low, *(number // d for d in low)})


def _nearest(numbers: Sequence[int], to: int, count: int) -> list[int]:
    return sorted(sorted(numbers, key=lambda number: abs(number - to))[:count])
