"""The output of every module of a step, as a hash and its largest value, and the first difference of two such lists.

*Contract*: `ModuleOutputs` looks at a model through forward hooks and hooks on the outputs' gradients, and changes no
bit. A record is a dict, in this order for each slot: every module's output when the module returns (so a module comes
after those that it calls), the gradients of these outputs in the order of the backward, and the gradient of each
parameter. A module that runs again in the backward (activation checkpointing) is recorded once.

    slot       the slot
    pass       "forward", "backward" (the gradient of an output) or "gradient" (of a parameter)
    module     the path of the module, such as "model.layers.0.norm", or of the parameter; "" is the whole step
    call       the number of this module's call in the slot, from 1
    class      the name of its class, or "Parameter"
    hash       of all tensors of the output, as the ledger hashes a batch; None for tensors without plain memory
    max_abs    the largest absolute value in it; None without numbers, "nan" or "inf" as text

*Errors*: ConfigError for a compiled model, inside of which there are no modules.

*Cost*: two passes over each output and each gradient, and a wait for the device at each.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from disttrain.errors import ConfigError
from disttrain.evidence.hashes import batch_hash

Record = dict[str, Any]
KEYS = ("slot", "pass", "module", "call", "class")
"""The entries that say which output it is; the others are its value."""


class ModuleOutputs:
    """Records the outputs of `model` and of all modules in it while `slot` is set, by calling `write`."""

    def __init__(self, model: nn.Module, write: Callable[[Record], None]) -> None:
        self.slot: int | None = None
        self._model = model
        self._write = write
        self._calls: Counter[str] = Counter()
        self._handles = []
        for name, module in model.named_modules():
            if getattr(module, "_compiled_call_impl", None) is not None:
                raise ConfigError("the model is compiled, so its modules have no outputs; set compile=false")
            if not isinstance(module, torch.jit.ScriptModule):  # it takes no hooks
                hook = partial(self._returned, name.replace("_orig_mod.", ""))
                self._handles.append(module.register_forward_hook(hook))

    def begin(self, slot: int) -> None:
        """Begin to record a slot."""
        self.slot = slot
        self._calls.clear()

    def end(self) -> None:
        """Record the gradients of a slot's parameters, and record nothing more until `begin`."""
        for name, parameter in self._model.named_parameters():
            if parameter.grad is not None:
                self._record("gradient", name.replace("_orig_mod.", ""), 1, "Parameter", parameter.grad)
        self.slot = None

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _returned(self, name: str, module: nn.Module, _inputs: Any, output: Any) -> None:
        if self.slot is None or torch._C._current_graph_task_id() != -1:  # it runs again in a backward
            return
        self._calls[name] += 1
        of_module = (name, self._calls[name], type(module).__name__)
        self._record("forward", *of_module, output)
        if not name:
            return  # its outputs are the model's and the loss, whose gradients are theirs
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:  # no parameter: it would keep the hook
                hook: Any = tensor.register_hook
                hook(partial(self._came_back, of_module))

    def _came_back(self, of_module: tuple[str, int, str], gradient: Tensor) -> None:
        self._record("backward", *of_module, gradient)

    def _record(self, kind: str, name: str, call: int, of_class: str, value: Any) -> None:
        if self.slot is None:
            return
        content: Record = {"hash": None, "max_abs": None}
        with torch.no_grad(), suppress(RuntimeError, NotImplementedError, TypeError):  # a tensor without plain memory
            content = {"hash": batch_hash(value), "max_abs": largest(value)}
        self._write({"slot": self.slot, "pass": kind, "module": name, "call": call, "class": of_class, **content})


def largest(value: Any) -> float | str | None:
    """Return the largest absolute value of all tensors in a value; text if it is not finite, None without numbers."""
    tensors = [each.detach() for each in tree_leaves(value) if isinstance(each, Tensor) and each.numel()]
    numbers = [float(each.abs().max()) for each in tensors if each.dtype is not torch.bool]
    if not numbers:
        return None
    found = max(numbers) if not any(map(math.isnan, numbers)) else math.nan
    return found if math.isfinite(found) else str(found)


class OutputDifference(NamedTuple):
    """The first output in which two lists of records differ; None for a list that ends before."""

    left: Record | None
    right: Record | None
    num_same: int
    """The records before it, which are the same."""

    @property
    def is_other_call(self) -> bool:
        """Whether other modules were called, and not the same one with another output."""
        return self.left is None or self.right is None or any(self.left[key] != self.right[key] for key in KEYS)

    def __str__(self) -> str:
        if self.is_other_call:
            return f"other modules run: {shown(self.left)}, and {shown(self.right)} on the other side"
        assert self.left is not None
        assert self.right is not None
        what = {"forward": "the output", "backward": "the gradient of the output", "gradient": "the gradient"}
        values = [f"{each['hash']}, largest value {each['max_abs']!r}" for each in (self.left, self.right)]
        return f"{what[self.left['pass']]} of {shown(self.left)}: {values[0]}; on the other side {values[1]}"


def shown(record: Record | None) -> str:
    """Return which output a record is of, in words."""
    if record is None:
        return "nothing more"
    name = record["module"] or "the whole step"
    if record["pass"] == "gradient":
        return f"the parameter {name}, slot {record['slot']}"
    return f"{name} ({record['class']}), call {record['call']} in slot {record['slot']}"


def first_output_difference(
    left: Sequence[Mapping[str, Any]], right: Sequence[Mapping[str, Any]]
) -> OutputDifference | None:
    """Return the OutputDifference of two lists of records, in their order; None if they are the same."""
    for number in range(max(len(left), len(right))):
        pair = [dict(side[number]) if number < len(side) else None for side in (left, right)]
        if pair[0] is None or pair[1] is None or _content(pair[0]) != _content(pair[1]):
            return OutputDifference(pair[0], pair[1], number)
    return None


def _content(record: Record) -> Iterable[Any]:
    return [record.get(key) for key in (*KEYS, "hash")]
