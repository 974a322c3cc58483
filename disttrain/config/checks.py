"""Checks of a whole Config, after each field's type: callable functions, fields that fit together, slots that fit.

*Errors*: each problem is one line: what was expected, what was got, what to do.
"""

import inspect
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from disttrain.config.annotations import PLAIN_KEY, FieldNote, Leaf, leaves, value_of
from disttrain.config.asked import asked, unknown
from disttrain.config.monitors import monitor_problems
from disttrain.config.update_checks import update_problems
from disttrain.config.wording import both, either, got
from disttrain.errors import ConfigError

if TYPE_CHECKING:
    from disttrain.config.fields import Config


OF_EVERY_LINE = ("step", "epoch", "loss", "grad_norm", "learning_rate", "left_out", "samples_per_second")
"""The names that the training curves of every run have."""


def problems(config: "Config") -> Iterator[str]:
    """Yield the reasons why a config cannot be run; its fields already have the right types."""
    yield from _name(config.name)
    if config.checkpoint.target is not None and not config.checkpoint.target.strip():
        yield "checkpoint.target: expected a folder or a URL such as 's3://bucket/runs', or None, got ''"
    if config.init_from.path is not None and not config.init_from.path.strip():
        yield "init_from: expected a run directory, such as 'runs/base@best', or a file of weights, or None, got ''"
    yield from _global_loss(config)
    yield from update_problems(config)
    if config.global_loss is None and (not config.updates or config.valid_data is not None):
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
    for update in config.updates.values():
        for leaf in leaves(type(update)):
            yield from _callables(f"updates.{update.name}.{leaf.name}", leaf.note, getattr(update, leaf.name))
    for leaf in leaves(type(config)):
        if leaf.note.asks:
            yield from _parts_that_are_not_there(config, leaf)
    yield from _metric_names("metrics", config.metrics)
    yield from _metric_names("train_metrics", config.train_metrics, OF_EVERY_LINE)
    yield from _valid_sets(config.valid_data)
    yield from monitor_problems(config)
    yield from _ema(config)
    if config.audit.every_steps:
        yield from _audit(config)
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


def _global_loss(config: "Config") -> Iterator[str]:
    """Yield the settings that exclude a loss over the global batch, or that it needs."""
    if config.global_loss is None:
        return
    if config.forward is None or config.loss is not None:
        given = "no forward" if config.forward is None else "a loss too"
        yield (
            f"global_loss: expected forward=(model, batch) -> embeddings beside it, and no loss, got {given}; "
            "global_loss takes the embeddings that forward returns"
        )
    if config.weight is not None:
        yield (
            "weight: expected None with global_loss, which gets the whole global batch at once, got "
            f"{got(config.weight)}; let forward return what counts in a sample, and weigh it in global_loss"
        )
    batch_size = config.validate.batch_size
    if batch_size is not None and config.global_batch_size % batch_size:
        yield (
            f"validate.batch_size: expected a divisor of global_batch_size={config.global_batch_size} with "
            f"global_loss, which compares that many samples, got {batch_size}"
        )
    if config.precision == "apex":
        yield (
            'precision: expected "fp32", "bf16" or "fp16" with global_loss, got "apex", which changes its loss scale '
            "between the slots of a step"
        )
    if config.strategy == "fsdp" and config.fsdp_gather == "module":
        yield (
            'fsdp_gather: expected "step" with global_loss, got "module": the loss over the global batch is computed '
            "outside the forward of the module that holds its parameters"
        )


def _callables(name: str, note: FieldNote, value: Any) -> Iterator[str]:
    """Yield a problem for each function that cannot be called with its arguments; no function is called."""
    if not note.takes or value is None:
        return
    if note.within or isinstance(value, Mapping):
        functions = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, function in functions:
            yield from _callables(f"{name}.{key}", FieldNote(takes=note.takes), function)
    elif note.num_arguments == 0 and hasattr(value, "state_dict") and not isinstance(value, type):
        yield f"{name}: expected {note.takes}, got {got(value)}, built already; give a function that builds it"
    elif names := asked(value, note):
        if left := unknown(value, note):
            yield (
                f"{name}: expected a function that takes {both(names)} alone, got {got(value)}, which needs "
                f"{both(left)} too; give {either(left)} by partial(FUNCTION, {left[0]}=...)"
            )
    else:
        try:
            signature = inspect.signature(value)
        except (TypeError, ValueError):  # some built-ins have no signature; the call itself will show it
            return
        try:
            signature.bind(*[None] * note.num_arguments)
        except TypeError as error:
            yield f"{name}: expected {note.takes}, got {got(value)}, which does not take these arguments: {error}"


