"""Optimizers that train at one point and evaluate at another (schedule-free ones): which point is used for what.

*Contract*: such an optimizer has `eval` and `train`, which move the parameters from one point to the other. A run steps
at the training point and resumes from it. It evaluates at the evaluation point, and a checkpoint holds the parameters
of that point as well, so that an export has them. Switching there and back rounds, so the parameters are copied, and
afterwards they are bit for bit as before.

*Cost*: a copy of the parameters during each evaluation and each save, and their size in each checkpoint. Nothing for
other optimizers.

*Source*: Defazio et al., The Road Less Scheduled (2024), for the two points.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from disttrain.handlers.stateful import bare


def has_two_points(optimizer: object) -> bool:
    """Return whether an optimizer trains at one point and evaluates at another."""
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))


def begin_training(optimizer: Any) -> None:
    """Put a new optimizer to its training point; schedule-free ones refuse a step before that."""
    if has_two_points(optimizer):
        optimizer.train()


@contextmanager
def evaluating(optimizer: Any, model: nn.Module) -> Iterator[None]:
    """Switch an optimizer that has `eval` and `train`; afterwards the parameters are bit for bit as before."""
    if not has_two_points(optimizer):
        yield
        return
    groups = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parameters = list({id(each): each for each in [*model.parameters(), *groups]}.values())  # a loss may have some too
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        for parameter, value in zip(parameters, before, strict=True):
            parameter.data.copy_(value)


class EvaluationPoint:
    """The parameters of a model at its optimizer's evaluation point, as a part of a checkpoint that is only saved."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._model = model
        self._optimizer = optimizer

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the parameters that train or have trained, by their names; every rank calls this."""
        model = bare(self._model)
        everything = model.named_parameters(remove_duplicate=False)
        # One that is frozen now, but has been trained, has two points too.
        named = [(name, each) for name, each in everything if each.requires_grad or each in self._optimizer.state]
        with evaluating(self._optimizer, model):
            copies = {id(parameter): parameter.detach().clone() for _, parameter in named}
        return {name: copies[id(parameter)] for name, parameter in named}
