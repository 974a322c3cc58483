"""Save objects while an engine runs, keep the newest or the best of them, and load them again.

*Contract*: `trainer.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint(to_save, save_handler))` saves the
`state_dict` of every object in `to_save` each time the event fires. An old checkpoint is removed only after the new one
is safe. A save handler is a directory (files by `DiskSaver`), a `DiskSaver`, a `DirectorySaver`, or any callable
`(checkpoint, filename, metadata)`. Old checkpoints are removed by its `remove(filename)`, if it has one.

On several ranks pass the `backend`. Every rank calls the handler, and one rank writes (all ranks, if the save handler
has `every_rank`). All ranks take the score of the rank that writes. If that rank fails, all ranks fail.

File names, such as `checkpoint_50000.pt` and `best_model_7_accuracy=0.9150.pt`:

    [PREFIX_]NAME[_STEP][_SCORENAME=SCORE].pt       NAME: the object's name if there is one object, or "checkpoint"
"""

import copy
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from disttrain.checkpoint import DiskSaver, on_one_rank
from disttrain.checkpoint.agree import CheckpointRanks
from disttrain.engine import Engine
from disttrain.handlers.checkpoint_moment import saves_alone, warn_of_open_iteration, warn_of_scaler
from disttrain.handlers.rotation import SavedCheckpoint, rotated, score_as_number, should_save
from disttrain.handlers.stateful import bare, listed, load_objects, map_objects, strongly, weakly

T = TypeVar("T")

SaveHandler = Callable[..., Any]
"""`(checkpoint, filename, metadata)`, or `(checkpoint, filename)`. It may have:

- `remove(filename)`, which removes what was saved under that name;
- `filename_pattern`, the pattern of its file names;
- `at_least`, the fewest checkpoints that it keeps;
- `every_rank = True`: every rank calls it, and it makes them agree;
- `saved() -> [(step, filename)]`, oldest first: the checkpoints of an earlier process, which are removed in turn.
"""

_FIELDS = ("filename_prefix", "name", "global_step", "score_name", "score", "ext")
_SELF = "checkpointer"