def _parts_that_are_not_there(config: "Config", leaf: Leaf) -> Iterator[str]:
    for part in leaf.note.asks:
        if part in asked(value_of(config, leaf.name), leaf.note) and getattr(config, part) is None:
            given = [each for each in leaf.note.asks if getattr(config, each) is not None]
            yield f"{leaf.name}: it asks for {part}, but the config has none; it has {both(given)}"


def _with_fsdp(config: "Config") -> Iterator[str]:
    """Yield the settings that exclude sharded parameters; parallel/groups.py checks the model and the optimizer."""
    if config.precision == "apex":
        yield (
            'precision: expected "fp32", "bf16" or "fp16" with strategy="fsdp", got "apex", which needs whole '
            'parameters; use one of these, or strategy="ddp"'
        )
    if config.compile and config.fsdp_gather == "module":
        yield (
            'compile: expected False with strategy="fsdp" and fsdp_gather="module", got True; use fsdp_gather="step", '
            'or strategy="ddp"'
        )


def _metric_names(field: str, names: Iterable[Any], taken: Collection[str] = ()) -> Iterator[str]:
    for name in names:
        if not PLAIN_KEY.fullmatch(name):
            yield f"{field}: expected names without '.', '=' and spaces, such as 'accuracy', got {got(name)}"
        elif name in taken:
            yield f"{field}: expected names of their own, got {got(name)}, which is a part of every line of the curves"


def _valid_sets(valid_data: Any) -> Iterator[str]:
    """Yield the problems of the names of several validation sets."""
    if not isinstance(valid_data, Mapping):
        return
    if not valid_data:
        yield "valid_data: expected a function, a dict of them by name, or None, got an empty dict"
    for name in valid_data:
        if not PLAIN_KEY.fullmatch(name) or "/" in name:
            yield f"valid_data: expected names without '.', '=', '/' and spaces, such as 'clean', got {got(name)}"


def _ema(config: "Config") -> Iterator[str]:
    given = sorted(config.ema.model_fields_set)
    if given and "decay" not in given:
        yield (f"ema.decay: missing beside ema.{given[0]}; expected a number such as 0.999, or None to keep no average")


def _audit(config: "Config") -> Iterator[str]:
    """Yield the settings with which a slot cannot be computed again, bit for bit."""
    given = f"audit.every_steps={config.audit.every_steps}"
    if not config.deterministic:
        yield f"deterministic: expected True with {given}, which compares bits, got False; leave one of the two out"
    if config.precision == "apex":
        yield (
            f'precision: expected "fp32", "bf16" or "fp16" with {given}, got "apex", which changes its loss scale '
            "between the slots of a step"
        )
    if config.strategy == "fsdp" and config.fsdp_gather == "module":
        yield (
            f'fsdp_gather: expected "step" with {given}, got "module": each rank computes slots of another rank, for '
            "which it needs the parameters whole"
        )
    if config.backend == "xla" or config.spmd:
        yield f"backend: expected another one than xla with {given}: it compiles a step into one program"


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


def check_devices(
    global_batch_size: int, num_slots: int, num_devices: int, evaluation_batch_size: int | None = None
) -> None:
    """Raise ConfigError unless the devices that share a slot, or a batch, divide its samples into equal parts."""
    if evaluation_batch_size is not None and evaluation_batch_size % num_devices:
        raise ConfigError(
            f"validate.batch_size={evaluation_batch_size} cannot be cut over {num_devices} devices equally; use a "
            f"multiple of {num_devices}."
        )
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
