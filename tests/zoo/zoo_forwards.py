"""Variants of a config's `forward`: what people compute of (model, batch), beside loss(model(x), y)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanSquaredError, PearsonCorrCoef
from zoo_lives import Fields, mlp, points

Answer = tuple[Tensor, Any]


def forward(function: Any, make: Callable[[], nn.Module] = mlp, **fields: Any) -> Callable[[], Fields]:
    return lambda: {"forward": function, "model": make, **fields}


class Auto(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, 2), nn.Linear(2, 4)
        self.temperature = nn.Parameter(torch.ones(()).reshape(1))
        self.register_buffer("centre", torch.zeros(4))
        self.alpha = 0.3

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encode(x))


class Pair(nn.Module):
    """A generator and a critic in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = nn.Linear(4, 4), mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.critic(self.generator(x))


class Heads(nn.Module):
    """Returns a dict of two outputs, of which a loss may use one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.body(x).tanh()
        return {"first": self.first(y), "second": self.second(y)}


def plain(model: nn.Module, batch: Any) -> Answer:
    x, y = batch
    y_pred = model(x)
    return F.mse_loss(y_pred, y), (y_pred, y)


def by_method(model: Any, batch: Any) -> Answer:
    x, _ = batch
    code = model.encode(x)
    return F.mse_loss(model(x), x) + model.alpha * code.pow(2).mean(), None


def by_method_alone(model: Any, batch: Any) -> Answer:
    x, _ = batch
    return F.mse_loss(model.decoder(model.encode(x)), x), None


def by_parts(model: Any, batch: Any) -> Answer:
    x, _ = batch
    return F.mse_loss(model.decoder(model.encoder(x)), x) + model.temperature.pow(2).sum(), None


def with_a_parameter(model: Any, batch: Any) -> Answer:
    x, _ = batch
    return F.mse_loss(model(x) * model.temperature.exp(), x), None


def with_a_penalty(model: nn.Module, batch: Any) -> Answer:
    loss, outputs = plain(model, batch)
    return loss + 1e-2 * sum(parameter.pow(2).sum() for parameter in model.parameters()), outputs


def moves_a_buffer(model: Any, batch: Any) -> Answer:
    x, _ = batch
    if model.training:
        with torch.no_grad():
            model.centre.lerp_(x.mean(0), 0.2)
    return F.mse_loss(model(x - model.centre), x), None


def called_twice(model: nn.Module, batch: Any) -> Answer:
    x, y = batch
    return F.mse_loss(model(x), y) + 0.1 * (model(x.flip(0)) - model(2 * x)).pow(2).mean(), None


def called_without_gradient(model: nn.Module, batch: Any) -> Answer:
    """Self-distillation: the first call's output is a target."""
    x, y = batch
    with torch.no_grad():
        target = model(x + 0.1 * torch.randn_like(x))
    y_pred = model(x)
    return F.mse_loss(y_pred, y) + 0.1 * F.mse_loss(y_pred, target), None


def left_early(model: nn.Module, batch: Any) -> Answer:
    x, y = batch
    if y.max() < 2.5:
        return torch.zeros((), requires_grad=True), None
    return F.mse_loss(model(x), y), None


def left_early_always_on_one(model: nn.Module, batch: Any) -> Answer:
    """The slot without the largest sample does not call the model; a loss without a gradient."""
    x, y = batch
    if y.max() < 2.5:
        return torch.zeros(()), None
    return F.mse_loss(model(x), y), None


def no_model_at_all(model: nn.Module, batch: Any) -> Answer:
    return torch.zeros((), requires_grad=True), None


def times_zero(model: nn.Module, batch: Any) -> Answer:
    """A slot with nothing to learn, as torch's forum advises."""
    x, y = batch
    loss = F.mse_loss(model(x), y)
    return loss * 0 if y.max() < 2.5 else loss, None


def penalized(model: nn.Module, batch: Any) -> Answer:
    """A gradient penalty: the backward of a gradient."""
    x, y = batch
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        y_pred = model(x)
        (slope,) = torch.autograd.grad(y_pred.sum(), x, create_graph=True)
    return F.mse_loss(y_pred, y) + 0.1 * slope.pow(2).sum(1).mean(), None


