"""The values of one checkpoint on the validation data: those that its run logged at that step, computed again.

*Contract*: the run is assembled as for a resume, its handlers called, and takes the checkpoint; then it is evaluated
and ends. Nothing is trained, locked or written here. The loss has the bits of the run's own evaluation on any number of
ranks; a metric that sums floats has them on the run's own number.

*Errors*: those of a resume; ConfigError for a run without validation data, or without the set that is asked for.
"""

import json
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

from rich.console import Console

from disttrain.backend import Backend, make_deterministic, refused_operations_named, set_tf32
from disttrain.checkpoint import CheckpointStore, load_from
from disttrain.config import Config
from disttrain.errors import ConfigError
from disttrain.evidence.evaluations import with_evaluations
from disttrain.files import json_text
from disttrain.run.assemble import assemble
from disttrain.run.beginning import initial_weights
from disttrain.run.checkpoint_places import accept
from disttrain.run.directory import RunDirectory
from disttrain.run.evaluation import Evaluation
from disttrain.run.resume import check_freezing, load_parts, warn_of_kernels
from disttrain.run.validation_sets import ValidationSets


class CheckpointValues(NamedTuple):
    """The values of a checkpoint, beside those that its run logged at the same step."""

    step: int
    values: dict[str, Any]
    logged: dict[str, Any] | None
    """Those of the same names that the run logged; None if it did not evaluate at this step."""

    @property
    def differing(self) -> list[str]:
        """The names whose values are not those that the run logged."""
        as_logged = json.loads(json_text(self.values))  # nan is null there
        return [] if self.logged is None else [name for name in as_logged if as_logged[name] != self.logged.get(name)]


def evaluate_checkpoint(
    config: Config,
    backend: Backend,
    directory: RunDirectory,
    store: CheckpointStore,
    name: str,
    data: str | None,
    console: Console,
) -> CheckpointValues:
    """Evaluate one checkpoint of the run in `directory`, on the set `data` or on all; every rank calls this."""
    with backend.agree("choosing deterministic kernels"):
        make_deterministic(config.cpu_threads, strict=config.deterministic)
        set_tf32(config.tf32)
    with refused_operations_named():
        initial = initial_weights(config, directory, backend, fresh=False)
        run = assemble(config, backend, directory, {}, initial)
        try:
            with backend.agree("choosing the validation data"):
                evaluation = chosen(run.evaluation, data)
            cuts = run.layout.cuts(run.parts, run.optimizer, run.kept)
            found = load_from(store, name, backend, cuts, partial(accept, run))
            position = found.manifest.position
            warn_of_kernels(run, position, console)
            load_parts(run, found.state, position, console)
            run.load_position(position)
            check_freezing(run, position)
            values = evaluation.run()
        finally:
            run.close()
    assert values is not None, "nothing stops this evaluation"
    return CheckpointValues(found.manifest.step, values, logged_at(directory, found.manifest.step, values))


def chosen(evaluation: Evaluation | ValidationSets | None, data: str | None) -> Evaluation | ValidationSets:
    """Return the evaluation of all validation data, or of the set `data` alone."""
    if evaluation is None:
        raise ConfigError("expected a run with validation data, got one whose config has no valid_data")
    if data is None:
        return evaluation
    sets = evaluation.by_set if isinstance(evaluation, ValidationSets) else {}
    if data not in sets:
        known = f"one of {', '.join(sets)}" if sets else "none, for the run's validation data has no sets with names"
        raise ConfigError(f"--data {data}: expected {known}")
    return ValidationSets({data: sets[data]})


def logged_at(directory: RunDirectory, step: int, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the values of these names that the run logged at a step; None if it logged none."""
    line = with_evaluations({step: {}}, directory.metrics / "valid.jsonl")[step].get("evaluation")
    found = {name: line[name] for name in values if name in line} if line else {}
    return found or None
