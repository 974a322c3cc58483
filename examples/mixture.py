"""The GPT of gpt.py over packed documents from three sources, each with its share of the samples.

    torchrun --standalone --nproc-per-node 2 -m disttrain.launch examples/mixture.py

The documents are the topics of Python's manual. The sources are its short, its middle and its long topics. From step
200 on the long ones count more.
"""

from functools import partial
from pydoc_data.topics import topics

from gpt import END, GPT, LENGTH, VOCAB, adamw, warm_up_and_cosine, written
from torch import Tensor
from torch.nn.functional import cross_entropy

from disttrain import Config
from disttrain.data import Mixture, PackedTokens, document_mask, num_targets

SOURCES = ("short", "middle", "long")


def packed(name: str, documents: list[str], folder: str) -> PackedTokens:
    text = b"".join(topics[document].encode() + bytes([END]) for document in documents)
    return PackedTokens(written(name, text, folder), LENGTH, dtype="uint16", end=END, vocab_size=VOCAB)


def train_data(folder: str = "~/.cache/disttrain") -> dict[str, PackedTokens]:
    kept = sorted((name for i, name in enumerate(sorted(topics)) if i % 10), key=lambda name: (len(topics[name]), name))
    third = len(kept) // 3
    return {source: packed(source, kept[i * third : (i + 1) * third], folder) for i, source in enumerate(SOURCES)}


def valid_data(folder: str = "~/.cache/disttrain") -> PackedTokens:
    return packed("every-tenth", sorted(topics)[::10], folder)


def forward(model: GPT, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    logits = model(batch["tokens"], batch["positions"], document_mask(batch["documents"]))
    return cross_entropy(logits.flatten(0, 1), batch["targets"].flatten()), logits


config = Config(
    name="mixture",
    seed=1,
    model=GPT,
    train_data=train_data,
    valid_data=valid_data,
    order=partial(
        Mixture, shares={"short": 0.2, "middle": 0.3, "long": 0.5}, changes={200: {"middle": 0.2, "long": 0.8}}
    ),
    forward=forward,
    weight=num_targets,
    optimizer=partial(adamw, lr=3e-3),
    schedule=warm_up_and_cosine,
    grad_clip_norm=1.0,
    global_batch_size=32,
    num_slots=8,
    max_steps=400,
)
