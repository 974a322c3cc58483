"""Variants of handlers: what people attach to a run, and the hooks, freezes and averages that they set there."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchmetrics.classification import MulticlassAccuracy
from zoo_lives import Fields, mlp
from zoo_losses import LABELLED

from disttrain import Events, RunEvents

Handler = Callable[[Any, Any], None]


def handled(*handlers: Handler, **fields: Any) -> Callable[[], Fields]:
    return lambda: {"handlers": list(handlers), **fields}


def model(make: Callable[[], nn.Module], **fields: Any) -> Callable[[], Fields]:
    return lambda: {"model": make, **fields}


def deep() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 1))


# -- averages
class Average:
    """A moving average of the parameters."""

    def __init__(self, model: nn.Module, decay: float = 0.8) -> None:
        self.decay, self.num = decay, 0
        self.tensors = {name: p.detach().clone() for name, p in model.named_parameters()}

    def update(self, model: nn.Module) -> None:
        self.num += 1
        for name, parameter in model.named_parameters():
            self.tensors[name].lerp_(parameter.detach(), 1 - self.decay)

    def state_dict(self) -> dict[str, Any]:
        return {"tensors": self.tensors, "num": self.num}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tensors, self.num = dict(state["tensors"]), state["num"]


def averaged(trainer: Any, run: Any) -> None:
    average = run.keep("average", Average(run.model))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: average.update(run.model))


def averaged_by_torch(trainer: Any, run: Any) -> None:
    average = run.keep("average", AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.9)))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: average.update_parameters(run.model))


def pulled_back(trainer: Any, run: Any) -> None:
    """The average is written back into the model each third step."""
    average = run.keep("average", Average(run.model))

    def update() -> None:
        average.update(run.model)
        if trainer.state.iteration % 3 == 0:
            with torch.no_grad():
                for name, parameter in run.model.named_parameters():
                    parameter.lerp_(average.tensors[name], 0.5)

    trainer.add_event_handler(Events.ITERATION_COMPLETED, update)


class Counter:
    """A count, a list and a text."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {"count": 0, "seen": [], "name": "a", "ratio": 0.1}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.values)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = dict(state)


def counted(trainer: Any, run: Any) -> None:
    counter = run.keep("counter", Counter())

    def count(engine: Any) -> None:
        counter.values["count"] += 1
        counter.values["seen"] = [*counter.values["seen"], engine.state.iteration][-3:]
        counter.values["ratio"] *= 1.1

    trainer.add_event_handler(Events.ITERATION_COMPLETED, count)


# -- freezing
def freeze(when: Any, *, frozen: bool, layer: int = 0) -> Handler:
    def handler(trainer: Any, run: Any) -> None:
        def change() -> None:
            run.model[layer].requires_grad_(not frozen)
            if not frozen:
                run.optimizer.add_param_group({"params": list(run.model[layer].parameters())})

        trainer.add_event_handler(when, change)

    return handler


def freeze_by_step(trainer: Any, run: Any) -> None:
    """The step alone says which layers are frozen."""

    def set_all(engine: Any) -> None:
        run.model[0].requires_grad_(engine.state.iteration > 4)

    trainer.add_event_handler(Events.ITERATION_STARTED, set_all)


def freeze_at_once(trainer: Any, run: Any) -> None:
    """Frozen when the handler is called, after everything is built."""
    run.model[0].requires_grad_(False)


def first_frozen() -> nn.Module:
    net = mlp()
    net[0].requires_grad_(False)
    return net


