"""The parameters that a run with slots trains, and a warning for those that no slot uses."""

import logging
from collections.abc import Set

from torch import nn


class TrainedParameters:
    """A model's trainable parameters, `tensors`, in the order of the model, and their `names`."""

    def __init__(self, model: nn.Module) -> None:
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.names = [name for name, _ in named]
        self.tensors = [parameter for _, parameter in named]
        self._warned = False

    def warn_of_unused(self, unused: Set[int], log: logging.Logger, *, iteration: int, rank: int) -> None:
        """Log a warning, once in a run, that names the parameters which no slot of this rank has used."""
        if unused and not self._warned:
            self._warned = True
            log.warning(
                "step %d: no slot of rank %d used the parameters %s. Their gradients count as zero, so weight decay "
                "and momentum still move them; freeze what is not in use with requires_grad_(False).",
                iteration,
                rank,
                ", ".join(self.names[i] for i in sorted(unused)),
            )
