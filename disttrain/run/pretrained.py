"""Descriptions of models of transformers, which checkpoints keep so that an export can be loaded by `from_pretrained`.

*Contract*: the position of a checkpoint holds, for each model of transformers in the run's model, its class, its config
as config.json has it, its generation config if it generates, and the names that `from_pretrained` ties to others. They
are read when the run is assembled. transformers is not imported here: a run that has not imported it has no such model.
A model with adapters of peft is none, because `from_pretrained` would not load its names. One whose config is no JSON
is left out, with a line in the log: a run is not stopped because of it.
"""

import json
import logging
import re
import sys
from typing import Any

from torch import nn

from disttrain.checkpoint import PRETRAINED
from disttrain.handlers.stateful import bare

logger = logging.getLogger(__name__)

_FSDP = "FSDP"
"""The beginning of the names that FSDP2 gives to the classes of modules that it has cut."""


def pretrained_position(model: nn.Module) -> dict[str, Any]:
    """Return the entry of a checkpoint's position; empty without a model of transformers."""
    if "transformers" not in sys.modules:
        return {}
    described = {}
    for place, module in pretrained_in(bare(model)).items():
        try:
            described[place] = _described(module)
        except Exception as error:  # noqa: BLE001 - a config of somebody's own; a run trains without this
            logger.warning("--format hf will not export %s: %s", place or "the model", error)
    return {PRETRAINED: described} if described else {}


def pretrained_in(model: nn.Module) -> dict[str, nn.Module]:
    """Return the models of transformers in a model, by their place in it: the outermost ones, without adapters."""
    found: dict[str, nn.Module] = {}
    for place, module in model.named_modules():
        is_inside = any(not outer or place.startswith(f"{outer}.") for outer in found)
        if not is_inside and _is_pretrained(module):
            found[place] = module
    return {place: module for place, module in found.items() if not _has_adapters(model, place, module)}


def _is_pretrained(module: nn.Module) -> bool:
    return any(
        kind.__name__ == "PreTrainedModel" and kind.__module__.startswith("transformers.")
        for kind in type(module).__mro__
    )


def _has_adapters(model: nn.Module, place: str, module: nn.Module) -> bool:
    """Return whether peft has put adapters into a module, or wrapped it."""
    outers = [each for name, each in model.named_modules() if not name or place == name or place.startswith(f"{name}.")]
    return any(hasattr(each, "peft_config") for each in outers) or bool(
        getattr(module, "_hf_peft_config_loaded", False)
    )


def _described(module: Any) -> dict[str, Any]:
    description: dict[str, Any] = {
        "architecture": type(module).__name__.removeprefix(_FSDP),
        "config": json.loads(module.config.to_json_string()),
    }
    if callable(getattr(module, "can_generate", None)) and module.can_generate():
        generation = json.loads(module.generation_config.to_json_string())
        generation.pop("compile_config", None)  # as save_pretrained does
        description["generation_config"] = generation
    if tied := tied_names(module):
        description["tied"] = tied
    return description


def tied_names(module: Any) -> list[str]:
    """Return the names of a model of transformers that it ties again to others when it is loaded."""
    named: dict[str, Any] = {**module.state_dict(keep_vars=True)}
    found = getattr(module, "all_tied_weights_keys", None)
    if isinstance(found, dict):  # since transformers 5: {name: the name that stays}
        return [name for name, other in found.items() if name in named and named.get(other) is named[name]]
    patterns = getattr(module, "_tied_weights_keys", None) or []
    fitting = [name for name in named if any(re.search(pattern, name) for pattern in patterns)]
    others = {id(value) for name, value in named.items() if name not in fitting}
    return [name for name in fitting if id(named[name]) in others]
