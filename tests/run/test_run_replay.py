"""Any step of a run, computed again in one process, has the bits of the run's ledger; a step with others is named."""

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Ranks
from replaying import embed, replayed, replayed_from, spread, weighted
from small_run import console, dies_after, net, points, printed, small_config, trained
from torch import nn
from torch.utils.data import IterableDataset

from disttrain.backend import Backend
from disttrain.checkpoint import store_at
from disttrain.data import Mixture
from disttrain.engine import Engine, Events
from disttrain.errors import DataError
from disttrain.evidence import read_ledger
from disttrain.handlers.preemption import Preemption
from disttrain.run.directory import RunDirectory
from disttrain.run.mismatch import Mismatch
from disttrain.run.replay_start import Start
from disttrain.run.state import Run
from disttrain.run.train import train

pytestmark = pytest.mark.usefixtures("torch_settings")


def files_of(run: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def half_frozen() -> nn.Module:
    model = net()
    model[0].requires_grad_(False)  # type: ignore[index]
    return model


class Counting:
    """A handler's object with a state that counts evaluations and the steps, and moves a weight by it."""

    def __init__(self, trainer: Engine, run: Run) -> None:
        self.count = 0
        self.run = run
        run.keep("counting", self)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self.step)

    def step(self) -> None:
        self.count += 1
        with torch.no_grad():
            self.run.model[2].bias += 1e-3 * self.count  # type: ignore[index,operator]

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from points(40)


def plateau(optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)


