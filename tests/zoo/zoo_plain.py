"""The plain training loop that a run must agree with: one process, no strategy, no handlers, no checkpoints.

It shares the package's seeds, the order of the samples and nothing else. The loss, if a module, and the model are one:
both are trained, and the buffers and frozen parameters of both begin each slot as they began the step. A buffer that no
state_dict holds begins each slot as its constructor made it. With `weight` a step's gradient is the mean over targets.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from disttrain import Config
from disttrain.backend import Backend
from disttrain.config import replace
from disttrain.parallel import Slots
from disttrain.run.data import loader_of
from disttrain.run.length import total_steps
from disttrain.seeding import manual_seed, seed_for, seed_position

Gradient = list[Tensor]


def plain_losses(
    config: Config, backend: Backend, step_begins: Callable[[nn.Module, int], None] | None = None
) -> list[list[str]]:
    """Return the loss of each slot of each step, in hexadecimal; `step_begins` may change the model before a step."""
    assert config.num_slots is not None
    torch.use_deterministic_algorithms(True)
    manual_seed(seed_for(config.seed, "data"))
    loader, identity = loader_of(replace(config, weight=None), config.train_data(), Slots(config.num_slots), backend)
    manual_seed(seed_for(config.seed, "init"))
    model = config.model()
    both = nn.ModuleList([model, config.loss] if isinstance(config.loss, nn.Module) else [model])
    trained = [parameter for parameter in both.parameters() if parameter.requires_grad]
    optimizer = config.optimizer(trained)
    num_steps = total_steps(config, identity)
    schedule = None if config.schedule is None else config.schedule(optimizer, num_steps)
    losses: list[list[str]] = []
    persistent = both.state_dict().keys()
    of_constructor = {name: each.clone() for name, each in both.named_buffers() if name not in persistent}
    for batch in _batches(loader, num_steps):
        if step_begins is not None:
            step_begins(model, len(losses) + 1)
        both.train()
        moved = [parameter for parameter in both.parameters() if parameter.requires_grad]
        at_start, after_first = _moving(both), _moving(both)
        gradients, step_losses, weights = [], [], []
        for slot, microbatch in enumerate(batch):
            _set(both, at_start | of_constructor)
            for parameter in both.parameters():
                parameter.grad = None
            torch.manual_seed(seed_for(config.seed, "step", len(losses), slot))
            with torch.autocast("cpu", torch.bfloat16) if config.precision == "bf16" else nullcontext():
                loss = _loss(config, model, microbatch)
            loss.backward()
            weight = 1 if config.weight is None else config.weight(microbatch)
            weights.append(weight)
            wide = [_wide(torch.zeros_like(p) if p.grad is None else p.grad) for p in moved]
            gradients.append([gradient * weight if weight else torch.zeros_like(gradient) for gradient in wide])
            step_losses.append(float(loss).hex())
            after_first = after_first if slot else _moving(both)
        _set(both, after_first)
        for parameter, total in zip(moved, _sum(gradients), strict=True):
            parameter.grad = (total / max(1, sum(weights))).to(parameter.dtype)
        if config.grad_clip_norm is not None:
            nn.utils.clip_grad_norm_(moved, config.grad_clip_norm)
        seed_position(seed_for(config.seed, "update", len(losses) + 1))
        if sum(weights):
            optimizer.step()
        if sum(weights) and schedule is not None:
            schedule.step()
        losses.append(step_losses)
    return losses


def _batches(loader: Any, num_steps: int) -> Iterator[Any]:
    done = 0
    while True:
        for batch in loader:
            yield batch
            done += 1
            if done == num_steps:
                return


def _loss(config: Config, model: nn.Module, batch: Any) -> Tensor:
    if config.forward is not None:
        return config.forward(model, batch)[0]
    assert config.loss is not None
    x, y = batch
    return config.loss(model(x), y)


def _sum(gradients: Sequence[Gradient]) -> Gradient:
    """Return the sum over slots: of the first half and the second half, each summed in the same way."""
    if len(gradients) == 1:
        return gradients[0]
    half = len(gradients) // 2
    return [left + right for left, right in zip(_sum(gradients[:half]), _sum(gradients[half:]), strict=True)]


def _wide(tensor: Tensor) -> Tensor:
    """Return a gradient of 16 bits in float32, in which it is summed."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _moving(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of what a forward may move: buffers and frozen parameters."""
    frozen = [(name, parameter) for name, parameter in module.named_parameters() if not parameter.requires_grad]
    return {name: tensor.detach().clone() for name, tensor in [*module.named_buffers(), *frozen]}


@torch.no_grad()
def _set(module: nn.Module, values: dict[str, Tensor]) -> None:
    for name, tensor in [*module.named_buffers(), *module.named_parameters()]:
        if name in values:
            tensor.copy_(values[name])
