"""A table of the memory that a rank of a run needs: in rows that are known, measured or estimated, and what to set.

*Contract*: bytes of one rank. Parameters, buffers, gradients and the average of the weights follow from the assembled
run; the states of the optimizer are those that it has or, before its first step, those of a copy over small parameters,
scaled up. Activations and the most at one time are measured (`memory_trial.py`), or unknown. Nothing here calls another
rank.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from disttrain.config import Config
from disttrain.devices import device_row
from disttrain.files import count_bytes
from disttrain.host_memory import host_bytes, resident_bytes
from disttrain.parallel.layout import part_here
from disttrain.parallel.tree import accumulation_dtype
from disttrain.run.optimizer_checks import small_copy_after_a_step
from disttrain.run.state import Run

TIGHT = 0.9
"""The share of the memory of a device beyond which a run is warned before it starts."""
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|[Cc]annot allocate memory|bad_alloc|"
    r"OUT_OF_MEMORY|failed to allocate"
)


@dataclass
class MemoryTable:
    """The rows of one rank, in bytes; `peak` and `activations` are None where they were not measured."""

    device: str
    rows: dict[str, int]
    activations: int | None = None
    """Of one microbatch, between its forward and its backward."""
    num_samples: int = 0
    """The samples of a microbatch."""
    peak: int | None = None
    """The most bytes of tensors at one time in a step, those of the data included."""
    process: int | None = None
    """What the process occupies beside tensors, where tensors lie in the memory of the host."""
    limit: int | None = None
    """The memory of the device, or of the host, which its ranks share."""
    num_sharing: int = 1
    """The ranks that share it."""
    advice: list[str] = field(default_factory=list)

    @property
    def needed(self) -> int:
        """The bytes that one rank needs, as far as they are known."""
        known = sum(self.rows.values()) + (self.activations or 0)
        return max(known, self.peak or 0) + (self.process or 0)

    @property
    def share(self) -> float | None:
        """The share of the memory that all ranks need that have it; None if that is unknown."""
        return self.needed * self.num_sharing / self.limit if self.limit else None

    def text(self, *, advises: bool = False) -> str:
        """Return the table, with what to set if it is a tight fit, or if it `advises` anyway."""
        rows = [(name, count_bytes(size), "") for name, size in self.rows.items() if size]
        if self.activations is not None:
            samples = f"{self.num_samples} sample{'s' * (self.num_samples != 1)}, measured"
            rows.append(("activations of a microbatch", count_bytes(self.activations), samples))
        else:
            rows.append(("activations of a microbatch", "?", "--memory measures them"))
        if self.process is not None:
            rows.append(("the process beside tensors", count_bytes(self.process), ""))
        if self.peak is not None:
            rows.append(("a step at most, tensors alone", count_bytes(self.peak), "measured"))
        has = "" if self.limit is None else f", {count_bytes(self.limit)} for {_ranks(self.num_sharing)}"
        lines = [f"memory of a rank on {self.device}{has}"]
        lines += [f"  {name:<36}{size:>10}  {note}".rstrip() for name, size, note in rows]
        if self.share is not None:
            lines.append(f"  {'together':<36}{count_bytes(self.needed):>10}  {self.share:.0%} of it")
        if self.advice and (advises or (self.share or 0) > TIGHT):
            lines += ["to need less:", *(f"  {each}" for each in self.advice)]
        return "\n".join(lines)


def known_memory(run: Run) -> MemoryTable:
    """Return the table of an assembled run, without what is measured."""
    parameters = list(run.step_function.parameters())
    trained = [each for each in parameters if each.requires_grad]
    rows = {
        "parameters": _bytes(map(part_here, parameters)),
        "parameters, gathered in a step": _gathered(run, parameters),
        "buffers": _bytes(map(part_here, run.step_function.buffers())),
        "gradients": _bytes(map(part_here, trained)),
        "gradients of slots until they meet": _waiting(run, trained),
        **{
            f"states of {type(each).__name__}{f' ({name})' if len(run.optimizers) > 1 else ''}": _bytes(states_of(each))
            or estimated_states(each)
            for name, each in run.optimizers.items()
        },
        "average of the weights (ema)": 0 if run.ema is None else _bytes(map(_shadow, map(part_here, trained))),
    }
    device = run.backend.device
    table = MemoryTable(
        device_text(device),
        rows,
        num_samples=run.config.global_batch_size // run.slots.num_slots,
        limit=limit_of(device),
        num_sharing=run.backend.local_world_size if device.type == "cpu" else 1,
    )
    table.advice = advice(run.config, run.backend.world_size, device)
    return table


def device_text(device: torch.device) -> str:
    """Return a device as text for a person."""
    return "the CPU" if device.type == "cpu" else str(device)


def limit_of(device: torch.device) -> int | None:
    """Return the memory of a device, or of the host for its CPU; None if it does not tell."""
    if device.type == "cpu":
        return host_bytes()
    return torch.accelerator.get_memory_info(device)[1] if device_row(device).counts_memory else None


def counts(device: torch.device) -> bool:
    """Return whether the memory of such a device and of its tensors can be told."""
    return device.type == "cpu" or device_row(device).counts_memory


def process_bytes(device: torch.device) -> int | None:
    """Return the memory that this process occupies now, if tensors lie in the same memory."""
    return resident_bytes() if device.type == "cpu" else None


def advice(config: Config, world_size: int, device: torch.device) -> list[str]:
    """Return the fields by which a run needs less memory, the cheapest first; docs/memory.md describes each."""
    slots, batch = config.num_slots or 1, config.global_batch_size
    finer = next((n for n in range(slots + 1, batch + 1) if batch % n == 0 and n % slots == 0), None)
    found = []
    if finer is not None:
        found.append(f"num_slots={finer}: microbatches of {batch // finer} samples (part of the run: a new one)")
    if not config.activation_checkpointing and not device_row(device).is_lazy:
        found.append("activation_checkpointing=true: activations of one block at a time, one more forward")
    if config.precision == "fp32" and "bf16" in device_row(device).precisions:
        found.append("precision=bf16: half the activations (part of the run: a new one)")
    if config.strategy == "ddp":
        more = "" if world_size > 1 else " and more ranks"
        found.append(f"strategy=fsdp{more}: parameters and states cut over the ranks")
    elif config.fsdp_gather == "step" and slots == world_size:
        found.append("fsdp_gather=module: parameters gathered one block at a time")
    if device_row(device).counts_memory:
        found.append("optimizer.fused=true or optimizer.foreach=false: no temporaries as large as the parameters")
    return found


def states_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return this rank's parts of the tensors of an optimizer's state."""
    found: list[Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(part_here(value))
        elif isinstance(value, (Mapping, list, tuple)):
            for each in value.values() if isinstance(value, Mapping) else value:
                collect(each)

    for state in optimizer.state.values():
        collect(state)
    return found


def estimated_states(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of the states that an optimizer will have; 0 if it cannot be copied for a trial.

    A state of as many numbers as its parameter grows with it. Others, such as a count, do not.
    """
    copied = small_copy_after_a_step(optimizer)
    if copied is None:
        return 0
    total = 0
    given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    small = [parameter for group in copied.param_groups for parameter in group["params"]]
    for parameter, tried in zip(given, small, strict=True):
        for value in copied.state.get(tried, {}).values():
            if isinstance(value, Tensor):
                grows = value.numel() == tried.numel() > 1
                total += part_here(parameter).numel() * value.itemsize if grows else value.nbytes
    return total


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an exception, or one from which it came, says that memory could not be had."""
    while error is not None:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            return True
        if isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)):
            return True
        error = error.__cause__
    return False


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(each.nbytes for each in tensors)


