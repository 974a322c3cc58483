"""examples/distill.py in PyTorch Lightning; runs/digits/best.ckpt is that of digits.py."""

import digits
import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from torch.utils.data import DataLoader

TEMPERATURE = 3.0


class Distilled(digits.Digits):
    strict_loading = False

    def __init__(self) -> None:
        super().__init__(lr=2e-3)
        self.net = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(144, 10))
        self.teacher = digits.Digits.load_from_checkpoint("runs/digits/best.ckpt").net.requires_grad_(False).eval()

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        images, labels = batch
        scores = self.net(images)
        soft, taught = ((each / TEMPERATURE).log_softmax(-1) for each in (scores, self.teacher(images)))
        kl = kl_div(soft, taught, reduction="batchmean", log_target=True) * TEMPERATURE**2
        ce = cross_entropy(scores, labels)
        self.log_dict({"train/kl": kl, "train/ce": ce})
        return 0.7 * kl + 0.3 * ce

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.net.parameters(), lr=self.hparams.lr)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: state[name] for name in state if not name.startswith("teacher.")}


if __name__ == "__main__":
    L.seed_everything(7, workers=True)
    train = DataLoader(digits.train_data(), batch_size=96, shuffle=True, drop_last=True)
    valid = DataLoader(digits.valid_data(), batch_size=96)
    trainer = L.Trainer(max_epochs=30, callbacks=[ModelCheckpoint("runs/distill", save_last=True)])
    trainer.fit(Distilled(), train, valid, ckpt_path="last")