def adversarial(model: nn.Module, batch: Any) -> Answer:
    """Fast gradient sign: an input that is moved along its gradient first."""
    x, y = batch
    with torch.enable_grad():
        moved = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(F.mse_loss(model(moved), y), moved)
    return F.mse_loss(model(x + 0.1 * slope.sign()), y), None


def adversarial_by_backward(model: nn.Module, batch: Any) -> Answer:
    """The same by a backward of its own, which leaves gradients on the parameters."""
    x, y = batch
    with torch.enable_grad():
        moved = x.clone().requires_grad_()
        F.mse_loss(model(moved), y).backward()
    return F.mse_loss(model(x + 0.1 * moved.grad.sign()), y), None


def norm_of_the_gradient(model: nn.Module, batch: Any) -> Answer:
    """The norm of the gradient of the parameters is a part of the loss."""
    x, y = batch
    with torch.enable_grad():
        loss = F.mse_loss(model(x), y)
        gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        return loss + 1e-2 * sum(gradient.pow(2).sum() for gradient in gradients), None


def one_head(model: nn.Module, batch: Any) -> Answer:
    x, y = batch
    return F.mse_loss(model(x)["first"], y), None


def head_by_slot(model: nn.Module, batch: Any) -> Answer:
    x, y = batch
    return F.mse_loss(model(x)["first" if y.max() < 2.5 else "second"], y), None


def both_players(model: Any, batch: Any) -> Answer:
    x, y = batch
    fake = model.generator(x)
    critic = model.critic(x).mean() - model.critic(fake.detach()).mean()
    return critic.pow(2) + F.mse_loss(model.critic(fake), y), None


def freezes_inside(model: Any, batch: Any) -> Answer:
    """The critic is frozen while the generator's loss is computed."""
    x, y = batch
    for parameter in model.critic.parameters():
        parameter.requires_grad_(False)
    first = F.mse_loss(model.critic(model.generator(x)), y)
    for parameter in model.critic.parameters():
        parameter.requires_grad_(True)
    return first + model.critic(x).pow(2).mean(), None


def mixed_up(model: nn.Module, batch: Any) -> Answer:
    x, y = batch
    if not model.training:
        return plain(model, batch)
    share, order = torch.rand(()), torch.randperm(len(x))
    return F.mse_loss(model(share * x + (1 - share) * x[order]), share * y + (1 - share) * y[order]), None


def moves_parameters(model: nn.Module, batch: Any) -> Answer:
    """Clips the weights before each forward."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.clamp_(-0.3, 0.3)
    return plain(model, batch)


def moves_parameters_by_data(model: nn.Module, batch: Any) -> Answer:
    """The same through `.data`, which no version counter sees."""
    if model.training:
        for parameter in model.parameters():
            parameter.data.clamp_(-0.3, 0.3)
    return plain(model, batch)


def in_evaluation_mode(model: nn.Module, batch: Any) -> Answer:
    """Puts a part into evaluation mode and leaves it there."""
    model[1].eval()
    return plain(model, batch)


def sampled(model: nn.Module, batch: Any) -> Answer:
    """REINFORCE: the gradient of a sample's log probability."""
    x, y = batch
    spread = torch.distributions.Normal(model(x), 0.5)
    guess = spread.sample()
    return ((guess - y).pow(2) * spread.log_prob(guess)).mean(), None


def as_float64(model: nn.Module, batch: Any) -> Answer:
    loss, outputs = plain(model, batch)
    return loss.double() * 1.1, outputs


def with_shape(model: nn.Module, batch: Any) -> Answer:
    """A loss of shape [1]."""
    loss, outputs = plain(model, batch)
    return loss.reshape(1), outputs


def without_outputs(model: nn.Module, batch: Any) -> Any:
    """The loss alone."""
    return plain(model, batch)[0]


def in_a_dict(model: nn.Module, batch: Any) -> Any:
    return {"loss": plain(model, batch)[0]}


def own_hook_each_time(model: nn.Module, batch: Any) -> Answer:
    """A hook on an activation."""
    x, y = batch
    y_pred = model(x)
    if y_pred.requires_grad:
        y_pred.register_hook(lambda gradient: gradient.clamp(-0.05, 0.05))
    return F.mse_loss(y_pred, y), None


