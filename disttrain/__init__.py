"""disttrain: distributed training that is killed anywhere, resumed anywhere, and gives the same bits.

These are the public names. Each name is loaded from its room at its first use, so `import disttrain` loads nothing.
Type checkers read the imports below; they and `_ROOMS` hold the same names (tests/test_package.py).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from disttrain.backend import Backend as Backend
    from disttrain.backend import connect as connect
    from disttrain.backend import make_deterministic as make_deterministic
    from disttrain.config import Config as Config
    from disttrain.config import Update as Update
    from disttrain.config import load_config as load_config
    from disttrain.data import IndexShuffle as IndexShuffle
    from disttrain.data import ReproducibleBatchSampler as ReproducibleBatchSampler
    from disttrain.data import SeededDataset as SeededDataset
    from disttrain.data import SlotBatchSampler as SlotBatchSampler
    from disttrain.data import SlotLoader as SlotLoader
    from disttrain.decay import parameter_groups as parameter_groups
    from disttrain.engine import DeterministicEngine as DeterministicEngine
    from disttrain.engine import Engine as Engine
    from disttrain.engine import EventEnum as EventEnum
    from disttrain.engine import Events as Events
    from disttrain.engine import RunEvents as RunEvents
    from disttrain.engine import State as State
    from disttrain.engine import create_supervised_evaluator as create_supervised_evaluator
    from disttrain.engine import create_supervised_trainer as create_supervised_trainer
    from disttrain.errors import BackendError as BackendError
    from disttrain.errors import CheckpointError as CheckpointError
    from disttrain.errors import ConfigError as ConfigError
    from disttrain.errors import DataError as DataError
    from disttrain.errors import DisttrainError as DisttrainError
    from disttrain.errors import NonFiniteError as NonFiniteError
    from disttrain.errors import RemoteError as RemoteError
    from disttrain.handlers import Checkpoint as Checkpoint
    from disttrain.handlers import DiskSaver as DiskSaver
    from disttrain.parallel import SlotGradients as SlotGradients
    from disttrain.parallel import Slots as Slots
    from disttrain.seeding import keep_random_state as keep_random_state
    from disttrain.seeding import manual_seed as manual_seed
    from disttrain.seeding import seed_for as seed_for
    from disttrain.version import __version__ as __version__

_ROOMS = {
    "backend": ["Backend", "connect", "make_deterministic"],
    "config": ["Config", "Update", "load_config"],
    "data": ["IndexShuffle", "ReproducibleBatchSampler", "SeededDataset", "SlotBatchSampler", "SlotLoader"],
    "decay": ["parameter_groups"],
    "engine": [
        *("DeterministicEngine", "Engine", "EventEnum", "Events", "RunEvents", "State"),
        *("create_supervised_evaluator", "create_supervised_trainer"),
    ],
    "errors": [
        *("BackendError", "CheckpointError", "ConfigError", "DataError"),
        *("DisttrainError", "NonFiniteError", "RemoteError"),
    ],
    "handlers": ["Checkpoint", "DiskSaver"],
    "parallel": ["SlotGradients", "Slots"],
    "seeding": ["keep_random_state", "manual_seed", "seed_for"],
    "version": ["__version__"],
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__: list[str] = sorted(_ROOM_OF)  # noqa: PLE0605 - type checkers read the imports above


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'disttrain' has no attribute {name!r}")
    value = getattr(import_module(f"disttrain.{_ROOM_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__.copy()
