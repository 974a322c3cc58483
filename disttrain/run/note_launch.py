"""Keeps the launch of a run, and says what has changed since the launch that the run resumes from.

*Contract*: every rank calls `note_launch`, after its checkpoint has been loaded and before the first step. Rank 0
writes. The launch that wrote a checkpoint is the newest one that began before the checkpoint's step. Changed code does
not stop a run: only its author knows whether it still computes the same. Of a Config that no file declares, the
versions and the values alone are kept.
"""

import logging
from functools import partial

from rich.console import Console

from disttrain.config import Origin, to_json
from disttrain.handlers.progress import warn
from disttrain.run.built_values import Built, ignored_values
from disttrain.run.launch_changes import launch_changes
from disttrain.run.launches import (
    KeptLaunch,
    LaunchRecord,
    keep_launch,
    launch_before,
    now_text,
    read_launches,
    record_files,
)
from disttrain.run.source_files import SourceFile, git_changes, git_state, package_versions, source_files
from disttrain.run.state import Run

logger = logging.getLogger(__name__)


def note_launch(run: Run, step: int, built: Built, console: Console) -> None:
    """Keep this launch, which begins after `step`; warn about code and values that differ from those of the run."""
    origin = run.config.origin
    files = {} if origin is None else source_files(origin)
    warn_of_ranks(run, files, console)
    with run.backend.agree("keeping the launch"):
        if run.backend.rank != 0:
            return
        directory = run.directory
        before = read_launches(directory.launches, directory.cfg_py)
        if step:
            begun = [each.record.built for each in before if each.record.step == 0]
            if texts := ignored_values(run, built, begun[-1] if begun else None):
                warn(
                    console,
                    f"new values in the config are not taken, for those of the checkpoint apply: {'; '.join(texts)}. "
                    "Start anew with --fresh to train with the new ones, or change the optimizer in a handler",
                )
        directory.check_held()
        record = record_of(run, origin, step, built, files)
        if (writer := launch_before(before, step)) is not None:
            print_changes(run, writer, record, files, console)
        changes = partial(git_changes, origin.folder) if origin is not None and record.dirty else lambda: None
        keep_launch(directory.launches, record, files, before, changes)
        if origin is not None:
            directory.describe(to_json(run.config), origin.text, origin.overrides)


def record_of(run: Run, origin: Origin | None, step: int, built: Built, files: dict[str, SourceFile]) -> LaunchRecord:
    """Return the record of this launch."""
    git = None if origin is None else git_state(origin.folder)
    return LaunchRecord(
        step=step,
        time=now_text(),
        command=list(run.directory.command),
        overrides=[] if origin is None else list(origin.overrides),
        world_size=run.backend.world_size,
        commit=None if git is None else git.commit,
        dirty=git is not None and git.dirty,
        versions=package_versions(origin),
        files=record_files(files),
        built={name: dict(values) for name, values in built.items()},
    )


def print_changes(
    run: Run, old: KeptLaunch, record: LaunchRecord, files: dict[str, SourceFile], console: Console
) -> None:
    """Print what has changed since an older launch, with the beginning of the diff; all of it goes to the log."""
    changes = launch_changes(
        old.record,
        record,
        (old.content, lambda name: files[name].content),
        ("then", "now"),
    )
    if not changes.facts:
        return
    since = f"launch {old.number}" if old.number else "the last launch"
    text = f"changed since {since}, from which the run goes on: {'; '.join(changes.facts)}"
    if changes.may_change_bits:
        warn(console, text)
    else:
        console.print(text, soft_wrap=True)
    for line in changes.shown(str(run.directory.logs / "rank-0.log")):
        console.print(line, soft_wrap=True)
    if changes.diff:
        logger.info("changed since %s:\n%s", since, "\n".join(changes.diff))


def warn_of_ranks(run: Run, files: dict[str, SourceFile], console: Console) -> None:
    """Warn if the ranks run other code than rank 0, as hosts with copies of their own may."""
    by_rank = run.backend.all_gather({name: file.sha256 for name, file in files.items()})
    for rank, theirs in enumerate(by_rank):
        if others := sorted(name for name in theirs.keys() & by_rank[0].keys() if theirs[name] != by_rank[0][name]):
            names = ", ".join(name.removeprefix("modules/") for name in others[:5])
            warn(console, f"rank {rank} runs other code than rank 0: {names}; the same bits are not promised")
            return
