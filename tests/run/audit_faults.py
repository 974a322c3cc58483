"""Runs with planted faults: one bit of a tensor flips on one rank, in one computation or in all of them.

*Contract*: nothing of the product knows of it. Faults are planted by hooks on the model and in a handler of the config,
at most one in a step. When the run ends with FaultyRank, the fault is taken away, as if the rank had been replaced by a
good one, and the same step is done again. So one run meets many faults, and its ledger has to be the undisturbed one.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from small_run import console, points, printed, small_config
from torch import Tensor, nn

from disttrain.backend import Backend
from disttrain.config.groups import AuditConfig, LedgerConfig
from disttrain.engine import Engine, Events
from disttrain.errors import FaultyRank
from disttrain.handlers.preemption import Preemption
from disttrain.run.directory import RunDirectory
from disttrain.run.state import Run
from disttrain.run.train import train

NUM_SLOTS = 6
IN_SLOTS, IN_STATE, SENT = ("activation", "gradient"), ("weight", "optimizer"), ("sent",)
LEDGER = {"ledger": LedgerConfig(every_steps=1)}
AUDITED = {"audit": AuditConfig(every_steps=1), **LEDGER}


@dataclass
class Planted:
    """A fault: `part` flips `bit` of element `index` (modulo its size) on `rank` in step `step`.

    `call`: the number of the computation in the step, on that rank, from 0. A persistent fault flips in all later ones
    too, until it is taken away.
    """

    part: str
    rank: int
    step: int
    call: int = 0
    index: int = 0
    bit: int = 20
    persistent: bool = False
    is_over: bool = False


class Net(nn.Module):
    """A model in which no unit is ever off, with dropout and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.2)
        self.last = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Any:
        return self.last(self.drop(torch.tanh(self.norm(self.first(x)))))


def rows_above_zero(batch: Any) -> int:
    return int((batch[1] > 0).sum())


def with_values(model: nn.Module, batch: Any) -> Any:
    x, y = batch
    out = model(x)
    loss = (out - y).square().mean()
    return loss, (out, y), {"largest": out.detach().max(), "hits": ((out > 0).sum().detach(), len(out))}


def changing_its_batch(model: nn.Module, batch: Any) -> Any:
    x, y = batch
    x.mul_(2).add_(1)
    out = model(x)
    return (out - y).square().mean(), (out, y)


def embeddings(model: nn.Module, batch: Any) -> Tensor:
    out: Tensor = model(batch[0])
    return out


def spread(rows: Tensor) -> Tensor:
    return (rows @ rows.T).square().mean() - rows.mean()


