"""A double of apex.amp's loss scaling, in float32 on any device; it casts nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

GROWTH_INTERVAL = 2000


@dataclass
class Scaler:
    scale: float
    dynamic: bool
    largest: float
    unskipped: int = 0


@dataclass
class Stash:
    """The attribute `_amp_stash` that apex sets on an optimizer."""

    already_patched: bool = False
    params_have_scaled_gradients: bool = False


scalers: list[Scaler] = []


def initialize(
    models,
    optimizers=None,
    enabled=True,
    opt_level="O1",
    loss_scale=None,
    num_losses=1,
    min_loss_scale=None,
    max_loss_scale=2.0**24,
):
    if loss_scale is None:
        loss_scale = 1.0 if opt_level == "O0" else "dynamic"
    dynamic = loss_scale == "dynamic"
    scale = 2.0**16 if dynamic else float(loss_scale)
    scalers[:] = [Scaler(scale, dynamic, max_loss_scale) for _ in range(num_losses)]
    optimizers._amp_stash = Stash()
    return models, optimizers


@contextmanager
def scale_loss(loss, optimizers, loss_id=0, delay_unscale=False) -> Iterator[torch.Tensor]:
    if not scalers:
        raise RuntimeError("amp.scale_loss was used before amp.initialize")
    scaler, held = scalers[loss_id], optimizers._amp_stash
    if scaler.scale == 1.0 and not scaler.dynamic:
        yield loss
        scaler.unskipped += 1
        return
    parameters = list(master_params(optimizers))
    stash: list[Any] = [None for _ in parameters]
    if not delay_unscale and not held.params_have_scaled_gradients:
        stash = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
    yield loss.float() * scaler.scale
    held.params_have_scaled_gradients = delay_unscale
    if not delay_unscale:
        _unscale(scaler, parameters, stash, optimizers)


def _unscale(scaler, parameters, stash, optimizer) -> None:
    overflow = False
    for p, before in zip(parameters, stash, strict=True):
        if p.grad is None:
            p.grad = before
            continue
        overflow = overflow or not bool(torch.isfinite(p.grad).all())
        p.grad.div_(scaler.scale)
        if before is not None:
            p.grad.add_(before)
    if overflow and scaler.dynamic:
        scaler.scale /= 2
        scaler.unskipped = 0
        skip_next_step(optimizer)
        return
    scaler.unskipped += 1
    if scaler.dynamic and scaler.unskipped == GROWTH_INTERVAL:
        scaler.scale = min(scaler.scale * 2, scaler.largest)
        scaler.unskipped = 0


def skip_next_step(optimizer: torch.optim.Optimizer) -> None:
    if optimizer._amp_stash.already_patched:
        return
    step = optimizer.step  # not always the class's: a learning rate schedule sets a method of its own

    def skipped(closure=None):
        optimizer.step = step
        optimizer._amp_stash.already_patched = False

    optimizer.step = skipped
    optimizer._amp_stash.already_patched = True


def master_params(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def state_dict() -> dict:
    return {f"loss_scaler{i}": {"loss_scale": s.scale, "unskipped": s.unskipped} for i, s in enumerate(scalers)}


def load_state_dict(state: dict) -> None:
    for i, scaler in enumerate(scalers):
        saved = state[f"loss_scaler{i}"]
        scaler.scale, scaler.unskipped = saved["loss_scale"], saved["unskipped"]
