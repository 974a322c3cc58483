"""What makes a Config sound beyond each field's type: functions that can be called, slots that fit.

*Errors*: every problem is one line that says what was expected, what was got and what to do.
"""

import inspect
import math
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

from disttrain.config.annotations import PLAIN_KEY, About, leaves
from disttrain.config.wording import either, got
from disttrain.errors import ConfigError

if TYPE_CHECKING:
    from disttrain.config.fields import Config


def value_of(config: "Config", name: str) -> Any:
    """Return the value of a field by its dotted name."""
    return reduce(getattr, name.split("."), config)


def problems(config: "Config") -> Iterator[str]:
    """Yield what keeps the config, whose fields have the right types, from being run."""
    yield from _name(config.name)
    if config.checkpoint.target is not None and not config.checkpoint.target.strip():
        yield "checkpoint.target: expected a folder or a URL such as 's3://bucket/runs', or None, got ''"
    yield from _one_of(
        "loss", "forward", config, "loss takes y_pred and y, forward replaces it for batches of another form"
    )
    yield from _one_of(
        "max_epochs",
        "max_steps",
        config,
        "each gives the length of the run; the other is None (on the command line: none)",
    )
    if config.spike_factor is not None and config.on_nan == "skip":
        yield (
            "spike_factor: expected None with on_nan='skip', which looks at gradients alone, "
            f"got {config.spike_factor}; use on_nan='rollback' or 'stop' with it"
        )
    for leaf in leaves(type(config)):
        yield from _callables(leaf.name, leaf.about, value_of(config, leaf.name))
    yield from _metric_names(config.metrics)
    yield from _monitor(config)
    if config.strategy == "fsdp":
        yield from _with_fsdp(config)
    if config.spmd and config.backend not in ("auto", "xla"):
        yield f"spmd: expected False with backend={config.backend!r}, got True; use backend='xla', which alone has it"
    if config.num_slots is not None:
        try:
            check_slots(config.global_batch_size, config.num_slots)
        except ConfigError as error:
            yield str(error)


def _name(name: str | None) -> Iterator[str]:
    """The run directory is `runs/NAME`, so a name is one plain part of a path."""
    if name is None:
        return
    plain = name.isprintable() and name == name.strip() and not set(name) & set("/\\") and not name.startswith(".")
    if not name or not plain or len(name.encode()) > 200:
        yield f"name: expected a folder's name such as 'digits', no path and no leading '.', got {got(name)}"


def _one_of(first: str, second: str, config: "Config", advice: str) -> Iterator[str]:
    num_given = sum(getattr(config, name) is not None for name in (first, second))
    if num_given != 1:
        yield f"{first}, {second}: expected one of the two, got {'both' if num_given else 'neither'}; {advice}"


def _callables(name: str, about: About, value: Any) -> Iterator[str]:
    """Look whether functions can be called as they will be, without calling them."""
    if not about.takes or value is None:
        return
    if about.within:
        named = value.items() if about.within.startswith("dict") else enumerate(value)
        for key, each in named:
            yield from _callables(f"{name}.{key}", About(takes=about.takes), each)
    elif about.num_arguments == 0 and hasattr(value, "state_dict") and not isinstance(value, type):
        yield f"{name}: expected {about.takes}, got {got(value)}, built already; give a function that builds it"
    else:
        try:
            signature = inspect.signature(value)
        except (TypeError, ValueError):  # some built-ins have none: what they take shows when they are called
            return
        try:
            signature.bind(*[None] * about.num_arguments)
        except TypeError as error:
            yield f"{name}: expected {about.takes}, got {got(value)}, which cannot be called so: {error}"


def _with_fsdp(config: "Config") -> Iterator[str]:
    """What does not go with sharded parameters; parallel/groups.py looks at the model and the optimizer themselves."""
    if config.precision == "apex":
        yield 'precision: expected "fp32", "bf16" or "fp16" with strategy="fsdp", got "apex", which takes whole ones'
    if config.compile:
        yield 'compile: expected False with strategy="fsdp", got True; leave it out, or use strategy="ddp"'


def _metric_names(names: Any) -> Iterator[str]:
    for name in names:
        if not PLAIN_KEY.fullmatch(name):
            yield f"metrics: expected names without '.', '=' and blanks, such as 'accuracy', got {got(name)}"


def _monitor(config: "Config") -> Iterator[str]:
    monitor, there = config.checkpoint.monitor, list(dict.fromkeys(["loss", *config.metrics]))
    if monitor is None and config.checkpoint.mode != "auto":
        yield f"checkpoint.mode: expected 'auto' without checkpoint.monitor, got {got(config.checkpoint.mode)}"
    elif monitor is not None and config.valid_data is None:
        yield f"checkpoint.monitor: expected None without valid_data, got {got(monitor)}; give it validation data"
    elif monitor is not None and monitor not in there:
        yield f"checkpoint.monitor: expected {either(map(repr, there))}, got {got(monitor)}"


def check_slots(global_batch_size: int, num_slots: int | None, world_size: int = 1) -> int:
    """Return the number of slots, which is the world size where `num_slots` is None.

    *Errors*: ConfigError where the slots do not divide the global batch or are fewer than the ranks.
    """
    slots = world_size if num_slots is None else num_slots
    if global_batch_size % slots == 0 and slots >= world_size:
        return slots
    fitting = _nearest([d for d in divisors(global_batch_size) if d >= world_size], slots, 3)
    if global_batch_size % slots:
        below = global_batch_size // slots * slots
        sizes = either(size for size in (below, below + slots) if size)
        which = f"num_slots={slots}" + (" (the world size)" if num_slots is None else "")
        counts = f", or num_slots={either(fitting)}" if fitting else ""
        raise ConfigError(
            f"global_batch_size={global_batch_size} cannot be cut into {which} equal slots; use {sizes}{counts}."
        )
    counts = f", or start a new run with num_slots={either(fitting)}" if fitting else ""
    raise ConfigError(
        f"num_slots={slots} is too few for {world_size} ranks, each of which needs a slot; "
        f"use at most {slots} rank{'s' if slots > 1 else ''}{counts}."
    )


def check_devices(global_batch_size: int, num_slots: int, num_devices: int) -> None:
    """ConfigError where the devices that work on each slot together do not divide its samples."""
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
    """Return what divides a positive number, in order."""
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*low, *(number // d for d in low)})


def _nearest(numbers: Sequence[int], to: int, count: int) -> list[int]:
    return sorted(sorted(numbers, key=lambda number: abs(number - to))[:count])
