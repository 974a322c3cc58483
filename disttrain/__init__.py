"""disttrain: distributed training that is killed anywhere, resumed anywhere, and gives the same bits.

The public names. Each is loaded from its room when it is first used, so `import disttrain` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from disttrain.backend import Backend, connect, make_deterministic
    from disttrain.config import Config, load_config
    from disttrain.data import IndexShuffle, ReproducibleBatchSampler, SeededDataset, SlotBatchSampler, SlotLoader
    from disttrain.engine import (
        DeterministicEngine,
        Engine,
        EventEnum,
        Events,
        State,
        create_supervised_evaluator,
        create_supervised_trainer,
    )
    from disttrain.errors import (
        BackendError,
        CheckpointError,
        ConfigError,
        DataError,
        DisttrainError,
        NonFiniteError,
        RemoteError,
    )
    from disttrain.handlers import Checkpoint, DiskSaver
    from disttrain.parallel import SlotGradients, Slots
    from disttrain.seeding import keep_random_state, manual_seed, seed_for
    from disttrain.version import __version__

_ROOMS = {
    "backend": ("Backend", "connect", "make_deterministic"),
    "config": ("Config", "load_config"),
    "data": ("IndexShuffle", "ReproducibleBatchSampler", "SeededDataset", "SlotBatchSampler", "SlotLoader"),
    "engine": (
        "DeterministicEngine",
        "Engine",
        "EventEnum",
        "Events",
        "State",
        "create_supervised_evaluator",
        "create_supervised_trainer",
    ),
    "errors": (
        "BackendError",
        "CheckpointError",
        "ConfigError",
        "DataError",
        "DisttrainError",
        "NonFiniteError",
        "RemoteError",
    ),
    "handlers": ("Checkpoint", "DiskSaver"),
    "parallel": ("SlotGradients", "Slots"),
    "seeding": ("keep_random_state", "manual_seed", "seed_for"),
    "version": ("__version__",),
}
_ROOM = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "Backend",
    "BackendError",
    "Checkpoint",
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataError",
    "DeterministicEngine",
    "DiskSaver",
    "DisttrainError",
    "Engine",
    "EventEnum",
    "Events",
    "IndexShuffle",
    "NonFiniteError",
    "RemoteError",
    "ReproducibleBatchSampler",
    "SeededDataset",
    "SlotBatchSampler",
    "SlotGradients",
    "SlotLoader",
    "Slots",
    "State",
    "__version__",
    "connect",
    "create_supervised_evaluator",
    "create_supervised_trainer",
    "keep_random_state",
    "load_config",
    "make_deterministic",
    "manual_seed",
    "seed_for",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOM:
        raise AttributeError(f"module 'disttrain' has no attribute {name!r}")
    value = getattr(import_module(f"disttrain.{_ROOM[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