# -- hooks
class Hooked(nn.Module):
    """A layer with a hook that its constructor sets."""

    def __init__(self, setting: Callable[[nn.Module], None]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)
        setting(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class Sometimes(Hooked):
    """The first layer is used by the slots with large samples alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh() if x.max() > 1.9 else x)


def on_gradient(module: Any) -> None:
    module.first.weight.register_hook(lambda gradient: gradient + 0.1)


def on_accumulated(module: Any) -> None:
    def clamp(parameter: Tensor) -> None:
        parameter.grad.clamp_(-0.05, 0.05)

    module.first.weight.register_post_accumulate_grad_hook(clamp)


def on_forward(module: Any) -> None:
    module.first.register_forward_hook(lambda layer, args, output: output * 0.9)


def before_forward(module: Any) -> None:
    module.first.register_forward_pre_hook(lambda layer, args: (args[0] + 0.1 * torch.randn_like(args[0]),))


def on_whole_forward(module: Any) -> None:
    module.register_forward_hook(lambda layer, args, output: output * 0.9)


def on_backward(module: Any) -> None:
    module.first.register_full_backward_hook(
        lambda layer, inputs, outputs: tuple(None if gradient is None else gradient * 0.5 for gradient in inputs)
    )


def before_backward(module: Any) -> None:
    module.second.register_full_backward_pre_hook(lambda layer, outputs: tuple(g * 0.5 for g in outputs))


def on_loading(module: Any) -> None:
    """A hook that changes what is loaded."""

    def forget(layer: Any, keys: Any) -> None:
        with torch.no_grad():
            layer.first.bias.zero_()

    module.register_load_state_dict_post_hook(forget)


def on_saving(module: Any) -> None:
    """A hook that leaves a parameter out of what is saved."""

    def leave_out(layer: Any, state: Any, prefix: str, meta: Any) -> None:
        del state[f"{prefix}first.bias"]

    module.register_state_dict_post_hook(leave_out)


def hook_in_a_handler(trainer: Any, run: Any) -> None:
    run.model[0].weight.register_hook(lambda gradient: gradient * 0.5)


def module_hook_in_a_handler(trainer: Any, run: Any) -> None:
    run.model[0].register_forward_hook(lambda layer, args, output: output * 0.9)


# -- buffers
class Buffered(nn.Module):
    """A buffer that the forward moves in one way or another."""

    def __init__(self, move: Callable[[Any, Tensor], None], *, persistent: bool = True, whole: bool = True) -> None:
        super().__init__()
        self.out, self.move = nn.Linear(4, 1), move
        self.register_buffer("seen", torch.zeros(4 if whole else 1), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.move(self, x)
        return self.out(x - 0.1 * self.seen)


def in_place(module: Any, x: Tensor) -> None:
    module.seen.lerp_(x.mean(0), 0.3)


def anew(module: Any, x: Tensor) -> None:
    module.seen = module.seen + x.mean(0)


def by_data(module: Any, x: Tensor) -> None:
    module.seen.data = module.seen * 0.5 + x.mean(0)


def growing(module: Any, x: Tensor) -> None:
    module.seen = torch.arange(float(x.shape[1])) * 0.1


def registered_late(module: Any, x: Tensor) -> None:
    if "late" not in module._buffers:
        module.register_buffer("late", torch.zeros(4))
    module.late.add_(x.mean(0))
    module.seen.copy_(module.late)


class Plain(nn.Module):
    """A tensor, or a number, that is an attribute and no buffer."""

    def __init__(self, start: Any) -> None:
        super().__init__()
        self.out, self.value = nn.Linear(4, 1), start

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.value = self.value * 0.9 + 0.1
        return self.out(x) * self.value


class Teacher(nn.Module):
    """A momentum teacher: frozen, and moved in the forward or by a handler."""

    def __init__(self, *, moved: bool = True) -> None:
        super().__init__()
        self.student, self.teacher, self.moved = mlp(), mlp().requires_grad_(False), moved

    def move(self) -> None:
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                slow.lerp_(fast, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.moved:
            self.move()
        return self.student(x) + 0.3 * self.teacher(x)


def moves_teacher(trainer: Any, run: Any) -> None:
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: run.model.move())


# -- optimizer, gradients and the end
def changes_the_rate(trainer: Any, run: Any) -> None:
    def change() -> None:
        run.optimizer.param_groups[0]["lr"] *= 0.9

    trainer.add_event_handler(Events.ITERATION_COMPLETED, change)


def changes_the_rate_after_evaluations(trainer: Any, run: Any) -> None:
    """Every second evaluation halves the rate, more or less."""

    def change() -> None:
        run.optimizer.param_groups[0]["lr"] *= 0.5 + 0.1 * float(torch.rand(1))

    trainer.add_event_handler(RunEvents.EVALUATED(every=2), change)


def freezes_by_a_result(trainer: Any, run: Any) -> None:
    """The newest evaluation decides in each step."""

    def change(engine: Any) -> None:
        run.model[0].requires_grad_(engine.state.metrics.get("valid/loss", 0.0) > 1.0)

    trainer.add_event_handler(Events.ITERATION_STARTED, change)


def resets_the_optimizer(trainer: Any, run: Any) -> None:
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=4), lambda: run.optimizer.state.clear())


def clips_by_value(trainer: Any, run: Any) -> None:
    """Before each update, through the run's own list of calls."""
    run.updates.before_update.append(lambda: nn.utils.clip_grad_value_(run.model.parameters(), 0.01))


def perturbs(trainer: Any, run: Any) -> None:
    """Noise on the weights after each step, from torch's generator."""

    def perturb() -> None:
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)

    trainer.add_event_handler(Events.ITERATION_COMPLETED, perturb)


def clamps(trainer: Any, run: Any) -> None:
    def clamp() -> None:
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.clamp_(-0.4, 0.4)

    trainer.add_event_handler(Events.ITERATION_COMPLETED, clamp)


def stops(trainer: Any, run: Any) -> None:
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=7), trainer.terminate)


def remembers(trainer: Any, run: Any) -> None:
    trainer.state.total = 0.0
    trainer.state_dict_user_keys.append("total")

    def add(engine: Any) -> None:
        engine.state.total += 1.5 * engine.state.iteration

    trainer.add_event_handler(Events.ITERATION_COMPLETED, add)


