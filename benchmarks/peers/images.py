"""examples/images.py in PyTorch Lightning."""

import digits
import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, default_collate

SYMMETRIC = (0, 1, 8)


class RandomFlip(Dataset):
    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.data[index]
        return image.flip(-1) if label in SYMMETRIC and torch.rand(()) < 0.5 else image, label


def mixup(samples: list, alpha: float = 0.2) -> list[Tensor]:
    images, labels = default_collate(samples)
    targets = nn.functional.one_hot(labels, 10).float()
    share = torch.distributions.Beta(alpha, alpha).sample()
    return [share * part + (1 - share) * part.roll(1, 0) for part in (images, targets)]


class Images(digits.Digits):
    def __init__(self) -> None:
        super().__init__(lr=3e-3)
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, weight_decay=0.01)
        schedule = ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "valid/accuracy"}}


if __name__ == "__main__":
    L.seed_everything(7, workers=True)
    train = DataLoader(RandomFlip(digits.train_data()), batch_size=96, shuffle=True, drop_last=True, collate_fn=mixup)
    valid = DataLoader(digits.valid_data(), batch_size=96)
    callbacks = [
        EMAWeightAveraging(decay=0.95),
        ModelCheckpoint("runs/images", filename="best", monitor="valid/accuracy", mode="max", save_last=True),
        EarlyStopping("valid/accuracy", mode="max", patience=6),
    ]
    trainer = L.Trainer(max_epochs=60, callbacks=callbacks)
    trainer.fit(Images(), train, valid, ckpt_path="last")
