"""`disttrain checkpoint ls | show | verify | prune | export RUN`: what is kept of a run, and what may go.

*Contract*: RUN is a run directory, its folder of checkpoints, or one checkpoint in it. Only `prune --yes` changes
anything there; `export` writes one file elsewhere. Exit code 0: done, and all that was looked at is good; 1: something
is damaged; 2: it cannot be done so.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from disttrain.checkpoint import (
    ELSEWHERE,
    MANIFEST,
    DamagedError,
    Manifest,
    Place,
    best_of,
    export,
    folder_under,
    folders_of,
    inspect,
    is_url,
    place_of,
    plan_prune,
    step_in,
    step_of,
    survey,
    tensors_of,
)
from disttrain.config import from_json
from disttrain.errors import CheckpointError, ConfigError, DisttrainError

GOOD, DAMAGED, USAGE = 0, 1, 2
WIDTH_OF_A_FILE = 160
"""Columns where there is no terminal, as in a pipe: nothing is folded there."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line says; return the exit code."""
    options = parser().parse_args(arguments)
    console = Console(
        highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE
    )
    try:
        found = find(options.run, getattr(options, "step", None), best=getattr(options, "best", False))
        code: int = options.command(found.place, found.name, options, console)
        for other in found.others if found.name is None else []:
            if not (names := other.committed()):
                continue
            if options.command is verify_them:
                code = max(code, verify_them(other, None, options, console))
            elif options.command in (list_them, prune_them):
                steps = ", ".join(str(step_in(each)) for each in names)
                console.print(f"older ones, in {plain(str(other))}: {steps}", soft_wrap=True)
        return code
    except DisttrainError as error:
        print(f"{type(error).__name__}: {plain(str(error))}", file=sys.stderr)
        return DAMAGED if isinstance(error, DamagedError) else USAGE


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    made = argparse.ArgumentParser(
        prog="disttrain checkpoint",
        description="Look at a run's checkpoints, check them, remove old ones, take the model out of one.",
        epilog="exit codes: 0: all that was looked at is good; 1: something is damaged; 2: it cannot be done so",
    )
    words = made.add_subparsers(required=True, metavar="ls | show | verify | prune | export")
    ls = words.add_parser("ls", help="list them with step, date, size and state")
    ls.add_argument("--quick", action="store_true", help="do not read the tensors: their state is complete, not good")
    show = words.add_parser("show", help="show what one says about itself, and its tensors")
    verify = words.add_parser("verify", help="hash every file of all, or of one")
    prune = words.add_parser("prune", help="remove all but the newest good ones and the best")
    prune.add_argument("--keep", metavar="N", type=int, default=2, help="how many good ones stay (2), at least 1")
    prune.add_argument("--damaged", action="store_true", help="remove the damaged ones, too")
    prune.add_argument("--yes", action="store_true", help="do it; without this it is only said what would be removed")
    model = words.add_parser("export", help="write the model of the newest, or of one, as one safetensors file")
    commands = ((ls, list_them), (show, show_one), (verify, verify_them), (prune, prune_them), (model, export_one))
    for word, command in commands:
        word.add_argument("run", metavar="RUN", help="a run directory, a folder of checkpoints, or its URL")
        word.set_defaults(command=command)
    model.add_argument("file", metavar="FILE", help="the new file, such as model.safetensors")
    for word in (show, verify, model):
        which = word.add_mutually_exclusive_group()
        which.add_argument("--step", metavar="N", type=int, help="the checkpoint of this step")
        which.add_argument("--best", action="store_true", help="the one with the best checkpoint.monitor")
    return made


class Found(NamedTuple):
    """What a command line means."""

    place: Place
    name: str | None
    others: Sequence[Place]
    """Where the run has, or had, checkpoints too."""


