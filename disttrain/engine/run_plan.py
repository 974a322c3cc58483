"""The start and the limits of a run: begin anew or continue from the state; and the dict in which they are saved."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from disttrain.engine.state import State


class Progress(Protocol):
    """The counters and the limits of a run. A `State` has them, and so has a `Plan`."""

    iteration: int
    epoch: int
    epoch_length: int | None
    max_epochs: int | None
    max_iters: int | None


@dataclass
class Plan:
    """The counters and the limits with which a run starts. `anew`: it starts from the beginning."""

    iteration: int
    epoch: int
    epoch_length: int | None
    max_epochs: int | None
    max_iters: int | None
    anew: bool = False

    def apply(self, state: State) -> None:
        """Write the plan into the state."""
        state.iteration, state.epoch, state.epoch_length = self.iteration, self.epoch, self.epoch_length
        state.max_epochs, state.max_iters = self.max_epochs, self.max_iters


def is_done(progress: Progress) -> bool:
    """Return whether the run has reached one of its limits."""
    if progress.max_iters is not None and progress.iteration >= progress.max_iters:
        return True
    if progress.max_epochs is None:
        return False
    if progress.epoch >= progress.max_epochs:
        return True
    return progress.epoch_length is not None and progress.iteration >= progress.epoch_length * progress.max_epochs


def plan_run(
    state: State,
    paused: bool,
    data: Iterable[Any] | None,
    max_epochs: int | None,
    max_iters: int | None,
    epoch_length: int | None,
) -> Plan:
    """Return the plan of `Engine.run` with these arguments; TypeError or ValueError if they are wrong in this state."""
    max_epochs, max_iters = _whole("max_epochs", max_epochs), _whole("max_iters", max_iters)
    epoch_length = _whole("epoch_length", epoch_length)
    _check_arguments(data, max_epochs, max_iters, epoch_length)
    plan = Plan(state.iteration, state.epoch, state.epoch_length, state.max_epochs, state.max_iters)
    plan.anew = plan.max_epochs is None and plan.max_iters is None
    if not plan.anew:
        _change_maximum(plan, max_epochs, max_iters)
        plan.anew = not paused and is_done(plan)
    if plan.anew:
        plan = Plan(0, 0, plan.epoch_length or None, max_epochs, max_iters, anew=True)
        plan.max_epochs = 1 if max_epochs is None and max_iters is None else max_epochs
        plan.epoch_length = _first_known(epoch_length, _length_of(data), plan.epoch_length)
    elif not plan.epoch_length:
        plan.epoch_length = _first_known(epoch_length, None if paused else _length_of(data))
    elif epoch_length not in (None, plan.epoch_length):
        raise ValueError(
            f"epoch_length must stay {plan.epoch_length} while a run continues, got {epoch_length}; "
            "to start again from the beginning set engine.state.max_epochs = None first"
        )
    if plan.epoch_length is None and data is None and (plan.anew or not paused):
        raise ValueError("expected data or epoch_length, got neither; a run without data needs an epoch_length")
    if plan.anew and plan.epoch_length == 0:
        raise ValueError("expected data of at least one batch, got data of length 0")
    return plan


def _whole(name: str, value: Any) -> int | None:
    """Return a number that was passed as an int; ValueError if it is no whole number, such as `len(data) / 2`."""
    if value is None:
        return None
    try:
        number = int(value)
        if number == value:
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{name} must be a whole number, got {value!r}")


def check_iterable(data: object) -> None:
    """Raise TypeError unless `data` is iterable. `iter` is not called, since it may start worker processes."""
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise TypeError(f"data must be iterable, got {data!r} of type {type(data).__name__}")


def _check_arguments(
    data: Iterable[Any] | None, max_epochs: int | None, max_iters: int | None, epoch_length: int | None
) -> None:
    if data is not None:
        check_iterable(data)
    if max_epochs is not None and max_iters is not None:
        raise ValueError(f"expected one of max_epochs and max_iters, got {max_epochs=} and {max_iters=}")
    for name, value in (("max_epochs", max_epochs), ("max_iters", max_iters), ("epoch_length", epoch_length)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _change_maximum(plan: Plan, max_epochs: int | None, max_iters: int | None) -> None:
    """Change the maximum of a run that has begun, but not to the other kind, nor to one below the progress."""
    for name, maximum, other, reached in (
        ("max_epochs", max_epochs, "max_iters", plan.epoch),
        ("max_iters", max_iters, "max_epochs", plan.iteration),
    ):
        if maximum is None:
            continue
        if getattr(plan, other) is not None:
            raise ValueError(
                f"expected {other}, the kind of maximum of this run ({other}={getattr(plan, other)}), got "
                f"{name}={maximum}; to start again from the beginning set engine.state.{other} = None first"
            )
        if maximum < reached:
            raise ValueError(
                f"{name} must be at least {reached}, which the run has already reached, got {maximum}; "
                f"to start again from the beginning set engine.state.{name} = None first"
            )
        setattr(plan, name, maximum)


def _length_of(data: Any) -> int | None:
    """Return `len(data)`, or None if it is not known."""
    try:
        return len(data)
    except TypeError:
        return None


def _first_known(*lengths: int | None) -> int | None:
    return next((length for length in lengths if length is not None), None)


def progress_dict(state: State, user_keys: Iterable[str]) -> dict[str, Any]:
    """Return the dict of the state's progress from which `plan_from_dict` makes a plan."""
    maximum = "max_epochs" if state.max_iters is None else "max_iters"
    keys = ["epoch_length", "iteration", maximum, *user_keys]
    return {key: getattr(state, key) for key in keys}


def plan_from_dict(state_dict: Mapping[str, Any], user_keys: Iterable[str]) -> Plan:
    """Return the plan that continues from a saved dict; TypeError or ValueError if the dict does not hold one."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__name__}")
    missing = [key for key in ("epoch_length", *user_keys) if key not in state_dict]
    if missing:
        raise ValueError(f"state_dict must hold {', '.join(missing)}, got the keys {sorted(state_dict)}")
    for pair in (("iteration", "epoch"), ("max_epochs", "max_iters")):
        if sum(key in state_dict for key in pair) != 1:
            raise ValueError(f"state_dict must hold either {pair[0]} or {pair[1]}, got the keys {sorted(state_dict)}")
    length = _whole("epoch_length", state_dict["epoch_length"]) or None  # 0, after data without a batch, says nothing
    if length is not None and length < 0:
        raise ValueError(f"state_dict must hold an epoch_length of at least 1, or None, got {length}")
    if "epoch" in state_dict:
        if length is None:
            raise ValueError("state_dict with epoch must hold an epoch_length, got None; give iteration instead")
        iteration = state_dict["epoch"] * length
    else:
        iteration = state_dict["iteration"]
    epoch = iteration // length if length else 0
    plan = Plan(iteration, epoch, length, state_dict.get("max_epochs"), state_dict.get("max_iters"))
    too_few_epochs = length and plan.max_epochs is not None and plan.max_epochs * length < iteration
    too_few_iterations = plan.max_iters is not None and plan.max_iters < iteration
    if too_few_epochs or too_few_iterations:
        raise ValueError(
            f"state_dict must hold a maximum of at least the progress, got iteration {iteration}, epoch_length "
            f"{length} and max_epochs={plan.max_epochs}, max_iters={plan.max_iters}"
        )
    return plan
