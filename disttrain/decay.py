"""The two usual groups of an optimizer: parameters with weight decay, and biases, norms and embeddings without.

*Contract*: `parameter_groups` reads types, names and numbers of dimensions alone, so it gives the same groups on every
rank, under each strategy, for compiled models too. A parameter is in one group, also if several modules share it.

*Errors*: ConfigError for what is no Module, and for an entry of `no_decay` or `decay` that fits no parameter.
"""

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from disttrain.errors import ConfigError

NORM = re.compile(r"Norm(\d+d)?$")
"""The end of the name of a class that normalises: LayerNorm, BatchNorm2d, LlamaRMSNorm."""
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

Exceptions = Sequence[type[nn.Module] | str]


def parameter_groups(
    *modules: nn.Module, weight_decay: float, no_decay: Exceptions = (), decay: Exceptions = (), frozen: bool = False
) -> list[dict[str, Any]]:
    """Return the groups of an optimizer over the trained parameters of `modules`: with `weight_decay`, and with 0.0.

        def optimizer(model, lr=3e-4):
            return torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=lr)

    Without decay are biases, the parameters of norms (a class whose name ends in "Norm", "Norm1d" and so on) and of
    embeddings (`nn.Embedding`, `nn.EmbeddingBag`), and all others of fewer than two dimensions. `no_decay` and `decay`
    name exceptions: a class (all parameters inside modules of it), or a pattern such as "head.*" for the dotted name of
    a parameter, or for an end of it: "bias" fits "blocks.0.bias". A parameter that several modules share is without
    decay if that holds in one of them.

    With `frozen`, parameters without `requires_grad` are in the groups too, so they can be unfrozen later. A group
    without parameters is left out. The order is that of the modules.

    *Errors*: ConfigError for what is no Module, for an entry that fits no parameter, and for a parameter that both
    `no_decay` and `decay` name.
    """
    for module in modules:
        if not isinstance(module, nn.Module):
            raise ConfigError(
                f"parameter_groups: expected Modules, got {type(module).__name__}; let the optimizer's factory ask for "
                "the model: def optimizer(model): ..."
            )
    without = _named_by(modules, no_decay, "no_decay")
    within = _named_by(modules, decay, "decay")
    for module in modules:
        for name, parameter in module.named_parameters():
            if id(parameter) in without and id(parameter) in within:
                raise ConfigError(f"parameter_groups: both no_decay and decay name {name}; leave it out of one of them")
    usual = {id(parameter) for module in modules for parameter in _usually_without(module)}
    given = {id(each): each for module in modules for each in module.parameters() if frozen or each.requires_grad}
    excluded = (usual - within) | without
    groups = [
        {"params": [each for key, each in given.items() if key not in excluded], "weight_decay": weight_decay},
        {"params": [each for key, each in given.items() if key in excluded], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _usually_without(module: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters that usually have no decay: biases, vectors, and those of norms and embeddings."""
    for place, part in module.named_modules():
        owner, attribute = part, None
        if isinstance(part, ParametrizationList):  # the values behind a weight that is computed
            path, _, attribute = place.rpartition(".")
            owner = module.get_submodule(path.removesuffix("parametrizations").removesuffix("."))
        by_type = isinstance(owner, EMBEDDINGS) or any(NORM.search(kind.__name__) for kind in type(owner).__mro__)
        for name, parameter in part.named_parameters(recurse=False):
            if by_type or parameter.ndim < 2 or "bias" in (attribute or name).lower():
                yield parameter


def _named_by(modules: Sequence[nn.Module], choice: Exceptions, word: str) -> set[int]:
    """Return the ids of the parameters that a choice names."""
    if isinstance(choice, str | type):
        raise ConfigError(f"parameter_groups: expected a list of classes and patterns as {word}, got one; use [...]")
    chosen: set[int] = set()
    for each in choice:
        found = {id(parameter) for module in modules for parameter in _fitting(module, each, word)}
        if not found:
            shown = each.__name__ if isinstance(each, type) else repr(each)
            names = [name for module in modules for name, _ in module.named_parameters()]
            raise ConfigError(
                f"parameter_groups: {word} has {shown}, which fits no parameter; expected a class of Modules, or a "
                f"pattern for names such as {', '.join(names[:3])}"
            )
        chosen |= found
    return chosen


def _fitting(module: nn.Module, each: Any, word: str) -> Iterator[Tensor]:
    """Yield the parameters of a module that one entry of a choice names."""
    if isinstance(each, type) and issubclass(each, nn.Module):
        for part in module.modules():
            if isinstance(part, each):
                yield from part.parameters()
    elif isinstance(each, str):
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if fnmatchcase(name, each) or fnmatchcase(name, f"*.{each}"):
                yield parameter
    else:
        raise ConfigError(
            f"parameter_groups: expected classes of Modules and patterns in {word}, got {each!r:.60}; a pattern is a "
            'text such as "head.*"'
        )
