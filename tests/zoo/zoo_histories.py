"""Variants that remember: what a run depends on beside weights, buffers, samples and seeds, and what changes them."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from zoo_lives import Fields, mlp, points

from disttrain import Events

Handler = Callable[[Any, Any], None]


def handled(*handlers: Handler, **fields: Any) -> Callable[[], Fields]:
    return lambda: {"handlers": list(handlers), **fields}


def model(make: Callable[[], nn.Module], **fields: Any) -> Callable[[], Fields]:
    return lambda: {"model": make, **fields}


def deep() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1))


# -- draws and counts
class Drawing(nn.Module):
    """Draws from numpy's generator, or from one of its own."""

    def __init__(self, *, own: bool) -> None:
        super().__init__()
        self.net, self.generator = mlp(), torch.Generator().manual_seed(0) if own else None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.net(x)
        if self.generator is None:
            return self.net(x + 0.1 * float(np.random.rand()))
        return self.net(x + 0.1 * torch.randn(x.shape, generator=self.generator))


def annealed() -> Fields:
    """A closure counts the calls of the forward."""
    calls = itertools.count(1)

    def forward(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        x, y = batch
        return F.mse_loss(model(x), y) * min(1.0, next(calls) / 20), None

    return {"forward": forward}


class Warming(nn.Module):
    """Counts its calls, and is another model for the first ones."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.calls = mlp(), 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return self.net(x) * (0.5 if self.calls < 8 else 1.0)


class Recording(nn.Module):
    """Keeps its last input's length and its calls, which change nothing: not to be refused."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.calls, self.last = mlp(), 0, None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.detach()
        return self.net(x)


# -- what a handler changes under way
def less_dropout(trainer: Any, run: Any) -> None:
    def change() -> None:
        run.model[1].p = 0.1

    trainer.add_event_handler(Events.EPOCH_STARTED(once=2), change)


def another_momentum(trainer: Any, run: Any) -> None:
    def change() -> None:
        run.model[2].momentum = 0.5

    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), change)


def grows(trainer: Any, run: Any) -> None:
    """A layer is added at the second epoch."""
    trainer.add_event_handler(Events.EPOCH_STARTED(once=2), lambda: run.model.append(nn.Linear(1, 1)))


def new_parameter(trainer: Any, run: Any) -> None:
    """The last layer is made anew."""

    def reset() -> None:
        run.model[2] = nn.Linear(8, 1)

    trainer.add_event_handler(Events.EPOCH_STARTED(once=2), reset)


def reset_in_place(trainer: Any, run: Any) -> None:
    """The last layer is drawn anew, in place."""
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), lambda: run.model[2].reset_parameters())


def later_group(trainer: Any, run: Any) -> None:
    """A frozen layer is thawed, and given to the optimizer in a group of its own."""

    def thaw() -> None:
        run.model[0].requires_grad_(True)
        run.optimizer.add_param_group({"params": list(run.model[0].parameters()), "lr": 1e-3})

    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=3), thaw)


def first_frozen() -> nn.Module:
    net = mlp()
    net[0].requires_grad_(False)
    return net


def rate_from_the_loss(trainer: Any, run: Any) -> None:
    """The rate follows the losses that this rank sees."""

    def follow(engine: Any) -> None:
        run.optimizer.param_groups[0]["lr"] = 1e-3 * float(sum(engine.state.output))

    trainer.add_event_handler(Events.ITERATION_COMPLETED, follow)


def stops_by_the_loss(trainer: Any, run: Any) -> None:
    """The run ends when a loss that this rank sees is small."""

    def stop(engine: Any) -> None:
        if min(float(loss) for loss in engine.state.output) < 0.1:
            trainer.terminate()

    trainer.add_event_handler(Events.ITERATION_COMPLETED, stop)


