"""Seeds as functions of position, and the global generators' states.

*Contract*: nothing random depends on what was drawn before. Each use of randomness has a purpose and a
position, and its seed is a hash of the run's seed and those two, so resuming is arithmetic:

| purpose  | position                   | seeds                                                    |
|----------|----------------------------|----------------------------------------------------------|
| "init"   | -                          | building the model, the same on every rank               |
| "order"  | epoch                      | the order of the samples                                 |
| "batch"  | epoch, step in epoch, slot | python, numpy and torch where that microbatch is loaded  |
| "stream" | epoch, slot                | as "batch", where the stream that a slot reads is opened |
| "step"   | step, slot                 | torch's generators before that slot's forward: dropout   |
| "valid"  | number of the batch        | as "batch", for validation data                          |
| "data"   | -                          | building the datasets, the same on every rank            |

Never `seed + i`: it aliases (seed 0 in epoch 1 is seed 1 in epoch 0).
"""

import functools
import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch

P = ParamSpec("P")
R = TypeVar("R")


def seed_for(seed: int, purpose: str, *position: int) -> int:
    """Return the seed of one use of randomness, 0 <= seed < 2**63: a stable hash of the arguments.

    `seed` is the run's, any integer; `purpose` any text; `position` any number of integers, counted as you like but
    always alike. The same on every platform, Python and process. It seeds nothing: hand it to a generator, or to
    `manual_seed`.

    *Cost*: about 2 microseconds.
    *Source*: BLAKE2b (RFC 7693), over the decimal text of the arguments, which no two of them share.
    """
    text = f"{seed}/{len(purpose)}:{purpose}/{'/'.join(map(str, position))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def manual_seed(seed: int) -> None:
    """Seed the global generators of python, numpy and torch (every device, lazily) with `seed`.

    numpy's takes 32 bits and gets the low ones. Cost: 100 to 200 microseconds, for torch notes down the caller's
    place for each kind of device that has not started; see `seed_position` for what is done every step.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - people's augmentations draw from the global one
    torch.manual_seed(seed)


def seed_torch(seed: int) -> None:
    """Seed torch's generators, of the CPU and of an accelerator that has started. Cost: about 2 microseconds.

    `torch.manual_seed` queues a seed for an accelerator that sleeps, which would be in force when it starts,
    long after the position that the seed belongs to.
    """
    torch.default_generator.manual_seed(seed)
    if (module := _accelerator()) is not None:
        getattr(module, "manual_seed_all", module.manual_seed)(seed)


def seed_position(seed: int) -> None:
    """Seed python's, numpy's and torch's generators for one position of a run. Cost: about 10 microseconds."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - people's augmentations draw from the global one
    seed_torch(seed)


def _accelerator() -> Any:
    """Return the module of the accelerator in use (such as `torch.cuda`), or None before it has started.

    Asking a sleeping accelerator for its state would create its context, which no seeding may do.
    """
    device = torch.accelerator.current_accelerator()
    module = torch.get_device_module(device) if device is not None else None
    started = getattr(module, "is_initialized", None)
    return module if module is not None and (started is None or started()) else None


def get_random_state() -> dict[str, Any]:
    """Return the states of all global generators as plain values and tensors.

    What comes back survives `torch.save` and `torch.load(weights_only=True)`.
    """
    twister: dict[str, Any] = np.random.get_state(legacy=False)  # noqa: NPY002
    keys = torch.from_numpy(twister["state"]["key"].astype(np.int64))
    position, has_gauss = int(twister["state"]["pos"]), int(twister["has_gauss"])
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (str(twister["bit_generator"]), keys, position, has_gauss, float(twister["gauss"])),
        "torch": torch.get_rng_state(),
    }
    if (module := _accelerator()) is not None:
        if hasattr(module, "get_rng_state_all"):
            state["accelerator"] = [s.cpu() for s in module.get_rng_state_all()]
        else:
            state["accelerator"] = [module.get_rng_state().cpu()]
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put the global generators into a state that `get_random_state` returned.

    An accelerator's part is skipped where there is none, so that a state saved on a GPU loads on a CPU.
    """
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "accelerator" in state and (module := _accelerator()) is not None:
        if hasattr(module, "set_rng_state_all"):
            module.set_rng_state_all(state["accelerator"][: module.device_count()])
        else:
            module.set_rng_state(state["accelerator"][0])


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the global generators as they were found, also when the body raises."""
    state = get_random_state()
    try:
        yield
    finally:
        set_random_state(state)


def keep_random_state(func: Callable[P, R]) -> Callable[P, R]:
    """Decorate `func` so that it leaves python's, numpy's and torch's generators as it found them.

    Returns what `func` returns, and restores also when it raises.
    """

    @functools.wraps(func)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with random_state_kept():
            return func(*args, **kwargs)

    return wrapper