def find(run: str, step: int | None = None, *, best: bool = False) -> Found:
    """Return the place of checkpoints that is meant and, where one of them is, its name.

    A run's may lie in several: the one with the newest is meant, or the one that has the `step`, or the best.
    """
    if is_url(run):
        url, _, name = run.rstrip("/").rpartition("/")
        is_one = step_of(name.partition(".")[0]) is not None
        places, name = [place_of(url if is_one else run)], name if is_one else ""
    else:
        places, name = places_in(Path(run))
    if best:
        best_step = best_of([entry for place in places for entry in survey(place, quick=True)])
        if best_step is None:
            raise ConfigError(
                f"--best: the run keeps no best checkpoint in {listed(places)}; set checkpoint.monitor in its config"
            )
        step = best_step.step
    if step is None:
        return Found(places[0], name or None, places[1:])
    for place in places:
        for each in place.committed():
            if step_in(each) == step:
                return Found(place, each, [])
    if best:
        raise ConfigError(f"--best: the checkpoint of step {step}, which was the best, is gone from {listed(places)}")
    raise ConfigError(f"there is no checkpoint of step {step} in {listed(places)}; disttrain checkpoint ls shows all")


def listed(places: Sequence[Place]) -> str:
    """Return places for a person to read."""
    return " or ".join(map(str, places))


def places_in(path: Path) -> tuple[list[Place], str]:
    """Return the places of the checkpoints of a run directory or a folder, and the name of one if it is that.

    The place with the newest comes first.
    """
    if not path.is_dir():
        raise ConfigError(f"expected a run directory or a folder of checkpoints, found no directory {path}")
    name, target = path.resolve().name, target_of(path)
    if target is not None or (path / "checkpoints").is_dir():
        places = [place_of(each) for each in folders_of(path / "checkpoints", target)]
        return sorted(places, key=lambda place: -max(map(step_in, place.committed()), default=-1)), ""
    if step_of(name) is not None:
        return [place_of(path.resolve().parent)], name
    if (path / MANIFEST).exists():
        raise ConfigError(f"{path} is a checkpoint under another name than step-NNNNNNNN; rename it to be read here")
    return [place_of(path)], ""


def target_of(run: Path) -> str | None:
    """Return where a run keeps its checkpoints, if that is not its directory."""
    config_json = run / "config.json"
    if not config_json.is_file():
        return None
    fields = from_json(config_json.read_text(encoding="utf-8"), str(config_json)).fields
    target, name = fields.get("checkpoint.target"), fields.get("name")
    if not isinstance(target, str) or (run / "checkpoints" / ELSEWHERE).is_file():
        return None  # what the run itself left word of does not depend on where this is typed
    return folder_under(target, str(name))


def list_them(root: Place, name: str | None, options: argparse.Namespace, console: Console) -> int:
    """Print a table of all; 1 where one that a run would load is damaged."""
    entries = survey(root, quick=options.quick)
    if not entries:
        console.print(f"no checkpoints in {root}", soft_wrap=True)
        return GOOD
    table = Table(box=None, pad_edge=False)
    for heading in ("step", "date (UTC)", "size", "epoch", "ranks", "state"):
        table.add_column(heading, justify="left" if heading in ("date (UTC)", "state") else "right", no_wrap=True)
    table.add_column("", overflow="fold")
    best = best_of(entries)
    for entry in entries:
        date = f"{entry.written:%Y-%m-%d %H:%M:%S}" if entry.written else "-"
        size = "-" if entry.size_bytes is None else count_bytes(entry.size_bytes)
        ranks = "-" if entry.manifest is None else str(entry.manifest.world_size)
        odd = "" if entry.name == f"step-{entry.step:08d}" else f"{entry.name} "
        is_best = best is not None and entry.step == best.step and entry.manifest is not None
        said = f"best {best.monitor}: {best.value:.4g}" if best is not None and is_best else entry.reason
        table.add_row(str(entry.step), date, size, epoch_of(entry.manifest), ranks, entry.state, plain(odd + said))
    console.print(table)
    committed = set(root.committed())
    return DAMAGED if any(entry.state == "damaged" and entry.name in committed for entry in entries) else GOOD