def calls_the_model(trainer: Any, run: Any) -> None:
    """Looks at outputs, in training mode: the statistics of a batch norm move."""

    def look() -> None:
        with torch.no_grad():
            run.model(torch.ones(3, 4))

    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=2), look)


def runs_a_backward(trainer: Any, run: Any) -> None:
    def probe() -> None:
        run.model(torch.ones(3, 4)).sum().backward()
        run.optimizer.zero_grad()

    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=2), probe)


def changes_the_batch(trainer: Any, run: Any) -> None:
    """Adds noise to the samples of all slots when a step begins."""

    def change(engine: Any) -> None:
        for x, _ in engine.state.batch:
            x.add_(0.1 * torch.randn(4))

    trainer.add_event_handler(Events.ITERATION_STARTED, change)


# -- samples and buffers
def in_place(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
    """Changes its samples, which are the data set's own."""
    rows = [(x.mul_(0.9), y) for x, y in batch]
    return F.mse_loss(model(torch.stack([x for x, _ in rows])), torch.stack([y for _, y in rows])), None


def in_place_of_a_copy(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
    """Changes the batch, which torch's collate has copied."""
    x, y = batch
    return F.mse_loss(model(x.mul_(0.9)), y), None


class Graph(nn.Module):
    """A sparse adjacency in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 1)
        self.register_buffer("adjacency", torch.eye(4).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.sparse.mm(self.adjacency, x.t()).t())


class Constant(nn.Module):
    """A constant in a buffer that is a view, or of another dtype."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.out = nn.Linear(4, 1)
        self.register_buffer("value", value)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x * self.value.real.float())


class Queue(nn.Module):
    """A memory of the last outputs and a pointer, as in MoCo."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 1)
        self.register_buffer("queue", torch.zeros(12, 4))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                begin = int(self.pointer)
                self.queue[begin : begin + len(x)] = x
                self.pointer[0] = (begin + len(x)) % 12
        return self.out(x - self.queue.mean(0))


VARIANTS: dict[str, Callable[[], Fields]] = {
    "draws_from_numpy": model(lambda: Drawing(own=False)),
    "draws_from_its_own_generator": model(lambda: Drawing(own=True)),
    "closure_counts_calls": annealed,
    "forward_counts_calls": model(Warming),
    "forward_keeps_a_record": model(Recording),
    "dropout_changed": handled(less_dropout, model=deep),
    "momentum_changed": handled(another_momentum, model=deep),
    "layer_added": handled(grows),
    "layer_made_anew": handled(new_parameter),
    "layer_reset": handled(reset_in_place),
    "group_added_under_way": handled(later_group, model=first_frozen),
    "rate_from_the_loss": handled(rate_from_the_loss),
    "stops_by_the_loss": handled(stops_by_the_loss),
    "handler_calls_the_model": handled(calls_the_model, model=deep),
    "handler_runs_a_backward": handled(runs_a_backward),
    "handler_changes_the_batch": handled(changes_the_batch),
    "samples_changed_in_place": lambda: {"forward": in_place, "collate": list},
    "batch_changed_in_place": lambda: {"forward": in_place_of_a_copy},
    "buffer_sparse": model(Graph),
    "buffer_expanded": model(lambda: Constant(torch.full((1,), 2.0).expand(4))),
    "buffer_transposed": model(lambda: Constant(torch.arange(8.0).reshape(4, 2).t()[0])),
    "buffer_complex": model(lambda: Constant(torch.full((4,), 1 + 1j))),
    "buffer_bool": model(lambda: Constant(torch.tensor([True, False, True, True]))),
    "queue": model(Queue),
    "scripted": model(lambda: torch.jit.script(mlp())),
    "traced": model(lambda: torch.fx.symbolic_trace(mlp())),
    "one_sample_a_slot": lambda: {"train_data": lambda: points(9), "global_batch_size": 3},
    "shared_samples": lambda: {"train_data": lambda: TensorDataset(*(t.expand(36, -1) for t in points(1).tensors))},
}
