"""The places of a run's checkpoints: the run directory, `checkpoint.target`, and where earlier launches wrote.

*Contract*: without a target, checkpoints are in the run directory; with one, in TARGET/NAME, and
`checkpoints/elsewhere.txt` in the run directory then names that place. A run resumes from the newest checkpoint of all
these places, so a target may be set, changed or removed between two launches. Rank 0 decides for all ranks.
"""

from contextlib import suppress
from functools import partial
from pathlib import Path

from rich.console import Console

from disttrain.backend import Backend
from disttrain.checkpoint import (
    ELSEWHERE,
    AsynchronousSaver,
    CheckpointStore,
    DamagedError,
    DirectorySaver,
    Loaded,
    Manifest,
    folder_under,
    folders_of,
    is_url,
    load_newest_of,
    marked_place,
    on_one_rank,
    step_in,
    store_at,
)
from disttrain.config import Config, Description, binding_fields, blocking_differences, describe
from disttrain.errors import ConfigError
from disttrain.files import write_text
from disttrain.handlers.progress import warn
from disttrain.run.directory import RunDirectory
from disttrain.run.state import Run


def folder_of(config: Config, directory: RunDirectory) -> str | Path:
    """Return the path or URL that checkpoints are written to."""
    target = config.checkpoint.target
    if target is None:
        return directory.checkpoints
    folder = folder_under(target, str(config.name))
    return folder if is_url(folder) else Path(folder).absolute()


def refuse_fresh(config: Config, directory: RunDirectory, backend: Backend) -> None:
    """Raise ConfigError if `checkpoint.target` holds checkpoints from which a new run would resume."""
    if config.checkpoint.target is None:
        return
    target = folder_of(config, directory)
    with backend.agree("looking at checkpoint.target"):
        if backend.rank == 0 and (store_at(target).committed() or store_at(target).set_aside()):
            raise ConfigError(
                f"--fresh can move a run directory aside, but not the checkpoints in {target}; "
                "remove them, or choose another checkpoint.target or name=NAME"
            )


def load_newest_checkpoint(run: Run) -> Loaded | None:
    """Load the newest good checkpoint of all places that the run may have written to; None if there is none."""
    cuts = run.layout.cuts(run.parts, run.optimizer, run.kept)
    written_to = folder_of(run.config, run.directory)
    folders = on_one_rank(run.backend, lambda: folders_of(run.directory.checkpoints, written_to))
    with run.backend.agree("opening the checkpoints"):
        stores = [store_at(each) for each in folders]
        if run.backend.rank == 0:
            check_newest(run, stores[0])
    return load_newest_of(stores, run.backend, cuts, partial(accept, run))


def accept(run: Run, manifest: Manifest, place: str) -> None:
    """Check that a checkpoint is of this run, and set what must be known before its tensors are read.

    The state of an optimizer is found by the place of its parameters in the groups.
    """
    check_run(run, manifest, place)
    run.freezing.load(manifest.position)
    if run.frozen is not None:
        run.frozen.check(manifest.position)


def check_newest(run: Run, store: CheckpointStore) -> None:
    """Raise ConfigError if the store to which the run will write holds another run's checkpoints.

    They may be older than the run's own, and would be removed one by one as the oldest.
    """
    for name in store.committed():
        with suppress(DamagedError):  # found, and set aside, when it is loaded
            check_run(run, store.manifest(name), str(store.path(name)))
            return


def check_run(run: Run, manifest: Manifest, place: str) -> None:
    """Raise ConfigError for the checkpoint of a run whose binding fields are others; any place may hold one."""
    mine = binding_fields(describe(run.config))
    theirs: Description = dict(manifest.config)
    if not theirs:  # a checkpoint of an older release, or of a loop of one's own
        known: Description = {"seed": manifest.seed, "num_slots": manifest.num_slots}
        known["global_batch_size"] = manifest.position.get("global_batch_size")
        theirs = {name: value for name, value in known.items() if value is not None}
        mine = {name: mine[name] for name in theirs}
    if differing := blocking_differences(theirs, mine):
        listing = ", ".join(f"{each.field}={each.old} in the checkpoint, {each.new} here" for each in differing)
        raise ConfigError(
            f"the checkpoint {place} is of a run with other settings: {listing}; "
            "set them alike, give this run another name=NAME, or start anew with --fresh"
        )


def check_best(run: Run, console: Console) -> None:
    """Forget the best checkpoint, with a warning, if it is gone: an older checkpoint may still name it."""
    best = run.best
    if best is None or best.found is None:
        return
    step = best.found.step

    def is_there() -> bool:
        folders = folders_of(run.directory.checkpoints, folder_of(run.config, run.directory))
        return any(step in map(step_in, store_at(each).committed()) for each in folders)

    if not on_one_rank(run.backend, is_there):
        warn(
            console,
            f"the checkpoint of step {step}, which had the best {best.monitor}, is in no place of this run: "
            "the next evaluation counts as the best",
        )
        best.found = None


def saver_of(run: Run) -> DirectorySaver:
    """Return the save handler that the config asks for; before each update the run waits for its copies."""
    folder, guard = folder_of(run.config, run.directory), run.directory.check_held
    with run.backend.agree("opening checkpoint.target"):
        if not run.config.checkpoint.asynchronous:
            return DirectorySaver(folder, describe=run.checkpoint_info, backend=run.backend, guard=guard)
        # A forward may change parameters; only the optimizer's next step changes its state. A handler may change both.
        harmless = all(getattr(handler, "changes_nothing", False) for handler in run.config.handlers)
        later = (lambda name: name.startswith("optimizer.state.")) if harmless else None
        saver = AsynchronousSaver(folder, describe=run.checkpoint_info, backend=run.backend, later=later, guard=guard)
        run.updates.before_update.append(saver.copied)
        return saver


def note_target(run: Run) -> None:
    """Write the place of the checkpoints into the run directory before the first goes there; on rank 0."""
    run.directory.check_held()
    marker, text = run.directory.checkpoints / ELSEWHERE, f"{folder_of(run.config, run.directory)}\n"
    before = marker.read_text(encoding="utf-8") if marker.exists() else None
    if before != text and (before is not None or run.config.checkpoint.target is not None):
        write_text(marker, text)


def location(directory: RunDirectory, name: str) -> str:
    """Return the path or URL of a checkpoint, for a person; an upload's name has a few more letters."""
    place = None if (directory.checkpoints / name).is_dir() else marked_place(directory.checkpoints)
    return str(directory.checkpoints / name) if place is None else f"{place}/{name}"
