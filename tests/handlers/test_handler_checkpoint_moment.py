"""Checkpoint inside an iteration says what a resume loses; after an exception on several ranks no rank waits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Err, RankFailure, Ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from disttrain.backend import Backend
from disttrain.checkpoint import DirectorySaver, committed
from disttrain.engine import Engine, Events, create_supervised_trainer
from disttrain.handlers import Checkpoint


def saved_at(event: Any, folder: Path, *, fails_in: str = "") -> Engine:
    def step(engine: Engine, batch: Any) -> None:
        if fails_in == "step" and engine.state.iteration == 2:
            raise RuntimeError("on purpose")

    def batches() -> Any:
        yield 0
        if fails_in == "data":
            raise RuntimeError("on purpose")
        yield from (1, 2)

    def handler(engine: Engine) -> None:
        if fails_in == "handler" and engine.state.iteration == 2:
            raise RuntimeError("on purpose")

    trainer = Engine(step)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, handler)
    trainer.add_event_handler(event, Checkpoint({"model": nn.Linear(1, 1), "trainer": trainer}, folder))
    trainer.run(batches(), max_epochs=1, epoch_length=3)
    return trainer


@pytest.mark.parametrize(
    ("event", "told"),
    [
        (
            Events.ITERATION_STARTED(once=2),
            "inside iteration 2 counts that iteration, whose update is not made.*with it",
        ),
        (Events.GET_BATCH_COMPLETED(once=1), "inside the fetch of the batch of iteration 2 has the random numbers"),
    ],
)
def test_a_checkpoint_inside_an_iteration_says_what_a_resume_loses(event: Any, told: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=told):
        saved_at(event, tmp_path)


@pytest.mark.parametrize(
    ("fails_in", "told"),
    [("step", "inside iteration 2 counts that iteration"), ("data", "inside the fetch of the batch of iteration 2")],
)
def test_after_an_exception_inside_an_iteration_too(fails_in: str, told: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=told):
        saved_at(Events.EXCEPTION_RAISED, tmp_path, fails_in=fails_in)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("event", "fails_in"),
    [
        (Events.GET_BATCH_STARTED(once=1), ""),
        (Events.ITERATION_COMPLETED(once=2), ""),
        (Events.EPOCH_COMPLETED, ""),
        (Events.EXCEPTION_RAISED, "handler"),
    ],
)
def test_other_moments_are_silent(event: Any, fails_in: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    saved_at(event, tmp_path, fails_in=fails_in)
    assert not recwarn.list


def fail_on(backend: Backend, folder: Path, failing: tuple[int, ...], kind: str) -> None:
    """Train under DDP; the batches of some ranks are of a wrong shape from the third one on, inside an epoch."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(3, 1), process_group=backend.process_group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(engine: Engine, x: torch.Tensor) -> None:
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()

    trainer = Engine(step)
    saver: Any = DirectorySaver(folder, backend=backend) if kind == "directory" else folder
    checkpoint = Checkpoint({"model": model, "trainer": trainer}, saver, backend=backend)
    trainer.add_event_handler(Events.EXCEPTION_RAISED | Events.ITERATION_COMPLETED(once=1), checkpoint)
    bad = torch.ones(2, 4)
    batches = [bad if number >= 2 and backend.rank in failing else torch.ones(2, 3) for number in range(5)]
    trainer.run(batches, max_epochs=3)


@pytest.mark.parametrize(
    ("failing", "kind"),
    [
        ((1,), "file"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (((0, 1), "file"), ((1,), "directory"))),
    ],
)
def test_after_an_exception_on_several_ranks_one_rank_saves_and_none_waits(
    ranks: Ranks, tmp_path: Path, failing: tuple[int, ...], kind: str
) -> None:
    with pytest.raises(RankFailure) as failed:
        ranks(2, fail_on, tmp_path, failing, kind, fresh=True)
    assert all(isinstance(outcome, Err) for outcome in failed.value.outcomes)
    assert "mat1 and mat2 shapes" in str(failed.value.outcomes[failing[-1]])
    if kind == "directory":
        assert committed(tmp_path) == ["step-00000001"]
        return
    state = torch.load(tmp_path / "checkpoint_3.pt", weights_only=True)
    assert state["trainer"]["iteration"] == 3
    torch.testing.assert_close(state["model"]["bias"], two_updates(), rtol=0, atol=0)


def two_updates() -> torch.Tensor:
    """Return the bias after two updates, by hand."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    return model.bias.detach()


@pytest.mark.parametrize("kept", [True, False])
def test_a_loss_scale_that_is_not_saved_is_named(kept: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = create_supervised_trainer(
        model, optimizer, nn.functional.mse_loss, device="cpu", amp_mode="amp", scaler=True
    )
    to_save = {"model": model, "trainer": trainer} | ({"scaler": trainer.state.scaler} if kept else {})
    trainer.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint(to_save, tmp_path))
    trainer.run([(torch.ones(1, 2), torch.ones(1, 1))])
    told = [str(each.message) for each in recwarn.list if "trainer.state.scaler" in str(each.message)]
    assert len(told) == (not kept)
