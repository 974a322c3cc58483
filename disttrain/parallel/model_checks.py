"""Refuses a model whose gradients cannot have the same bits on any number of ranks, before its first step."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from disttrain.errors import ConfigError


def check_model(model: nn.Module, device: torch.device | None) -> None:
    """Raise ConfigError for a model whose gradients cannot be the same on any number of ranks."""
    for name, module in model.named_modules():
        described = f"{type(module).__name__.removeprefix('FSDP')} ({name or 'the model itself'})"
        if isinstance(module, nn.SyncBatchNorm):
            raise ConfigError(
                f"{described} normalises over the samples of all ranks, so its results change with their number; "
                "use BatchNorm, which here normalises over one slot on any number of ranks, GroupNorm or LayerNorm"
            )
        if isinstance(module, DistributedDataParallel):
            raise ConfigError(f"expected a bare model, got {described}; pass its `.module`: it is wrapped here")
        if getattr(module, "sparse", False) is True and isinstance(module, nn.Embedding | nn.EmbeddingBag):
            raise ConfigError(
                f"{described} has sparse gradients, which cannot be summed in a fixed order; use sparse=False"
            )
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            raise ConfigError(
                f"{described} has max_norm={module.max_norm}: its forward changes its weight, so results depend on "
                "which slots a rank runs; leave out max_norm, and clip the rows in a handler after the step"
            )
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not parameters:
        raise ConfigError(
            f"{type(model).__name__} has no parameter to train: it has none, or requires_grad is False for all"
        )
    for name, parameter in parameters.items():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ConfigError(f"the parameter {name} has no shape yet; run one forward of the lazy model first")
        if device is not None and parameter.device != torch.empty(0, device=device).device:
            raise ConfigError(f"expected the model on {device}, got the parameter {name} on {parameter.device}")
