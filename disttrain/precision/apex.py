"""Mixed precision by NVIDIA apex's `amp`, for programs that were written for it.

*Contract*: whoever builds the model calls `initialize` (apex's own `amp.initialize`) before wrapping it in DDP.
Each microbatch's backward runs inside `amp.scale_loss`; `before_step` runs after that context has exited, so
the gradients are unscaled, and clips over `master_params`. apex itself skips an update that overflowed.

*Errors*: ModuleNotFoundError with what to install, in three cases (see `require_amp`); nothing foreign is
imported to find out, for the wrong package fails in its own way when it is.

*Source*: apex's README and `apex/amp/handle.py`; its last tag with `amp` is 25.05.
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

    def __init__(self) -> None:
        require_amp()
        from apex import amp

        self._amp: Any = amp

    def initialize(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, opt_level: str = "O1", **options: Any
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Return model and optimizer as `amp.initialize` prepared them; before DDP, once a process."""
        prepared: tuple[nn.Module, torch.optim.Optimizer] = self._amp.initialize(
            model, optimizer, opt_level=opt_level, **options
        )
        return prepared

    def master_params(self, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """Return the parameters that the optimizer steps: what a `before_step` clips."""
        return list(self._amp.master_params(optimizer))

    def backward(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        with self._amp.scale_loss(loss, optimizer) as scaled:
            torch.autograd.backward(scaled)

    def update(self, optimizer: torch.optim.Optimizer, before_step: BeforeStep | None = None) -> bool:
        if before_step is not None and before_step() is False:
            return False
        stepped: list[bool] = []
        # After an overflow apex has put an empty method in the place of `step`: then the hook stays silent.
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
