"""A small GPT over the bytes of Python's own manual, in bf16 autocast, with dropout; a loss of its own batches."""

from functools import partial
from pydoc_data.topics import topics

import torch
from mlp import fields
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import Dataset

from disttrain import Config

LENGTH, WIDTH, HEADS, DEPTH = 32, 48, 4, 2


class Text(Dataset):
    """Pieces of LENGTH + 1 bytes, each from a start that is drawn anew."""

    def __init__(self) -> None:
        text = "".join(topics[name] for name in sorted(topics)).encode("ascii", "replace")[:20_000]
        self.bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()

    def __len__(self) -> int:
        return len(self.bytes) // (2 * LENGTH)

    def __getitem__(self, i: int) -> Tensor:
        start = i * 2 * LENGTH + int(torch.randint(LENGTH - 1, ()))
        return self.bytes[start : start + LENGTH + 1]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mix, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], HEADS, WIDTH // HEADS)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.mix(self.before(x)).chunk(3, dim=-1))
        attended = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + self.dropout(self.out(attended))
        return x + self.dropout(self.narrow(nn.functional.gelu(self.wide(self.between(x)))))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(DEPTH)])
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.tokens(x) + self.places.weight))


def forward(model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(batch[:, :-1])
    return cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten()), logits


config = Config(
    **{
        **fields,
        "model": GPT,
        "train_data": Text,
        "loss": None,
        "forward": forward,
        "precision": "bf16",
        "optimizer": partial(torch.optim.AdamW, lr=3e-3, betas=(0.9, 0.95)),
    }
)
