"""Seeds as functions of a position in the run, and the states of the global generators.

*Contract*: nothing random depends on earlier draws. Each use of randomness has a purpose and a position, and its seed
is a hash of the run's seed and these two. So a resumed run computes its seeds instead of restoring generators:

| purpose      | position                   | seeds                                                    |
|--------------|----------------------------|----------------------------------------------------------|
| "init"       | -                          | building the model, the same on every rank               |
| "order"      | epoch                      | the order of the samples                                 |
| "window"     | epoch, window              | the batches of sorted samples in an order by length      |
| "mixture"    | change of the shares       | the turns of the sources of a mixture                    |
| "source"     | source, its own epoch      | the order of the samples of one source of a mixture      |
| "batch"      | epoch, step in epoch, slot | python, numpy and torch in the process that loads it     |
| "stream"     | epoch, slot                | as "batch", in the process that opens the slot's stream  |
| "step"       | step, slot                 | torch's generators before that slot's forward: dropout   |
| "global"     | step                       | torch's generators before the loss over a global batch   |
| "valid"      | number of the batch        | as "batch", for validation data                          |
| "config"     | -                          | the execution of a cfg.py, before its seed is known      |
| "data"       | -                          | building the datasets, the same on every rank            |
| "probe"      | index                      | a sample that is loaded to be compared with other ranks' |
| "evaluation" | number of the batch        | python, numpy and torch before that batch's forward      |
| "epoch"      | epoch                      | python, numpy and torch in a dataset's `set_epoch`       |
| "evaluated"  | step                       | python, numpy and torch before EVALUATED's handlers      |
| "updates"    | the bytes of its name      | one of several updates: the seed of all its other seeds  |

A seed is never `seed + i`, because such seeds coincide: seed 0 in epoch 1 is seed 1 in epoch 0.
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

    `seed` is the run's seed, any integer. `purpose` is any text. `position` is any number of integers, always counted
    in the same way. The result is the same on every platform, Python and process. This function seeds nothing: pass
    its result to a generator, or to `manual_seed`.

    *Cost*: about 2 microseconds.
    *Source*: BLAKE2b (RFC 7693) of the arguments as decimal text; different arguments have different texts.
    """
    text = f"{seed}/{len(purpose)}:{purpose}/{'/'.join(map(str, position))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def manual_seed(seed: int) -> None:
    """Seed the global generators of python, numpy and torch (every device, lazily) with `seed`.

    numpy's generator takes 32 bits and gets the low ones.

    *Cost*: 100 to 200 microseconds, because torch records the caller's stack for each device type that has not
    started. `seed_position` is the fast function for every step.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - people's augmentations draw from the global one
    torch.manual_seed(seed)


def seed_torch(seed: int) -> None:
    """Seed torch's generators of the CPU and of an accelerator that has started.

    `torch.manual_seed` would also queue the seed for an accelerator that has not started. It would take effect at the
    start of the device, long after the position to which the seed belongs.

    *Cost*: about 2 microseconds.
    """
    torch.default_generator.manual_seed(seed)
    if (module := _accelerator()) is not None:
        getattr(module, "manual_seed_all", module.manual_seed)(seed)


def seed_position(seed: int) -> None:
    """Seed python's, numpy's and torch's generators for one position of a run; about 10 microseconds."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - people's augmentations draw from the global one
    seed_torch(seed)


def _accelerator() -> Any:
    """Return the module of the accelerator in use (such as `torch.cuda`), or None before it has started.

    Reading the state of an accelerator that has not started would create its context; seeding must not do that.
    """
    device = torch.accelerator.current_accelerator()
    module = torch.get_device_module(device) if device is not None else None
    started = getattr(module, "is_initialized", None)
    return module if module is not None and (started is None or started()) else None


def get_random_state() -> dict[str, Any]:
    """Return the states of all global generators as plain values and tensors.

    The result survives `torch.save` and `torch.load(weights_only=True)`.
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
    """Set the global generators to a state that `get_random_state` returned.

    The accelerator's part is ignored without an accelerator, so a state saved on a GPU loads on a CPU.
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


def seed_config() -> None:
    """Seed python's, numpy's and torch's generators as for every execution of a cfg.py, whatever its own seed is."""
    seed_position(seed_for(0, "config"))


class SeededConfig:
    """Seeds the generators when it is unpickled: put before an object whose unpickling executes a cfg.py again."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return seed_config, ()


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the global generators after the body, also when it raises."""
    state = get_random_state()
    try:
        yield
    finally:
        set_random_state(state)


def keep_random_state(func: Callable[P, R]) -> Callable[P, R]:
    """Decorate `func` to restore python's, numpy's and torch's generators after each call, also when it raises."""

    @functools.wraps(func)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with random_state_kept():
            return func(*args, **kwargs)

    return wrapper