class Checkpoint:
    """Saves `to_save` when called with an engine.

    - `to_save`: a dict from names to objects with `state_dict`, or to lists or dicts of such objects. A wrapped model
      (DataParallel, DistributedDataParallel, torch.compile) is saved as the bare model. An Engine is held weakly.
    - `score_function(engine)`: higher is better; the `n_saved` best are kept instead of the newest. With only a
      `score_name` the score is `engine.state.metrics[score_name]`. A nan is worse than any number.
    - `n_saved`: None keeps all.
    - `global_step_transform(engine, event)`: the step in the file name, by default the iterations of `engine`. The
      handler of an evaluator needs one that returns the step of the trainer.
    - `include_self`: the list of saved checkpoints is saved too, as "checkpointer".
    - `greater_or_equal`: an equal score replaces the oldest of the worst.
    - `keeps(filename)`: True for a checkpoint that stays beside the `n_saved` ones.
    """

    def __init__(
        self,
        to_save: Mapping[str, Any],
        save_handler: str | Path | SaveHandler,
        filename_prefix: str = "",
        score_function: Callable[[Engine], Any] | None = None,
        score_name: str | None = None,
        n_saved: int | None = 1,
        global_step_transform: Callable[[Engine, Any], int] | None = None,
        filename_pattern: str | None = None,
        include_self: bool = False,
        greater_or_equal: bool = False,
        save_on_rank: int = 0,
        backend: CheckpointRanks | None = None,
        keeps: Callable[[str], bool] | None = None,
    ) -> None:
        if not isinstance(to_save, Mapping):
            raise TypeError(f"expected to_save to be a dict of objects, got {type(to_save).__name__}")
        if not to_save:
            raise ValueError("expected at least one object in to_save, got none")
        if include_self and _SELF in to_save:
            raise ValueError(f"to_save has the name {_SELF!r}, which include_self=True takes; choose another name")
        for argument, value in (("score_function", score_function), ("global_step_transform", global_step_transform)):
            if value is not None and not callable(value):
                raise TypeError(f"expected {argument} to be callable, got {type(value).__name__}")
        if n_saved is not None and n_saved < 1:
            raise ValueError(f"expected n_saved to be at least 1, or None to keep all, got {n_saved}")
        self._objects = map_objects(dict(to_save), weakly)
        if isinstance(save_handler, (str, Path)):
            save_handler = DiskSaver(save_handler)
        if not callable(save_handler):
            raise TypeError(f"expected save_handler to be a directory or callable, got {type(save_handler).__name__}")
        if score_function is None and score_name is not None:
            score_function = self.get_default_score_fn(score_name)
        self.save_handler: SaveHandler = save_handler
        self.filename_prefix = filename_prefix
        self.score_function = score_function
        self.score_name = score_name
        self.n_saved = None if n_saved is None else max(n_saved, getattr(save_handler, "at_least", 1))
        self.global_step_transform = global_step_transform
        self.include_self = include_self
        self.greater_or_equal = greater_or_equal
        self.save_on_rank = save_on_rank
        self._keeps = keeps or (lambda _filename: False)
        self._backend = backend
        self._with_metadata = _takes_metadata(save_handler)
        self._pattern = self._choose_pattern(filename_pattern or getattr(save_handler, "filename_pattern", None))
        self._saved: list[SavedCheckpoint] = []
        self._knows_saved = False

    def _choose_pattern(self, given: str | None) -> str:
        if given is None:
            scored = self.score_function is not None
            return self.setup_filename_pattern(
                with_prefix=bool(self.filename_prefix),
                with_score=scored,
                with_score_name=scored and self.score_name is not None,
                with_global_step=not scored or self.global_step_transform is not None,
            )
        try:
            given.format(filename_prefix="", name="", global_step=0, score_name="", score="", ext="")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"filename_pattern={given!r} cannot be filled in; use the fields {_FIELDS}") from error
        return given

    def attach(self, engine: Engine, event: Any) -> Any:
        """Save each time `event` of `engine` fires; return a handle whose `remove()` ends that."""
        return engine.add_event_handler(event, self)

    def __call__(self, engine: Engine, exception: BaseException | None = None) -> None:
        """Save, if there is room or the score is better than the worst; then remove a surplus checkpoint.

        After an exception on several ranks, `save_on_rank` saves alone, and the exception is raised again: a rank that
        went on by itself would no longer be at the step of the others.
        """
        warn_of_open_iteration(listed(self._objects), exception)
        warn_of_scaler(listed(self._objects))
        if exception is None or self._backend is None or self._backend.world_size == 1:
            self._save(engine)
            return
        if saves_alone(self._backend, exception, self.save_handler, self.save_on_rank):
            alone = copy.copy(self)
            alone._backend = None
            alone._save(engine)
            self._saved = alone._saved
        raise exception

    def _save(self, engine: Engine) -> None:
        global_step, priority = self._step_and_priority(engine)
        self._list_saved()
        scored = self.score_function is not None
        if not should_save(
            self._saved, priority, scored=scored, n_saved=self.n_saved, equal_is_better=self.greater_or_equal
        ):
            return
        filename = self._filename(global_step, priority)
        new = SavedCheckpoint(priority, filename)
        saved, removed = rotated(self._saved, new, scored=scored, n_saved=self.n_saved, keeps=self._keeps)
        name = "_".join(filter(None, (self.filename_prefix, self._name())))
        metadata = {"basename": name, "score_name": self.score_name, "priority": priority, "global_step": global_step}

        self._gather_windows()

        def write() -> None:
            arguments = (self._collect(saved), filename, metadata)
            self.save_handler(*(arguments if self._with_metadata else arguments[:2]))

        self._on_writers(write)
        self._saved = saved
        if removed and hasattr(self.save_handler, "remove"):
            self._on_writers(lambda: self._remove(removed))

    def _gather_windows(self) -> None:
        """Bring together the gradients of open accumulation windows, which under DDP are other ones on each rank."""
        for engine in listed(self._objects):
            if isinstance(engine, Engine) and engine.window is not None and self._backend is not None:
                engine.window.gather(self._backend.all_gather)

    def _remove(self, checkpoints: list[SavedCheckpoint]) -> None:
        for checkpoint in checkpoints:
            self.save_handler.remove(checkpoint.filename)  # type: ignore[attr-defined]

    def _on_writers(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank, or on one rank while the others wait, as the save handler needs it."""
        if getattr(self.save_handler, "every_rank", False):
            return action()
        return on_one_rank(self._backend, action, self.save_on_rank)

    def _step_and_priority(self, engine: Engine) -> tuple[int, int | float]:
        """Return the step for the file name and the priority: those of one rank, on all ranks."""
        transform = self.global_step_transform
        global_step = engine.state.iteration if transform is None else transform(engine, engine.last_event_name)
        priority = global_step if self.score_function is None else score_as_number(self.score_function(engine))
        if self._backend is not None and self._backend.world_size > 1:
            global_step, priority = self._backend.broadcast((global_step, priority), source=self.save_on_rank)
        return global_step, priority

    def _list_saved(self) -> None:
        """Before the first save, list the checkpoints that an earlier process saved."""
        if not self._knows_saved and self.score_function is None and hasattr(self.save_handler, "saved"):
            listed = self._on_writers(self.save_handler.saved)
            self._saved = [SavedCheckpoint(step, filename) for step, filename in listed]
        self._knows_saved = True

    def _name(self) -> str:
        return next(iter(self._objects)) if len(self._objects) == 1 and not self.include_self else "checkpoint"

    def _filename(self, global_step: int, priority: int | float) -> str:
        return self._pattern.format(
            filename_prefix=self.filename_prefix,
            name=self._name(),
            global_step=global_step,
            score_name=self.score_name,
            score=str(priority) if isinstance(priority, int) else f"{priority:.4f}",
            ext="pt",
        )

    @property
    def to_save(self) -> dict[str, Any]:
        """The objects that are saved."""
        objects: dict[str, Any] = map_objects(self._objects, strongly)
        return objects

    def _collect(self, saved: list[SavedCheckpoint]) -> Any:
        """Return the states of all objects by name; of a single object its state alone."""
        checkpoint = map_objects(self._objects, lambda obj, path: bare(strongly(obj, path)).state_dict())
        if self.include_self:
            checkpoint[_SELF] = _own_state(saved)
        elif len(checkpoint) == 1:
            return checkpoint[self._name()]
        return checkpoint

    @property
    def last_checkpoint(self) -> str | Path | None:
        """The newest checkpoint, or the best: its path, or its name if the save handler has no `dirname`."""
        if not self._saved:
            return None
        filename = self._saved[-1].filename
        dirname = getattr(self.save_handler, "dirname", None)
        if dirname is None or "://" in str(dirname):
            return filename if dirname is None else f"{dirname}/{filename}"
        return Path(dirname) / filename

    def reset(self) -> None:
        """Forget the saved checkpoints, for another run with the same handler; nothing is removed."""
        self._saved = []
        self._knows_saved = True

    def state_dict(self) -> dict[str, Any]:
        """Return the list of saved checkpoints, as plain values."""
        return _own_state(self._saved)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the list of saved checkpoints."""
        self._saved = [SavedCheckpoint(priority, filename) for priority, filename in state_dict["_saved"]]

    @staticmethod
    def get_default_score_fn(metric_name: str, score_sign: float = 1.0) -> Callable[[Engine], Any]:
        """Return a score function: a metric of the engine, times `score_sign` (-1.0 for a loss or an error)."""
        if score_sign not in (1.0, -1.0):
            raise ValueError(f"expected score_sign to be 1.0 or -1.0, got {score_sign}")

        def score(engine: Engine) -> Any:
            metrics = engine.state.metrics
            if metric_name not in metrics:
                raise ValueError(f"expected a metric {metric_name!r} of this engine, got {sorted(metrics)}")
            return score_sign * metrics[metric_name]

        return score

    @staticmethod
    def setup_filename_pattern(
        with_prefix: bool = True, with_score: bool = True, with_score_name: bool = True, with_global_step: bool = True
    ) -> str:
        """Return the pattern of file names with these parts."""
        if not (with_score or with_global_step):
            raise ValueError("expected with_score or with_global_step, got neither: then all names are the same")
        if with_score_name and not with_score:
            raise ValueError("expected with_score=True beside with_score_name=True, got with_score=False")
        score = ("_{score_name}={score}" if with_score_name else "_{score}") if with_score else ""
        return f"{'{filename_prefix}_' * with_prefix}{{name}}{'_{global_step}' * with_global_step}{score}.{{ext}}"

    load_objects = staticmethod(load_objects)


def _own_state(saved: list[SavedCheckpoint]) -> dict[str, Any]:
    return {"_saved": [(checkpoint.priority, checkpoint.filename) for checkpoint in saved]}


def _takes_metadata(save_handler: SaveHandler) -> bool:
    """Return True if the save handler takes (checkpoint, filename, metadata), and not (checkpoint, filename)."""
    try:
        inspect.signature(save_handler).bind(None, None, None)
    except (TypeError, ValueError) as error:
        return isinstance(error, ValueError)  # a builtin has no signature
    return True
