"""WHEN things happen: an engine calls a process function on batch after batch and fires events around it."""

from disttrain.engine.deterministic import (
    DeterministicEngine,
    ReproducibleBatchSampler,
    keep_random_state,
    update_dataloader,
)
from disttrain.engine.engine import Engine
from disttrain.engine.evaluation import (
    create_supervised_evaluator,
    supervised_evaluation_step,
    supervised_evaluation_step_amp,
)
from disttrain.engine.events import CallableEventWithFilter, EventEnum, Events, EventsList, RemovableEventHandle
from disttrain.engine.state import State
from disttrain.engine.supervised import (
    create_supervised_trainer,
    supervised_training_step,
    supervised_training_step_amp,
    supervised_training_step_apex,
    supervised_training_step_tpu,
)

__all__ = [
    "CallableEventWithFilter",
    "DeterministicEngine",
    "Engine",
    "EventEnum",
    "Events",
    "EventsList",
    "RemovableEventHandle",
    "ReproducibleBatchSampler",
    "State",
    "create_supervised_evaluator",
    "create_supervised_trainer",
    "keep_random_state",
    "supervised_evaluation_step",
    "supervised_evaluation_step_amp",
    "supervised_training_step",
    "supervised_training_step_amp",
    "supervised_training_step_apex",
    "supervised_training_step_tpu",
    "update_dataloader",
]
