"""The parameters that a run with slots trains: those with `requires_grad`, which may change between steps.

*Contract*: a step trains the parameters that have `requires_grad` when it begins. A parameter that a handler freezes
has no gradient from then on, so an optimizer leaves it alone. One that is unfrozen has a gradient from the next step
on. The ranks agree on each change before the step.

*Errors*: ConfigError on every rank if the ranks differ, or if nothing is left to train.

*Cost*: reads `requires_grad` of every parameter once a step.
"""

import logging
from collections.abc import Set

import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup

from disttrain.errors import ConfigError

logger = logging.getLogger(__name__)


class TrainedParameters:
    """A model's trained parameters, `tensors`, in the order of the model, and their `names`."""

    def __init__(self, model: nn.Module, process_group: ProcessGroup | None = None) -> None:
        self._model = model
        self._group = process_group
        self._all = dict(model.named_parameters())
        self._flags: list[bool] = []
        self._warned = False
        self.names: list[str] = []
        self.tensors: list[nn.Parameter] = []
        self._read()

    def _read(self) -> None:
        self._flags = [parameter.requires_grad for parameter in self._all.values()]
        trained = [(name, parameter) for name, parameter in self._all.items() if parameter.requires_grad]
        self.names = [name for name, _ in trained]
        self.tensors = [parameter for _, parameter in trained]

    def changed(self) -> bool:
        """Return True if other parameters have `requires_grad` than in the last step; then `tensors` are those."""
        if [parameter.requires_grad for parameter in self._all.values()] == self._flags:
            return False
        self._all = dict(self._model.named_parameters())
        for parameter in self._all.values():
            parameter.grad = None  # one that is frozen now must not keep that of the last step
        self._read()
        self._agree()
        return True

    def _agree(self) -> None:
        if self._group is not None and self._group.size() > 1:
            by_rank: list[list[str]] = [[] for _ in range(self._group.size())]
            dist.all_gather_object(by_rank, self.names, group=self._group)
            for rank, names in enumerate(by_rank):
                if differing := set(names) ^ set(by_rank[0]):
                    raise ConfigError(
                        f"expected the same parameters with requires_grad on every rank, but ranks 0 and {rank} differ "
                        f"in {', '.join(sorted(differing))}; freeze and unfreeze by the step or the epoch alone"
                    )
        if not self.tensors:
            raise ConfigError("no parameter is left to train: requires_grad is False for all")

    def warn_of_unused(self, unused: Set[int], *, iteration: int, rank: int) -> None:
        """Log a warning, once in a run, that names the parameters which no slot of this rank has used."""
        if unused and not self._warned:
            self._warned = True
            logger.warning(
                "step %d: no slot of rank %d used the parameters %s. Their gradients count as zero, so weight decay "
                "and momentum still move them; freeze what is not in use with requires_grad_(False).",
                iteration,
                rank,
                ", ".join(self.names[i] for i in sorted(unused)),
            )
