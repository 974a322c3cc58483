"""Variants of optimizers: all of torch.optim with their options, and some that people write."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn, optim
from zoo_lives import Fields, mlp, points

Parameters = Iterable[nn.Parameter]


def used(kind: Any, **options: Any) -> Callable[[], Fields]:
    return lambda: {"optimizer": partial(kind, **options)}


def matrices() -> nn.Module:
    """All of its parameters are matrices."""
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 1, bias=False))


def in_groups(parameters: Parameters) -> optim.Optimizer:
    """Decay for matrices alone, as people do it."""
    listed = list(parameters)
    return optim.AdamW(
        [
            {"params": [p for p in listed if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in listed if p.ndim <= 1], "weight_decay": 0.0, "lr": 3e-2},
        ],
        lr=1e-2,
    )


def grouped_later(parameters: Parameters) -> optim.Optimizer:
    first, *others = list(parameters)
    optimizer = optim.SGD([first], lr=1e-2, momentum=0.9)
    optimizer.add_param_group({"params": others, "lr": 3e-2})
    return optimizer


def half_of_them(parameters: Parameters) -> optim.Optimizer:
    """Some parameters are in no group, and so never move."""
    return optim.Adam(list(parameters)[:2], lr=1e-2)


class Lion(optim.Optimizer):
    def __init__(self, parameters: Parameters, lr: float = 1e-2) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    moment = self.state[p].setdefault("moment", torch.zeros_like(p))
                    p.sub_(moment.lerp(p.grad, 1 - group["betas"][0]).sign(), alpha=group["lr"])
                    moment.lerp_(p.grad, 1 - group["betas"][1])


class Quantized(optim.Optimizer):
    """A moment in uint8, a count in int64, a rate in float64 and a text."""

    def __init__(self, parameters: Parameters, lr: float = 1e-2) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["code"] = torch.full_like(p, 128, dtype=torch.uint8)
                    state["count"] = torch.zeros((), dtype=torch.int64)
                    state["rate"] = torch.ones((), dtype=torch.float64)
                    state["name"] = "quantized"
                    state["num"] = 0
                moment = (state["code"].float() - 128) / 127
                moment.lerp_(p.grad.clamp(-1, 1), 0.3)
                state["code"].copy_((moment * 127 + 128).round().clamp(0, 255).to(torch.uint8))
                state["count"] += 1
                state["num"] += 1
                state["rate"].mul_(1 - 1 / (3 + state["num"]))
                p.add_(moment, alpha=-group["lr"] * float(state["rate"]))


class Masters(optim.Optimizer):
    """Float32 masters of bfloat16 weights."""

    def __init__(self, parameters: Parameters, lr: float = 3e-2) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    master = self.state[p].setdefault("master", p.detach().float())
                    master.sub_(p.grad.float(), alpha=group["lr"])
                    p.copy_(master)


class ScheduleFree(optim.Optimizer):
    """Trains at one point and evaluates at another, so it has `eval` and `train`."""

    def __init__(self, parameters: Parameters, lr: float = 3e-2, beta: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "beta": beta, "k": 0, "train_mode": True})

    @torch.no_grad()
    def _swap(self, weight: Callable[[float], float], *, training: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != training:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(self.state[p]["z"], weight(group["beta"]))
                group["train_mode"] = training

    def eval(self) -> None:
        self._swap(lambda beta: 1 - 1 / beta, training=False)

    def train(self) -> None:
        self._swap(lambda beta: 1 - beta, training=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            assert group["train_mode"], "stepped in evaluation mode"
            group["k"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                z = self.state[p].setdefault("z", p.detach().clone())
                p.lerp_(z, 1 / group["k"])
                p.add_(p.grad, alpha=group["lr"] * (group["beta"] * (1 - 1 / group["k"]) - 1))
                z.sub_(p.grad, alpha=group["lr"])


class Lookahead(optim.Optimizer):
    """Slow weights that follow the fast ones each third step; the count is in the group."""

    def __init__(self, parameters: Parameters, lr: float = 1e-2) -> None:
        super().__init__(parameters, {"lr": lr, "count": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["count"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                slow = self.state[p].setdefault("slow", p.detach().clone())
                p.sub_(p.grad, alpha=group["lr"])
                if group["count"] % 3 == 0:
                    p.copy_(slow.lerp_(p, 0.5))


class Centred(optim.Optimizer):
    """Subtracts a gradient's mean over its parameter: it looks across a parameter."""

    def __init__(self, parameters: Parameters, lr: float = 1e-2) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad - p.grad.mean(), alpha=group["lr"])


class Noisy(optim.Optimizer):
    """Langevin: draws from torch's generator in its step."""

    def __init__(self, parameters: Parameters, lr: float = 1e-2) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad + 0.1 * torch.randn_like(p), alpha=group["lr"])


class Both(optim.Optimizer):
    """Two optimizers in one: Adam for matrices and SGD for vectors."""

    def __init__(self, parameters: Parameters) -> None:
        listed = list(parameters)
        self.parts = [
            optim.Adam([p for p in listed if p.ndim > 1], lr=1e-2),
            optim.SGD([p for p in listed if p.ndim <= 1], lr=1e-2, momentum=0.9),
        ]
        super().__init__(listed, {"lr": 1e-2})

    def step(self, closure: Any = None) -> None:
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)


class Sharp(optim.SGD):
    """SAM: its step needs a closure."""

    def step(self, closure: Any) -> Tensor:  # type: ignore[override]
        with torch.enable_grad():
            loss: Tensor = closure()
        super().step()
        return loss


