"""examples/adapters.py in PyTorch Lightning; runs/digits/best.ckpt is that of digits.py."""

import digits
import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset


class Adapted(nn.Conv2d):
    def __init__(self, conv: nn.Conv2d, rank: int) -> None:
        super().__init__(conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding)
        self.load_state_dict(conv.state_dict())
        self.requires_grad_(False)
        self.down = nn.Conv2d(conv.in_channels, rank, conv.kernel_size, padding=conv.padding, bias=False)
        self.up = nn.Conv2d(rank, conv.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.up(self.down(x))


class Parity(Dataset):
    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, label = self.data[index]
        return image, label % 2


class Adapters(digits.Digits):
    strict_loading = False

    def __init__(self, rank: int = 4) -> None:
        super().__init__(lr=1e-2, num_classes=2)
        self.net = digits.Digits.load_from_checkpoint("runs/digits/best.ckpt").net.requires_grad_(False)
        for index, layer in enumerate(self.net):
            if isinstance(layer, nn.Conv2d):
                self.net[index] = Adapted(layer, rank)
        self.net[-1] = nn.Linear(64 * 4 * 4, 2)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                del checkpoint["state_dict"][name]


if __name__ == "__main__":
    L.seed_everything(7, workers=True)
    train = DataLoader(Parity(digits.train_data()), batch_size=96, shuffle=True, drop_last=True)
    valid = DataLoader(Parity(digits.valid_data()), batch_size=96)
    trainer = L.Trainer(max_epochs=5, callbacks=[ModelCheckpoint("runs/adapters", save_last=True)])
    trainer.fit(Adapters(), train, valid, ckpt_path="last")
