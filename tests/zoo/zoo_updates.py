"""Programs with several updates in a step: adversaries, actors with critics, and what people write around them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from torch.nn.functional import mse_loss
from torch.nn.utils.parametrizations import spectral_norm

from disttrain import Events, Update
from disttrain.config import CheckpointConfig, EarlyStopConfig, EmaConfig

Fields = dict[str, Any]
NOISE = 3
adam = partial(torch.optim.Adam, lr=1e-2)
rmsprop = partial(torch.optim.RMSprop, lr=1e-2)


def of(*parts: str) -> Callable[[Any], list[nn.Parameter]]:
    return lambda model: [each for part in parts for each in model[part].parameters()]


def gan(norm: bool = False) -> nn.ModuleDict:
    wrap = spectral_norm if norm else (lambda module: module)
    return nn.ModuleDict(
        {
            "g": nn.Sequential(nn.Linear(NOISE, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)),
            "d": nn.Sequential(wrap(nn.Linear(4, 6)), nn.BatchNorm1d(6), nn.Dropout(0.3), wrap(nn.Linear(6, 1))),
        }
    )


def made(model: Any, x: Tensor) -> Tensor:
    return model["g"](torch.randn(len(x), NOISE, dtype=x.dtype))


def tell_apart(model: Any, batch: Any) -> Any:
    x, _ = batch
    on_x, on_made = model["d"](x), model["d"](made(model, x).detach())
    loss = cross_entropy(on_x, torch.ones_like(on_x)) + cross_entropy(on_made, torch.zeros_like(on_made))
    return loss, None, {"fooled": ((on_made > 0).sum(), len(x))}


def deceive(model: Any, batch: Any) -> Any:
    on_made = model["d"](made(model, batch[0]))
    return cross_entropy(on_made, torch.ones_like(on_made)), None


def distance(model: Any, batch: Any) -> Any:
    """Return the loss of an evaluation."""
    x, _ = batch
    mean = model["g"](torch.zeros(len(x), NOISE, dtype=x.dtype)).mean(0)
    return (mean - x.mean(0)).square().sum(), None, {"far": (mean - x.mean(0)).abs().sum()}


D, G = Update("d", of("d"), tell_apart, adam), Update("g", of("g"), deceive, adam)


def fields(updates: list[Update], model: Callable[..., Any] = gan, **changes: Any) -> Fields:
    alone: Fields = {
        "optimizer": None,
        "loss": None,
        "forward": distance,
        "checkpoint": CheckpointConfig(every_steps=2),
    }
    return {**alone, "model": model, "updates": updates} | changes


def wasserstein() -> Fields:
    """Every second step the generator too; a handler clips the critic's weights."""

    def judge(model: Any, batch: Any) -> Any:
        return model["d"](made(model, batch[0]).detach()).mean() - model["d"](batch[0]).mean(), None

    def clipping(trainer: Any, run: Any) -> None:
        @trainer.on(Events.ITERATION_COMPLETED)
        @torch.no_grad()
        def clip() -> None:
            for parameter in run.model["d"].parameters():
                parameter.clamp_(-0.05, 0.05)

    def fool(model: Any, batch: Any) -> Any:
        return -model["d"](made(model, batch[0])).mean(), None

    return fields(
        [Update("d", of("d"), judge, rmsprop), Update("g", of("g"), fool, rmsprop, every=2)], handlers=[clipping]
    )


def penalized() -> Fields:
    """A gradient of the critic by its input, in the loss."""

    def judge(model: Any, batch: Any) -> Any:
        x, _ = batch
        fake = made(model, x).detach()
        mixed = torch.lerp(x, fake, torch.rand(len(x), 1)).requires_grad_()
        (slope,) = torch.autograd.grad(model["d"](mixed).sum(), mixed, create_graph=True)
        return model["d"](fake).mean() - model["d"](x).mean() + (slope.norm(dim=1) - 1).square().mean(), None

    return fields([Update("d", of("d"), judge, adam, every=1), G])


def parts(target: bool = False) -> nn.ModuleDict:
    def part(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, width))

    model = nn.ModuleDict({"encoder": nn.Linear(4, 4), "actor": part(2), "critic": part(1)})
    if target:
        model["target"] = part(1).requires_grad_(False)
        model["target"].load_state_dict(model["critic"].state_dict())
    return model


