"""The training step: the one body compared with steps written by hand, and the choices and errors of its factories.

apex and torch_xla are doubles here (tests/precision/doubles), which are enough to check the order of the calls.
"""

import inspect
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import disttrain.engine as engine_room
from disttrain.engine import (
    DeterministicEngine,
    Engine,
    Events,
    create_supervised_trainer,
    supervised_training_step,
    supervised_training_step_amp,
    supervised_training_step_apex,
    supervised_training_step_tpu,
)
from disttrain.parallel.gradients import Accumulation
from disttrain.precision import AMP, FP32

DOUBLES = Path(__file__).parents[1] / "precision" / "doubles"


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(6, 4, generator=generator), torch.randn(6, 1, generator=generator)) for _ in range(count)]


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def by_hand(data, steps: int = 1, dtype: torch.dtype | None = None) -> tuple[list[float], list[torch.Tensor]]:
    """Train as a person would write it; return the losses and the weights."""
    model = make_model()
    optimizer = make_optimizer(model)
    model.train()
    torch.manual_seed(5)
    losses = []
    for number, (x, y) in enumerate(data):
        if number % steps == 0:
            optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = nn.functional.mse_loss(model(x), y)
        (loss / steps).backward()
        if (number + 1) % steps == 0:
            optimizer.step()
        losses.append(loss.item())
    return losses, weights(model)


def run_losses(trainer: Engine, data) -> list[float]:
    losses: list[float] = []
    handle = trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: losses.append(engine.state.output))
    torch.manual_seed(5)
    trainer.run(data)
    handle.remove()
    return losses


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_step_is_bitwise_the_step_by_hand(steps):
    data = batches(6)
    losses, expected = by_hand(data, steps)
    model = make_model()
    trainer = create_supervised_trainer(
        model, make_optimizer(model), nn.functional.mse_loss, gradient_accumulation_steps=steps
    )
    assert run_losses(trainer, data) == losses
    assert equal(weights(model), expected)


@pytest.mark.parametrize("steps", [1, 2])
def test_the_factories_process_function_is_the_same_step(steps):
    data = batches(4)
    losses, expected = by_hand(data, steps)
    model = make_model()
    step = supervised_training_step(
        model, make_optimizer(model), nn.functional.mse_loss, gradient_accumulation_steps=steps
    )
    assert run_losses(Engine(step), data) == losses
    assert equal(weights(model), expected)


@pytest.mark.parametrize("steps", [1, 2])
def test_amp_is_the_step_by_hand_under_autocast(steps):
    data = batches(4)
    losses, expected = by_hand(data, steps, torch.bfloat16)
    model = make_model()
    trainer = create_supervised_trainer(
        model, make_optimizer(model), nn.functional.mse_loss, amp_mode="amp", gradient_accumulation_steps=steps
    )
    assert run_losses(trainer, data) == losses
    assert equal(weights(model), expected)


def test_amp_takes_a_dtype():
    seen = []
    for dtype in (torch.float16, torch.bfloat16):
        model = make_model()
        step = supervised_training_step_amp(
            model,
            make_optimizer(model),
            lambda y_pred, y: nn.functional.mse_loss(y_pred.float(), y),
            device="cpu",
            output_transform=lambda x, y, y_pred, loss: seen.append(y_pred.dtype),
            dtype=dtype,
        )
        Engine(step).run(batches(1))
    assert seen == [torch.float16, torch.bfloat16]


COMMON = {
    "device": None,
    "non_blocking": False,
    "prepare_batch": ...,
    "model_transform": ...,
    "output_transform": ...,
}
ACCUMULATION = {"gradient_accumulation_steps": 1, "model_fn": ...}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("supervised_training_step", {**COMMON, **ACCUMULATION}),
        ("supervised_training_step_apex", {**COMMON, **ACCUMULATION}),
        ("supervised_training_step_tpu", {**COMMON, **ACCUMULATION}),
        ("supervised_training_step_amp", {**COMMON, "scaler": None, **ACCUMULATION, "dtype": None}),
        (
            "create_supervised_trainer",
            {**COMMON, "deterministic": False, "amp_mode": None, "scaler": False, **ACCUMULATION},
        ),
    ],
)
def test_positional_parameters_and_defaults_are_the_contracts(name, options):
    parameters = list(inspect.signature(getattr(engine_room, name)).parameters.values())
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional] == ["model", "optimizer", "loss_fn", *options]
    assert {p.name: p.default for p in positional[3:] if options[p.name] is not ...} == {
        key: value for key, value in options.items() if value is not ...
    }


