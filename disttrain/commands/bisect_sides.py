"""The two sides of a bisection: a run, and the same run with another cfg.py, commit or interpreter, or another run.

*Contract*: each side is computed by `disttrain replay` in processes of its own. A commit is checked out into a
temporary work tree, which `close` removes; the repository's own work tree is left alone. The overrides of the run's
newest launch apply on both sides.

*Errors*: ConfigError for something that is none of these, and for a process that fails.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

from disttrain.commands.exit_codes import DIFFERENT, SAME
from disttrain.commands.replay import import_path
from disttrain.environment import variables_with
from disttrain.errors import ConfigError
from disttrain.evidence import read_ledger
from disttrain.evidence.ledger import Line
from disttrain.run.directory import RunDirectory
from disttrain.run.launches import KeptLaunch, read_launches

CHECKED_OUT_WITHIN_S = 60.0


class SideDone(NamedTuple):
    """The result of a side: the lines of its ledger by step, the modules' records, and whether a step differed."""

    lines: dict[int, Line]
    records: list[dict[str, Any]]
    differs: bool
    text: str
    """The last line that it printed to its errors."""


@dataclass
class Side:
    """One side: the interpreter, the run directory, and the words that choose its code."""

    label: str
    run: str
    python: str = sys.executable
    words: list[str] = field(default_factory=list)
    cfg: Path | None = None
    """The cfg.py, if it is not the one that the run keeps."""
    folders: tuple[str, ...] = ()
    """Folders from which modules are imported first."""

    def begin(
        self, step: int, start: int, folder: Path, *, modules: bool = False, proven: bool = True
    ) -> "RunningSide":
        """Begin to compute the steps from the checkpoint of `start` up to `step`, in a process.

        With `proven` it ends at a step that differs from the run's ledger.
        """
        folder.mkdir(parents=True)
        words = ["-m", "disttrain", "replay", self.run, "--step", str(step), "--start", str(start), "--json"]
        words += ["--to", str(folder / "to"), *self.words]
        words += ["--modules", str(folder / "modules.jsonl")] if modules else []
        words += [] if proven else ["--unproven"]
        with (folder / "errors").open("wb") as errors:
            return RunningSide(self, start_process([self.python, *words], errors, self.folders), folder)


def start_process(words: Sequence[str], errors: IO[bytes], folders: Sequence[str]) -> "subprocess.Popen[bytes]":
    """Start a process that imports from `folders` first; its errors go into a file."""
    nothing, variables = subprocess.DEVNULL, variables_with(import_path(*folders))
    return subprocess.Popen(words, stdin=nothing, stdout=nothing, stderr=errors, env=variables)


class RunningSide(NamedTuple):
    """A side whose process computes."""

    side: Side
    process: "subprocess.Popen[bytes]"
    folder: Path

    def wait(self) -> SideDone:
        """Wait for the process; ConfigError if it could not compute the steps."""
        code = self.process.wait()
        text = (self.folder / "errors").read_text(encoding="utf-8", errors="replace").strip()
        if code not in (SAME, DIFFERENT) or (code == DIFFERENT and "Mismatch: " not in text):
            last = text.rpartition("\n")[2]
            raise ConfigError(f"{self.side.label} cannot compute the steps: {last or f'exit code {code}'}")
        lines: dict[int, Line] = {}
        for ledger in sorted(self.folder.glob("to/**/ledger.jsonl")):
            with suppress(ConfigError):  # empty: the first step differed
                lines |= read_ledger(ledger)
        records = []
        if (modules := self.folder / "modules.jsonl").exists():
            records = [json.loads(line) for line in modules.read_text(encoding="utf-8").splitlines()]
        return SideDone(lines, records, code == DIFFERENT, text.rpartition("\n")[2])

    def end(self) -> None:
        """End the process, if it still computes."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def sides_of(run: str, against: str, stack: ExitStack) -> tuple[Side, Side]:
    """Return the run's own side, and the other one."""
    directory = RunDirectory(Path(run))
    if not directory.config_json.is_file():
        raise ConfigError(f"{run}: expected a run directory, such as runs/digits, which holds config.json and cfg.py")
    mine = Side(run, run)
    path = Path(against)
    if path.is_dir() and (path / "config.json").is_file():
        return mine, Side(against, against)
    if path.suffix == ".py":
        if not path.is_file():
            raise ConfigError(f"--against {against}: no such file; expected a cfg.py")
        return mine, _with_cfg(against, run, path)
    if (python := shutil.which(against)) is not None and _is_python(python):
        return mine, Side(against, run, python)
    launch = newest_launch(directory)
    folder = None if launch is None else Path(launch.record.files["cfg.py"].path).parent
    commit = None if folder is None else _commit(folder, against)
    if launch is None or folder is None or commit is None:
        raise ConfigError(
            f"--against {against}: expected a cfg.py, a run directory, a Python interpreter, or a commit of the git "
            f"repository of the run's cfg.py ({folder or 'which the run does not know'}); got none of these"
        )
    return mine, _at_commit(run, launch, folder, commit, stack)


