"""examples/gan.py in PyTorch Lightning."""

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset

NOISE = 16


def images() -> Dataset:
    pixels = torch.tensor(load_digits().images, dtype=torch.float32)
    return TensorDataset(pixels.flatten(1) / 8 - 1)


class Gan(L.LightningModule):
    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(NOISE, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64), nn.Tanh()
        )
        self.discriminator = nn.Sequential(
            nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(128, 1), nn.Flatten(0)
        )

    def update(self, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def training_step(self, batch: list[torch.Tensor], _: int) -> None:
        (real,) = batch
        d, g = self.optimizers()
        made = self.generator(torch.randn(len(real), NOISE, device=real.device)).detach()
        on_real, on_made = self.discriminator(real), self.discriminator(made)
        d_loss = cross_entropy(on_real, torch.ones_like(on_real)) + cross_entropy(on_made, torch.zeros_like(on_made))
        self.update(d, d_loss)
        on_new = self.discriminator(self.generator(torch.randn(len(real), NOISE, device=real.device)))
        g_loss = cross_entropy(on_new, torch.ones_like(on_new))
        self.update(g, g_loss)
        self.log_dict({"d/loss": d_loss, "g/loss": g_loss, "d/taken_for_real": (on_made > 0).float().mean()})

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        parts = (self.discriminator, self.generator)
        return [torch.optim.Adam(part.parameters(), lr=2e-4, betas=(0.5, 0.999)) for part in parts]


if __name__ == "__main__":
    L.seed_everything(0, workers=True)
    train = DataLoader(images(), batch_size=96, shuffle=True, drop_last=True)
    trainer = L.Trainer(max_epochs=20, callbacks=[ModelCheckpoint("runs/gan", save_last=True)])
    trainer.fit(Gan(), train, ckpt_path="last")