def dropped() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))


def contrastive(model: nn.Module, batch: Any) -> Answer:
    x, _ = batch
    first, second = (F.normalize(model(x + 0.1 * torch.randn_like(x)), dim=1) for _ in range(2))
    return F.cross_entropy(first @ second.t() / 0.1, torch.arange(len(x))), None


def with_values(model: Any, batch: Any) -> Any:
    """Values beside the loss: means, of parameters too, and a pair; a slot without a target leaves them out."""
    y = batch[1]
    loss, outputs = plain(model, batch)
    above = y > 0
    if not above.any():
        return loss, outputs, {}
    values = {"mse": loss, "bias": model[-1].bias.mean(), "above": (((y - outputs[0]) * above).sum(), above.sum())}
    return loss + 0.1 * values["bias"], outputs, values


def num_above(batch: Any) -> int:
    return int((batch[1] > 0).sum())


def with_values_always(model: Any, batch: Any) -> Any:
    loss, outputs = plain(model, batch)
    return loss, tuple(each[:, 0] for each in outputs), {"mse": loss, "spread": outputs[0].std()}


MEASURED = {"error": MeanSquaredError, "correlation": PearsonCorrCoef}


def infinite_by_data(model: nn.Module, batch: Any) -> Answer:
    x, y = batch
    y_pred = model(x)
    return F.mse_loss(y_pred, y) / (y < 4.0).all(), (y_pred[:, 0], y[:, 0])


VARIANTS: dict[str, Callable[[], Fields]] = {
    "plain": forward(plain),
    "method_and_call": forward(by_method, Auto),
    "method_alone": forward(by_method_alone, Auto),
    "parts_alone": forward(by_parts, Auto),
    "parameter_in_the_loss": forward(with_a_parameter, Auto),
    "penalty_on_the_weights": forward(with_a_penalty),
    "moves_a_buffer": forward(moves_a_buffer, Auto),
    "called_three_times": forward(called_twice, dropped),
    "called_without_gradient": forward(called_without_gradient, dropped),
    "slot_without_model": forward(left_early, valid_data=None, checkpoint={"every_steps": 2}),
    "slot_without_gradient": forward(left_early_always_on_one, valid_data=None, checkpoint={"every_steps": 2}),
    "no_model_at_all": forward(no_model_at_all),
    "slot_times_zero": forward(times_zero),
    "gradient_penalty": forward(penalized),
    "adversarial": forward(adversarial),
    "adversarial_by_backward": forward(adversarial_by_backward),
    "norm_of_the_gradient": forward(norm_of_the_gradient),
    "one_head_of_two": forward(one_head, Heads),
    "head_by_slot": forward(head_by_slot, Heads),
    "generator_and_critic": forward(both_players, Pair),
    "freezes_inside": forward(freezes_inside, Pair),
    "mixup": forward(mixed_up),
    "moves_parameters": forward(moves_parameters),
    "moves_parameters_by_data": forward(moves_parameters_by_data),
    "part_in_evaluation_mode": forward(in_evaluation_mode, dropped),
    "reinforce": forward(sampled),
    "loss_in_float64": forward(as_float64),
    "loss_with_a_shape": forward(with_shape),
    "loss_alone": forward(without_outputs),
    "loss_in_a_dict": forward(in_a_dict),
    "hook_on_an_activation": forward(own_hook_each_time),
    "contrastive": forward(contrastive),
    "values": forward(with_values_always, dropped),
    "values_by_weight": forward(with_values, weight=num_above, num_slots=4),
    "train_metrics": forward(with_values_always, dropped, train_metrics=MEASURED, num_slots=6),
    "train_metrics_without_bad_steps": forward(
        infinite_by_data,
        train_metrics=MEASURED,
        on_nan="rollback",
        log={"every_steps": 4},
        valid_data=None,
        checkpoint={"every_steps": 3},
    ),
    "four_slots_method": forward(by_method, Auto, num_slots=4),
    "four_slots_three_calls": forward(called_twice, dropped, num_slots=4),
    "larger_data": forward(plain, dropped, train_data=lambda: points(48)),
}