def test_default_output_is_the_loss_as_a_number_and_default_prepare_unpacks_two():
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = create_supervised_trainer(model, optimizer, nn.functional.mse_loss)
    x, y = torch.ones(1, 1), torch.zeros(1, 1)
    assert trainer.run([[x, y]]).output == nn.functional.mse_loss(model(x), y).item()


def test_model_fn_model_transform_and_output_transform_are_called_in_this_order():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    trainer = create_supervised_trainer(
        model,
        optimizer,
        lambda y_pred, y: (y_pred - y).pow(2).sum(),
        prepare_batch=lambda batch, device, non_blocking: (batch["x"], batch["y"]),
        model_fn=lambda model, x: {"logits": model(x * 2)},
        model_transform=lambda output: output["logits"] + 1,
        output_transform=lambda x, y, y_pred, loss: (x, y, y_pred, loss),
    )
    x, y = torch.ones(1, 2), torch.zeros(1, 2)
    got_x, got_y, y_pred, loss = trainer.run([{"x": x, "y": y}]).output
    expected = model(x * 2) + 1
    assert got_x is x
    assert got_y is y
    assert torch.equal(y_pred, expected)
    assert torch.equal(loss, expected.pow(2).sum())


def test_prepare_batch_gets_device_and_non_blocking():
    seen = []

    def prepare(batch, device, non_blocking):
        seen.append((device, non_blocking))
        return batch

    model = nn.Linear(4, 1)
    create_supervised_trainer(
        model, make_optimizer(model), nn.functional.mse_loss, "cpu", True, prepare_batch=prepare
    ).run(batches(1))
    assert seen == [("cpu", True)]


class TestAccumulation:
    def test_gradients_are_zeroed_at_a_windows_start_alone(self):
        model = nn.Linear(1, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        trainer = create_supervised_trainer(
            model, optimizer, lambda y_pred, y: (y_pred * y).sum(), gradient_accumulation_steps=2
        )
        gradients = []
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: gradients.append(model.weight.grad.item()))
        one = torch.ones(1, 1)
        trainer.run([(one, one), (one, 3 * one), (one, 5 * one)])
        # the loss's gradient is y, halved for the backward
        assert gradients == [0.5, 0.5 + 1.5, 2.5]

    def test_the_loss_is_reported_undivided(self):
        data = batches(2)
        model = make_model()
        trainer = create_supervised_trainer(
            model, make_optimizer(model), nn.functional.mse_loss, gradient_accumulation_steps=2
        )
        assert run_losses(trainer, data) == by_hand(data, 2)[0]

    @pytest.mark.parametrize("steps", [0, -1])
    @pytest.mark.parametrize("factory", [supervised_training_step, supervised_training_step_amp])
    def test_steps_below_one_are_refused(self, factory, steps):
        model = make_model()
        optimizer = make_optimizer(model)
        for make in (factory, create_supervised_trainer):
            with pytest.raises(ValueError, match=f"gradient_accumulation_steps must be at least 1, got {steps}"):
                make(model, optimizer, nn.functional.mse_loss, gradient_accumulation_steps=steps)

    @pytest.fixture
    def ddp(self, tmp_path):
        """Yield a real DDP model in a group of one rank, and the iterations in which it sent its gradients."""
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        model = DistributedDataParallel(nn.Linear(4, 1))
        sent: list[int] = []
        iteration = [0]

        def hook(state, bucket):
            sent.append(iteration[0])
            future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        model.register_comm_hook(None, hook)
        yield model, sent, iteration
        dist.destroy_process_group()

    def test_under_ddp_no_gradients_are_sent_inside_a_window(self, ddp):
        model, sent, iteration = ddp
        trainer = create_supervised_trainer(
            model, make_optimizer(model), nn.functional.mse_loss, gradient_accumulation_steps=3
        )

        @trainer.on(Events.ITERATION_STARTED)
        def note(engine):
            iteration[0] = engine.state.iteration

        trainer.run(batches(7))
        assert sent == [3, 6]

    def test_a_kept_exception_does_not_keep_ddp_from_sending(self, ddp):
        model, sent, _iteration = ddp
        trainer = create_supervised_trainer(
            model, make_optimizer(model), nn.functional.mse_loss, gradient_accumulation_steps=2
        )
        kept = []
        trainer.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: kept.append(error))
        good = batches(1)[0]
        trainer.run([(torch.ones(1, 3), torch.ones(1, 1))], epoch_length=1)
        assert isinstance(kept[0], RuntimeError)
        assert model.require_backward_grad_sync
        trainer.run([good, good])
        assert len(sent) == 1


