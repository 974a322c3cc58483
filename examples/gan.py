"""A generative adversarial network of handwritten digits: two updates a step, each with a loss of its own.

torchrun --standalone --nproc-per-node 2 -m disttrain.launch examples/gan.py
"""

from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from torch.utils.data import Dataset, TensorDataset

from disttrain import Config, Update

NOISE = 16


def images() -> Dataset:
    pixels = torch.tensor(load_digits().images, dtype=torch.float32)  # 1,797 scans of 8x8 pixels, in 0..16
    return TensorDataset(pixels.flatten(1) / 8 - 1)


def net() -> nn.Module:
    return nn.ModuleDict(
        {
            "generator": nn.Sequential(
                nn.Linear(NOISE, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64), nn.Tanh()
            ),
            "discriminator": nn.Sequential(
                nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(128, 1), nn.Flatten(0)
            ),
        }
    )


def tell_apart(model: nn.Module, batch: list[torch.Tensor]) -> tuple:
    """Return the discriminator's loss: scans are 1, what the generator makes is 0."""
    (real,) = batch
    made = model["generator"](torch.randn(len(real), NOISE, device=real.device)).detach()
    on_real, on_made = model["discriminator"](real), model["discriminator"](made)
    loss = cross_entropy(on_real, torch.ones_like(on_real)) + cross_entropy(on_made, torch.zeros_like(on_made))
    return loss, None, {"taken_for_real": (on_made > 0).float().mean()}


def deceive(model: nn.Module, batch: list[torch.Tensor]) -> tuple:
    """Return the generator's loss: what it makes is to be taken for scans."""
    (real,) = batch
    on_made = model["discriminator"](model["generator"](torch.randn(len(real), NOISE, device=real.device)))
    return cross_entropy(on_made, torch.ones_like(on_made)), None


adam = partial(torch.optim.Adam, lr=2e-4, betas=(0.5, 0.999))

config = Config(
    model=net,
    train_data=images,
    updates=[
        Update("d", lambda model: model["discriminator"].parameters(), tell_apart, adam),
        Update("g", lambda model: model["generator"].parameters(), deceive, adam),
    ],
    global_batch_size=96,
    num_slots=8,
    max_epochs=20,
)
