"""Parameters, gradients and optimizer states of which each rank holds its part: FSDP2's, cut along the first dimension.

*Contract*: `Sharded(model, ...)` shards the model in place (`torch.distributed.fsdp.fully_shard`), one group of
parameters for each of `groups_of`; its parameters are DTensors from then on. Whatever is asked of this layout is
collective: all ranks ask for the same in the same order.

*Errors*: ConfigError for models and optimizers that cannot be sharded with the same bits (`groups`).

*Cost*: each rank holds 1/W of parameters, gradients and optimizer states, rounded up to whole rows. `total_norm` sends
1/W of the gradient from each rank: every gradient is put together on one rank, whose norm is then the norm of a whole
tensor. `whole` gathers one tensor on all.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from disttrain.errors import ConfigError
from disttrain.parallel.groups import check_elementwise, check_shardable, groups_of
from disttrain.parallel.layout import Replicated, norm_of_norms
from disttrain.parallel.tree import Message

ROUND_BYTES = 64 * 1024**2
"""How much of the gradients a rank puts together at a time for their norms."""


class Alone(Replicated):
    """The layout of a world of one, which has nothing to cut; it refuses what a larger one would refuse."""

    def __init__(self, model: nn.Module) -> None:
        check_shardable(model)

    def check_optimizer(self, optimizer: Optimizer) -> None:
        check_elementwise(optimizer)


class Sharded:
    """The layout of a model that `fully_shard` has cut over the ranks of `process_group`.

    `stays_gathered`: the parameters are gathered once and stay so until `gathered` is left; otherwise each group is
    gathered for its forward and again for its backward.
    """

    def __init__(
        self,
        model: nn.Module,
        process_group: ProcessGroup,
        *,
        device: torch.device,
        reduction: Literal["invariant", "fast"],
        stays_gathered: bool,
    ) -> None:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
            raise ConfigError(f'strategy="fsdp" needs torch 2.13 or newer, got {torch.__version__}; use "ddp"')
        check_shardable(model)
        self.model = model
        self.process_group = process_group
        self.stays_gathered = stays_gathered
        self._invariant = reduction == "invariant"
        self._mesh = DeviceMesh.from_group(process_group, device.type)
        self.groups: list[Any] = groups_of(model)
        """The modules that are gathered as one, each an FSDPModule."""
        for group in self.groups:
            group.register_forward_hook(_with_memory_of_its_own)
            fully_shard(group, mesh=self._mesh, reshard_after_forward=self._reshards(group))

    def _reshards(self, group: nn.Module) -> bool:
        """Return whether a group's parameters are let go between forward and backward; the root's are not."""
        return not self.stays_gathered and group is not self.model

    def check_optimizer(self, optimizer: Optimizer) -> None:
        check_elementwise(optimizer)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Hold all parameters whole: every rank may call the model as often as it likes, and no part of it waits."""
        for group in self.groups:
            group.set_reshard_after_forward(False, recurse=False)
            group.set_reshard_after_backward(False, recurse=False)
        for group in self.groups:
            group.unshard()
        try:
            yield
        finally:
            # FSDP2 remembers each forward, to fetch in the backward what was used before it: forwards without a
            # backward, of which there are more on some ranks than on others, must not be found there.
            self.groups[-1].reset_iter_state()
            for group in self.groups:
                group.reshard()
                group.set_reshard_after_forward(self._reshards(group), recurse=False)
                group.set_reshard_after_backward(True, recurse=False)

    def whole(self, tensor: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def clip(self, parameters: Sequence[Tensor], limit: float, norm: Tensor) -> None:
        parts = []
        for parameter in parameters:
            part = nn.Parameter(_local(parameter), requires_grad=True)
            part.grad = None if parameter.grad is None else _local(parameter.grad)
            parts.append(part)
        nn.utils.clip_grads_with_norm_(parts, limit, norm)

    @torch.no_grad()
    def total_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return the norm: the bits that whole gradients give, or with reduction="fast" some that are cheaper."""
        if not self._invariant:
            squares = norm_of_norms([torch.linalg.vector_norm(_local(gradient)) for gradient in gradients]) ** 2
            dist.all_reduce(squares, group=self.process_group)
            return squares.sqrt_()
        norms = torch.zeros(len(gradients), dtype=torch.float64, device=gradients[0].device)
        for mine in self._put_together(gradients):
            for index, gradient in mine.items():
                norms[index] = torch._foreach_norm([gradient])[0]
        dist.all_reduce(norms, group=self.process_group)  # each is zero but on one rank: nothing is rounded
        dtypes = [gradient.dtype for gradient in gradients]
        return norm_of_norms([norm.to(dtype) for norm, dtype in zip(norms.unbind(), dtypes, strict=True)])

    def _put_together(self, gradients: Sequence[Tensor]) -> Iterator[dict[int, Tensor]]:
        """Yield, in rounds, the whole gradients of which this rank is to take the norms, by their index."""
        size = self.process_group.size()
        largest_first = sorted(range(len(gradients)), key=lambda i: -gradients[i].numel())
        owned: list[list[int]] = [[] for _ in range(size)]
        num_bytes = 0
        for at, index in enumerate(largest_first):
            owned[at % size].append(index)
            num_bytes += gradients[index].nbytes if at % size == 0 else 0
            if at == len(gradients) - 1 or (at % size == size - 1 and num_bytes >= ROUND_BYTES):
                yield self._exchanged(gradients, owned)
                owned, num_bytes = [[] for _ in range(size)], 0

    def _exchanged(self, gradients: Sequence[Tensor], owned: Sequence[Sequence[int]]) -> dict[int, Tensor]:
        """Send every rank this rank's parts of the gradients it owns, and return those that this rank owns, whole."""
        rank, size = self.process_group.rank(), self.process_group.size()
        parts: dict[int, list[Tensor]] = {index: [] for index in owned[rank]}
        ops: list[Message] = []
        for peer in range(size):
            for index in owned[rank]:
                gradient = gradients[index]
                part = _local(gradient)
                if peer != rank:
                    part = part.new_empty(_rows(len(gradient), peer, size), *gradient.shape[1:])
                    ops.append((dist.irecv, part, peer))
                parts[index].append(part)
        for peer in range(size):
            if peer != rank:
                ops += [(dist.isend, _local(gradients[index]).contiguous(), peer) for index in owned[peer]]
        messages = [
            dist.P2POp(op, part, group=self.process_group, group_peer=peer) for op, part, peer in ops if part.numel()
        ]
        for work in dist.batch_isend_irecv(messages) if messages else ():
            work.wait()
        return {index: torch.cat(found) for index, found in parts.items()}

    def stateful(self, part: Any) -> Any:
        return part  # its state is made of DTensors, of which each rank saves and loads its part

    def cuts(self, model: nn.Module, optimizer: Optimizer) -> Callable[[str, tuple[int, ...]], Any]:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        by_index = [parameter for group in optimizer.param_groups for parameter in group["params"]]

        def cut(path: str, shape: tuple[int, ...]) -> Any:
            part, _, name = path.partition(".")
            parameter: Any = parameters.get(name) if part == "model" else None
            if part == "optimizer" and (found := re.match(r"state\.(\d+)\.", name)):
                parameter = by_index[int(found[1])] if int(found[1]) < len(by_index) else None
            if parameter is None or parameter.shape != shape:
                return None
            return parameter.device_mesh, parameter.placements

        return cut


def _with_memory_of_its_own(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Return a module's output with views copied: FSDP2 loses sight of a view that is then changed in place (`x += y`).

    It would not gather the module's parameters for its backward. A linear layer's output often is a view.
    """
    if isinstance(output, Tensor):
        return output.clone() if output._base is not None and output.requires_grad else output
    if type(output) in (list, tuple):
        return type(output)(_with_memory_of_its_own(module, inputs, part) for part in output)
    if isinstance(output, dict):
        for key, part in output.items():
            output[key] = _with_memory_of_its_own(module, inputs, part)
    return output


def _local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor."""
    return cast("Any", tensor.detach()).to_local() if hasattr(tensor, "to_local") else tensor.detach()


def _rows(num_rows: int, rank: int, world_size: int) -> int:
    """Return how many of a tensor's rows a rank holds: as `torch.chunk` cuts them."""
    each = -(-num_rows // world_size)
    return max(0, min(num_rows, each * (rank + 1)) - each * rank)
