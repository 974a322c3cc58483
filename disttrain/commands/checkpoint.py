"""`disttrain checkpoint ls | show | verify | prune | export RUN`: list, show, verify, prune and export checkpoints.

*Contract*: RUN is a run directory, its folder of checkpoints, or one checkpoint in it. Only `prune --yes` changes
anything there; `export` writes elsewhere, and `disttrain export` is its short name. A run directory may be a
stranger's: another place that it names is looked into only with --elsewhere. Exit code 0: done, and every checkpoint
that was read is good; 1: a checkpoint is damaged; 2: the command cannot be run.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from disttrain.checkpoint import (
    CheckpointStore,
    DamagedError,
    Manifest,
    best_of,
    inspect,
    is_anchor,
    plan_prune,
    step_in,
    survey,
    tensors_of,
)
from disttrain.commands.exit_codes import ALL_GOOD, DAMAGE_FOUND, USAGE
from disttrain.commands.export import add_export_options, export_model
from disttrain.errors import CheckpointError, ConfigError, DisttrainError
from disttrain.files import count_bytes, printable
from disttrain.run.checkpoint_target import find_target, hint_of, refuse_link

WIDTH_OF_A_FILE = 160
"""Columns of the output if it is not a terminal: wide enough that nothing is folded."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = checkpoint_parser().parse_args(arguments)
    console = Console(
        highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE
    )
    hint = ""
    try:
        hint = "" if options.elsewhere else hint_of(options.run)
        target = find_target(
            options.run,
            getattr(options, "step", None),
            best=getattr(options, "best", False),
            elsewhere=options.elsewhere,
        )
        if options.command is prune_checkpoints and not options.elsewhere:
            refuse_link(options.run, target.store)
        code: int = options.command(target.store, target.name, options, console)
        for other in target.other_stores if target.name is None else []:
            if not (names := other.committed()):
                continue
            if options.command is verify_checkpoints:
                code = max(code, verify_checkpoints(other, None, options, console))
            elif options.command in (list_checkpoints, prune_checkpoints):
                steps = ", ".join(str(step_in(name)) for name in names)
                console.print(f"older ones, in {printable(str(other))}: {steps}", soft_wrap=True)
        if hint and options.command in (list_checkpoints, verify_checkpoints):
            console.print(printable(hint), soft_wrap=True)
        return code
    except DisttrainError as error:
        advice = f"; {hint}" if hint and isinstance(error, ConfigError) else ""
        print(f"{type(error).__name__}: {printable(str(error) + advice)}", file=sys.stderr)
        return DAMAGE_FOUND if isinstance(error, DamagedError) else USAGE


def checkpoint_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="disttrain checkpoint",
        description="List, show and verify the checkpoints of a run, remove old ones, or export a model.",
        epilog="exit codes: 0: every checkpoint that was read is good; 1: one is damaged; 2: the command cannot be run",
    )
    subparsers = parser.add_subparsers(required=True, metavar="ls | show | verify | prune | export")

    def add(name: str, command: Callable[..., int], help_text: str) -> argparse.ArgumentParser:
        subparser = subparsers.add_parser(name, help=help_text, description=f"{help_text[0].upper()}{help_text[1:]}.")
        run_help = "a run directory, a folder of checkpoints or its URL, or a single checkpoint"
        subparser.add_argument("run", metavar="RUN", help=run_help)
        subparser.add_argument(
            "--elsewhere", action="store_true", help="look into the other place that the run directory names, too"
        )
        subparser.set_defaults(command=command)
        return subparser

    ls = add("ls", list_checkpoints, "list the checkpoints with step, date, size and state")
    ls.add_argument("--quick", action="store_true", help="do not read the tensors: the state is complete, not good")
    show = add("show", show_checkpoint, "print the manifest of a checkpoint, by default the newest, and its tensors")
    verify = add("verify", verify_checkpoints, "hash every file of all checkpoints, or of one")
    prune = add("prune", prune_checkpoints, "remove all checkpoints but the newest good ones, the best one and anchors")
    prune.add_argument("--keep", metavar="N", type=int, default=2, help="good ones to keep, at least 1 (default: 2)")
    prune.add_argument("--damaged", action="store_true", help="remove damaged checkpoints too")
    prune.add_argument("--anchors", action="store_true", help="remove anchors too (checkpoint.anchor_every_steps)")
    prune.add_argument("--yes", action="store_true", help="remove them; without --yes they are only listed")
    model = add("export", export_model, "write the weights of a checkpoint, by default the newest, for other programs")
    add_export_options(model)
    for subparser in (show, verify, model):
        choice = subparser.add_mutually_exclusive_group()
        choice.add_argument("--step", metavar="N", type=int, help="the checkpoint of this step")
        choice.add_argument("--best", action="store_true", help="the checkpoint with the best checkpoint.monitor")
    return parser


