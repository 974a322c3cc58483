"""examples/mixture.py in PyTorch Lightning."""

from pydoc_data.topics import topics

import gpt
import torch
from gpt import END, LENGTH, Windows, written
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import ConcatDataset, DataLoader, WeightedRandomSampler

SHARES = {"short": 0.2, "middle": 0.3, "long": 0.5}


class Packed(Windows):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens, targets = super().__getitem__(index)
        ends, places = tokens == END, torch.arange(LENGTH)
        begins = ends.roll(1)
        begins[0] = True
        return {
            "tokens": tokens,
            "targets": targets.masked_fill(ends, -100),
            "documents": begins.cumsum(0),
            "positions": places - (places * begins).cummax(0).values,
        }


def packed(name: str, documents: list[str]) -> Packed:
    text = b"".join(topics[document].encode() + bytes([END]) for document in documents)
    return Packed(written(name, text, "~/.cache/disttrain"))


def train_data() -> ConcatDataset:
    kept = sorted((name for i, name in enumerate(sorted(topics)) if i % 10), key=lambda name: (len(topics[name]), name))
    third = len(kept) // 3
    return ConcatDataset([packed(name, kept[i * third : (i + 1) * third]) for i, name in enumerate(SHARES)])


def valid_data() -> Packed:
    return packed("every-tenth", sorted(topics)[::10])


class Training(gpt.Training):
    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        same = batch["documents"].unsqueeze(-1) == batch["documents"].unsqueeze(-2)
        logits = self.model(batch["tokens"], batch["positions"], same.tril().unsqueeze(-3))
        return cross_entropy(logits.flatten(0, 1), batch["targets"].flatten())


if __name__ == "__main__":
    data = train_data()
    sizes = torch.tensor([len(source) for source in data.datasets])
    weights = (torch.tensor(list(SHARES.values())) / sizes).repeat_interleave(sizes)
    sampler = WeightedRandomSampler(weights, num_samples=len(data))
    train = DataLoader(data, batch_size=32, sampler=sampler, drop_last=True)
    gpt.fit(Training(), train, DataLoader(valid_data(), batch_size=32), "runs/mixture")
