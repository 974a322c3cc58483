"""WHEN things happen: an engine calls a process function on batch after batch and fires events around it.

events                 the events of a run, and filters on them
signatures             checks that a callable takes the arguments with which it will be called
state                  counters, limits, batch and output of a run
registration           a handler on an event, and when it is next due
emitter                adds and removes handlers, fires events
run_plan               the start and the limits of a run; the dict in which they are saved
cursor                 the position of a run in the loop
control                stop, pause, other data, save, load, copy
engine                 the loop, and `Engine.run`
deterministic          an engine whose batches are a function of a seed and the iteration
step_defaults          types, defaults and checks of the supervised factories
supervised             the one training step body and its factories
supervised_evaluation  the evaluation step and its factories
"""

from disttrain.engine.deterministic import (
    DeterministicEngine,
    ReproducibleBatchSampler,
    keep_random_state,
    update_dataloader,
)
from disttrain.engine.emitter import RemovableEventHandle
from disttrain.engine.engine import Engine
from disttrain.engine.events import CallableEventWithFilter, EventEnum, Events, EventsList, RunEvents
from disttrain.engine.state import State
from disttrain.engine.supervised import (
    create_supervised_trainer,
    supervised_training_step,
    supervised_training_step_amp,
    supervised_training_step_apex,
    supervised_training_step_tpu,
)
from disttrain.engine.supervised_evaluation import (
    create_supervised_evaluator,
    supervised_evaluation_step,
    supervised_evaluation_step_amp,
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
    "RunEvents",
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
