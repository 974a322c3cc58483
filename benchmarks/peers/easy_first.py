"""easy_first.py of docs/order.md in PyTorch Lightning."""

from collections.abc import Iterator

import digits
import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset, Sampler


class EasyFirst(Sampler):
    def __init__(self, data: Dataset) -> None:
        self.easy, self.epoch = data.data.tensors[0].sum((1, 2, 3)).argsort(stable=True), 0

    def __len__(self) -> int:
        return len(self.easy)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(self.easy.tolist() if self.epoch == 0 else torch.randperm(len(self)).tolist())


if __name__ == "__main__":
    L.seed_everything(7, workers=True)
    data = digits.train_data()
    train = DataLoader(data, batch_size=96, sampler=EasyFirst(data), drop_last=True)
    valid = DataLoader(digits.valid_data(), batch_size=96)
    trainer = L.Trainer(max_epochs=4, callbacks=[ModelCheckpoint("runs/easy_first", save_last=True)])
    trainer.fit(digits.Digits(), train, valid, ckpt_path="last")
