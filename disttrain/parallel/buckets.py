"""The buckets in which a rank's gradients are sent, while the backward of its last slot goes on.

*Contract*: the trained parameters are cut into buckets, in the reverse of the model's order, for a backward ends with
the first layers. The cut is the same on every rank, and so is the order in which the buckets are sent. A bucket is
sent when the gradients of its parameters are complete and the buckets before it have been sent; what is left is sent
after the backward. The gradient of a parameter that the slot did not use counts as zero.

The first backward sends nothing early: it shows whether each gradient arrives once. A gradient that arrives in parts
(a block used twice under reentrant checkpointing), or that a hook of the user's may change after it arrived, is sent
after the backward, in every step.

*Errors*: ConfigError from the backward if a gradient arrives again after it was sent.

*Cost*: memory for all trained parameters once, which the parameters' `.grad` share; one call of Python for each
parameter and backward. A bucket holds at most `BUCKET_BYTES`, the first `FIRST_BUCKET_BYTES`, so that it leaves early.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from disttrain.errors import ConfigError

FIRST_BUCKET_BYTES = 1024**2
BUCKET_BYTES = 25 * 1024**2


@dataclass(frozen=True)
class Bucket:
    """Some parameters by their index, and the memory for their gradients: real numbers, one after the other."""

    index: list[int]
    flat: Tensor

    def views(self, flat: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return a view into a tensor like `flat` for each parameter of the bucket, with the parameter's strides."""
        views, start = [], 0
        for i in self.index:
            parameter = parameters[i]
            values = torch.view_as_complex(flat.view(-1, 2)) if parameter.is_complex() else flat
            views.append(values.as_strided(parameter.shape, dense_stride(parameter), start))
            start += parameter.numel()
        return views


class Buckets:
    """The buckets of `parameters`; `send(bucket)` is called once for each in a step, in their order.

    Call `opens` before the backward of the rank's last slot, and `complete` after it.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], send: Callable[[Bucket], None]) -> None:
        self.buckets = cut_into_buckets(parameters)
        self._parameters = parameters
        self._send = send
        self._of = {i: number for number, bucket in enumerate(self.buckets) for i in bucket.index}
        self._open = self._early = self._has_seen_a_backward = False
        self._arrived: set[int] = set()
        self._missing: list[int] = []
        self._num_sent = 0
        self._hooks: list[Any] = [
            parameter.register_post_accumulate_grad_hook(partial(self._arrives, i))  # type: ignore[no-untyped-call]
            for i, parameter in enumerate(parameters)
        ]

    def close(self) -> None:
        """Take the hooks off the parameters: from now on nothing is sent during a backward."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def begin(self) -> None:
        """Drop the state of the step before, even if it failed."""
        self._open, self._num_sent = False, 0

    def opens(self, *, may_send: bool = True) -> None:
        """Note that the backward of the rank's last slot comes next; nothing leaves in it unless it `may_send`."""
        self._arrived.clear()
        self._missing = [len(bucket.index) for bucket in self.buckets]
        alone = all(_num_hooks(parameter) == 1 for parameter in self._parameters)
        self._early = may_send and self._has_seen_a_backward and alone
        self._open = True

    def waits(self) -> None:
        """Note that other backwards come before the buckets are sent."""
        self._open = False

    def complete(self) -> None:
        """Send the buckets that are left."""
        self._open, self._has_seen_a_backward = False, True
        self._send_up_to(len(self.buckets))

    def _arrives(self, i: int, parameter: Tensor) -> None:
        """Note that a gradient was added to `parameter.grad`; send the buckets that are complete."""
        if not self._open:
            return
        number = self._of[i]
        if i in self._arrived:
            if number < self._num_sent:
                raise ConfigError(
                    f"the gradient of a parameter of shape {list(parameter.shape)} arrived in two parts, but at once "
                    "in the steps before. Reentrant checkpointing does this to a block that is used twice: use "
                    "torch.utils.checkpoint with use_reentrant=False"
                )
            self._early = False
            self.close()
            return
        self._arrived.add(i)
        self._missing[number] -= 1
        if self._early:
            end = self._num_sent
            while end < len(self.buckets) and not self._missing[end]:
                end += 1
            self._send_up_to(end)

    def _send_up_to(self, end: int) -> None:
        while self._num_sent < end:
            self._num_sent += 1
            self._send(self.buckets[self._num_sent - 1])


def cut_into_buckets(parameters: Sequence[Tensor]) -> list[Bucket]:
    """Cut the parameters, from the last to the first, into buckets of one dtype on one device."""
    kinds: dict[Any, list[list[int]]] = {}
    sizes: dict[Any, int] = {}
    for i in reversed(range(len(parameters))):
        parameter = parameters[i]
        kind = parameter.dtype, parameter.device
        cuts = kinds.setdefault(kind, [[]])
        limit = FIRST_BUCKET_BYTES if len(cuts) == 1 else BUCKET_BYTES
        if cuts[-1] and sizes[kind] + parameter.nbytes > limit:
            cuts.append([])
            sizes[kind] = 0
        cuts[-1].append(i)
        sizes[kind] = sizes.get(kind, 0) + parameter.nbytes
    buckets = []
    for (dtype, device), cuts in kinds.items():
        for index in cuts:
            numel = sum(parameters[i].numel() for i in index) * (2 if dtype.is_complex else 1)
            buckets.append(Bucket(index, torch.zeros(numel, dtype=dtype.to_real(), device=device)))
    return sorted(buckets, key=lambda bucket: -bucket.index[0])


def dense_stride(parameter: Tensor) -> tuple[int, ...]:
    """Return the strides of a parameter's gradient in its bucket: the parameter's own, if they leave no gaps."""
    dense = torch.empty_like(parameter, device="meta").stride() == parameter.stride()
    return parameter.stride() if dense else torch.empty(parameter.shape, device="meta").stride()


def _num_hooks(parameter: Tensor) -> int:
    """Return the number of hooks that run after a gradient was added to a parameter; this class has one."""
    return len(getattr(parameter, "_post_accumulate_grad_hooks", None) or ())
