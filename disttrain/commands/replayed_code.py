"""The code with which a step is replayed: that of the launch that did it, or another cfg.py.

*Contract*: a launch's cfg.py and overrides are those that the run keeps. Its modules are imported from where they lie,
unless one has changed: then the kept ones are. The launch that did a step is the newest one that began before it.
"""

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from disttrain.commands.evaluate import changed_modules
from disttrain.config import Config, load_config, read_stored, replace
from disttrain.errors import ConfigError
from disttrain.handlers.progress import warn
from disttrain.run.directory import RunDirectory
from disttrain.run.kept_code import LaunchCode, is_same_code, launch_code
from disttrain.run.launches import KeptLaunch, launch_before
from disttrain.run.source_files import package_versions


class Code:
    """The code of a replay: `imported` is the context in which it is loaded and runs."""

    def __init__(
        self,
        directory: RunDirectory,
        launch: KeptLaunch | None,
        kept: LaunchCode | None,
        cfg: Path | None,
        folder: Path,
    ) -> None:
        self._folder = folder
        self._directory = directory
        self._launch = launch
        self._kept = kept
        self._cfg = cfg

    @contextlib.contextmanager
    def imported(self) -> Iterator[None]:
        """Import the modules of this code."""
        with contextlib.nullcontext() if self._kept is None else self._kept.imported():
            yield

    def load(self) -> Config:
        """Return the config."""
        overrides = [] if self._launch is None else self._launch.record.overrides
        if self._cfg is not None:
            name = read_stored(self._directory.config_json).fields.get("name")
            return replace(load_config(self._cfg, overrides), name=name)
        launch = self._launch
        if launch is None or launch.number == 0 or launch.content("cfg.py") is None:
            return load_config(self._directory.path)  # an older release kept the newest cfg.py alone
        file = launch.folder / "cfg.py"
        if any(name.startswith(("modules/cfg.", "modules/cfg/")) for name in launch.record.files):
            # The cfg.py imports another one, as a variant of it does, and would find itself under that name.
            self._folder.mkdir(parents=True, exist_ok=True)
            file = self._folder / f"launch_{launch.number}.py"
            file.write_bytes(launch.content("cfg.py") or b"")
        return load_config(self._directory.path, kept=(file, overrides))

    def reasons(self, config: Config) -> list[str]:
        """Return the known differences from the launch that may give other bits."""
        launch, found = self._launch, []
        if launch is not None:
            now, then = package_versions(config.origin), launch.record.versions
            found += [
                f"{name}: {then[name]} then, {now[name]} now"
                for name in then
                if now.get(name, then[name]) != then[name]
            ]
            if self._kept is None:
                found += changed_modules(config, launch)
            if config.reduction == "fast" and launch.record.world_size > 1:
                found.append(f"reduction=fast: its bits are those of {launch.record.world_size} ranks")
        if not config.deterministic:
            found.append("deterministic=false promises nothing")
        return found


def code_for(
    options: argparse.Namespace,
    directory: RunDirectory,
    launches: Sequence[KeptLaunch],
    folder: Path,
    console: Console,
) -> Code:
    """Return the code of the step that the options ask for; `folder` is for files that are needed meanwhile."""
    if options.launch is not None:
        launch = next((each for each in launches if each.number == options.launch), None)
    else:
        launch = launch_before(list(launches), options.step)
    if options.config is not None:
        return Code(directory, launch, None, options.config, folder)
    if not directory.cfg_py.is_file() and launch is None:
        raise ConfigError(
            f"{directory.path} keeps no cfg.py: its Config was made by a program of your own, so the run cannot be "
            "built again; keep the Config in a file, and launch that"
        )
    if launch is None or options.code == "now" or not launch.record.knows_modules:
        return Code(directory, launch, None, None, folder)
    kept = launch_code(launch)
    if kept.changed:
        warn(
            console,
            f"changed since launch {launch.number}, which did step {options.step}: {', '.join(kept.changed)}; the "
            "copies that the run keeps are used (--code now takes those of now)",
        )
    return Code(directory, launch, kept, None, folder)


def segments(launches: Sequence[KeptLaunch], start: int, step: int) -> list[tuple[KeptLaunch, int]]:
    """Return the launches with different code that did the steps after `start`, each with its last step."""
    found: list[tuple[KeptLaunch, int]] = []
    borders = sorted({each.record.step for each in launches if start < each.record.step < step} | {step})
    for last in borders:
        launch = launch_before(list(launches), last)
        if launch is None:
            return []
        if found and is_same_code(found[-1][0], launch):
            found.pop()
        found.append((launch, last))
    return found