def list_checkpoints(root: CheckpointStore, name: str | None, options: argparse.Namespace, console: Console) -> int:
    """Print a table of all checkpoints; return 1 if one that a run would load is damaged."""
    entries = survey(root, quick=options.quick)
    if not entries:
        console.print(f"no checkpoints in {root}", soft_wrap=True)
        return ALL_GOOD
    table = Table(box=None, pad_edge=False)
    for heading in ("step", "date (UTC)", "size", "epoch", "ranks", "state"):
        table.add_column(heading, justify="left" if heading in ("date (UTC)", "state") else "right", no_wrap=True)
    table.add_column("", overflow="fold")
    best = best_of(entries)
    for entry in entries:
        date = f"{entry.written:%Y-%m-%d %H:%M:%S}" if entry.written else "-"
        size = "-" if entry.size_bytes is None else count_bytes(entry.size_bytes)
        ranks = "-" if entry.manifest is None else str(entry.manifest.world_size)
        odd_name = "" if entry.name == f"step-{entry.step:08d}" else f"{entry.name} "
        is_best = best is not None and entry.step == best.step and entry.manifest is not None
        notes = [f"best {best.monitor}: {best.value:.4g}"] if best is not None and is_best else []
        note = odd_name + (", ".join([*notes, *["anchor"] * is_anchor(entry)]) or entry.reason)
        table.add_row(str(entry.step), date, size, epoch_of(entry.manifest), ranks, entry.state, printable(note))
    console.print(table)
    committed = set(root.committed())
    is_damaged = any(entry.state == "damaged" and entry.name in committed for entry in entries)
    return DAMAGE_FOUND if is_damaged else ALL_GOOD


def show_checkpoint(root: CheckpointStore, name: str | None, options: argparse.Namespace, console: Console) -> int:
    """Print the manifest of one checkpoint, by default the newest, and its tensors."""
    name = name or next(iter(root.committed()), None)
    if name is None:
        raise ConfigError(f"there are no checkpoints in {root}")
    entry = inspect(root, name, quick=True)
    if entry.manifest is None:
        raise DamagedError(f"the checkpoint {root.path(name)} is damaged: {entry.reason}")
    manifest = entry.manifest
    grid = Table.grid(padding=(0, 2))
    grid.add_row("checkpoint", printable(str(root.path(name))))
    rows = {key: getattr(manifest, key) for key in ("format", "step", "world_size", "seed", "num_slots")}
    for key, value in {**rows, "config_sha256": manifest.config_sha256, **manifest.versions}.items():
        grid.add_row(printable(key), printable(str(value)))
    for key, value in manifest.position.items():
        grid.add_row(printable(f"position.{key}"), printable(str(value)))
    for file, record in manifest.files.items():
        grid.add_row("file", f"{file}, {count_bytes(record.size_bytes)}, sha256 {record.sha256}")
    console.print(grid, soft_wrap=True)
    tensors = tensors_of(manifest)
    table = Table(title=f"\n{len(tensors)} tensors", title_justify="left", box=None, pad_edge=False)
    file_column = ("in file",) if manifest.tensors is not None else ()
    for heading in ("name", "dtype", "shape", *file_column):
        table.add_column(heading, overflow="fold")
    for row in tensors:
        cells = [row.name, row.dtype, " x ".join(map(str, row.shape)) or "scalar", row.where]
        table.add_row(*map(printable, cells[: 3 + len(file_column)]))
    console.print(table)
    return ALL_GOOD


def verify_checkpoints(root: CheckpointStore, name: str | None, options: argparse.Namespace, console: Console) -> int:
    """Hash every file of one or all committed checkpoints, and print for each checkpoint whether it is good."""
    names = [name] if name else root.committed()
    if not names:
        raise ConfigError(f"there are no checkpoints in {root}")
    code = ALL_GOOD
    for checkpoint in names:
        entry = inspect(root, checkpoint)
        if entry.state == "good":
            console.print(f"{checkpoint}: good, {count_bytes(entry.size_bytes or 0)}", soft_wrap=True)
        else:
            code = DAMAGE_FOUND
            console.print(f"{checkpoint}: DAMAGED: {printable(entry.reason)}", soft_wrap=True)
    return code


def prune_checkpoints(root: CheckpointStore, name: str | None, options: argparse.Namespace, console: Console) -> int:
    """Remove all checkpoints but the newest good ones, the best one and anchors; without --yes list them only."""
    if options.keep < 1:
        raise ConfigError(f"--keep {options.keep}: expected at least 1, because the newest good one always stays")
    if name is not None:
        raise ConfigError(f"expected a folder of checkpoints, got the checkpoint {root.path(name)}; use {root}")
    try:
        keep, remove = plan_prune(survey(root), options.keep, damaged=options.damaged, anchors=options.anchors)
    except CheckpointError as error:
        raise CheckpointError(f"{root}: {error}") from error
    for entry in keep:
        console.print(f"keep    {printable(str(root.path(entry.name)))}", soft_wrap=True)
    for entry in remove:
        verb = "removed" if options.yes else "remove "
        console.print(f"{verb} {printable(str(root.path(entry.name)))}", soft_wrap=True)
        if options.yes:
            root.discard(entry.name)
    if remove and not options.yes:
        console.print("nothing was removed; add --yes to remove them")
    return ALL_GOOD


def epoch_of(manifest: Manifest | None) -> str:
    """Return the number of epochs that were begun, as text; "-" if the manifest does not hold it."""
    epoch = None if manifest is None else manifest.position.get("epoch")
    if not isinstance(epoch, int) or manifest is None:
        return "-"
    return str(epoch + bool(manifest.position.get("step_in_epoch")))
