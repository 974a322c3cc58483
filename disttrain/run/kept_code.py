"""The code of a past launch: its cfg.py and the modules that it had imported, as its run directory keeps them.

*Contract*: `launch_code(launch)` says which of the launch's own modules have another content now. If any has, the kept
ones are imported in the place of all of the launch's modules. Each has its old path as its `__file__`, so data beside
it is found. Nothing is written. What no import showed then (data files, modules that were imported later) is as it is
now.

*Errors*: ConfigError for a module that has changed and whose content the run does not keep.
"""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from disttrain.config import Config
from disttrain.config.annotations import leaves
from disttrain.errors import ConfigError
from disttrain.run.launches import KeptFile, KeptLaunch

MODULES = "modules/"


class _KeptModule(NamedTuple):
    path: str
    content: bytes


class LaunchCode(NamedTuple):
    """The own modules of a launch."""

    launch: KeptLaunch
    changed: list[str]
    """The names of the modules that have another content now, or are gone."""
    modules: dict[str, _KeptModule]
    """All kept modules, by the names under which they are imported; empty if none has changed."""

    @contextmanager
    def imported(self) -> Iterator[None]:
        """Import the kept modules in the `with` body."""
        for name in self.modules:
            sys.modules.pop(name, None)  # of an earlier config in this process
        finder = _Finder(self.modules)
        sys.meta_path.insert(0, finder)
        try:
            yield
        finally:
            sys.meta_path.remove(finder)


class _Finder(MetaPathFinder):
    """Finds kept modules."""

    def __init__(self, modules: dict[str, _KeptModule]) -> None:
        self._modules = modules

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if (kept := self._modules.get(fullname)) is None:
            return None
        folder = [str(Path(kept.path).parent)] if Path(kept.path).name == "__init__.py" else None
        loader = _Loader(fullname, kept.path, kept.content)
        return spec_from_file_location(fullname, kept.path, loader=loader, submodule_search_locations=folder)


class _Loader(SourceFileLoader):
    """Loads a module from its kept content, without the compiled code of the present file."""

    def __init__(self, name: str, path: str, content: bytes) -> None:
        super().__init__(name, path)
        self._content = content

    def path_stats(self, path: Any) -> Any:
        raise OSError("no compiled code is read or written")

    def get_data(self, path: Any) -> bytes:
        return self._content


def launch_code(launch: KeptLaunch) -> LaunchCode:
    """Return the own modules of a launch, compared with the files that lie there now."""
    own = {name: file for name, file in launch.record.files.items() if name.startswith(MODULES)}
    changed = [name for name, file in own.items() if not _is_unchanged(file)]
    if not changed:
        return LaunchCode(launch, [], {})
    modules = {}
    for name, file in own.items():
        if (content := launch.content(name)) is not None:
            modules[_module_name(name)] = _KeptModule(file.path, content)
        elif name in changed:
            at = "" if launch.record.commit is None else f", at the git commit {launch.record.commit[:12]}"
            raise ConfigError(
                f"{file.path} has changed since launch {launch.number}, and the run keeps no copy of it: restore it as "
                f"it was{at}, or replay with the code of now (--code now)"
            )
    return LaunchCode(launch, [_module_name(name) for name in changed], modules)


def is_same_code(left: KeptLaunch, right: KeptLaunch) -> bool:
    """Return whether two launches have run the same files, with the same overrides of what decides about a step.

    A file that only one of them lists was imported earlier there: another file that names it first would differ too.
    """
    both = left.record.files.keys() & right.record.files.keys()
    files = [{name: each.record.files[name].sha256 for name in both} for each in (left, right)]
    overrides = [[text for text in each.record.overrides if not _is_harmless(text)] for each in (left, right)]
    return files[0] == files[1] and overrides[0] == overrides[1]


def _is_harmless(override: str) -> bool:
    """Return whether an override leaves all steps that both launches would do as they are."""
    field = override.partition("=")[0]
    harmless = {leaf.name for leaf in leaves(Config) if leaf.note.harmless and not leaf.name.startswith("validate.")}
    return field in harmless | {"max_epochs", "max_steps"}  # a schedule depends on these, and then they cannot change


def _is_unchanged(file: KeptFile) -> bool:
    try:
        path = Path(file.path)
        if path.stat().st_size != file.size_bytes:
            return False
        return not file.sha256 or hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256
    except OSError:
        return False


def _module_name(kept: str) -> str:
    """Return the name under which the module of a kept file is imported: `modules/lib/__init__.py` is lib."""
    parts = kept.removeprefix(MODULES).rpartition(".")[0].split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
