"""A script of your own, with an engine, an evaluator, a metric of your own, a progress bar and checkpoints.

    torchrun --standalone --nproc-per-node 2 examples/own_script.py

Kill it and start it again, on any number of ranks: it goes on in the middle of the epoch, and ends with the same bits.
"""

import digits
import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import DataLoader

from disttrain import (
    Checkpoint,
    Events,
    SlotBatchSampler,
    SlotGradients,
    SlotLoader,
    Slots,
    connect,
    create_supervised_evaluator,
    create_supervised_trainer,
    make_deterministic,
)
from disttrain.checkpoint import load_newest
from disttrain.handlers import DirectorySaver

SEED, BATCH, NUM_SLOTS, EPOCHS, WORKERS = 7, 96, 8, 6, 0


class TopTwo:
    """The share of samples whose label has one of the two highest scores."""

    def reset(self) -> None:
        self.hits, self.total = 0, 0

    def update(self, scores: Tensor, labels: Tensor) -> None:
        self.hits += int((scores.topk(2).indices == labels[:, None]).sum())
        self.total += len(labels)

    def compute(self) -> float:
        return self.hits / self.total


with connect() as backend:
    make_deterministic()
    torch.manual_seed(SEED)
    data, slots = digits.train_data(), Slots(NUM_SLOTS, backend.rank, backend.world_size)
    sampler = SlotBatchSampler(len(data), BATCH, NUM_SLOTS, seed=SEED, slots=slots.mine)
    loader = SlotLoader(data, sampler, num_workers=WORKERS)
    model = digits.net().to(backend.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    trainer = create_supervised_trainer(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        backend.device,
        gradients=SlotGradients(model, slots, seed=SEED, process_group=backend.process_group),
        deterministic=True,
        backend=backend,
    )
    evaluator = create_supervised_evaluator(model, {"top two": TopTwo()}, backend.device)
    parts = {"trainer": trainer, "model": model, "optimizer": optimizer}
    saver = Checkpoint(parts, DirectorySaver("checkpoints", backend=backend), n_saved=3, backend=backend)
    trainer.add_event_handler(Events.ITERATION_COMPLETED(every=10) | Events.COMPLETED, saver)
    bar = Progress(disable=backend.rank != 0)
    task = bar.add_task("training", total=EPOCHS * len(loader))

    @trainer.on(Events.ITERATION_COMPLETED)
    def show() -> None:
        bar.update(task, completed=trainer.state.iteration, description=f"loss {trainer.state.output[0]:.3f}")

    @trainer.on(Events.EPOCH_COMPLETED)
    def evaluate() -> None:
        evaluator.run(DataLoader(digits.valid_data(), batch_size=BATCH))
        if backend.rank == 0:
            bar.print(f"epoch {trainer.state.epoch}: {evaluator.state.metrics}")

    if found := load_newest("checkpoints", backend):
        Checkpoint.load_objects(parts, found.state)
    if trainer.state.iteration < EPOCHS * len(loader):
        with bar:
            trainer.run(loader, max_epochs=EPOCHS)
    if backend.rank == 0:
        torch.save(model.state_dict(), "model.pt")