def hooked(parameters: Parameters) -> optim.Optimizer:
    """A hook before each step adds to the gradients."""
    optimizer = optim.SGD(parameters, lr=1e-2)

    def decay(optimizer: optim.Optimizer, args: Any, options: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.add_(p.detach(), alpha=0.1)

    optimizer.register_step_pre_hook(decay)
    return optimizer


def double(kind: Any, **options: Any) -> Callable[[], Fields]:
    """In float64: torch loads a state in its parameter's dtype, and some counts are float32."""
    return lambda: {
        "optimizer": partial(kind, **options),
        "model": lambda: mlp().double(),
        "train_data": lambda: points(dtype=torch.float64),
        "valid_data": lambda: points(10, seed=5, dtype=torch.float64),
    }


def brain(kind: Any, **options: Any) -> Callable[[], Fields]:
    """In bfloat16."""
    return lambda: {
        "optimizer": partial(kind, **options),
        "model": lambda: mlp().bfloat16(),
        "train_data": lambda: points(dtype=torch.bfloat16),
        "valid_data": lambda: points(10, seed=5, dtype=torch.bfloat16),
    }


TORCHS: dict[str, Callable[[], Fields]] = {
    "ASGD": used(optim.ASGD, lr=1e-2, t0=2),
    "Adadelta": used(optim.Adadelta, lr=1.0),
    "Adafactor": used(optim.Adafactor, lr=1e-2),
    "Adagrad": used(optim.Adagrad, lr=1e-2, initial_accumulator_value=0.1),
    "Adam": used(optim.Adam, lr=1e-2),
    "AdamW": used(optim.AdamW, lr=1e-2),
    "Adamax": used(optim.Adamax, lr=1e-2),
    "LBFGS": used(optim.LBFGS, lr=0.1),
    "Muon": lambda: {"optimizer": partial(optim.Muon, lr=1e-2), "model": matrices},
    "NAdam": used(optim.NAdam, lr=1e-2),
    "RAdam": used(optim.RAdam, lr=1e-2),
    "RMSprop": used(optim.RMSprop, lr=1e-2),
    "Rprop": used(optim.Rprop, lr=1e-2),
    "SGD": used(optim.SGD, lr=1e-2),
    "SparseAdam": used(optim.SparseAdam, lr=1e-2),
}
"""All of torch.optim, by the name of the class."""

VARIANTS: dict[str, Callable[[], Fields]] = {
    **{f"torch_{name}": fields for name, fields in TORCHS.items()},
    "adam_amsgrad": used(optim.Adam, lr=1e-2, amsgrad=True),
    "adam_maximize": used(optim.Adam, lr=1e-3, maximize=True),
    "adam_foreach": used(optim.Adam, lr=1e-2, foreach=True),
    "adam_fused": used(optim.Adam, lr=1e-2, fused=True),
    "adam_capturable": used(optim.Adam, lr=1e-2, capturable=True),
    "adam_differentiable": used(optim.Adam, lr=1e-2, differentiable=True),
    "adam_rate_in_a_tensor": used(optim.Adam, lr=torch.tensor(1e-2), foreach=False),
    "adamw_fused_amsgrad": used(optim.AdamW, lr=1e-2, amsgrad=True, fused=True),
    "adagrad_fused": used(optim.Adagrad, lr=1e-2, fused=True),
    "sgd_nesterov": used(optim.SGD, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd_fused_momentum": used(optim.SGD, lr=1e-2, momentum=0.9, fused=True),
    "sgd_foreach_dampened": used(optim.SGD, lr=1e-2, momentum=0.9, dampening=0.5, foreach=True),
    "rmsprop_centered": used(optim.RMSprop, lr=1e-2, centered=True, momentum=0.9),
    "nadam_decoupled": used(optim.NAdam, lr=1e-2, decoupled_weight_decay=True, weight_decay=0.1),
    "nadam_foreach": used(optim.NAdam, lr=1e-2, foreach=True),
    "nadam_double": double(optim.NAdam, lr=1e-2),
    "asgd_double": double(optim.ASGD, lr=1e-2, t0=2),
    "adam_double": double(optim.Adam, lr=1e-2),
    "radam_double": double(optim.RAdam, lr=1e-2),
    "nadam_bfloat16": brain(optim.NAdam, lr=1e-2),
    "adam_bfloat16": brain(optim.Adam, lr=1e-2),
    "adam_bfloat16_with_ema": lambda: brain(optim.Adam, lr=1e-2)() | {"ema": {"decay": 0.9}},
    "sgd_bfloat16": brain(optim.SGD, lr=1e-2, momentum=0.9),
    "sgd_half_precision_masters": brain(Masters),
    "adam_in_groups": lambda: {"optimizer": in_groups},
    "sgd_group_added_later": lambda: {"optimizer": grouped_later},
    "adam_over_half_of_the_parameters": lambda: {"optimizer": half_of_them},
    "adam_clipped": lambda: {"optimizer": partial(optim.Adam, lr=1e-2), "grad_clip_norm": 0.1},
    "own_lion": used(Lion),
    "own_quantized_state": used(Quantized),
    "own_schedule_free": used(ScheduleFree),
    "own_lookahead": used(Lookahead),
    "own_centred_gradients": used(Centred),
    "own_noise_in_the_step": used(Noisy),
    "own_two_in_one": used(Both),
    "own_with_closure": used(Sharp, lr=1e-2),
    "step_hook": lambda: {"optimizer": hooked},
}
