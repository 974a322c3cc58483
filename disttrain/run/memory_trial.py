"""Two steps of a run, done to measure the memory that it needs, before it starts or instead.

*Contract*: the run is assembled as always, its handlers are called, and it trains two steps from its beginning: the
states of the optimizer are there in the second. No checkpoint and no file of the run is read or written. The table is
that of the rank that needs most.

*Cost*: two steps; on the CPU each operation of them is looked at, which takes some microseconds. Compiled code cannot
be looked at there, so the model is not compiled.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from disttrain.backend import Backend, make_deterministic, refused_operations_named, set_tf32
from disttrain.config import Config, replace
from disttrain.devices import device_row
from disttrain.engine import Engine, Events
from disttrain.errors import ConfigError
from disttrain.run.assemble import assemble
from disttrain.run.directory import RunDirectory
from disttrain.run.memory_shortage import told_of_memory, told_of_memory_while_building
from disttrain.run.memory_table import MemoryTable, counts, known_memory, process_bytes
from disttrain.run.replayed_slots import gradients_of
from disttrain.run.state import Run
from disttrain.run.tensor_memory import TensorWatch, watch_on

TRIAL_STEPS = 2


def measure_memory(config: Config, backend: Backend, directory: RunDirectory) -> MemoryTable:
    """Return the table of the rank that needs most; every rank calls this. `config.num_slots` is a number."""
    row = device_row(backend.device)
    if row.is_lazy or not counts(backend.device):
        raise ConfigError(f"--memory: expected the CPU or a device that counts its tensors, got {backend.device}")
    if config.compile and not row.counts_memory:
        config = replace(config, compile=False)
    with backend.agree("choosing deterministic kernels"):
        make_deterministic(config.cpu_threads, strict=config.deterministic)
        set_tf32(config.tf32)
    before = process_bytes(backend.device)
    with refused_operations_named(), watch_on(backend.device) as watch:
        with told_of_memory_while_building(config, backend):
            run = assemble(config, backend, directory, {})
        try:
            with told_of_memory(run):
                table = _measured(run, watch)
        finally:
            run.close()
    table.process = before
    tables: list[MemoryTable] = backend.all_gather(table)
    return max(tables, key=lambda each: each.needed)


def _measured(run: Run, watch: TensorWatch) -> MemoryTable:
    """Train the steps; return the table of this rank. `watch` has seen how the run was assembled."""
    activations = _Activations([each.module for each in gradients_of(run).values()], watch)

    def begin_anew(engine: Engine) -> None:
        if engine.state.iteration == TRIAL_STEPS:
            watch.forget_peak()
            activations.most = 0

    run.trainer.add_event_handler(Events.ITERATION_STARTED, begin_anew)
    run.training = True
    run.trainer.run(run.loader, max_iters=TRIAL_STEPS, epoch_length=run.epoch_length)
    activations.close()
    table = known_memory(run)  # now with the states of the optimizer
    table.activations, table.peak = activations.most, watch.peak
    return table


class _Activations:
    """The bytes that a forward leaves for its backward, the most of all slots."""

    def __init__(self, modules: Sequence[nn.Module], watch: TensorWatch) -> None:
        self.most = 0
        self._watch = watch
        self._before = 0
        self._hooks = [each.register_forward_pre_hook(self._begin) for each in modules]
        self._hooks += [each.register_forward_hook(self._end) for each in modules]

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        self._before = self._watch.live()

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.most = max(self.most, self._watch.live() - self._before)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
