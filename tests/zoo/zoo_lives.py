"""Lives of a variant on ranks of the pool: trained whole, or killed after a checkpoint and resumed on other ranks.

A variant is one small Config. Its fields are made anew on each rank, from the name of its module and its own name:
functions of a Config need not travel. A kill is an exception at a step, on all ranks; the next life assembles the run
anew from its directory.
"""

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from ranks import Died, Err, Ok, Ranks
from rich.console import Console
from torch import nn
from torch.utils.data import TensorDataset
from zoo_plain import plain_losses

from disttrain import Config, Events
from disttrain.backend import Backend
from disttrain.config import CheckpointConfig, LedgerConfig, LogConfig, ValidateConfig, replace
from disttrain.errors import ConfigError, RemoteError
from disttrain.handlers.preemption import Preemption
from disttrain.run.directory import RunDirectory
from disttrain.run.train import train

KILLED_AT = 5
"""Steps are 1 to 9 in 3 epochs; checkpoints are saved after each second one."""

Fields = dict[str, Any]


class Killed(Exception):
    """Ends a life as SIGKILL would."""


@dataclass(frozen=True)
class Life:
    """One life of a run: so many ranks, to KILLED_AT or to the end."""

    world_size: int
    strategy: str = "ddp"
    killed: bool = False


WHOLE = (Life(1),)
"""The reference."""
RESIZED = {
    "ddp": (Life(3, "ddp", killed=True), Life(2, "ddp")),
    "fsdp": (Life(3, "fsdp", killed=True), Life(2, "fsdp")),
}
"""With 3 slots each rank of the first lives has one slot, and a rank of the second ones two."""
ONE_RANK_SHARDED = (Life(1, "fsdp"),)


@dataclass(frozen=True)
class Outcome:
    """How a life ended: "completed", "killed", or the type of an error, and its message."""

    status: str
    message: str = ""
    num_steps: int = 0