def one_cycle(optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=total_steps, cycle_momentum=False)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ema and a schedule": {"ema": {"decay": 0.9, "every_steps": 2}, "schedule": one_cycle, "grad_clip_norm": 0.5},
    "sets and early stop": {
        "valid_data": {"a": partial(points, 6), "b": partial(points, 7)},
        "early_stop": {"monitor": "a/loss", "patience": 50},
        "checkpoint": {"every_steps": 3, "monitor": "b/loss"},
    },
    "plateau": {"schedule": plateau, "validate": {"every_steps": 2}},
    "weights and values": {"loss": None, "forward": weighted, "weight": lambda batch: len(batch[0])},
    "global loss": {
        "loss": None,
        "forward": embed,
        "global_loss": spread,
        "optimizer": partial(torch.optim.SGD, lr=0.01),
    },
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "frozen": {"model": half_frozen, "checkpoint": {"every_steps": 3, "leave_out_frozen": True}},
    "kept object": {"handlers": [Counting]},
    "stream": {"train_data": Stream, "max_epochs": None, "max_steps": 8, "valid_data": None},
    "mixture": {
        "train_data": lambda: {"a": points(20), "b": points(12)},
        "order": partial(Mixture, shares={"a": 1, "b": 2}, changes={5: {"a": 1}}),
    },
    "adamw, recomputed": {"optimizer": partial(torch.optim.AdamW, lr=0.1), "activation_checkpointing": ("Linear",)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_is_replayed_with_its_bits(kind: str, tmp_path: Path) -> None:
    """Killed on the way, its last steps from a checkpoint, the first from the beginning of the run."""
    fields: dict[str, Any] = {"checkpoint": {"every_steps": 3}, "ledger": {"every_steps": 2}, **KINDS[kind]}
    handlers = fields.pop("handlers", [])
    with pytest.raises(ValueError, match="on purpose"):
        trained(tmp_path, handlers=[*handlers, dies_after(4)], **fields)
    trained(tmp_path, handlers=handlers, **fields)
    config = small_config(handlers=handlers, **fields)
    before = files_of(tmp_path / "small")
    for step, start in ((8, 6), (5, 3), (2, 0)):
        found = replayed(tmp_path, step, config)
        assert found.start.step == start or (found.start.step == 4 and "early_stop" in fields)  # the best one
        assert found.num_proven == step - found.start.step
        assert len(found.slots) == 2
    assert files_of(tmp_path / "small") == before


def test_a_step_that_was_left_out(tmp_path: Path) -> None:
    """A rollback left steps out: those after are the run's, and the step itself is computed as it was before."""
    data = points()
    data.tensors[0][5] = torch.inf  # type: ignore[attr-defined]
    fields: dict[str, Any] = {"on_nan": "rollback", "train_data": lambda: data, "checkpoint": {"every_steps": 3}}
    result = trained(tmp_path, **fields)
    lines = read_ledger(tmp_path / "small" / "ledger.jsonl")
    bad = [step for step, line in lines.items() if step and line["loss"] is None]
    assert result["skipped_steps"] == len(bad) == 2
    last = replayed(tmp_path, 8, small_config(**fields))
    assert last.left_out is None
    assert replayed_from(tmp_path, [Start(0)], 8, small_config(**fields)).num_proven == 8
    for step in bad:
        found = replayed(tmp_path, step, small_config(**fields))
        assert found.left_out == lines[step]["left_out"]
        assert any(5 in (slot.indices or []) for slot in found.slots)
        assert not torch.tensor([slot.loss for slot in found.slots]).isfinite().all()


def test_a_bad_step_that_stopped_the_run(tmp_path: Path) -> None:
    data = points()
    data.tensors[0][5] = torch.inf  # type: ignore[attr-defined]
    with pytest.raises(Exception, match="step"):
        trained(tmp_path, train_data=lambda: data, checkpoint={"every_steps": 1}, log={"every_steps": 1})
    step = max(read_ledger(tmp_path / "small" / "ledger.jsonl"))
    found = replayed(tmp_path, step, small_config(train_data=lambda: data))
    assert any(5 in (slot.indices or []) for slot in found.slots)
    assert found.num_proven == 1


def changed(trainer: Engine, run: Run) -> None:
    @trainer.on(Events.ITERATION_STARTED(once=6))
    def change() -> None:
        run.model[1].eps = 1e-2  # type: ignore[index]


def test_a_step_that_differs_is_named(tmp_path: Path) -> None:
    trained(tmp_path, checkpoint={"every_steps": 4})
    with pytest.raises(Mismatch, match=r"step 6 is not the run's: the loss: expected .*step 5 was the same") as info:
        replayed(tmp_path, 8, small_config(handlers=[changed]))
    assert info.value.exit_code == 1
    line = read_ledger(tmp_path / "small" / "ledger.jsonl")[6]
    assert line["loss"] in str(info.value)
    assert str(info.value).endswith("`disttrain verify` finds out what")
    with pytest.raises(Mismatch, match="Other bits are to be expected: torch: 1 then, 2 now"):
        replayed(tmp_path, 8, small_config(handlers=[changed]), reasons=["torch: 1 then, 2 now"])


class Forgetful(Counting):
    """Counts as its base does, and tells nobody."""

    def __init__(self, trainer: Engine, run: Run) -> None:
        self.count = 0
        self.run = run
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self.step)


def test_state_that_no_checkpoint_holds_is_named(tmp_path: Path) -> None:
    trained(tmp_path, handlers=[Forgetful], checkpoint={"every_steps": 4})
    config = small_config(handlers=[Forgetful])
    with pytest.raises(Mismatch, match=r"step 6 is .* Other bits .*: Forgetful.* has a state that no checkpoint"):
        replayed(tmp_path, 8, config)
    assert replayed_from(tmp_path, [Start(0)], 8, config).num_proven == 8


def test_it_goes_on_after_a_step_that_differs_if_that_is_asked_for(tmp_path: Path) -> None:
    trained(tmp_path, checkpoint={"every_steps": 4})
    to = console()
    found = replayed(tmp_path, 8, small_config(handlers=[changed]), proves=False, to=to)
    assert found.num_proven == 1
    assert found.differs is not None
    assert found.differs.difference.step == 6
    assert printed(to).count("WARNING: Mismatch: step 6 is not the run's: the loss: ") == 1
    assert found.line["step"] == 8
    whole = replayed(tmp_path, 8, small_config())
    assert [slot.indices for slot in found.slots] == [slot.indices for slot in whole.slots]
    assert [slot.loss for slot in found.slots] != [slot.loss for slot in whole.slots]
    assert replayed(tmp_path, 8, small_config(), proves=False).differs is None


