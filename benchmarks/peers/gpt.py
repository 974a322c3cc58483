"""examples/gpt.py in PyTorch Lightning."""

import hashlib
import math
import os
from pathlib import Path
from pydoc_data.topics import topics

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

LENGTH, VOCAB, WIDTH, HEADS, DEPTH = 64, 256, 128, 4, 2
END = 0


def token_file(part: str, folder: str) -> Path:
    text = b"".join(topics[name].encode() + bytes([END]) for name in sorted(topics))
    cut = len(text) * 9 // 10
    return written(part, text[:cut] if part == "train" else text[cut:], folder)


def written(name: str, text: bytes, folder: str) -> Path:
    path = Path(folder).expanduser() / f"manual-{name}-{hashlib.sha256(text).hexdigest()[:12]}.bin"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.uname().nodename}-{os.getpid()}")
        np.frombuffer(text, dtype=np.uint8).astype(np.uint16).tofile(temporary)
        temporary.replace(path)  # in one step: other ranks may write it too
    return path


class Windows(Dataset):
    def __init__(self, path: Path) -> None:
        self.tokens = np.memmap(path, dtype=np.uint16, mode="r")

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // LENGTH

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = torch.from_numpy(self.tokens[index * LENGTH : (index + 1) * LENGTH + 1].astype(np.int64))
        return window[:-1], window[1:]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mix, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        shape = (*x.shape[:2], HEADS, WIDTH // HEADS)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.mix(self.before(x)).chunk(3, dim=-1))
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + self.dropout(self.out(seen.transpose(1, 2).reshape(x.shape)))
        return x + self.dropout(self.narrow(F.gelu(self.wide(self.between(x)))))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks, self.norm = nn.ModuleList(Block() for _ in range(DEPTH)), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor, positions: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device) if positions is None else positions
        x = self.tokens(tokens) + self.places(places)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


class Training(L.LightningModule):
    def __init__(self, lr: float = 3e-3, weight_decay: float = 0.1, warm_up: int = 20) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = GPT()

    def loss(self, batch: list[Tensor]) -> Tensor:
        tokens, targets = batch
        return F.cross_entropy(self.model(tokens).flatten(0, 1), targets.flatten())

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("valid/loss", self.loss(batch), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> dict:
        large = [parameter for parameter in self.parameters() if parameter.dim() >= 2]
        small = [parameter for parameter in self.parameters() if parameter.dim() < 2]
        groups = [{"params": large, "weight_decay": self.hparams.weight_decay}, {"params": small, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams.lr, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def factor(self, step: int) -> float:
        part = min(1.0, step / self.trainer.estimated_stepping_batches)
        return min((step + 1) / self.hparams.warm_up, 0.55 + 0.45 * math.cos(math.pi * part))


def fit(training: Training, train: DataLoader, valid: DataLoader, folder: str) -> None:
    L.seed_everything(1, workers=True)
    trainer = L.Trainer(max_steps=400, gradient_clip_val=1.0, callbacks=[ModelCheckpoint(folder, save_last=True)])
    trainer.fit(training, train, valid, ckpt_path="last")


if __name__ == "__main__":
    train, valid = (Windows(token_file(part, "~/.cache/disttrain")) for part in ("train", "valid"))
    train = DataLoader(train, batch_size=32, shuffle=True, drop_last=True)
    fit(Training(), train, DataLoader(valid, batch_size=32), "runs/gpt")
