"""A small GPT over the bytes of Python's own manual: token files, warm-up and cosine, clipping, decay groups.

    torchrun --standalone --nproc-per-node 2 -m disttrain.launch examples/gpt.py

Every Python has the text. Its tokens are written once into ~/.cache/disttrain, or where `train_data.folder=` and
`valid_data.folder=` say. docs/text.md describes token files of your own.
"""

import hashlib
import math
import os
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from disttrain import Config, parameter_groups
from disttrain.data import TokenFiles

LENGTH, VOCAB, WIDTH, HEADS, DEPTH = 64, 256, 128, 4, 2
END = 0  # the byte after each topic of the manual


def token_file(part: str, folder: str) -> Path:
    """Return the file of the manual's first nine tenths for the part "train", of the rest for "valid"."""
    text = b"".join(topics[name].encode() + bytes([END]) for name in sorted(topics))
    cut = len(text) * 9 // 10
    return written(part, text[:cut] if part == "train" else text[cut:], folder)


def written(name: str, text: bytes, folder: str) -> Path:
    """Return a file of the text's bytes as tokens, which is written if it is not there.

    Its name holds the hash of its text. So a rank whose Python has another manual is refused, and so is such a resume.
    """
    path = Path(folder).expanduser() / f"manual-{name}-{hashlib.sha256(text).hexdigest()[:12]}.bin"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.uname().nodename}-{os.getpid()}")
        np.frombuffer(text, dtype=np.uint8).astype(np.uint16).tofile(temporary)
        temporary.replace(path)  # in one step: other ranks may write it too
    return path


def windows(part: str, folder: str = "~/.cache/disttrain") -> TokenFiles:
    return TokenFiles(token_file(part, folder), LENGTH, dtype=np.uint16, vocab_size=VOCAB)


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
    """tokens [batch, length] -> logits [batch, length, VOCAB]; `positions` and `mask` are for packed documents."""

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


def next_token(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def adamw(model, lr: float, weight_decay: float = 0.1) -> torch.optim.Optimizer:
    """Return an AdamW that decays matrices, and neither biases nor norms."""
    groups = parameter_groups(model, weight_decay=weight_decay, decay=[nn.Embedding])
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def warm_up_and_cosine(optimizer, total_steps: int, warm_up: int = 20) -> torch.optim.lr_scheduler.LRScheduler:
    """Return a schedule that rises for `warm_up` steps and then falls to a tenth of the rate."""

    def factor(step: int) -> float:
        return min((step + 1) / warm_up, 0.55 + 0.45 * math.cos(math.pi * min(1.0, step / total_steps)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


config = Config(
    name="gpt",
    seed=1,
    model=GPT,
    train_data=partial(windows, "train"),
    valid_data=partial(windows, "valid"),
    loss=next_token,
    optimizer=partial(adamw, lr=3e-3),
    schedule=warm_up_and_cosine,
    grad_clip_norm=1.0,
    global_batch_size=32,
    num_slots=8,
    max_steps=400,
)
