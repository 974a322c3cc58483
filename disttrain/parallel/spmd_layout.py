"""XLA's SPMD mode: one rank whose tensors are spread over several devices, which all work on one slot at a time.

*Contract*: a program is written for whole tensors, and the compiler cuts it over the devices. The samples of a slot are
cut over all devices. Parameters, gradients and optimizer states lie whole on each device. With `shards`, they are cut
along the longest dimension that the number of devices divides; a tensor without such a dimension lies whole on each.
The results are those of the whole program except for rounding: with another number of devices, sums inside a slot are
made in another order. The same number of devices gives the same bits.

*Errors*: ConfigError for a model whose parameters have been laid out already.

*Cost*: `whole` reads the parts from the devices and assembles them on the host; it compiles nothing.

*Source*: torch_xla's `experimental/spmd_fully_sharded_data_parallel.py`, which does FSDP under SPMD by annotating the
parameters and the modules' outputs. Here hooks annotate the outputs, so modules keep their types and names.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from disttrain.errors import ConfigError
from disttrain.parallel.layout import ReplicatedLayout
from disttrain.parallel.optimizer_state import load_optimizer

AXIS = "devices"


class SpmdLayout(ReplicatedLayout):
    """The `Layout` of SPMD mode: the tensors of the one rank, spread over its devices."""

    def __init__(self, model: nn.Module, num_devices: int, *, shards: bool) -> None:
        import torch_xla
        from torch_xla.distributed import spmd

        self.num_devices = num_devices
        self.shards = shards
        self._xla = torch_xla
        self._spmd = spmd
        self._mesh = spmd.Mesh(list(range(num_devices)), (num_devices,), (AXIS,))
        self._num_samples = 0
        for name, parameter in model.named_parameters():
            if self._annotation(parameter):
                raise ConfigError(
                    f"expected a model whose parameters are laid out here, got the parameter {name} annotated with "
                    f"{self._annotation(parameter)}; leave mark_sharding to strategy='fsdp'"
                )
            self.lay(parameter)
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._lay_gradient)  # type: ignore[no-untyped-call]
        for buffer in model.buffers():
            self._mark(buffer, None)
        if shards:
            for module in model.modules():
                if next(module.parameters(recurse=False), None) is not None:
                    module.register_forward_hook(self._keep_samples_apart)

    def lay(self, tensor: Tensor) -> None:
        """Lay a parameter, its gradient or its optimizer state on the devices; the shape alone decides the cut."""
        self._mark(tensor, self.cut_dimension(tensor.shape))

    def cut_dimension(self, shape: Sequence[int]) -> int | None:
        """Return the dimension along which parameters of this shape are cut; None if they lie whole on each device."""
        fitting = [i for i, size in enumerate(shape) if size and size % self.num_devices == 0]
        return max(fitting, key=lambda i: shape[i], default=None) if self.shards else None

    def cut(self, batch: Any) -> Any:
        """Cut a batch that lies on the device over the devices, by its samples.

        The number of samples is the length of the batch's first tensor that has a length. Tensors of another length lie
        whole on each device. If the number of devices does not divide the number of samples, all tensors do.
        """
        tensors = [tensor for tensor in _tensors(batch) if tensor.ndim and tensor.device.type == "xla"]
        self._num_samples = len(tensors[0]) if tensors and len(tensors[0]) % self.num_devices == 0 else 0
        for tensor in tensors:
            self._mark(tensor, 0 if len(tensor) == self._num_samples else None)
        return batch

    def bring_together(self, outputs: Any) -> Any:
        """Lay outputs that the host will read whole on each device, in the same program that computes them."""
        for tensor in _tensors(outputs):
            if tensor.device.type == "xla":
                self._mark(tensor, None)
        return outputs

    def whole(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "xla":
            return tensor
        self._xla.sync()
        self._xla.core.xla_model.wait_device_ops()
        if self._annotation(tensor) in ("", "{replicated}"):
            return tensor
        library = self._xla._XLAC
        parts = library._get_local_shards([tensor])[0]
        places = library._get_local_shard_replica_and_indices([tensor])[0]
        whole = torch.empty(tensor.shape, dtype=tensor.dtype)
        for (part, _), (replica, place) in zip(parts, places, strict=True):
            if replica == 0:
                whole[place if place is Ellipsis else tuple(place)] = part
        return whole

    def stateful(self, part: Any) -> Any:
        return _SavedWhole(part, self)

    def _mark(self, tensor: Tensor, dimension: int | None) -> None:
        if not self._annotation(tensor):
            cuts = tuple(AXIS if i == dimension else None for i in range(tensor.ndim))
            self._spmd.mark_sharding(tensor, self._mesh, cuts)

    def _annotation(self, tensor: Tensor) -> str:
        annotation: str = self._xla._XLAC._get_xla_sharding_spec(tensor)
        return annotation

    def _lay_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.lay(parameter.grad)

    def _keep_samples_apart(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        """Make XLA gather a module's parameters rather than its samples; both are cut over the same devices."""
        for tensor in _tensors(outputs):
            if tensor.ndim and self._num_samples and len(tensor) % self._num_samples == 0:
                self._mark(tensor, 0)


class _SavedWhole:
    """An object that saves and loads its state as without SPMD: in whole tensors, which any device can load."""

    def __init__(self, part: Any, layout: SpmdLayout) -> None:
        self._part = part
        self._layout = layout

    def state_dict(self) -> dict[str, Any]:
        return {name: self._whole(value) for name, value in self._part.state_dict().items()}

    def _whole(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._layout.whole(value)
        if isinstance(value, Mapping):
            return {name: self._whole(inside) for name, inside in value.items()}
        return value

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load whole tensors; each device gets only the part that it holds, at no time more."""
        if isinstance(self._part, nn.Module):
            parameters = dict(self._part.named_parameters(remove_duplicate=False))
            laid = {name: self._laid(value) if name in parameters else value for name, value in state.items()}
            self._part.load_state_dict(laid)
        elif isinstance(self._part, Optimizer):
            load_optimizer(self._part, {**state, "state": self._laid_states(self._part, state["state"])})
        else:
            self._part.load_state_dict(state)

    def _laid_states(self, optimizer: Optimizer, states: Mapping[int, Mapping[str, Any]]) -> dict[int, Any]:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        return {
            i: {
                key: self._laid(value)
                if isinstance(value, Tensor) and value.ndim and value.shape == parameters[i].shape
                else value
                for key, value in kept.items()
            }
            for i, kept in states.items()
        }

    def _laid(self, tensor: Tensor) -> Tensor:
        on_device = tensor.to("xla")  # XLA keeps it on the host until it is laid out
        self._layout.lay(on_device)
        return on_device


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in lists, tuples and dicts, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(part)