def show_one(root: Place, name: str | None, options: argparse.Namespace, console: Console) -> int:
    """Print what one checkpoint, by default the newest, says about itself."""
    name = name or next(iter(root.committed()), None)
    if name is None:
        raise ConfigError(f"there are no checkpoints in {root}")
    entry = inspect(root, name, quick=True)
    if entry.manifest is None:
        raise DamagedError(f"the checkpoint {root.path(name)} is damaged: {entry.reason}")
    manifest = entry.manifest
    grid = Table.grid(padding=(0, 2))
    grid.add_row("checkpoint", plain(str(root.path(name))))
    rows = {key: getattr(manifest, key) for key in ("format", "step", "world_size", "seed", "num_slots")}
    for key, value in {**rows, "config_sha256": manifest.config_sha256, **manifest.versions}.items():
        grid.add_row(plain(key), plain(str(value)))
    for key, value in manifest.position.items():
        grid.add_row(plain(f"position.{key}"), plain(str(value)))
    for file, record in manifest.files.items():
        grid.add_row("file", f"{file}, {count_bytes(record.size_bytes)}, sha256 {record.sha256}")
    console.print(grid, soft_wrap=True)
    tensors = tensors_of(manifest)
    table = Table(title=f"\n{len(tensors)} tensors", title_justify="left", box=None, pad_edge=False)
    several = ("in file",) if manifest.tensors is not None else ()
    for heading in ("name", "dtype", "shape", *several):
        table.add_column(heading, overflow="fold")
    for row in tensors:
        cells = [row.name, row.dtype, " x ".join(map(str, row.shape)) or "scalar", row.where]
        table.add_row(*map(plain, cells[: 3 + len(several)]))
    console.print(table)
    return GOOD


def verify_them(root: Place, name: str | None, options: argparse.Namespace, console: Console) -> int:
    """Hash every file of one or all committed checkpoints, and say of each whether it is good."""
    names = [name] if name else root.committed()
    if not names:
        raise ConfigError(f"there are no checkpoints in {root}")
    code = GOOD
    for each in names:
        entry = inspect(root, each)
        if entry.state == "good":
            console.print(f"{each}: good, {count_bytes(entry.size_bytes or 0)}", soft_wrap=True)
        else:
            code = DAMAGED
            console.print(f"{each}: DAMAGED: {plain(entry.reason)}", soft_wrap=True)
    return code


def prune_them(root: Place, name: str | None, options: argparse.Namespace, console: Console) -> int:
    """Remove all but the newest good ones and the best, or say what would be removed."""
    if options.keep < 1:
        raise ConfigError(f"--keep {options.keep}: expected at least 1, for the newest good one always stays")
    if name is not None:
        raise ConfigError(f"{root.path(name)} is one checkpoint; name the folder that it lies in: {root}")
    try:
        keep, remove = plan_prune(survey(root), options.keep, damaged=options.damaged)
    except CheckpointError as error:
        raise CheckpointError(f"{root}: {error}") from error
    for entry in keep:
        console.print(f"keep    {entry.name}", soft_wrap=True)
    for entry in remove:
        console.print(f"{'removed' if options.yes else 'remove '} {entry.name}", soft_wrap=True)
        if options.yes:
            root.discard(entry.name)
    if remove and not options.yes:
        console.print("nothing was removed; add --yes to do it")
    return GOOD


def export_one(root: Place, name: str | None, options: argparse.Namespace, console: Console) -> int:
    """Write the model in one checkpoint, by default the newest, as one file."""
    name = name or next(iter(root.committed()), None)
    if name is None:
        raise ConfigError(f"there are no checkpoints in {root}")
    with root.opened(name) as directory:
        done = export(directory, options.file)
    what = f"{done.num_tensors} tensors of step {done.step}, {count_bytes(done.size_bytes)}"
    console.print(f"wrote {options.file}: {what}", soft_wrap=True)
    return GOOD


def epoch_of(manifest: Manifest | None) -> str:
    """Return the epochs that were begun, as people count them, from 1."""
    epoch = None if manifest is None else manifest.position.get("epoch")
    if not isinstance(epoch, int) or manifest is None:
        return "-"
    return str(epoch + bool(manifest.position.get("step_in_epoch")))


def count_bytes(number: int) -> str:
    """Return such as "3.4 MB"."""
    size = float(number)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def plain(text: str) -> str:
    """Return a text that a stranger may have written without what a terminal would act on."""
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


if __name__ == "__main__":
    sys.exit(main())