def act(model: Any, batch: Any) -> Any:
    x, y = batch
    features = model["encoder"](x)
    scores = model["actor"](features)
    chosen = torch.multinomial(scores.detach().softmax(1), 1)
    reward = (chosen == (y > 0)).float()
    advantage = (reward - model["critic"](features)).detach()
    return -(scores.log_softmax(1).gather(1, chosen) * advantage).mean(), None


def judge_features(model: Any, batch: Any) -> Any:
    x, y = batch
    return mse_loss(model["critic"](model["encoder"](x).detach()), y), None


def fit(model: Any, batch: Any) -> Any:
    return mse_loss(model["critic"](model["encoder"](batch[0])), batch[1]), None


def target_network() -> Fields:
    """A frozen copy of the critic, which follows it in the forward of one update and is read in the other."""

    def judge(model: Any, batch: Any) -> Any:
        x, y = batch
        if model.training:
            with torch.no_grad():
                for slow, fast in zip(model["target"].parameters(), model["critic"].parameters(), strict=True):
                    slow.lerp_(fast, 0.1)
        aim = y + 0.9 * model["target"](x)
        return mse_loss(model["critic"](x), aim), None

    def follow(model: Any, batch: Any) -> Any:
        x, _ = batch
        return mse_loss(model["actor"](model["encoder"](x)).mean(1, keepdim=True), model["target"](x)), None

    updates = [
        Update("critic", of("critic"), judge, adam),
        Update("actor", of("actor", "encoder"), follow, adam, every=2),
    ]
    return fields(updates, partial(parts, True), forward=fit)


def target_by_handler() -> Fields:
    def following(trainer: Any, run: Any) -> None:
        @trainer.on(Events.ITERATION_COMPLETED(every=3))
        @torch.no_grad()
        def follow() -> None:
            for slow, fast in zip(run.model["target"].parameters(), run.model["critic"].parameters(), strict=True):
                slow.copy_(fast)

    return target_network() | {"handlers": [following]}


def shared_encoder() -> Fields:
    updates = [
        Update("critic", of("critic"), judge_features, adam),
        Update("actor", of("encoder", "actor"), act, adam, grad_clip_norm=0.1),
    ]
    return fields(updates, parts, forward=fit)


def three() -> Fields:
    updates = [
        Update("encoder", of("encoder"), fit, adam, every=3),
        Update("critic", of("critic"), judge_features, partial(torch.optim.SGD, lr=0.1, momentum=0.9)),
        Update("actor", of("actor"), act, adam, every=2),
    ]
    return fields(updates, parts, forward=fit)


def warm(optimizer: Any, total_steps: int) -> Any:
    return torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, total_steps)


def plateau(optimizer: Any, total_steps: int) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1.0)


def scheduled() -> Fields:
    updates = [D.model_copy(update={"schedule": warm}), G.model_copy(update={"schedule": plateau, "every": 2})]
    return fields(updates)


def watched() -> Fields:
    """An average that is evaluated, a best checkpoint and an early stop by a value of the evaluation."""
    return fields(
        [D, G],
        ema=EmaConfig(decay=0.9),
        checkpoint=CheckpointConfig(every_steps=2, monitor="far", mode="min"),
        early_stop=EarlyStopConfig(monitor="far", mode="min", patience=50),
    )


def bad_at(step: int) -> Callable[[Any, Any], None]:
    """Return a handler that makes the generator's loss infinite in one step."""

    def spoiling(trainer: Any, run: Any) -> None:
        trainer.add_event_handler(
            Events.ITERATION_STARTED, lambda engine: run.model["g"].__dict__.update(bad=engine.state.iteration == step)
        )

    return spoiling


def spoiled(model: Any, batch: Any) -> Any:
    loss, outputs = deceive(model, batch)
    return loss * (torch.inf if model["g"].__dict__.get("bad") else 1.0), outputs


def skips() -> Fields:
    return fields([D, G.model_copy(update={"forward": spoiled})], on_nan="skip", handlers=[bad_at(4)])


def goes_back() -> Fields:
    return fields([D, G.model_copy(update={"forward": spoiled})], on_nan="rollback", handlers=[bad_at(7)])


def freezes() -> Fields:
    """One update's parameters are all frozen for a while by a handler, one of the other's for good."""

    def freezing(trainer: Any, run: Any) -> None:
        run.model["d"][0].weight.requires_grad_(False)

        @trainer.on(Events.ITERATION_STARTED)
        def freeze(engine: Any) -> None:
            run.model["g"][0].requires_grad_(engine.state.iteration not in (2, 3, 6))

    return fields([D, G], handlers=[freezing])


