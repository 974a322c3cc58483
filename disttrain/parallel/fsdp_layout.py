"""Parameters, gradients and optimizer states that FSDP2 cuts over the ranks, along their first dimension.

*Contract*: `FsdpLayout(model, ...)` shards the model in place (`torch.distributed.fsdp.fully_shard`), with one group of
parameters for each module of `groups_of`. From then on its parameters are DTensors. The methods of this layout are
collective: all ranks call the same ones in the same order.

*Errors*: ConfigError for models and optimizers that cannot be sharded with the same bits (`groups`).

*Cost*: each rank holds 1/W of the parameters, gradients and optimizer states, rounded up to whole rows. In `total_norm`
each rank sends 1/W of the gradient: every gradient is assembled on one rank, so its norm is that of a whole tensor.
`whole` gathers one tensor on all ranks.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from disttrain.errors import ConfigError
from disttrain.parallel.counterparts import Counterparts
from disttrain.parallel.groups import check_shardable, groups_of, needs_whole, own_parameters
from disttrain.parallel.layout import Cuts, ReplicatedLayout, norm_of_norms, part_here, take_from_first_rank
from disttrain.parallel.owners import assembled
from disttrain.parallel.slot_checks import ForwardWatch
from disttrain.parallel.whole_steps import WholeSteps

ROUND_BYTES = 64 * 1024**2
"""The bytes of gradients that a rank assembles at a time for their norms."""


class OptimizerRules:
    """The optimizers that a layout with parts takes, the same on any number of ranks."""

    def __init__(self) -> None:
        self._stepped_whole: list[Optimizer] = []

    def check_optimizer(self, optimizer: Optimizer) -> None:
        if optimizer not in self._stepped_whole and (reason := needs_whole(optimizer)) is not None:
            raise ConfigError(f'strategy="fsdp": {reason}; give the optimizer such groups when it is built')

    def step_whole(self, optimizer: Optimizer) -> None:
        self._stepped_whole.append(optimizer)


class UncutLayout(OptimizerRules, ReplicatedLayout):
    """The layout of a single rank: nothing is cut. It refuses the models and optimizers that several ranks refuse."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        check_shardable(model)


