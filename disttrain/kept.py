"""Where a run's checkpoints are kept, and how they get there: `checkpoint.target` and `checkpoint.asynchronous`.

*Contract*: without a target they lie in the run directory, with one in TARGET/NAME; `checkpoints/elsewhere.txt` in the
run directory then says where. A run goes on from the newest of all these places, so a target may be set, changed
or taken away between two launches. Only rank 0 decides; all ranks hear the same.
"""

from pathlib import Path

from rich.console import Console

from disttrain.backend import Backend
from disttrain.checkpoint import (
    ELSEWHERE,
    AsynchronousSaver,
    DirectorySaver,
    Loaded,
    folder_under,
    folders_of,
    is_url,
    load_newest_of,
    on_one_rank,
    place_of,
    step_in,
)
from disttrain.config import Config
from disttrain.errors import ConfigError
from disttrain.parallel.layout import Cuts
from disttrain.run import Run
from disttrain.run_directory import RunDirectory, write_text


def folder(config: Config, directory: RunDirectory) -> str | Path:
    """Return the path or URL that checkpoints are written to."""
    target = config.checkpoint.target
    if target is None:
        return directory.checkpoints
    place = folder_under(target, str(config.name))
    return place if is_url(place) else Path(place).absolute()


def refuse_fresh(config: Config, directory: RunDirectory, backend: Backend) -> None:
    """ConfigError where a run that is to begin anew would go on from what its target holds."""
    if config.checkpoint.target is None:
        return
    target = folder(config, directory)
    with backend.agree("looking at checkpoint.target"):
        if backend.rank == 0 and (place_of(target).committed() or place_of(target).set_aside()):
            raise ConfigError(
                f"--fresh: {target} holds the checkpoints of a run, which only a run directory's would make room; "
                "remove them, or choose another checkpoint.target or name=NAME"
            )


def load(made: Run, cuts: Cuts | None) -> Loaded | None:
    """Load the newest good checkpoint of all places that the run may have written to; None where there is none."""
    written_to = folder(made.config, made.directory)
    folders = on_one_rank(made.backend, lambda: folders_of(made.directory.checkpoints, written_to))
    with made.backend.agree("opening the checkpoints"):
        places = [place_of(each) for each in folders]
    return load_newest_of(places, made.backend, cuts)


def check_run(made: Run, found: Loaded) -> None:
    """ConfigError where a checkpoint is another run's, which a place that is shared may hold."""
    expected = {"seed": made.config.seed, "num_slots": made.slots.num_slots}
    got = {"seed": found.manifest.seed, "num_slots": found.manifest.num_slots}
    if differing := [name for name, value in got.items() if value not in (None, expected[name])]:
        said = ", ".join(f"{name}={got[name]} in the checkpoint, {expected[name]} here" for name in differing)
        raise ConfigError(
            f"the checkpoint {found.name} is of a run with other settings: {said}; "
            "set them alike, give this run another name=NAME, or start anew with --fresh"
        )


def check_best(made: Run, console: Console) -> None:
    """Forget the best checkpoint, and say so, where it is gone: one that a run goes back to may name it still."""
    best = made.best
    if best is None or best.found is None:
        return
    step = best.found.step

    def is_there() -> bool:
        folders = folders_of(made.directory.checkpoints, folder(made.config, made.directory))
        return any(step in map(step_in, place_of(each).committed()) for each in folders)

    if not on_one_rank(made.backend, is_there):
        said = f"the checkpoint of step {step}, which had the best {best.monitor}, is in no place of this run"
        console.print(f"WARNING: {said}: the next evaluation counts as the best", style="bold yellow", soft_wrap=True)
        best.found = None


def saver_of(made: Run) -> DirectorySaver:
    """Return the save handler that the config asks for."""
    where = folder(made.config, made.directory)
    with made.backend.agree("opening checkpoint.target"):
        if not made.config.checkpoint.asynchronous:
            return DirectorySaver(where, describe=made.about, backend=made.backend)
        # A forward may change parameters, but what an optimizer remembers only its next step; and handlers may, both.
        harmless = all(getattr(handler, "changes_nothing", False) for handler in made.config.handlers)
        later = (lambda name: name.startswith("optimizer.state.")) if harmless else None
        saver = AsynchronousSaver(where, describe=made.about, backend=made.backend, later=later)
        made.wait_for_copy = saver.copied
        return saver


def note_target(made: Run) -> None:
    """Leave word in the run directory of where the checkpoints are, before the first goes there; on rank 0."""
    marker, text = made.directory.checkpoints / ELSEWHERE, f"{folder(made.config, made.directory)}\n"
    before = marker.read_text(encoding="utf-8") if marker.exists() else None
    if before != text and (before is not None or made.config.checkpoint.target is not None):
        write_text(marker, text)


def where(directory: RunDirectory, name: str) -> str:
    """Return where a checkpoint of the run lies, for a person to find it; an upload has a few letters more."""
    marker = directory.checkpoints / ELSEWHERE
    if not marker.is_file() or (directory.checkpoints / name).is_dir():
        return str(directory.checkpoints / name)
    return f"{marker.read_text(encoding='utf-8').strip()}/{name}"
