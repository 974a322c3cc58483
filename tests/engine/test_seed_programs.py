"""Programs that were written for the reference API run when only their imports are changed.

Each text is a program as its documentation shows it. `Training.run` replaces each `...` by an object, and the paths.
"""

import contextlib
import io
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from disttrain.engine import Engine
from disttrain.seeding import manual_seed

SAVING = """
from disttrain.engine import Engine, Events
from disttrain.handlers import Checkpoint, DiskSaver

trainer = ...
model = ...
optimizer = ...
lr_scheduler = ...
data_loader = ...

to_save = {'trainer': trainer, 'model': model, 'optimizer': optimizer, 'lr_scheduler': lr_scheduler}
handler = Checkpoint(to_save, DiskSaver('/tmp/training', create_dir=True))
trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
trainer.run(data_loader, max_epochs=100)
"""

RESUMING = """
from disttrain.handlers import Checkpoint

trainer = ...
model = ...
optimizer = ...
lr_scheduler = ...
data_loader = ...

to_load = {'trainer': trainer, 'model': model, 'optimizer': optimizer, 'lr_scheduler': lr_scheduler}
checkpoint = torch.load(checkpoint_file)
Checkpoint.load_objects(to_load=to_load, checkpoint=checkpoint)

trainer.run(train_loader, max_epochs=100)
"""

DETERMINISTIC = """
import torch
from torch.utils.data import DataLoader
from disttrain.engine import DeterministicEngine, Events
from disttrain.seeding import manual_seed


def random_train_data_loader(size):
    data = torch.arange(0, size)
    return DataLoader(data, batch_size=4, shuffle=True)


def print_train_data(engine, batch):
    i = engine.state.iteration
    e = engine.state.epoch
    print("train", e, i, batch.tolist())

trainer = DeterministicEngine(print_train_data)

print("Original Run")
manual_seed(56)
trainer.run(random_train_data_loader(40), max_epochs=2, epoch_length=5)

print("Resumed Run")
# Resume from 2nd epoch
trainer.load_state_dict({"epoch": 1, "epoch_length": 5, "max_epochs": 2, "rng_states": None})
manual_seed(56)
trainer.run(random_train_data_loader(40))
"""

GENERATOR = """
import torch
from disttrain.engine import DeterministicEngine, Events
from disttrain.engine.deterministic import keep_random_state

def random_train_data_generator():
    while True:
        yield torch.randint(0, 100, size=(1, ))

def print_train_data(engine, batch):
    i = engine.state.iteration
    e = engine.state.epoch
    print("train", e, i, batch.tolist())

trainer = DeterministicEngine(print_train_data)

@trainer.on(Events.ITERATION_COMPLETED(every=3))
def user_handler():
    # handler synchronizes the random state
    torch.manual_seed(12)
    a = torch.rand(1)

trainer.run(random_train_data_generator(), max_epochs=3, epoch_length=5);
"""


def printed_by(program: str, **names: Any) -> list[str]:
    """Run a program and return the lines that it prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(program, "<program>", "exec"), names)  # noqa: S102
    return output.getvalue().splitlines()


def numbers(line: str) -> str:
    """Return the batch of a line such as `train 2 7 [3]`."""
    return line.partition("[")[2]


class Crash(Exception):
    """Ends a run early, as a kill would."""


class Training:
    """The objects for the dots of the first two programs: 500 batches an epoch, and one update at its end."""

    def __init__(self, crash_in_epoch: int | None = None) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(2, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.lr_scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.99)
        self.trainer = Engine(self.step)
        self.data_loader = range(500)
        self.crash_in_epoch = crash_in_epoch

    def step(self, engine: Engine, batch: int) -> None:
        if batch == 499:
            self.optimizer.zero_grad()
            self.model(torch.tensor([[1.0, engine.state.epoch / 100]])).square().mean().backward()
            self.optimizer.step()
            self.lr_scheduler.step()
        if engine.state.epoch == self.crash_in_epoch and batch == 250:
            raise Crash

    def run(self, program: str, folder: Path, **names: Any) -> None:
        filled = program.replace("/tmp/training", str(folder))
        for name in ("trainer", "model", "optimizer", "lr_scheduler", "data_loader"):
            filled = filled.replace(f"\n{name} = ...\n", f"\n{name} = training.{name}\n")
        assert "..." not in filled
        printed_by(filled, training=self, torch=torch, train_loader=self.data_loader, **names)

    def values(self) -> list[float]:
        momentum = self.optimizer.state_dict()["state"][0]["momentum_buffer"]
        weights = nn.utils.parameters_to_vector(self.model.parameters()).tolist()
        assert all(map(math.isfinite, weights))
        return [*weights, *momentum.flatten().tolist(), *self.lr_scheduler.get_last_lr()]


def test_saving_every_epoch_and_resuming_the_training(tmp_path: Path) -> None:
    straight = Training()
    straight.run(SAVING, tmp_path / "straight")
    assert [file.name for file in (tmp_path / "straight").iterdir()] == ["checkpoint_50000.pt"]

    with pytest.raises(Crash):
        Training(crash_in_epoch=61).run(SAVING, tmp_path / "crashed")
    (last,) = (tmp_path / "crashed").iterdir()
    assert last.name == "checkpoint_30000.pt"
    torch.load(last, weights_only=True)
    resumed = Training()
    resumed.run(RESUMING, tmp_path, checkpoint_file=last)
    assert (resumed.trainer.state.epoch, resumed.trainer.state.iteration) == (100, 50000)
    assert resumed.values() == straight.values()


def test_the_resumed_epoch_prints_the_batches_of_the_original() -> None:
    lines = printed_by(DETERMINISTIC)
    assert [lines[0], lines[11]] == ["Original Run", "Resumed Run"]
    assert [line.split(" [")[0] for line in lines[1:11]] == [f"train {1 + (i - 1) // 5} {i}" for i in range(1, 11)]
    assert lines[12:] == lines[6:11]
    batches = [sample for line in lines[1:11] for sample in numbers(line).strip("]").split(", ")]
    assert sorted(map(int, batches)) == list(range(40))


def test_the_program_prints_the_same_whatever_was_drawn_before() -> None:
    lines = printed_by(DETERMINISTIC)
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    torch.rand(5)
    assert printed_by(DETERMINISTIC) == lines


def test_a_reseeding_handler_disturbs_the_generator() -> None:
    lines = printed_by(GENERATOR)
    batches = [numbers(line) for line in lines]
    assert [line.split(" [")[0] for line in lines] == [f"train {1 + (i - 1) // 5} {i}" for i in range(1, 16)]
    assert batches[3:6] == batches[6:9] == batches[9:12] == batches[12:15]


def test_a_reseeding_handler_with_keep_random_state_does_not_disturb_it() -> None:
    kept = GENERATOR.replace("\ndef user_handler", "\n@keep_random_state\ndef user_handler")
    undisturbed = GENERATOR.replace("    torch.manual_seed(12)\n    a = torch.rand(1)\n", "    pass\n")
    assert len({GENERATOR, kept, undisturbed}) == 3
    manual_seed(56)
    expected = printed_by(undisturbed)
    manual_seed(56)
    assert printed_by(kept) == expected
    manual_seed(56)
    assert printed_by(GENERATOR)[:3] == expected[:3]
    assert len({numbers(line) for line in expected}) > 5