def random_faults(seed: int, world_size: int, steps: Iterable[int]) -> list[Planted]:
    """Return one fault for each step, of any part; a bit of the last digits of a number may change nothing."""
    draw = random.Random(seed)
    return [
        Planted(
            part=draw.choice(IN_SLOTS + IN_STATE + SENT),
            rank=draw.randrange(world_size),
            step=step,
            call=draw.randrange(2 * NUM_SLOTS // world_size),
            index=draw.randrange(1000),
            bit=draw.randrange(14, 32),
            persistent=draw.random() < 0.5,
        )
        for step in steps
    ]


def flipped(tensor: Tensor, fault: Planted) -> Tensor:
    """Return a copy with one other bit."""
    copy = tensor.detach().clone().contiguous()
    words = copy.view(-1).view(torch.int32)
    words[fault.index % words.numel()] ^= 1 << fault.bit if fault.bit < 31 else -(1 << 31)
    return copy


class Plant:
    """A config's handler that plants faults; `found` are the errors that ended a step."""

    def __init__(self, faults: Iterable[Planted]) -> None:
        self.by_step = {fault.step: fault for fault in faults}
        self.found: list[dict[str, Any]] = []

    def __call__(self, trainer: Engine, run: Run) -> None:
        self.trainer, self.run = trainer, run
        self.calls = {"activation": -1, "gradient": -1}
        trainer.add_event_handler(Events.ITERATION_STARTED, self.begin)
        run.model.last.register_forward_hook(lambda module, inputs, output: self.seen("activation", output))
        if any(fault.part == "gradient" for fault in self.by_step.values()):
            run.model.last.weight.register_hook(lambda gradient: self.seen("gradient", gradient))
        step, trainer._process_function = trainer._process_function, self.process
        self.step = step
        # The product's modules call `torch.distributed.batch_isend_irecv` by this name.
        self.send, torch.distributed.batch_isend_irecv = torch.distributed.batch_isend_irecv, self.sends
        trainer.add_event_handler(Events.COMPLETED, self.end)

    def end(self) -> None:
        torch.distributed.batch_isend_irecv = self.send

    def sends(self, ops: list[Any]) -> Any:
        """Send; one bit of what is sent first has changed in the memory of a faulty rank."""
        fault = self.by_step.get(self.trainer.state.iteration)
        out = [op.tensor for op in ops if op.op is torch.distributed.isend and op.tensor.dtype == torch.float32]
        is_here = fault is not None and fault.part == "sent" and fault.rank == self.run.backend.rank
        if fault is not None and is_here and out and not fault.is_over:
            fault.is_over = not fault.persistent
            out[0].copy_(flipped(out[0], fault))
        return self.send(ops)

    def process(self, engine: Engine, batch: Any) -> Any:
        """Do a step; if it finds a faulty rank, do it again with a good one."""
        try:
            return self.step(engine, batch)
        except FaultyRank as error:
            self.found.append({**vars(error), "rank": error.rank, "message": str(error)})
            fault = self.by_step[engine.state.iteration]
            fault.is_over = True
            if fault.part in IN_STATE:
                self.flip_state(fault)
            return self.step(engine, batch)

    def begin(self) -> None:
        self.calls.update(activation=-1, gradient=-1)
        fault = self.by_step.get(self.trainer.state.iteration)
        if fault is not None and fault.part in IN_STATE:
            self.flip_state(fault)

    def flip_state(self, fault: Planted) -> None:
        if self.run.backend.rank == fault.rank:
            weight = self.run.model.last.weight
            tensor = weight.data if fault.part == "weight" else self.run.optimizer.state[weight]["momentum_buffer"]
            tensor.copy_(flipped(tensor, fault))

    def seen(self, part: str, tensor: Tensor) -> Tensor:
        """Return a tensor of the computation as it comes out on this rank."""
        self.calls[part] += 1
        fault = self.by_step.get(self.trainer.state.iteration)
        if fault is None or fault.part != part or fault.rank != self.run.backend.rank or fault.is_over:
            return tensor
        if self.calls[part] == fault.call or (fault.persistent and self.calls[part] > fault.call):
            wrong = flipped(tensor, fault)
            return tensor + (wrong - tensor).detach() if part == "activation" else wrong
        return tensor


def run_on(backend: Backend, folder: str, faults: list[Planted], changes: dict[str, Any]) -> dict[str, Any]:
    """Train a small run with planted faults; return its result, the errors that were met, and the printed text."""
    defaults: dict[str, Any] = {"model": Net, "num_slots": NUM_SLOTS, "global_batch_size": 4 * NUM_SLOTS}
    defaults |= {"train_data": partial(points, 16 * NUM_SLOTS), "max_epochs": None, "max_steps": 4, "valid_data": None}
    plant = Plant(faults)
    config = small_config(**(defaults | {"handlers": [plant]} | changes))
    directory, to = RunDirectory(Path(folder) / "small"), console()
    with Preemption() as preemption:
        result = train(config, backend, directory, to, preemption)
    return {"result": result, "found": plant.found, "printed": printed(to)}


def ends_with(backend: Backend, folder: str, faults: list[Planted], changes: dict[str, Any]) -> str:
    """Train as `run_on`, but let FaultyRank end the run; return its message."""
    process = Plant.process
    Plant.process = lambda self, engine, batch: self.step(engine, batch)  # type: ignore[method-assign]
    try:
        run_on(backend, folder, faults, changes)
    except FaultyRank as error:
        return str(error)
    finally:
        Plant.process = process  # type: ignore[method-assign]
    return "no error"
