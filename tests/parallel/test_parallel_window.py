"""An accumulation window survives a resume with the same bits, or a warning says which gradients are lost."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from disttrain.backend.base import Backend
from disttrain.checkpoint import DirectorySaver
from disttrain.engine import DeterministicEngine, Engine, Events, create_supervised_trainer, supervised_training_step
from disttrain.handlers import Checkpoint
from disttrain.parallel.window import AccumulationWindow, warn_of_lost

STEPS = 3
LENGTH = 5  # windows reach over the ends of epochs


class Batches:
    """The batches of a rank, from `start` on in the first pass."""

    def __init__(self, start: int = 0, rank: int = 0) -> None:
        draw = torch.Generator().manual_seed(11 + rank)
        self.batches = [(torch.randn(4, 3, generator=draw), torch.randn(4, 1, generator=draw)) for _ in range(LENGTH)]
        self.start = start

    def __len__(self) -> int:
        return LENGTH

    def __iter__(self) -> Iterator[Any]:
        start, self.start = self.start, 0
        return iter(self.batches[start:])


def loss(y_pred: Tensor, y: Tensor) -> Tensor:
    return (y_pred - y).abs().pow(1.7).mean()


class Parts:
    """A model, its optimizer and a trainer; with a backend the model is wrapped in DDP."""

    def __init__(self, backend: Backend | None = None, steps: int = STEPS, **options: Any) -> None:
        torch.manual_seed(3)
        self.model: nn.Module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        if backend is not None:
            self.model = DistributedDataParallel(self.model, process_group=backend.process_group, **options)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)
        self.trainer = create_supervised_trainer(
            self.model, self.optimizer, loss, gradient_accumulation_steps=steps, deterministic=False
        )

    @property
    def to_save(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "trainer": self.trainer}

    def weights(self) -> list[list[float]]:
        return [parameter.flatten().tolist() for parameter in self.model.parameters()]


def whole(backend: Backend | None = None, epochs: int = 2) -> list[list[float]]:
    parts = Parts(backend)
    parts.trainer.run(Batches(rank=0 if backend is None else backend.rank), max_epochs=epochs)
    return parts.weights()


def stopped(stop: int, folder: Path, **options: Any) -> Parts:
    """Train to iteration `stop` and save there."""
    parts = Parts()
    parts.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop), Checkpoint(parts.to_save, folder))
    parts.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop), parts.trainer.terminate)
    parts.trainer.run(Batches(), max_epochs=2)
    return parts


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 7])
def test_a_window_goes_on_with_the_same_bits(stop: int, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    stopped(stop, tmp_path)
    resumed = Parts()
    Checkpoint.load_objects(resumed.to_save, tmp_path / f"checkpoint_{stop}.pt")
    assert ("accumulation_window" in resumed.trainer.state_dict()) == (stop % STEPS != 0)
    resumed.trainer.run(Batches(stop % LENGTH), max_epochs=2)
    assert resumed.weights() == whole()
    assert not recwarn.list


def test_a_process_function_around_the_step_keeps_the_window(tmp_path: Path) -> None:
    def engine_of(parts: Parts) -> Engine:
        step = supervised_training_step(parts.model, parts.optimizer, loss, gradient_accumulation_steps=STEPS)

        def update(engine: Engine, batch: Any) -> Any:
            return {"loss": step(engine, batch)}

        return Engine(update)

    first, second = Parts(), Parts()
    trainer = engine_of(first)
    trainer.run(Batches(), max_iters=4)
    resumed = engine_of(second)
    for to, state in ((second.model, first.model), (second.optimizer, first.optimizer), (resumed, trainer)):
        to.load_state_dict(copy.deepcopy(state.state_dict()))
    resumed.run(Batches(4), max_iters=2 * LENGTH)
    assert second.weights() == whole()


def test_a_copy_of_the_engine_has_the_window() -> None:
    parts = Parts()
    parts.trainer.run(Batches(), max_iters=4)
    again = copy.copy(parts.trainer)
    again.run(Batches(4), max_iters=2 * LENGTH)
    assert parts.weights() == whole()


def test_a_saved_state_does_not_change_while_the_training_goes_on() -> None:
    parts = Parts()
    parts.trainer.run(Batches(), max_iters=1)
    saved = parts.trainer.state_dict()["accumulation_window"]["gradients"][0]
    before = [gradient.clone() for gradient in saved]
    parts.trainer.run(Batches(1), max_iters=3)
    assert all(torch.equal(a, b) for a, b in zip(saved, before, strict=True))


def test_a_state_without_the_window_is_named_and_nothing_stale_is_added() -> None:
    """As an older release has saved it; the trainer has run before, so that its parameters hold other gradients."""
    parts, expected = Parts(), Parts()
    state = {"epoch_length": LENGTH, "iteration": 4, "max_epochs": 2}
    parts.trainer.run(Batches(), max_iters=2)
    for to in (parts, expected):
        to.model.load_state_dict(Parts().model.state_dict())
        to.optimizer.load_state_dict(Parts().optimizer.state_dict())
    parts.trainer.load_state_dict(state)
    with pytest.warns(UserWarning, match="the gradients of iteration 4 are lost to their accumulation window"):
        parts.trainer.run(Batches(4), max_epochs=2)
    expected.trainer.load_state_dict(state)
    with pytest.warns(UserWarning, match="the loaded state does not hold them"):
        expected.trainer.run(Batches(4), max_epochs=2)
    assert parts.weights() == expected.weights()


@pytest.mark.parametrize(("steps", "why"), [(2, "steps was 3 when they were saved, and is 2"), (1, "does not accum")])
def test_another_number_of_steps_is_named(steps: int, why: str) -> None:
    parts, other = Parts(), Parts(steps=steps)
    parts.trainer.run(Batches(), max_iters=5)
    other.trainer.load_state_dict(parts.trainer.state_dict())
    with pytest.warns(UserWarning, match=f"the gradients of iterations 4 to 5 are lost.*{why}"):
        other.trainer.run(Batches(), max_iters=7)


def test_the_window_of_another_model_is_refused() -> None:
    parts, other = Parts(), Parts()
    parts.trainer.run(Batches(), max_iters=1)
    state = parts.trainer.state_dict()
    state["accumulation_window"]["gradients"][0].pop()
    other.trainer.load_state_dict(state)
    with pytest.raises(ValueError, match=r"accumulation window of other parameters: expected 4 gradients.*got 3"):
        other.trainer.run(Batches(1), max_iters=3)


@pytest.mark.parametrize(
    ("bad", "told"),
    [(2, "the gradients of iteration 2 are lost"), (3, "the gradients of iterations 1 to 3 are lost.*was not made")],
)
def test_an_exception_inside_a_window_is_not_silent(bad: int, told: str) -> None:
    parts = Parts()
    parts.trainer.add_event_handler(Events.EXCEPTION_RAISED, lambda engine, error: None)
    batches = Batches()
    batches.batches[bad - 1] = (torch.ones(1, 2), torch.ones(1, 1))  # of a wrong shape
    with pytest.warns(UserWarning, match=told):
        parts.trainer.run(batches, max_iters=bad + 2)


def test_a_new_run_begins_a_new_window(recwarn: pytest.WarningsRecorder) -> None:
    parts = Parts()
    parts.trainer.run(Batches(), max_epochs=1)
    parts.trainer.run(Batches(), max_epochs=1)
    assert not recwarn.list


def under_ddp(backend: Backend, folder: Path, stop: int, kind: str) -> list[list[list[float]]]:
    """Return the weights of an uninterrupted run, and those of one that was saved at `stop` and resumed."""
    parts, batches = Parts(backend), Batches(rank=backend.rank)
    saver: Any = DirectorySaver(folder, backend=backend) if kind == "directory" else folder
    with_backend = {} if kind == "alone" else {"backend": backend}
    checkpoint = Checkpoint(parts.to_save, saver, **with_backend)
    if kind != "alone" or backend.rank == 0:
        parts.trainer.add_event_handler(Events.ITERATION_COMPLETED(once=stop), checkpoint)
    parts.trainer.run(batches, max_iters=stop)
    backend.barrier()
    resumed = Parts(backend, gradient_as_bucket_view=True)
    Checkpoint.load_objects(resumed.to_save, folder if kind == "directory" else folder / f"checkpoint_{stop}.pt")
    resumed.trainer.run(Batches(stop % LENGTH, backend.rank), max_iters=2 * LENGTH)
    return [whole(backend), resumed.weights()]


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_under_ddp_each_rank_gets_its_own_gradients_back(ranks: Ranks, tmp_path: Path, kind: str) -> None:
    by_rank = ranks(2, under_ddp, tmp_path, 7 if kind == "file" else 5, kind)
    assert by_rank[0] == by_rank[1]
    assert by_rank[0][0] == by_rank[0][1]


def lost_under_ddp(backend: Backend, folder: Path) -> list[str]:
    with pytest.warns(UserWarning, match="accumulation window") as warned:
        under_ddp(backend, folder, 5, "alone")
    return [str(each.message) for each in warned if "accumulation window" in str(each.message)]


def test_under_ddp_a_save_of_one_rank_alone_says_what_is_lost(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks(2, lost_under_ddp, tmp_path)
    at_resume = (
        "the gradients of iterations 4 to 5 are lost to their accumulation window: "
        "the checkpoint holds those of 1 of 2 ranks"
    )
    assert second == [at_resume]
    assert first[1] == at_resume
    assert first[0].startswith("a checkpoint inside an accumulation window holds the gradients of rank 0 alone")


def test_a_window_is_the_sum_over_the_parameters_of_model_and_optimizer() -> None:
    model, scale = nn.Linear(2, 1, bias=False), nn.Parameter(torch.ones(()))
    engine = DeterministicEngine(lambda engine, batch: None)
    window = AccumulationWindow(2, model, torch.optim.SGD([*model.parameters(), scale], lr=0.1))
    window.begins(engine, 1)
    (scale * model(torch.ones(1, 2)).sum()).backward()
    window.ends(engine, 1)
    assert engine.window is window
    state = engine.state_dict()["accumulation_window"]
    assert [gradient.tolist() for gradient in state["gradients"][0]] == [[[1.0, 1.0]], model.weight.sum().item()]
    window.ends(engine, 2)
    assert engine.window is None


def test_a_lost_window_is_named_by_its_iterations() -> None:
    with pytest.warns(UserWarning, match="the gradients of iterations 7 to 8 are lost to their .* window: a reason"):
        warn_of_lost({"steps": 3, "iteration": 8}, "a reason")