def _shadow(parameter: Tensor) -> Tensor:
    return torch.empty_like(parameter, dtype=accumulation_dtype(parameter.dtype), device="meta")


def _gathered(run: Run, parameters: list[nn.Parameter]) -> int:
    """Return the bytes of the whole parameters that a rank holds in a step beside its parts."""
    cut: list[Any] = [each for each in parameters if hasattr(each, "to_local")]
    if not cut:
        return 0
    layout: Any = run.layout
    if layout.stays_gathered:
        return _bytes(cut)
    by_group = zip(layout.groups, layout.own, strict=True)
    sizes: list[int] = [sum(group.get_parameter(name).nbytes for name in names) for group, names in by_group]
    return sizes[-1] + sum(sorted(sizes[:-1])[-2:])  # the model's own group, and two that overlap


def _waiting(run: Run, trained: list[nn.Parameter]) -> int:
    """Return the bytes of whole gradients that wait in the slots' tree, beside the one that is computed."""
    most = max(run.slots.counts)
    whole = sum(each.numel() * accumulation_dtype(each.dtype).itemsize for each in trained)
    is_cut = any(hasattr(each, "to_local") for each in trained)
    waiting = most.bit_length() - 1 + (1 if is_cut and getattr(run.layout, "stays_gathered", False) else 0)
    return waiting * whole


def _ranks(number: int) -> str:
    return f"{number} rank{'s' * (number != 1)}"