class Noted(FP32):
    """A fifth precision: float32, and it records the calls."""

    name = "noted"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def forward(self):
        self.calls.append("forward")
        return super().forward()

    def backward(self, loss, optimizer):
        self.calls.append("backward")
        super().backward(loss, optimizer)

    def update(self, optimizer, before_step=None):
        self.calls.append("update")
        return super().update(optimizer, before_step)


class Halves(Accumulation):
    """Each batch is two microbatches of half its size."""

    several = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.divisor = 2
        self.ended = 0

    def opens(self, iteration: int) -> bool:
        return True

    def closes(self, iteration: int) -> bool:
        return True

    def microbatches(self, batch, iteration):
        x, y = batch
        yield x[:3], y[:3]
        yield x[3:], y[3:]
        self.ended += 1


def test_a_precision_takes_its_place_in_the_body():
    data = batches(4)
    model = make_model()
    precision = Noted()
    trainer = create_supervised_trainer(
        model, make_optimizer(model), nn.functional.mse_loss, gradient_accumulation_steps=2, precision=precision
    )
    losses, expected = by_hand(data, 2)
    assert run_losses(trainer, data) == losses
    assert equal(weights(model), expected)
    assert precision.calls == ["forward", "backward", "forward", "backward", "update"] * 2


def test_gradients_with_several_microbatches_give_the_list_of_outputs():
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradients = Halves(model)
    trainer = create_supervised_trainer(
        model,
        optimizer,
        nn.functional.mse_loss,
        output_transform=lambda x, y, y_pred, loss: loss.detach(),
        gradients=gradients,
    )
    ((x, y),) = batches(1)
    with torch.no_grad():
        losses = [nn.functional.mse_loss(model(x[part]), y[part]) for part in (slice(3), slice(3, 6))]
    assert trainer.run([(x, y)]).output == losses
    assert gradients.ended == 1
    torch.manual_seed(0)
    expected = nn.Linear(4, 1)
    for part in (slice(3), slice(3, 6)):
        (nn.functional.mse_loss(expected(x[part]), y[part]) / 2).backward()
    assert torch.equal(model.weight.grad, expected.weight.grad)


def test_one_output_is_made_after_the_update():
    order = []
    model = make_model()
    create_supervised_trainer(
        model,
        make_optimizer(model),
        nn.functional.mse_loss,
        output_transform=lambda x, y, y_pred, loss: order.append("output"),
        before_step=lambda: order.append("before_step"),
    ).run(batches(2))
    assert order == ["before_step", "output"] * 2