def test_the_state_of_a_checkpoint_is_held_against_the_ledger(tmp_path: Path) -> None:
    trained(tmp_path, checkpoint={"every_steps": 4}, ledger={"every_steps": 4})
    ledger = tmp_path / "small" / "ledger.jsonl"
    lines = [json.loads(text) for text in ledger.read_text().splitlines()]
    lines[4]["state"]["model.0.bias"] = "0" * 16
    ledger.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    with pytest.raises(Mismatch, match=r"step 4 is not the run's: the weights .*\(model.0.bias\)"):
        replayed(tmp_path, 6, small_config())
    assert replayed(tmp_path, 3, small_config()).num_proven == 3


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    trained(tmp_path, checkpoint={"every_steps": 3})
    (tensors,) = (tmp_path / "small" / "checkpoints" / "step-00000006").glob("tensors*")
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"!")
    to = console()
    found = replayed(tmp_path, 8, small_config(), to=to)
    assert (found.start.step, found.num_proven) == (3, 5)
    assert "step-00000006 cannot be used" in printed(to)
    assert tensors.exists()


def test_other_data_is_refused(tmp_path: Path) -> None:
    sizes = [32]
    config = small_config(train_data=lambda: points(sizes[0]))
    trained(tmp_path, train_data=config.train_data)
    sizes[0] = 33
    with pytest.raises(DataError, match="has changed since the run began"):
        replayed(tmp_path, 6, config)


def test_the_state_after_a_step_is_saved_as_a_stopped_run_saves_it(tmp_path: Path) -> None:
    """A replay goes on from it with the same bits, also where an evaluation that others follow was due."""
    fields: dict[str, Any] = {"checkpoint": {"every_steps": 3}, **KINDS["plateau"]}
    trained(tmp_path, **fields)
    for step in (4, 5):
        folders = set(tmp_path.iterdir())
        replayed(tmp_path, step, small_config(**fields), saves=True)
        (shadow,) = set(tmp_path.iterdir()) - folders
        store = store_at(shadow / "small" / "checkpoints")
        found = replayed_from(tmp_path, [Start(step, store, store.committed()[0])], 8, small_config(**fields))
        assert found.num_proven == 8 - step


def run_on_ranks(backend: Backend, folder: str, fields: dict[str, Any], dies_at: int | None) -> None:
    directory = RunDirectory(Path(folder) / "small")
    handlers = [] if dies_at is None else [dies_after(dies_at)]
    with Preemption() as preemption, pytest.raises(ValueError, match="on purpose") if handlers else nullcontext():
        train(small_config(**fields, handlers=handlers), backend, directory, console(), preemption)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_steps_of_several_ranks(ranks: Ranks, tmp_path: Path, strategy: str) -> None:
    """On three ranks, which die, and then on two."""
    fields: dict[str, Any] = {"strategy": strategy, "num_slots": 4, "checkpoint": {"every_steps": 3}}
    ranks(3, run_on_ranks, str(tmp_path), fields, 4)
    ranks(2, run_on_ranks, str(tmp_path), fields, None)
    for step in (1, 5, 8):
        found = replayed(tmp_path, step, small_config(**fields))
        assert found.num_proven == step - found.start.step
        assert len(found.slots) == 4


def test_handlers_write_beside_the_run(tmp_path: Path) -> None:
    """Files that a handler writes into run.directory go to the replay's own; COMPLETED does not fire."""

    def writes(trainer: Engine, run: Run) -> None:
        @trainer.on(Events.ITERATION_COMPLETED)
        def note(engine: Engine) -> None:
            (run.directory.path / f"note-{engine.state.iteration}").touch()

        @trainer.on(Events.COMPLETED)
        def over() -> None:
            (tmp_path / "over").touch()

    trained(tmp_path, handlers=[writes])
    (tmp_path / "over").unlink()
    before = files_of(tmp_path / "small")
    replayed(tmp_path, 3, small_config(handlers=[writes]))
    assert files_of(tmp_path / "small") == before
    assert not (tmp_path / "over").exists()
