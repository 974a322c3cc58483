"""A masked language model of text of any length: the encoder of paragraphs.py learns bytes that are hidden from it.

    torchrun --standalone --nproc-per-node 2 -m disttrain.launch examples/masked.py

Microbatches hide different numbers of bytes. With `weight` each hidden byte of the global batch counts once.
"""

from functools import partial

import torch
from paragraphs import PAD, VOCAB, WIDTH, Encoder, lengths, padded, paragraphs
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from disttrain import Config
from disttrain.data import IGNORED, LengthBuckets, num_targets

HIDDEN = 1


def masked(samples: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    """Return a padded batch in which about 15 % of the bytes are hidden."""
    tokens, _ = padded(samples)
    chosen = (torch.rand(tokens.shape) < 0.15) & (tokens != PAD)
    return {"tokens": tokens.masked_fill(chosen, HIDDEN), "targets": tokens.masked_fill(~chosen, IGNORED)}


def forward(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    scores = model(batch["tokens"])
    return cross_entropy(scores.flatten(0, 1), batch["targets"].flatten()), scores


config = Config(
    name="masked",
    seed=2,
    model=lambda: nn.Sequential(Encoder(), nn.Linear(WIDTH, VOCAB)),
    train_data=partial(paragraphs, held_out=False),
    valid_data=partial(paragraphs, held_out=True),
    collate=masked,
    weight=num_targets,
    order=partial(LengthBuckets, lengths=lengths, window=8),
    forward=forward,
    optimizer=partial(torch.optim.AdamW, lr=2e-3),
    global_batch_size=64,
    num_slots=8,
    max_epochs=8,
)