def test_before_step_clips_or_skips():
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    answers = iter([None, False, True])
    norms = []

    def before_step():
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1e-3).item())
        return next(answers)

    trainer = create_supervised_trainer(model, optimizer, nn.functional.mse_loss, before_step=before_step)
    moved = []
    last = weights(model)

    @trainer.on(Events.ITERATION_COMPLETED)
    def note():
        nonlocal last
        moved.append(
            math.dist(torch.cat([w.flatten() for w in last]), torch.cat([w.flatten() for w in weights(model)]))
        )
        last = weights(model)

    trainer.run(batches(3))
    assert min(norms) > 1e-3
    assert moved == [pytest.approx(1e-3, rel=1e-3), 0.0, pytest.approx(1e-3, rel=1e-3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": FP32(), "amp_mode": "amp"}, "expected precision alone"),
        ({"precision": AMP("cpu", scaler=True), "scaler": True}, "expected precision alone"),
        ({"gradients": Accumulation(nn.Linear(1, 1)), "gradient_accumulation_steps": 2}, "expected gradients alone"),
        ({"amp_mode": "amp", "device": "mps"}, r"amp_mode='amp' cannot be used with a device of type mps"),
        ({"amp_mode": "apex", "device": "mps"}, r"amp_mode='apex' cannot be used with a device of type mps"),
        ({"amp_mode": "amp", "device": torch.device("xla")}, r"amp_mode='amp' cannot be used with .* xla"),
        ({"amp_mode": "apex", "device": "xla"}, r"amp_mode='apex' cannot be used with .* xla"),
        ({"scaler": True}, 'expected amp_mode="amp" with a scaler, got amp_mode=None'),
        ({"scaler": torch.amp.GradScaler("cpu")}, 'expected amp_mode="amp" with a scaler, got amp_mode=None'),
        ({"scaler": True, "amp_mode": "apex"}, "expected amp_mode=\"amp\" with a scaler, got amp_mode='apex'"),
        ({"amp_mode": "half"}, r"expected amp_mode None or one of \('amp', 'apex'\), got 'half'"),
    ],
)
def test_arguments_that_exclude_each_other_are_refused(options, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        create_supervised_trainer(model, make_optimizer(model), nn.functional.mse_loss, **options)


@pytest.fixture
def without(monkeypatch):
    """Hide apex and torch_xla, installed or not."""
    for package in ("apex", "torch_xla"):
        for name in [n for n in sys.modules if n.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(sys, "path", [p for p in sys.path if not (Path(p) / package).exists()])


def test_an_xla_device_without_torch_xla(without):
    model = make_model()
    with pytest.raises(RuntimeError, match=r"expected torch_xla for device 'xla'.*pip install"):
        create_supervised_trainer(model, make_optimizer(model), nn.functional.mse_loss, device="xla")


def test_absent_packages_are_named_with_how_to_install_them(without):
    model = make_model()
    arguments = (model, make_optimizer(model), nn.functional.mse_loss)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .*torch_xla"):
        supervised_training_step_tpu(*arguments)
    with pytest.raises(ModuleNotFoundError, match=r"no package apex; install .*apex"):
        supervised_training_step_apex(*arguments)
    with pytest.raises(ModuleNotFoundError, match=r"no package apex; install .*apex"):
        create_supervised_trainer(*arguments, amp_mode="apex")


class TestScaler:
    def trainer(self, scaler) -> Engine:
        model = make_model()
        # small enough for its scaled gradients to fit in float16
        loss = lambda y_pred, y: nn.functional.mse_loss(y_pred.float(), y) / 1000  # noqa: E731
        return create_supervised_trainer(model, make_optimizer(model), loss, amp_mode="amp", scaler=scaler)

    def test_the_state_has_a_scaler_with_true_alone_and_keeps_it(self):
        trainer = self.trainer(True)
        scaler = trainer.state.scaler
        assert isinstance(scaler, torch.amp.GradScaler)
        trainer.run(batches(2))
        trainer.run(batches(1))
        assert trainer.state.scaler is scaler
        assert scaler.state_dict()["_growth_tracker"] == 3

    def test_a_passed_scaler_is_used_and_not_in_the_state(self):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
        trainer = self.trainer(scaler)
        assert not hasattr(trainer.state, "scaler")
        trainer.run(batches(2))
        assert scaler.get_scale() == 8.0

    def test_without_a_scaler_the_state_has_none(self):
        trainer = self.trainer(False)
        assert not hasattr(trainer.state, "scaler")

    def test_the_amp_step_takes_a_scaler(self):
        model = make_model()
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
        loss = lambda y_pred, y: nn.functional.mse_loss(y_pred.float(), y)  # noqa: E731
        Engine(supervised_training_step_amp(model, make_optimizer(model), loss, scaler=scaler)).run(batches(2))
        assert scaler.get_scale() == 16.0


class TestOverflow:
    """An update whose scaled gradients overflow: fp16 on the CPU, both factories, accumulation, a schedule."""

    BAD = 5  # the iteration, from 1, whose loss is infinite

    def make(self, steps: int, fused: bool = False):
        model = make_model()
        return model, torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused), nn.functional.mse_loss

    def loss(self, engine: list[Engine]):
        def loss(y_pred, y):
            bad = engine[0].state.iteration == self.BAD
            return nn.functional.mse_loss(y_pred.float(), y) / 1000 * (math.inf if bad else 1.0)

        return loss

    def expected(self, data, steps: int, fused: bool) -> list[torch.Tensor]:
        """Return the weights after training by hand, with a scaled loss and without the bad iteration's update."""
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
        torch.manual_seed(5)
        scale = 2.0**16
        for iteration, (x, y) in enumerate(data, start=1):
            if (iteration - 1) % steps == 0:
                optimizer.zero_grad()
                overflowed = False
            with torch.autocast("cpu", torch.float16):
                loss = nn.functional.mse_loss(model(x).float(), y) / 1000
            overflowed = overflowed or iteration == self.BAD
            (loss / steps * scale).backward()
            if iteration % steps:
                continue
            for parameter in model.parameters():
                parameter.grad /= scale
            if overflowed:
                scale /= 2
            else:
                optimizer.step()
        return weights(model)

    @pytest.mark.parametrize("by", ["mode", "factory"])
    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("steps", [1, 2, 3])
    def test_exactly_that_update_is_skipped_and_the_scale_halved(self, by, steps, fused):
        data, held = batches(12), []
        model, optimizer, _ = self.make(steps, fused)
        scaler = torch.amp.GradScaler("cpu")
        arguments = {"gradient_accumulation_steps": steps, "scaler": scaler, "device": "cpu"}
        if by == "mode":
            held.append(create_supervised_trainer(model, optimizer, self.loss(held), amp_mode="amp", **arguments))
        else:
            held.append(Engine(supervised_training_step_amp(model, optimizer, self.loss(held), **arguments)))
        torch.manual_seed(5)
        held[0].run(data)
        assert scaler.get_scale() == 2.0**15
        assert equal(weights(model), self.expected(data, steps, fused))

    @pytest.mark.parametrize("fused", [False, True])
    def test_a_schedule_in_after_step_does_not_count_it_and_a_resumed_run_has_the_same_scale(self, fused):
        data = batches(12)

        def run(first: int, last: int, states=None) -> tuple[list[bool], dict]:
            held, stepped = [], []
            model, optimizer, _ = self.make(2, fused)
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=6)
            precision = AMP("cpu", scaler=True)

            def after_step(has_stepped: bool) -> None:
                stepped.append(has_stepped)
                if has_stepped:
                    schedule.step()

            held.append(
                create_supervised_trainer(
                    model,
                    optimizer,
                    self.loss(held),
                    gradient_accumulation_steps=2,
                    precision=precision,
                    before_step=lambda: nn.utils.clip_grad_norm_(model.parameters(), 1e-3) and None,
                    after_step=after_step,
                )
            )
            parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "precision": precision}
            for name, state in (states or {}).items():
                parts[name].load_state_dict(state)
            held[0].state.iteration = first
            for batch in data[first:last]:
                held[0].state.iteration += 1
                torch.manual_seed(held[0].state.iteration)
                held[0].state.output = held[0]._process_function(held[0], batch)
            return stepped, {name: part.state_dict() for name, part in parts.items()}

        stepped, whole = run(0, 12)
        assert stepped == [True, True, False, True, True, True]
        assert whole["schedule"]["last_epoch"] == 5
        assert (whole["precision"]["scaler"]["scale"], whole["precision"]["num_skipped"]) == (2.0**15, 1)
        for kill in (4, 6, 10):
            before, saved = run(0, kill)
            after, resumed = run(kill, 12, saved)
            assert before + after == stepped
            assert resumed["precision"] == whole["precision"]
            assert equal(list(resumed["model"].values()), list(whole["model"].values()))

    def test_clipping_comes_after_unscaling(self):
        norms = []
        model, optimizer, loss = self.make(1)
        create_supervised_trainer(
            model,
            optimizer,
            lambda y_pred, y: loss(y_pred.float(), y) / 1000,
            precision=AMP("cpu", scaler=True),
            before_step=lambda: norms.append(nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()),
        ).run(batches(3))
        assert len(norms) == 3
        assert max(norms) < 1  # times the scale, 65536, it is far above


