"""A GPT-2 of transformers, built from its config: bf16, accumulated gradients, groups of weight decay, a cosine.

    torchrun --standalone --nproc-per-node 2 -m disttrain.launch examples/gpt2.py

It needs `pip install transformers` and downloads nothing: its text is Python's own manual, byte by byte. Two ranks run
four slots each, one after the other, so their gradients are accumulated.
"""

from functools import partial
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from transformers import GPT2Config, GPT2LMHeadModel, get_cosine_schedule_with_warmup

from disttrain import Config, parameter_groups

LENGTH, VOCAB, HELD_OUT = 64, 256, 500


class Windows(Dataset):
    """Pieces of the manual, each a dict as the models of transformers take it."""

    def __init__(self) -> None:
        text = "\n".join(topics[name] for name in sorted(topics)).encode()
        self.tokens = torch.tensor(list(text)).unfold(0, LENGTH, LENGTH)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def train_data() -> Dataset:
    data = Windows()
    return Subset(data, range(HELD_OUT, len(data)))


def valid_data() -> Dataset:
    return Subset(Windows(), range(HELD_OUT))


def gpt2() -> nn.Module:
    sizes = {"n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, **sizes))


def forward(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    outputs = model(**batch)
    return outputs.loss, outputs.logits


def adamw(model: nn.Module, lr: float, weight_decay: float = 0.1) -> torch.optim.Optimizer:
    groups = parameter_groups(model, weight_decay=weight_decay, no_decay=["wte.weight", "wpe.weight"])
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


config = Config(
    name="gpt2",
    model=gpt2,
    train_data=train_data,
    valid_data=valid_data,
    forward=forward,
    optimizer=partial(adamw, lr=3e-3),
    schedule=lambda optimizer, total_steps: get_cosine_schedule_with_warmup(optimizer, 20, total_steps),
    grad_clip_norm=1.0,
    precision="bf16",
    global_batch_size=32,
    num_slots=8,
    max_steps=400,
)