def newest_launch(directory: RunDirectory) -> KeptLaunch | None:
    """Return the newest launch that the run keeps and whose cfg.py is known."""
    launches = read_launches(directory.launches, directory.cfg_py)
    return next((each for each in reversed(launches) if "cfg.py" in each.record.files), None)


def _with_cfg(label: str, run: str, cfg: Path) -> Side:
    return Side(label, run, words=["--config", str(cfg)], cfg=cfg)


def _is_python(path: str) -> bool:
    name = os.path.basename(os.path.realpath(path))
    return "python" in name or "pypy" in name


def _git(folder: Path, *words: str) -> str | None:
    """Return the output of a git command in a folder; None if it fails."""
    command = ["git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "-C", str(folder), *words]
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=CHECKED_OUT_WITHIN_S, check=True, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip()


def _commit(folder: Path, name: str) -> str | None:
    if name.startswith("-"):
        return None
    return _git(folder, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}") or None


def _at_commit(run: str, launch: KeptLaunch, folder: Path, commit: str, stack: ExitStack) -> Side:
    """Check a commit out into a temporary work tree, which ends with `stack`; return its side."""
    root = Path(_git(folder, "rev-parse", "--show-toplevel") or folder)
    inside = Path(launch.record.files["cfg.py"].path).resolve().relative_to(root.resolve())
    tree = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bisect-"))) / "tree"
    if _git(root, "worktree", "add", "--detach", str(tree), commit) is None:
        raise ConfigError(f"the commit {commit[:12]} of {root} could not be checked out into {tree}")
    stack.callback(_git, root, "worktree", "remove", "--force", str(tree))
    if not (tree / inside).is_file():
        raise ConfigError(f"the commit {commit[:12]} of {root} has no {inside}, which is the run's cfg.py")
    side = _with_cfg(f"commit {commit[:12]}", run, tree / inside)
    side.folders = tuple(str(tree / each) for each in import_folders(launch, root))
    return side


def import_folders(launch: KeptLaunch, root: Path) -> list[Path]:
    """Return the folders below `root`, relative to it, from which a launch has imported its own modules.

    A package that is installed in editable mode lies in another folder than the cfg.py.
    """
    found = []
    for name, file in launch.record.files.items():
        depth = name.count("/")  # modules/lib/nets.py lies two folders below the one from which `lib` is imported
        path = Path(file.path)
        if name.startswith("modules/") and path.is_relative_to(root.resolve()) and depth <= len(path.parts):
            found.append(path.parents[depth - 1].relative_to(root.resolve()))
    return list(dict.fromkeys(found))


def described(side: Side, overrides: Sequence[str]) -> Mapping[str, Any] | None:
    """Return the described config of a side that has a cfg.py of its own; None if the run's own is used."""
    if side.cfg is None:
        return None
    words = [side.python, "-m", "disttrain.launch", str(side.cfg), *overrides, "--print-config"]
    done = subprocess.run(
        words,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        check=False,
        env=variables_with(import_path(*side.folders)),
    )
    try:
        text = "\n" + done.stdout.decode()
        found = json.loads(text[text.rindex("\n{\n") :])  # after what the cfg.py prints itself
    except ValueError:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise ConfigError(f"{side.label}: its config cannot be loaded: {last}") from None
    return dict(found)