def mixes_up() -> Fields:
    """Forwards that change their microbatch in place."""

    def in_place(forward: Any) -> Any:
        def changed(model: Any, batch: Any) -> Any:
            batch[0].mul_(2).add_(torch.randn_like(batch[0]))
            return forward(model, batch)

        return changed

    return fields([Update(each.name, each.parameters, in_place(each.forward), adam) for each in (D, G)])


def flips() -> Fields:
    """A forward that switches requires_grad itself, as loops by hand do."""

    def by_hand(model: Any, batch: Any) -> Any:
        model["d"].requires_grad_(False)
        loss = deceive(model, batch)
        model["d"].requires_grad_(True)
        return loss

    return fields([D, G.model_copy(update={"forward": by_hand})])


def freezes_all() -> Fields:
    """A handler freezes the generator whole in the first steps, so that the discriminator learns alone."""

    def freezing(trainer: Any, run: Any) -> None:
        trainer.add_event_handler(
            Events.ITERATION_STARTED, lambda engine: run.model["g"].requires_grad_(engine.state.iteration > 4)
        )

    return fields([D, G], handlers=[freezing])


def without_gradient() -> Fields:
    """A loss that its own parameters do not reach."""

    def detached(model: Any, batch: Any) -> Any:
        on_made = model["d"](made(model, batch[0]).detach())
        return cross_entropy(on_made, torch.ones_like(on_made)), None

    return fields([D, G.model_copy(update={"forward": detached})])


def moves_the_other() -> Fields:
    """A forward that clips the weights which another update trains."""

    def clipping(model: Any, batch: Any) -> Any:
        with torch.no_grad():
            for parameter in model["d"].parameters():
                parameter.clamp_(-0.05, 0.05)
        return deceive(model, batch)

    return fields([D, G.model_copy(update={"forward": clipping})])


def counts_calls() -> Fields:
    calls: list[int] = []

    def counting(model: Any, batch: Any) -> Any:
        calls.append(1)
        loss, outputs = deceive(model, batch)
        return loss * len(calls), outputs

    return fields([D, G.model_copy(update={"forward": counting})])


def shares() -> Fields:
    """One part trained with two losses: both updates have the encoder."""
    return fields(
        [Update("critic", of("critic", "encoder"), fit, adam), Update("actor", of("actor", "encoder"), act, adam)],
        parts,
        forward=fit,
    )


def loss_alone() -> Fields:
    """The second update returns no outputs."""
    return fields([D, G.model_copy(update={"forward": lambda model, batch: deceive(model, batch)[0]})])


VARIANTS: dict[str, Callable[[], Fields]] = {
    "wasserstein": wasserstein,
    "penalized": penalized,
    "target_network": target_network,
    "target_by_handler": target_by_handler,
    "shared_encoder": shared_encoder,
    "three": three,
    "spectral": lambda: fields([D, G], partial(gan, norm=True)),
    "weighted": lambda: fields([D, G], weight=lambda batch: int((batch[1] > 0).sum())),
    "scheduled": scheduled,
    "watched": watched,
    "skips": skips,
    "goes_back": goes_back,
    "freezes": freezes,
    "mixes_up": mixes_up,
    "flips": flips,
    "freezes_all": freezes_all,
    "without_gradient": without_gradient,
    "moves_the_other": moves_the_other,
    "counts_calls": counts_calls,
    "shares": shares,
    "loss_alone": loss_alone,
    "bf16": lambda: fields([D, G], precision="bf16"),
    "fp16": lambda: fields([D, G], precision="fp16"),
    "recomputed": lambda: fields([D, G], activation_checkpointing=["Sequential"]),
    "asynchronous": lambda: fields([D, G], checkpoint=CheckpointConfig(every_steps=2, asynchronous=True)),
    "not_evaluated": lambda: fields([D, G], forward=None, valid_data=None),
    "own_groups": lambda: fields(
        [
            D.model_copy(
                update={
                    "optimizer": lambda model: torch.optim.AdamW(
                        [
                            {"params": list(model["d"][0].parameters()), "lr": 1e-3},
                            {"params": [p for part in model["d"][1:] for p in part.parameters()]},
                        ],
                        lr=1e-2,
                    )
                }
            ),
            G,
        ]
    ),
}
