"""Gradients over slots on real XLA replicas: the same bits on 1, 2 and 4 replicas, and on every replica."""

import threading
from typing import Any

import pytest
import torch
from replicas import SYNC_LIMIT_S, Replicas
from torch import nn

from disttrain.backend import Backend
from disttrain.engine import Events, create_supervised_trainer
from disttrain.evidence import params_sha256
from disttrain.parallel import Slots, World, XlaSlotGradients, strategy_for
from disttrain.precision import choose_precision
from disttrain.seeding import manual_seed

BUILDING = threading.Lock()
"""Held while a replica builds its model: the replicas share torch's generator, from which a model draws."""


def net(kind: str) -> nn.Module:
    if kind == "plain":
        return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(4 * 2 * 2, 3)
    )


def slot_batch(kind: str, step: int, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + slot)
    shape = (6, 12) if kind == "plain" else (6, 1, 4, 4)
    return torch.randn(shape, generator=generator), torch.randint(0, 3, (6,), generator=generator)


def train(
    backend: Backend, kind: str, num_slots: int, steps: int = 6, reduction: str = "invariant", precision: str = "fp32"
) -> dict[str, Any]:
    """Train as a run does; return each step's losses by slot and norm, the weights, and the compiler's programs."""
    had_fallen_back = backend.programs().fallback_ops if backend.programs() else ()  # type: ignore[union-attr]
    with BUILDING:
        manual_seed(3)
        model = backend.move(net(kind))
    slots = Slots(num_slots, backend.rank, backend.world_size)
    world = World(
        slots=slots,
        device=backend.device,
        process_group=backend.process_group,
        gather=backend.gather_recorded,
        reduction=reduction,  # type: ignore[arg-type]
    )
    gradients = strategy_for("ddp", model, world).gradients(model, seed=5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    norms: list[torch.Tensor] = []

    def clip() -> None:
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0))

    trainer = create_supervised_trainer(
        gradients.module,
        optimizer,
        nn.functional.cross_entropy,
        device=backend.device,
        output_transform=lambda x, y, y_pred, loss: loss.detach(),
        precision=choose_precision(precision, backend.device),
        gradients=gradients,
        before_step=clip,
    )
    losses: list[list[float]] = []
    compiled: list[int] = []

    def note(engine: Any) -> None:
        by_rank = backend.all_gather(backend.fetch(engine.state.output))
        losses.append([loss for part in by_rank for loss in part])
        backend.barrier()
        programs = backend.programs()
        compiled.append(programs.num_compiled if programs is not None else 0)
        backend.barrier()

    trainer.add_event_handler(Events.ITERATION_COMPLETED, note)
    trainer.run([[slot_batch(kind, step, slot) for slot in slots.mine] for step in range(steps)], max_epochs=1)
    fallback_ops = backend.programs().fallback_ops if backend.programs() else ()  # type: ignore[union-attr]
    return {
        "losses": losses,
        "norms": backend.fetch(norms),
        "weights": params_sha256(model),
        "compiled_after_step_2": compiled[-1] - compiled[1],
        "fallback_ops": tuple(op for op in fallback_ops if op not in had_fallen_back),
        "gradients": type(gradients).__name__,
    }


SAME = ("losses", "norms", "weights")


@pytest.mark.parametrize("kind", ["plain", "all that is random"])
def test_the_same_bits_on_1_2_and_4_replicas(replicas: Replicas, kind: str) -> None:
    by_size = {size: replicas(size, train, kind, 4) for size in (1, 2, 4)}
    expected = by_size[1][0]
    assert expected["gradients"] == XlaSlotGradients.__name__
    assert expected["losses"][0] != expected["losses"][-1]
    for results in by_size.values():
        for result in results:
            assert [result[name] for name in SAME] == [expected[name] for name in SAME]
            assert result["compiled_after_step_2"] == 0
            assert result["fallback_ops"] == ()


def test_slots_whose_sum_is_no_node_of_the_tree(replicas: Replicas) -> None:
    """Compare 3 replicas of 6 slots with one: the sum of a replica's two slots is no node, so it gathers them alone."""
    expected = replicas(1, train, "plain", 6)[0]
    for result in [*replicas(2, train, "plain", 6), *replicas(3, train, "plain", 6)]:
        assert [result[name] for name in SAME] == [expected[name] for name in SAME]


