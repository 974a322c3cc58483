"""Mixed precision by NVIDIA apex's `amp`, for programs that were written for it.

*Contract*: the code that builds the model calls `prepare` (apex's own `amp.initialize`) before it wraps the model in
DDP. The backward of each microbatch runs inside `amp.scale_loss`. `before_step` runs after that context has exited, so
the gradients are unscaled; it clips over `master_params`. apex itself skips an update that overflowed.

If the gradients of several microbatches meet over ranks only after their backwards, `unscale_at_update` leaves them
scaled until then. Otherwise DDP would sum the last microbatch's gradients during its backward, still scaled, with the
others' unscaled ones. And a rank that saw an overflow alone would continue with a scale of its own.

*Errors*: ModuleNotFoundError with the package to install, in three cases (see `require_amp`). The package is not
imported for this check, because another package of that name fails in its own way when it is imported.

*Source*: apex's README, its page "Advanced Amp Usage" ("Gradient accumulation across iterations", `delay_unscale`)
and `apex/amp/handle.py`; its last tag with `amp` is 25.05.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from disttrain.precision.base import FP32, BeforeStep

INSTALL_APEX = (
    "install NVIDIA's from source, tag 25.05 "
    '(pip install -v --no-build-isolation "git+https://github.com/NVIDIA/apex@25.05"), or use torch.amp: '
    'amp_mode="amp", in a config precision="bf16" or "fp16"'
)


def require_amp() -> None:
    """Raise ModuleNotFoundError, with advice, unless NVIDIA's apex with its `amp` is installed."""
    spec = find_spec("apex")
    if spec is None:
        raise ModuleNotFoundError(f"expected NVIDIA apex, found no package apex; {INSTALL_APEX}", name="apex")
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]

    def holds(file: str) -> bool:
        return any((folder / file).is_file() for folder in folders)

    if not (holds("multi_tensor_apply/multi_tensor_apply.py") and holds("optimizers/fused_adam.py")):
        place = ", ".join(map(str, folders)) or spec.origin
        raise ModuleNotFoundError(
            f"expected NVIDIA apex, found another package of that name in {place}; "
            f"remove it (pip uninstall apex) and {INSTALL_APEX}",
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
    """The forward that apex patched, a backward inside `amp.scale_loss`, and apex's own skipping of overflows."""

    name = "apex"

    def __init__(self, opt_level: str = "O1", *, unscale_at_update: bool = False) -> None:
        require_amp()
        from apex import amp

        self._amp: Any = amp
        self._opt_level = opt_level
        self._unscale_at_update = unscale_at_update
        self._backward_options = {"delay_unscale": True} if unscale_at_update else {}
        self._overflowed = False

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return model and optimizer after `amp.initialize`; call it before DDP, once in each process."""
        prepared: tuple[nn.Module, torch.optim.Optimizer] = self._amp.initialize(
            model, optimizer, opt_level=self._opt_level
        )
        return prepared

    def master_params(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """Return the parameters that the optimizer steps; a `before_step` clips their gradients."""
        return list(self._amp.master_params(optimizer))

    def backward(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        step = _own_step(optimizer)
        with self._amp.scale_loss(loss, optimizer, **self._backward_options) as scaled:
            torch.autograd.backward(scaled)
        self._overflowed = self._overflowed or _own_step(optimizer) is not step

    def update(self, optimizer: torch.optim.Optimizer, before_step: BeforeStep | None = None) -> bool:
        if self._unscale_at_update:
            step = _own_step(optimizer)
            with self._amp.scale_loss(torch.zeros(()), optimizer):
                pass  # no backward: on exit, apex unscales the gradients that are there and checks for an overflow
            self._overflowed = _own_step(optimizer) is not step
        overflowed, self._overflowed = self._overflowed, False
        if before_step is not None and before_step() is False:
            if overflowed:
                optimizer.step()  # apex's empty method; without this call it would skip the next update
            return False
        stepped: list[bool] = []
        # After an overflow, apex has replaced `step` by an empty method, which does not call the hook.
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
    """Return the `step` that was set on the object, or None; after an overflow, apex sets one that does nothing."""
    return vars(optimizer).get("step")