def test_after_step_is_called_once_for_each_update():
    stepped = []
    model = make_model()
    answers = iter([None, False, True])
    create_supervised_trainer(
        model,
        make_optimizer(model),
        nn.functional.mse_loss,
        gradient_accumulation_steps=2,
        before_step=lambda: next(answers),
        after_step=stepped.append,
    ).run(batches(6))
    assert stepped == [True, False, True]


class TestTrainingMode:
    def test_the_whole_model_is_in_training_mode_at_every_step(self):
        model = make_model()
        modes = []

        def model_fn(model, x):
            modes.append([module.training for module in model.modules()])
            return model(x)

        trainer = create_supervised_trainer(model, make_optimizer(model), nn.functional.mse_loss, model_fn=model_fn)
        # once as after a validation in a handler, once as after one that bypasses a wrapper (DDP)
        trainer.add_event_handler(Events.ITERATION_STARTED(once=1), lambda: model.eval())
        trainer.add_event_handler(Events.ITERATION_STARTED(once=2), lambda: model[1].eval())
        trainer.run(batches(3))
        assert modes == [[True] * 6] * 3

    def test_a_models_own_train_method_decides(self):
        class Frozen(nn.Sequential):
            def train(self, mode: bool = True):
                super().train(mode)
                self[1].train(mode and not self.frozen)
                return self

        model = Frozen(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        model.frozen = True
        trainer = create_supervised_trainer(model, make_optimizer(model), nn.functional.mse_loss)
        before = model[1].running_mean.clone()
        trainer.run(batches(2))
        assert torch.equal(model[1].running_mean, before)
        model.frozen = False
        trainer.run(batches(2))
        assert not torch.equal(model[1].running_mean, before)


def test_deterministic_picks_the_engine():
    model = make_model()
    arguments = (model, make_optimizer(model), nn.functional.mse_loss)
    assert type(create_supervised_trainer(*arguments)) is Engine
    assert type(create_supervised_trainer(*arguments, deterministic=True)) is DeterministicEngine


class TestDoubles:
    @pytest.fixture
    def path(self, without, monkeypatch):
        # Not syspath_prepend: when pytest undoes it, the packages that `without` hides would stay hidden.
        monkeypatch.setattr(sys, "path", [*(str(DOUBLES / double) for double in ("apex_with_amp", "xla")), *sys.path])
        yield
        for name in [n for n in sys.modules if n.partition(".")[0] in ("apex", "torch_xla")]:
            monkeypatch.delitem(sys.modules, name)

    @pytest.mark.parametrize("steps", [1, 2])
    def test_apex_by_amp_mode_and_by_factory(self, path, steps):
        from apex import amp

        data = batches(4)
        losses, expected = by_hand(data, steps)
        for mode in (True, False):
            model = make_model()
            model, optimizer = amp.initialize(model, make_optimizer(model), opt_level="O0")
            arguments = (model, optimizer, nn.functional.mse_loss)
            if mode:
                trainer = create_supervised_trainer(
                    *arguments, amp_mode="apex", gradient_accumulation_steps=steps, device="cpu"
                )
            else:
                trainer = Engine(supervised_training_step_apex(*arguments, gradient_accumulation_steps=steps))
            assert run_losses(trainer, data) == losses
            assert equal(weights(model), expected)
            assert amp.state_dict()["loss_scaler0"]["unskipped"] == len(data)

    def test_apex_under_ddp_leaves_a_windows_gradients_scaled_until_they_are_reduced(self, path, tmp_path):
        from apex import amp

        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            model, data = make_model(), batches(4)
            model, optimizer = amp.initialize(model, make_optimizer(model))
            arguments = (DistributedDataParallel(model), optimizer, nn.functional.mse_loss)
            trainer = create_supervised_trainer(*arguments, amp_mode="apex", gradient_accumulation_steps=2)
            losses, expected = by_hand(data, 2)
            assert run_losses(trainer, data) == losses
            assert equal(weights(model), expected)
            assert amp.state_dict()["loss_scaler0"]["unskipped"] == 2  # once a window
        finally:
            dist.destroy_process_group()

    @pytest.mark.parametrize("steps", [1, 2])
    def test_tpu_by_device_and_by_factory(self, path, steps):
        from torch_xla.core import xla_model

        data = batches(4)
        losses, expected = by_hand(data, steps)
        for by_device in (True, False):
            xla_model.calls.clear()
            model = make_model()
            arguments = (model, make_optimizer(model), nn.functional.mse_loss)
            if by_device:
                trainer = create_supervised_trainer(
                    *arguments,
                    device="xla",
                    gradient_accumulation_steps=steps,
                    prepare_batch=lambda batch, device, non_blocking: batch,
                )
            else:
                trainer = Engine(supervised_training_step_tpu(*arguments, gradient_accumulation_steps=steps))
            assert run_losses(trainer, data) == losses
            assert equal(weights(model), expected)
            assert [call["barrier"] for call in xla_model.calls] == [True] * (len(data) // steps)
