"""Opens Python's debugger in a replayed step, before the model is called on a slot.

*Contract*: the debugger stops in `before_model`, whose variables are `model`, `x` (the first argument), `arguments`,
`keywords`, `batch`, `step`, `slot` and `run`. The generators are those of the slot: what is drawn in the debugger, or
changed there, changes the step. `c` goes on. If the step's forward never calls the model itself, nothing opens.
"""

import pdb  # noqa: T100 - this is what it is for
from typing import Any

from torch import nn

from disttrain.run.replayed_slots import Before
from disttrain.run.state import Run

HINT = """to stop in its forward: "tbreak model.forward" and "c"; "up" shows its callers; "c" goes on"""


def open_debugger(slot: int) -> Before:
    """Return a function that opens the debugger before the model's first call in a slot."""

    def before_slot(run: Run, number: int, batch: Any) -> None:
        if number == slot:
            attach_debugger(run, number, batch)

    return before_slot


def attach_debugger(run: Run, slot: int, batch: Any) -> None:
    """Open the debugger at the next call of the run's model."""
    step = run.trainer.state.iteration
    debugger = pdb.Pdb()

    def before_model(model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        handle.remove()
        x = arguments[0] if arguments else next(iter(keywords.values()), None)
        known = {"x": x, "run": run, "slot": slot, "step": step, "batch": batch}
        print(f"step {step}, slot {slot}, before model(x), with {', '.join(known)}: {HINT}", file=debugger.stdout)
        debugger.set_trace()
        del known

    handle = run.model.register_forward_pre_hook(before_model, with_kwargs=True)
