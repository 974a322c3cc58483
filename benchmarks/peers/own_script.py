"""examples/own_script.py with Lightning Fabric."""

from pathlib import Path

import digits
import torch
from lightning.fabric import Fabric
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils.data import DataLoader

SEED, BATCH, EPOCHS, WORKERS = 7, 96, 6, 0
NEWEST = Path("checkpoints/newest.ckpt")


class TopTwo:
    def reset(self) -> None:
        self.hits, self.total = 0, 0

    def update(self, scores: Tensor, labels: Tensor) -> None:
        self.hits += int((scores.topk(2).indices == labels[:, None]).sum())
        self.total += len(labels)

    def compute(self) -> float:
        return self.hits / self.total


if __name__ == "__main__":
    fabric = Fabric()
    fabric.launch()
    fabric.seed_everything(SEED, workers=True)
    data = digits.train_data()
    loader = fabric.setup_dataloaders(
        DataLoader(data, BATCH // fabric.world_size, shuffle=True, drop_last=True, num_workers=WORKERS)
    )
    model = digits.net()
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=2e-3))
    loss_of, metric = nn.CrossEntropyLoss(), TopTwo()
    state = {"model": model, "optimizer": optimizer, "step": 0}
    if NEWEST.exists():
        fabric.load(NEWEST, state)
    with Progress(disable=fabric.global_rank != 0) as bar:
        task = bar.add_task("training", total=EPOCHS * len(loader))
        for epoch in range(state["step"] // len(loader), EPOCHS):
            model.train()
            for number, (images, labels) in enumerate(loader, epoch * len(loader)):
                if number < state["step"]:
                    continue
                optimizer.zero_grad()
                loss = loss_of(model(images), labels)
                fabric.backward(loss)
                optimizer.step()
                state["step"] += 1
                bar.update(task, completed=state["step"], description=f"loss {loss.item():.3f}")
                if state["step"] % 10 == 0:
                    fabric.save(NEWEST, state)
            model.eval()
            metric.reset()
            with torch.no_grad():
                for images, labels in DataLoader(digits.valid_data(), BATCH):
                    metric.update(model(images.to(fabric.device)), labels.to(fabric.device))
            if fabric.global_rank == 0:
                bar.print(f"epoch {epoch + 1}: top two {metric.compute():.4f}")
    fabric.save(NEWEST, state)
    if fabric.global_rank == 0:
        torch.save(model.state_dict(), "model.pt")
