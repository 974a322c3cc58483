"""Small models and the loop that trains them by slots, for the tests of this folder and the ranks that they start."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.functional import cross_entropy

from disttrain.backend.base import Backend
from disttrain.errors import ConfigError
from disttrain.parallel import SlotGradients, Slots

STEPS = 6
SAMPLES = 5

NEEDS_FSDP = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason='strategy="fsdp" needs torch 2.13'
)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))


def cnn() -> nn.Module:
    """BatchNorm, dropout, and weights whose order in memory differs from their shapes (channels_last)."""
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(24, 10),
    )
    return net.to(memory_format=torch.channels_last)


class Mixed(nn.Module):
    """Three dtypes, so three buckets; a frozen layer, one that only even slots use, and one that no slot uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.short = nn.Linear(16, 16).bfloat16()
        self.long = nn.Linear(16, 10).double()
        self.sometimes = nn.Linear(12, 16)
        self.never = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if x[0, 0] > 0:  # `microbatch` makes it positive for even slots
            hidden = hidden + self.sometimes(x)
        hidden = self.short(self.frozen(hidden).tanh().bfloat16())
        return self.long(hidden.tanh().double()).float()


def wide() -> nn.Module:
    """A model with more parameters than DDP's first bucket holds, and than a reduction sends whole."""
    return nn.Sequential(nn.Linear(12, 512), nn.Tanh(), nn.Linear(512, 600), nn.Tanh(), nn.Linear(600, 1000))


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "cnn": cnn, "mixed": Mixed, "wide": wide, "bf16": mlp}


def microbatch(name: str, step: int, slot: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + slot)
    x = torch.randn(SAMPLES, *((1, 6, 6) if name == "cnn" else (12,)), generator=generator)
    if name == "mixed":
        x[0, 0] = x[0, 0].abs() if slot % 2 == 0 else -x[0, 0].abs()
    return x, torch.randint(0, 10, (SAMPLES,), generator=generator)


def digest(model: nn.Module) -> str:
    """Hash the parameters and buffers, as a checkpoint would hold them."""
    state = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        state.update(name.encode())
        state.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def train(name: str, slots: Slots, group: ProcessGroup | None, steps: int = STEPS, **options: Any) -> nn.Module:
    """Train one of the models with clipping and AdamW, from a random state that differs between ranks."""
    torch.manual_seed(7)
    model = MODELS[name]()
    torch.manual_seed(slots.rank)  # nothing may depend on it
    gradients = SlotGradients(model, slots, seed=3, process_group=group, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        batch = [microbatch(name, step, slot) for slot in slots.mine]
        for x, y in gradients.microbatches(batch, step + 1):
            with torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16"):
                loss = cross_entropy(gradients.module(x), y)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return model


def slots_of(backend: Backend, num_slots: int) -> Slots:
    return Slots(num_slots, backend.rank, backend.world_size)


@contextmanager
def refusals(backend: Backend) -> Iterator[list[str]]:
    """Take the ConfigError of the `with` body, of this rank or of one for which it waits, into a list of messages."""
    told: list[str] = []
    try:
        yield told
    except ConfigError as error:
        backend.fail(error)  # as the launcher does, so that ranks which wait for this one wake
        told.append(str(error))
    except RuntimeError:
        first = backend.first_failure()
        assert first is not None
        told.append(first.message.removeprefix("ConfigError: "))