def points(n: int = 36, d: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> TensorDataset:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return TensorDataset(x, x.sum(1, keepdim=True))


def mlp(d: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(d, 8), nn.Tanh(), nn.Linear(8, 1))


USUAL: Fields = {
    "seed": 3,
    "model": mlp,
    "train_data": points,
    "valid_data": lambda: points(10, seed=5),
    "loss": nn.MSELoss(),
    "optimizer": partial(torch.optim.AdamW, lr=1e-2),
    "global_batch_size": 12,
    "num_slots": 3,
    "max_epochs": 3,
    "timeout_s": 45.0,
    "checkpoint": CheckpointConfig(every_steps=2, monitor="loss"),
    "log": LogConfig(every_steps=2, tensorboard=False),
    "ledger": LedgerConfig(every_steps=1),
    "validate": ValidateConfig(every_steps=3),
}
"""What a variant's fields begin with."""


class HasFields(Protocol):
    """A variant that is an object, such as a random program."""

    def fields(self) -> Fields: ...

    def step_begins(self, model: nn.Module, step: int) -> None:
        """Change the model as a handler does when a step begins."""


Variant = str | HasFields
"""An object, or "module.name" of a variant in `VARIANTS`."""


def config_of(variant: Variant) -> Config:
    """Return the Config of a variant; with `forward` there is no loss unless the variant says so."""
    if isinstance(variant, str):
        module, _, name = variant.partition(".")
        fields = importlib.import_module(module).VARIANTS[name]()
    else:
        fields = variant.fields()
    usual = {**USUAL, "name": "run"} | ({"loss": None} if "forward" in fields else {})
    return Config(**(usual | fields))


def live(backend: Backend, variant: Variant, life: Life, folder: str) -> Outcome:
    """Live on one rank; return how it ended, by the failure that came first on any rank."""
    steps: list[int] = []

    def count_and_die(trainer: Any, run: Any) -> None:
        def note(engine: Any) -> None:
            steps.append(engine.state.iteration)
            if life.killed and engine.state.iteration == KILLED_AT:
                raise Killed

        trainer.add_event_handler(Events.ITERATION_COMPLETED, note)
        if not isinstance(variant, str):
            trainer.add_event_handler(
                Events.ITERATION_STARTED, lambda engine: variant.step_begins(run.model, engine.state.iteration)
            )

    try:
        config = config_of(variant)
        config = replace(config, strategy=life.strategy, handlers=(*config.handlers, count_and_die))
        directory = RunDirectory(Path(folder))
        console = Console(quiet=True)
        with Preemption(backend, starting=True) as preemption:
            train(config, backend, directory, console, preemption)
    except Killed:
        return Outcome("killed", num_steps=len(steps))
    except Exception as error:
        status, message = first_failure(error, backend)
        return Outcome(status, message, num_steps=len(steps))
    return Outcome("completed", num_steps=len(steps))


def live_plainly(backend: Backend, variant: Variant) -> list[list[str]] | None:
    """Return the slots' losses by the plain loop; None for a variant that is more than a loop."""
    config = config_of(variant)
    if isinstance(variant, str) and "plateau" in variant.lower():
        return None  # its schedule follows the evaluations
    if config.updates:
        return None  # test_run_several_updates.py compares them with a loop by hand
    if config.global_loss is not None:
        return None  # it runs each slot twice; test_run_global_loss.py compares it with a loop over whole batches
    if (
        config.early_stop.monitor is not None
        or config.handlers
        or config.precision not in ("fp32", "bf16")
        or config.on_nan != "stop"
    ):
        return None
    return plain_losses(config, backend, None if isinstance(variant, str) else variant.step_begins)


def first_failure(error: Exception, backend: Backend) -> tuple[str, str]:
    """Return type and message of the error that came first on any rank, as the launcher finds it."""
    if not isinstance(error, RemoteError):
        first = None if isinstance(error, ConfigError) else backend.first_failure(wait_s=0.5)
        if first is None:
            backend.fail(error)
            first = backend.first_failure(wait_s=0.0)
        if first is None or first.rank == backend.rank:
            return type(error).__name__, str(error)
        error = first
    status, _, message = error.message.partition(": ")
    return status, message


def run_lives(ranks: Ranks, variant: Variant, lives: tuple[Life, ...], folder: Path) -> list[Outcome]:
    """Live one life after the other in one run directory; return the outcomes of the last life's ranks."""
    outcomes: list[Outcome] = []
    for life in lives:
        lived = ranks.outcomes(life.world_size, live, variant, life, str(folder), timeout_s=150.0)
        outcomes = [each.value if isinstance(each, Ok) else ended(each) for each in lived]
        if any(outcome.status != ("killed" if life.killed else "completed") for outcome in outcomes):
            break
    return outcomes


def ended(outcome: Err | Died) -> Outcome:
    """Return the outcome of a rank that did not report its end itself."""
    return Outcome("raised", outcome.text) if isinstance(outcome, Err) else Outcome("died", outcome.log.strip())


def evidence(folder: Path) -> Mapping[str, Any]:
    """Return the traces of a whole run: each step's hashes and losses, the curves, the results, the best step."""
    result = json.loads((folder / "result.json").read_text())
    same = ("status", "step", "epoch", "metrics", "train", "params_sha256", "best", "stopped", "skipped_steps")
    same += ("rollbacks",)
    found: dict[str, Any] = {key: result.get(key) for key in same}
    for file in ("ledger.jsonl", "metrics/train.jsonl", "metrics/valid.jsonl"):
        path = folder / file
        found[file] = path.read_text().splitlines() if path.exists() else []
    return found


def difference_from_plain(one: Mapping[str, Any], plain: list[list[str]]) -> str:
    """Return in words the first step whose slots have other losses than those of the plain loop."""
    lines = [json.loads(line) for line in one["ledger.jsonl"]]
    losses = [line["slots"]["loss"] for line in lines if "slots" in line]
    assert len(losses) == len(plain), f"{len(losses)} steps, {len(plain)} plain ones"
    for step, (mine, theirs) in enumerate(zip(losses, plain, strict=True), 1):
        if [float.fromhex(loss).hex() for loss in mine] != [float.fromhex(loss).hex() for loss in theirs]:
            return f"the slots of step {step} have the losses {mine}, in a plain loop {theirs}"
    return ""


def difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return in words where two runs differ first; nothing if they do not."""
    for key in ("ledger.jsonl", "metrics/train.jsonl", "metrics/valid.jsonl"):
        for left, right in zip(one[key], other[key], strict=False):
            if left != right:
                first, second = json.loads(left), json.loads(right)
                parts = {k: (first.get(k), second.get(k)) for k in first if first.get(k) != second.get(k)}
                return f"{key} at step {first.get('step')}: {_shorter(parts)}"
        if len(one[key]) != len(other[key]):
            return f"{key}: {len(one[key])} and {len(other[key])} lines"
    differing = [f"{key}: {one[key]} and {other[key]}" for key in one if one[key] != other[key]]
    return "; ".join(differing)


def _shorter(parts: Mapping[str, tuple[Any, Any]]) -> str:
    """Return differing fields as text; of the hashes of a state only those that differ."""
    shown = []
    for key, (left, right) in parts.items():
        if isinstance(left, dict) and isinstance(right, dict):
            names = [name for name in sorted({*left, *right}) if left.get(name) != right.get(name)]
            shown.append(f"{key} of {', '.join(names)}")
        else:
            shown.append(f"{key} {left} and {right}")
    return "; ".join(shown)