class FsdpLayout(OptimizerRules):
    """The layout of a model that `fully_shard` has cut over the ranks of `process_group`.

    `stays_gathered`: the parameters are gathered once and stay gathered until the context `gathered` ends. Otherwise
    each group is gathered for its forward and again for its backward.
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
        super().__init__()
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
            raise ConfigError(f'strategy="fsdp" needs torch 2.13 or newer, got {torch.__version__}; use "ddp"')
        check_shardable(model)
        take_from_first_rank([*model.parameters(), *model.buffers()], process_group)
        self.model = model
        self.process_group = process_group
        self.stays_gathered = stays_gathered
        self._invariant = reduction == "invariant"
        self._mesh = DeviceMesh.from_group(process_group, device.type)
        self.groups: list[Any] = groups_of(model)
        """The modules whose parameters are gathered together, each an FSDPModule."""
        self.own = own_parameters(self.groups)
        """For each group, the names in it of the parameters that no inner group has."""
        places = {module: f"{name}." if name else "" for name, module in model.named_modules()}
        self.prefixes = [places[group] for group in self.groups]
        """For each group, what stands before those names in the model."""
        self._gathered: dict[str, Tensor] = {}
        self._has_forwards = False  # before the first one, FSDP2 has no record of them
        if stays_gathered:
            for group in self.groups:
                _cut_without_hooks(group, self._mesh)
            return
        model.register_forward_pre_hook(self._note_forward)
        for group, names in zip(self.groups, self.own, strict=True):
            watch = ForwardWatch(names)
            group.register_forward_hook(_with_memory_of_its_own)
            group.register_forward_hook(watch.forward_ends)
            fully_shard(group, mesh=self._mesh, reshard_after_forward=group is not model)
            group.register_forward_pre_hook(watch.forward_starts)

    def _note_forward(self, model: nn.Module, inputs: Any) -> None:
        self._has_forwards = True

    def step_whole(self, optimizer: Optimizer) -> None:
        super().step_whole(optimizer)
        WholeSteps(optimizer, self.process_group, self.like)

    def gathered_parameters(self) -> list[dict[str, Tensor]]:
        """Return, for each group, its own parameters as autograd sees them, by their names in the group.

        They take `requires_grad` from the cut parameters, which user code sees. A collective.
        """
        cut = dict(self.model.named_parameters())
        by_group = []
        for group, names, prefix in zip(self.groups, self.own, self.prefixes, strict=True):
            group.unshard()
            gathered: dict[str, Tensor] = {name: group.get_parameter(name) for name in names}
            group.reshard()
            for name, parameter in gathered.items():
                parameter.requires_grad_(cut[prefix + name].requires_grad)
                self._gathered[prefix + name] = parameter
            by_group.append(gathered)
        return by_group

    def show_flags(self) -> None:
        cut = dict(self.model.named_parameters())
        for name, parameter in self._gathered.items():
            parameter.requires_grad_(cut[name].requires_grad)

    def like(self, parameter: Tensor, part: Tensor) -> Any:
        """Return the DTensor of this rank's part of a gradient, cut as its parameter is."""
        from torch.distributed.tensor import DTensor

        placements = cast("Any", parameter).placements
        return DTensor.from_local(
            part, self._mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )

    def chunk_numel(self, tensor: Tensor) -> int:
        """Return the number of elements of a rank's rows of a whole tensor, filled up to those of the first rank."""
        rows = -(-len(tensor) // self.process_group.size())
        return rows * (tensor.numel() // max(1, len(tensor)))

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Hold all parameters whole: each rank may call the model any number of times, and no module waits."""
        self._free_after_use(False)
        for group in self.groups:
            group.unshard()
        try:
            yield
        finally:
            # FSDP2 records each forward, and in the backward it gathers the groups in the reverse order. Forwards
            # without a backward must not stay in that record: their number differs between the ranks.
            if self._has_forwards:
                self.groups[-1].reset_iter_state()
            for group in self.groups:
                group.reshard()
            self._free_after_use(True)

    def _free_after_use(self, value: bool) -> None:
        """Let each module's hooks free what they have gathered, or not; with `stays_gathered` there are no hooks."""
        for group in [] if self.stays_gathered else self.groups:
            group.set_reshard_after_forward(value and group is not self.model, recurse=False)
            group.set_reshard_after_backward(value, recurse=False)

    def whole(self, tensor: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def clip(self, parameters: Sequence[Tensor], limit: float, norm: Tensor) -> None:
        parts = []
        for parameter in parameters:
            part = nn.Parameter(part_here(parameter), requires_grad=True)
            part.grad = None if parameter.grad is None else part_here(parameter.grad)
            parts.append(part)
        nn.utils.clip_grads_with_norm_(parts, limit, norm)

    @torch.no_grad()
    def total_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return the norm, with the bits of whole gradients; with reduction="fast", a cheaper one with other bits."""
        if not self._invariant:
            squares = norm_of_norms([torch.linalg.vector_norm(part_here(gradient)) for gradient in gradients]) ** 2
            dist.all_reduce(squares, group=self.process_group)
            return squares.sqrt_()
        norms = torch.zeros(len(gradients), dtype=torch.float64, device=gradients[0].device)
        for mine in self._put_together(gradients):
            for index, gradient in mine.items():
                norms[index] = torch._foreach_norm([gradient])[0]
        dist.all_reduce(norms, group=self.process_group)  # each norm is zero on all ranks but one: nothing is rounded
        dtypes = [gradient.dtype for gradient in gradients]
        return norm_of_norms([norm.to(dtype) for norm, dtype in zip(norms.unbind(), dtypes, strict=True)])

    def _put_together(self, gradients: Sequence[Tensor]) -> Iterator[dict[int, Tensor]]:
        """Yield, in rounds, the whole gradients whose norms this rank computes, by their index."""
        size = self.process_group.size()
        largest_first = sorted(range(len(gradients)), key=lambda i: -gradients[i].numel())
        owners: dict[int, int] = {}
        num_bytes = 0
        for place, index in enumerate(largest_first):
            owners[index] = place % size
            num_bytes += gradients[index].nbytes if place % size == 0 else 0
            if place == len(gradients) - 1 or (place % size == size - 1 and num_bytes >= ROUND_BYTES):
                yield assembled({index: gradients[index] for index in owners}, owners, self.process_group)
                owners, num_bytes = {}, 0

    def cut(self, batch: Any) -> Any:
        return batch

    def bring_together(self, outputs: Any) -> Any:
        return outputs

    def stateful(self, part: Any) -> Any:
        return part  # its state consists of DTensors; each rank saves and loads its part of them

    def cuts(self, parts: Mapping[str, nn.Module], optimizer: Optimizer, kept: Mapping[str, Any]) -> Cuts:
        """Return the cuts: a tensor of the checkpoint is cut like its counterpart in this run."""
        counterparts = Counterparts(parts, optimizer, kept)

        def cut(path: str, shape: tuple[int, ...]) -> Any:
            tensor: Any = counterparts.of(path, shape)
            return None if not hasattr(tensor, "placements") else (tensor.device_mesh, tensor.placements)

        return cut


def _cut_without_hooks(group: nn.Module, mesh: Any) -> None:
    """Cut the parameters of a group by FSDP2, without the hooks by which it gathers them for each forward.

    All parameters are gathered for the whole step, and gradients are taken from them as autograd leaves them. The hooks
    would gather and free parameters at each `autograd.grad` inside a forward.
    """
    from torch.distributed.fsdp import fully_shard

    before = {name: dict(getattr(group, name)) for name in ("_forward_pre_hooks", "_forward_hooks")}
    fully_shard(group, mesh=mesh, reshard_after_forward=False)
    for name, hooks in before.items():
        for key in getattr(group, name).keys() - hooks.keys():
            del getattr(group, name)[key]
    for name in ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        present = group._forward_pre_hooks if "pre" in name else group._forward_hooks
        for key in getattr(group, name).keys() - present.keys():
            del getattr(group, name)[key]


def _with_memory_of_its_own(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Return a module's output with its views copied, because FSDP2 loses a view that is changed in place (`x += y`).

    FSDP2 would not gather the module's parameters for its backward. A linear layer's output often is a view.
    """
    if isinstance(output, Tensor):
        return output.clone() if output._base is not None and output.requires_grad else output
    if type(output) in (list, tuple):
        return type(output)(_with_memory_of_its_own(module, inputs, part) for part in output)
    if isinstance(output, dict):
        for key, part in output.items():
            output[key] = _with_memory_of_its_own(module, inputs, part)
    return output
