"""Mixed precision by NVIDIA apex's `amp`, for programs that were written for it.

*Contract*: whoever builds the model calls `prepare` (apex's own `amp.initialize`) before wrapping it in DDP.
Each microbatch's backward runs inside `amp.scale_loss`; `before_step` runs after that context has exited, so
the gradients are unscaled, and clips over `master_params`. apex itself skips an update that overflowed.

Where the gradients of several microbatches meet over ranks only after their backwards, `unscale_at_update` leaves
them scaled until then. Else the last microbatch's, which DDP sums while its backward runs, would meet the others'
unscaled, and a rank that alone saw an overflow would go on with a scale of its own.

*Errors*: ModuleNotFoundError with what to install, in three cases (see `require_amp`); nothing foreign is
imported to find out, for the wrong package fails in its own way when it is.

*Source*: apex's README, its page "Advanced Amp Usage" ("Gradient accumulation across iterations", `delay_unscale`)
and `apex/amp/handle.py`; its last tag with `amp` is 25.05.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from disttrain.precision.base import FP32, BeforeStep

INSTALL = (
    "install NVIDIA's from source, tag 25.05 "
    '(pip install -v --no-build-isolation "git+https://github.com/NVIDIA/apex@25.05"), or use torch.amp: '
    'amp_mode="amp", in a config precision="bf16" or "fp16"'
)


def require_amp() -> None:
    """Raise ModuleNotFoundError, with what to do, unless NVIDIA's apex with its `amp` is installed."""
    spec = find_spec("apex")
    if spec is None:
        raise ModuleNotFoundError(f"expected NVIDIA apex, found no package apex; {INSTALL}", name="apex")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]

    def holds(file: str) -> bool:
        return any((folder / file).is_file() for folder in folders)

    if not (holds("multi_tensor_apply/multi_tensor_apply.py") and holds("optimizers/fused_adam.py")):
        where = ", ".join(map(str, folders)) or spec.origin
        raise ModuleNotFoundError(
            f"expected NVIDIA apex, found another package of that name in {where}; "
            f"remove it (pip uninstall apex) and {INSTALL}",
            name="apex",
        )
    if not holds("amp/frontend.py"):
        raise ModuleNotFoundError(
            'expected apex.amp, found an apex too new to have it (gone since May 2025); use torch.amp (amp_mode="amp", '
            'in a config precision="bf16" or "fp16"): apex\'s fused optimizers and layers work with it; '
            "or install its tag 25.05",
            name="apex.amp",
        )


class Apex(FP32):
    """Forward as apex patched it, backward through `amp.scale_loss`, apex's own skipping of overflows."""

    name = "apex"

    def __init__(self, opt_level: str = "O1", *, unscale_at_update: bool = False) -> None:
        require_amp()
        from apex import amp

        self._amp: Any = amp
        self._opt_level = opt_level
        self._unscale_at_update = unscale_at_update
        self._while_backward = {"delay_unscale": True} if unscale_at_update else {}
        self._overflowed = False

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return model and optimizer as `amp.initialize` prepared them; before DDP, once a process."""
        prepared: tuple[nn.Module, torch.optim.Optimizer] = self._amp.initialize(
            model, optimizer, opt_level=self._opt_level
        )
        return prepared

    def master_params(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """Return the parameters that the optimizer steps: what a `before_step` clips."""
        return list(self._amp.master_params(optimizer))

    def backward(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        step = _own_step(optimizer)
        with self._amp.scale_loss(loss, optimizer, **self._while_backward) as scaled:
            torch.autograd.backward(scaled)
        self._overflowed = self._overflowed or _own_step(optimizer) is not step

    def update(self, optimizer: torch.optim.Optimizer, before_step: BeforeStep | None = None) -> bool:
        if self._unscale_at_update:
            step = _own_step(optimizer)
            with self._amp.scale_loss(torch.zeros(()), optimizer):
                pass  # the gradients are there already: on leaving, apex unscales them and looks for an overflow
            self._overflowed = _own_step(optimizer) is not step
        overflowed, self._overflowed = self._overflowed, False
        if before_step is not None and before_step() is False:
            if overflowed:
                optimizer.step()  # the empty one, or the next update would be skipped in its place
            return False
        stepped: list[bool] = []
        # The empty method in the place of `step`, after an overflow, leaves the hook silent.
        hook = optimizer.register_step_post_hook(lambda *_: stepped.append(True))
        try:
            optimizer.step()
        finally:
            hook.remove()
        return bool(stepped)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self._amp.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self._amp.load_state_dict(state)


def _own_step(optimizer: torch.optim.Optimizer) -> object:
    """Return the step that was put over the class's, or None; apex puts one that does nothing after an overflow."""
    return vars(optimizer).get("step")
