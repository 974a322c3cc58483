"""A classifier of text of any length: to which topic of Python's manual does a paragraph belong?

    torchrun --standalone --nproc-per-node 2 -m disttrain.launch examples/paragraphs.py

A batch holds paragraphs of about the same length, so there is little padding. masked.py trains the same encoder as a
masked language model.
"""

from functools import partial
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchmetrics.classification import MulticlassAccuracy

from disttrain import Config
from disttrain.data import LengthBuckets

NUM_TOPICS, LONGEST, WIDTH, VOCAB = 10, 200, 64, 256
PAD = 0


def paragraphs(held_out: bool) -> list[tuple[Tensor, int]]:
    """Return (bytes [length], topic) of every tenth paragraph of the longest topics, or of all the others."""
    longest = sorted(topics, key=lambda name: (len(topics[name]), name))[-NUM_TOPICS:]
    texts = [(text, label) for label, name in enumerate(longest) for text in topics[name].split("\n\n") if text.strip()]
    cut = [(torch.tensor(list(text.encode())[:LONGEST]), label) for text, label in texts]
    return [sample for i, sample in enumerate(cut) if (i % 10 == 0) == held_out]


def padded(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    texts, labels = zip(*samples, strict=True)
    return pad_sequence(texts, batch_first=True, padding_value=PAD), torch.tensor(labels)


def lengths(data: list[tuple[Tensor, int]]) -> list[int]:
    return [len(text) for text, _ in data]


class Encoder(nn.Module):
    """tokens [batch, length] -> [batch, length, WIDTH]; padding is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(LONGEST, WIDTH)
        block = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.1, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, 2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        places = self.places(torch.arange(tokens.shape[1], device=tokens.device))
        return self.blocks(self.tokens(tokens) + places, src_key_padding_mask=tokens == PAD)


class Classifier(nn.Module):
    """tokens [batch, length] -> scores [batch, NUM_TOPICS], from the mean over the tokens that are no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Linear(WIDTH, NUM_TOPICS)

    def forward(self, tokens: Tensor) -> Tensor:
        real = (tokens != PAD).unsqueeze(-1)
        return self.head((self.encoder(tokens) * real).sum(1) / real.sum(1))


config = Config(
    name="paragraphs",
    seed=2,
    model=Classifier,
    train_data=partial(paragraphs, held_out=False),
    valid_data=partial(paragraphs, held_out=True),
    collate=padded,
    order=partial(LengthBuckets, lengths=lengths, window=8),
    loss=nn.CrossEntropyLoss(),
    optimizer=partial(torch.optim.AdamW, lr=2e-3),
    metrics={"accuracy": partial(MulticlassAccuracy, num_classes=NUM_TOPICS, average="micro")},
    global_batch_size=64,
    num_slots=8,
    max_epochs=8,
)
