"""The length of a run: what its config asks for, and the steps that this means for its data."""

from collections.abc import Mapping
from typing import Any

from disttrain.config import Config


def run_length(config: Config) -> dict[str, Any]:
    """Return the fields of a config that say how long its run is."""
    return {"max_epochs": config.max_epochs, "max_steps": config.max_steps}


def total_steps(config: Config, data: Mapping[str, Any]) -> int:
    """Return the steps of the whole run; `data` is what identifies the training data."""
    if config.max_steps is not None:
        return config.max_steps
    positions: int = data.get("order_length", data["dataset_length"])
    return (config.max_epochs or 0) * (positions // config.global_batch_size)