def test_a_fast_reduction_is_the_same_on_each_replica_and_close_to_the_other(replicas: Replicas) -> None:
    expected = replicas(1, train, "plain", 4)[0]
    results = replicas(4, train, "plain", 4, 6, "fast")
    assert len({result["weights"] for result in results}) == 1
    for result in results:
        torch.testing.assert_close(torch.tensor(result["losses"]), torch.tensor(expected["losses"]), rtol=1e-5, atol=0)


def test_bf16_is_autocast_and_close_to_fp32(replicas: Replicas) -> None:
    expected = torch.tensor(replicas(2, train, "plain", 4)[0]["losses"])
    results = replicas(2, train, "plain", 4, 6, "invariant", "bf16")
    assert results[0]["weights"] == results[1]["weights"]
    got = torch.tensor(results[0]["losses"])
    assert not torch.equal(got, expected)
    torch.testing.assert_close(got, expected, rtol=2**-6, atol=2**-6)


def refused(backend: Backend) -> str:
    try:
        train(backend, "plain", 6)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_slots_that_cannot_be_shared_equally_are_refused(replicas: Replicas) -> None:
    for message in replicas(4, refused):
        assert message.startswith("ConfigError: num_slots=6 cannot be shared equally by 4 XLA devices")


def test_a_missed_sync_is_named(replicas: Replicas) -> None:
    with pytest.raises(AssertionError) as caught:
        replicas(2, one_too_many, limit_s=2 * SYNC_LIMIT_S + 20)
    message = str(caught.value)
    assert "MissedSync: replica 0 of 2 waited" in message
    assert "before all had called torch_xla.sync()" in message


def one_too_many(backend: Backend) -> None:
    backend.flush()
    if backend.rank == 0:
        backend.flush()
    backend.barrier()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Embedding(5, 4)
        self.out = nn.Linear(4, 5, bias=False)
        self.out.weight = self.into.weight
        self.register_buffer("mask", torch.ones(2))
        self.again = nn.Module()
        self.again.register_buffer("mask", self.mask)


def move_tied(backend: Backend) -> tuple[bool, bool, int, str]:
    model = backend.move(Tied())
    same = model.out.weight is model.into.weight, model.mask is model.again.mask
    return *same, len(list(model.parameters())), str(model.out.weight.device.type)


def test_tied_parameters_stay_tied(replicas: Replicas) -> None:
    assert replicas(1, move_tied) == [(True, True, 1, "xla")]


def compile_it(backend: Backend) -> str:
    try:
        backend.compile(nn.Linear(1, 1))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_torch_compile_is_refused(replicas: Replicas) -> None:
    assert replicas(1, compile_it)[0].startswith("ConfigError: compile=True expected a device of torch.compile")


def step_of_the_factory(backend: Backend, steps: int) -> tuple[list[float], list[float]]:
    """Return the losses of the contract's TPU step and those of the same model on the CPU."""
    results = []
    for device in (backend.device, torch.device("cpu")):
        torch.manual_seed(1)
        model = backend.move(net("plain")) if device.type == "xla" else net("plain")
        trainer = create_supervised_trainer(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            nn.functional.cross_entropy,
            device=device,
            gradient_accumulation_steps=steps,
        )
        losses: list[float] = []
        trainer.add_event_handler(
            Events.ITERATION_COMPLETED, lambda engine, losses=losses: losses.append(engine.state.output)
        )
        trainer.run([slot_batch("plain", step, 0) for step in range(8)], max_epochs=1)
        results.append(losses)
    return results[0], results[1]


@pytest.mark.parametrize("steps", [1, 2])
def test_the_tpu_step_of_the_engines_contract(replicas: Replicas, steps: int) -> None:
    on_xla, on_cpu = replicas(1, step_of_the_factory, steps)[0]
    torch.testing.assert_close(torch.tensor(on_xla), torch.tensor(on_cpu), rtol=1e-5, atol=1e-6)