VARIANTS: dict[str, Callable[[], Fields]] = {
    "average": handled(averaged),
    "average_by_torch": handled(averaged_by_torch),
    "average_with_buffers": handled(averaged_by_torch, model=deep),
    "average_written_back": handled(pulled_back),
    "ema": handled(ema={"decay": 0.8}),
    "ema_of_buffers_and_dropout": handled(
        model=deep,
        ema={"decay": 0.8, "every_steps": 2},
        early_stop={"monitor": "loss", "patience": 1, "min_delta": 9.0},
    ),
    "ema_thawed_after_step_3": handled(
        freeze(Events.ITERATION_COMPLETED(once=3), frozen=False), model=first_frozen, ema={"decay": 0.8}
    ),
    "ema_gathered_by_module": handled(
        ema={"decay": 0.8}, fsdp_gather="module", num_slots=3, checkpoint={"asynchronous": True, "every_steps": 2}
    ),
    "ema_of_clamped_weights": handled(clamps, ema={"decay": 0.8, "evaluate": False}),
    "counter": handled(counted),
    "frozen_from_epoch_2": handled(freeze(Events.EPOCH_STARTED(once=2), frozen=True)),
    "frozen_after_step_4": handled(freeze(Events.ITERATION_COMPLETED(once=4), frozen=True)),
    "thawed_from_epoch_2": handled(freeze(Events.EPOCH_STARTED(once=2), frozen=False), model=first_frozen),
    "thawed_after_step_3": handled(freeze(Events.ITERATION_COMPLETED(once=3), frozen=False), model=first_frozen),
    "frozen_by_the_step": handled(freeze_by_step),
    "frozen_at_once": handled(freeze_at_once),
    "frozen_momentum": handled(
        freeze(Events.EPOCH_STARTED(once=2), frozen=True),
        optimizer=partial(torch.optim.SGD, lr=1e-2, momentum=0.9, weight_decay=0.1),
    ),
    "hook_on_a_gradient": model(lambda: Hooked(on_gradient)),
    "hook_on_a_gradient_here_and_there": model(lambda: Sometimes(on_gradient)),
    "hook_on_accumulated": model(lambda: Hooked(on_accumulated)),
    "hook_on_forward": model(lambda: Hooked(on_forward)),
    "hook_before_forward": model(lambda: Hooked(before_forward)),
    "hook_on_the_whole": model(lambda: Hooked(on_whole_forward)),
    "hook_on_backward": model(lambda: Hooked(on_backward)),
    "hook_before_backward": model(lambda: Hooked(before_backward)),
    "hook_on_loading": model(lambda: Hooked(on_loading)),
    "hook_on_saving": model(lambda: Hooked(on_saving)),
    "hook_in_a_handler": handled(hook_in_a_handler),
    "module_hook_in_a_handler": handled(module_hook_in_a_handler),
    "layer_here_and_there": model(lambda: Sometimes(lambda module: None)),
    "buffer_in_place": model(lambda: Buffered(in_place)),
    "buffer_anew": model(lambda: Buffered(anew)),
    "buffer_by_data": model(lambda: Buffered(by_data)),
    "buffer_grows": model(lambda: Buffered(growing, whole=False)),
    "buffer_registered_late": model(lambda: Buffered(registered_late)),
    "buffer_not_persistent": model(lambda: Buffered(in_place, persistent=False)),
    "attribute_tensor": model(lambda: Plain(torch.full((), 2.0))),
    "attribute_number": model(lambda: Plain(2.0)),
    "teacher_in_the_forward": model(Teacher),
    "teacher_by_a_handler": handled(moves_teacher, model=lambda: Teacher(moved=False)),
    "rate_changed": handled(changes_the_rate),
    "rate_changed_after_evaluations": handled(changes_the_rate_after_evaluations),
    "frozen_by_a_result": handled(freezes_by_a_result),
    "optimizer_reset": handled(resets_the_optimizer),
    "clipped_by_value": handled(clips_by_value),
    "noise_on_the_weights": handled(perturbs),
    "weights_clamped": handled(clamps),
    "terminated": handled(stops),
    "ended_early": handled(early_stop={"monitor": "loss", "patience": 1, "min_delta": 100.0}),
    "ended_early_by_a_metric": handled(
        metrics={"accuracy": partial(MulticlassAccuracy, 3)},
        early_stop={"monitor": "accuracy", "patience": 1, "min_delta": 0.9},
        schedule=lambda o, n: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.5),
        loss=nn.CrossEntropyLoss(),
        **LABELLED,
    ),
    "user_keys": handled(remembers),
    "metric_of_classes": handled(
        metrics={"accuracy": partial(MulticlassAccuracy, 3)}, loss=nn.CrossEntropyLoss(), **LABELLED
    ),
    "skips_bad_steps": handled(on_nan="skip"),
}
