"""Activation checkpointing: chosen modules keep their inputs alone, and run again in the backward.

*Contract*: `recompute(model, choice)` changes the `forward` of the chosen modules in place. Classes, names of modules,
parameters and buffers, hooks and the `state_dict` stay as they are. The bits of a step stay too: the second run has the
parameters, the buffers, the generators and the autocast of the first one, and what it does to buffers is dropped. Where
no gradient is recorded, a module runs once. A model that is copied is copied with it.

    recompute(model, ["Block"])      # every module whose class is called Block, or derives from one that is
    recompute(model, True)           # the blocks: what an nn.ModuleList or an nn.Sequential holds, if it has modules

*Errors*: ConfigError that names the classes of the model, for a choice that fits no module; and, in a forward, for a
frozen parameter that a chosen module changes.

*Cost*: one more forward of the chosen modules; a copy of their buffers for each call.
*Source*: arXiv:1604.06174; `torch.utils.checkpoint` with `use_reentrant=False`.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from disttrain.errors import ConfigError

OPTIONS = {*inspect.signature(checkpoint).parameters, "preserve_rng_state"} - {"args", "kwargs"}
"""The keywords that torch's function takes for itself."""
SHOWN_CLASSES = 8

Choice = bool | Iterable[str | type]


def recompute(model: nn.Module, choice: Choice) -> list[str]:
    """Let the chosen modules of `model` run again in the backward; return their names in the model."""
    chosen = dict(_blocks(model)) if choice is True else _of_classes(model, choice or ())
    for name, module in chosen.items():
        if isinstance(module, torch.jit.ScriptModule):
            raise ConfigError(f"activation_checkpointing: {name or 'the model'} is compiled by torch.jit; leave it out")
        own = module.forward
        module.forward = update_wrapper(partial(_recomputed, module, vars(module).get("forward")), own)
    return list(chosen)


def _of_classes(model: nn.Module, choice: Iterable[str | type]) -> dict[str, nn.Module]:
    """Return the modules of the chosen classes, by name."""
    chosen: dict[str, nn.Module] = {}
    for kind in choice:
        found = {name: each for name, each in model.named_modules() if _is_of(each, kind)}
        if not found:
            shown = kind if isinstance(kind, str) else kind.__name__
            raise ConfigError(
                f"activation_checkpointing: no module of the model is a {shown}; expected one of its classes: "
                f"{', '.join(_class_names(model))}"
            )
        chosen |= found
    return chosen


def _is_of(module: nn.Module, kind: str | type) -> bool:
    if isinstance(kind, type):
        return isinstance(module, kind)
    return any(each.__name__ == kind for each in type(module).__mro__ if each is not nn.Module)


def _class_names(model: nn.Module) -> list[str]:
    """Return the names of the classes of a model's modules: its own first, then those of torch."""
    kinds = list(dict.fromkeys(type(each) for each in model.modules()))
    names = sorted(kinds, key=lambda kind: kind.__module__.startswith("torch."))
    return list(dict.fromkeys(kind.__name__ for kind in names))[:SHOWN_CLASSES]


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the blocks of a model, by name; ConfigError if it has none."""
    found: dict[str, nn.Module] = {}
    for place, module in model.named_modules():
        inside = any(place.startswith(f"{name}.") for name in found)
        if isinstance(module, nn.ModuleList | nn.Sequential) and not inside:
            for name, child in module.named_children():
                if any(True for _ in child.children()) and not isinstance(child, nn.ModuleList | nn.ModuleDict):
                    found[f"{place}.{name}" if place else name] = child
    if not found:
        raise ConfigError(
            "activation_checkpointing=True: the model has no nn.ModuleList or nn.Sequential of blocks, which hold "
            f"modules of their own; expected a class: {', '.join(_class_names(model))}"
        )
    yield from found.items()


def _recomputed(module: nn.Module, own: Callable[..., Any] | None, /, *args: Any, **kwargs: Any) -> Any:
    """Run the forward of a module; keep nothing of it for the backward but the arguments."""
    forward = type(module).forward.__get__(module) if own is None else own
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    if OPTIONS & kwargs.keys():
        forward, kwargs = partial(forward, **kwargs), {}
    if torch.compiler.is_compiling():  # the compiler drops and recomputes by itself, and repeats no change of a buffer
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=partial(_contexts, module), **kwargs)


def _contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of the first run and of each further one; the first begins now."""
    return _watching(module), _Again(module)


@contextmanager
def _watching(module: nn.Module) -> Iterator[None]:
    """Raise ConfigError if the `with` body changes a frozen parameter: it would be changed again."""
    frozen = [(name, each, each._version) for name, each in module.named_parameters() if not each.requires_grad]
    yield
    for name, parameter, version in frozen:
        if parameter._version != version:
            raise ConfigError(
                f"activation_checkpointing: the forward of {type(module).__name__.removeprefix('FSDP')} changes its "
                f"frozen parameter {name}, which would change again when it is recomputed; choose classes without it, "
                "or make it a buffer"
            )


class _Again(AbstractContextManager[None]):
    """Puts the parameters and copies of the buffers of this moment into a module while it runs again.

    The parameters may be others meanwhile, as after `functional_call`. Those that FSDP2 has cut are left to it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parameters = _entries(module, "_parameters")
        self._buffers = _entries(module, "_buffers")
        self._at_start = {id(each): each.detach().clone() for _, _, each in self._buffers}  # modules may share one
        self._present: list[_Entry] = []

    def __enter__(self) -> None:
        fresh = {key: copied.clone() for key, copied in self._at_start.items()}  # the run may change them
        others = [(held, name, each) for held, name, each in self._parameters if _is_swapped(held.get(name), each)]
        again = [*others, *((held, name, fresh[id(each)]) for held, name, each in self._buffers)]
        self._present = [(held, name, held.get(name)) for held, name, _ in again]
        for held, name, each in again:
            held[name] = each

    def __exit__(self, *error: object) -> None:
        for held, name, each in self._present:
            held[name] = each


_Entry = tuple[dict[str, Any], str, Any]
"""The dict of a module in which a tensor is held, the tensor's name in it, and the tensor."""


def _entries(module: nn.Module, kind: str) -> list[_Entry]:
    """Return the entries of a module and the modules in it; `kind` is "_parameters" or "_buffers"."""
    held = [getattr(part, kind) for part in module.modules()]
    return [(each, name, tensor) for each in held for name, tensor in each.items() if tensor is not None]


def _is_swapped(present: Any, then: Any) -> bool:
    """Return whether another tensor has taken the place of a parameter, and not FSDP2, which cuts and gathers them."""
    return present is not then and not hasattr(present, "placements") and not hasattr(then, "placements")
