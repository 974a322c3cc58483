"""Loads a Config from a path: runs a cfg.py, or the copy of it in a run directory.

*Contract*: the file runs once, as a module named after the file without `.py`. Its folder becomes the first on
`sys.path`, as for a script. If the file fails, both changes are undone; nothing else changes. It runs under a fixed
seed, so what it draws from the global generators is the same on every rank; they are left as they were. Functions of a
cfg.py can be sent to worker processes, spawned ones included. If another module already has that name (`random.py`),
the module gets a name of its own; forked workers know that name, spawned workers do not.

*Errors*: ConfigError with one message, for anything that prevents the file from giving a Config.
"""

import difflib
import hashlib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import NamedTuple

from disttrain.config.fields import Config, Origin, replace, with_origin
from disttrain.config.overrides import apply_overrides
from disttrain.config.stored import read_overrides, read_stored
from disttrain.config.wording import both, either, got
from disttrain.errors import ConfigError, DisttrainError

_loaded: set[str] = set()
"""The names of the modules that were loaded here. A later cfg.py of the same name may replace such a module."""


class _Source(NamedTuple):
    """A file to run: its path as given and resolved, and the name, import folder and overrides of the run."""

    shown: Path
    file: Path
    name: str
    folder: Path
    overrides: list[str]


def load_config(
    path: Path | str, overrides: Sequence[str] = (), *, kept: tuple[Path, Sequence[str]] | None = None
) -> Config:
    """Return the Config of a cfg.py or a run directory, with overrides applied.

    A run directory has overrides of its own; the given ones are applied after them. `kept`: the cfg.py and the
    overrides of one of its launches, in the place of those of the newest.
    """
    source = _find(Path(path))
    if kept is not None:
        source = source._replace(shown=kept[0], file=kept[0].resolve(), overrides=list(kept[1]))
    texts = [*source.overrides, *overrides]
    modules_before = frozenset(sys.modules)
    with _importable(source) as module:
        text = _run(source, module)
        config = apply_overrides(_config_of(source, module), texts)
        if config.name is None:
            config = replace(config, name=source.name)
    origin = Origin(source.file, module.__name__, tuple(texts), source.folder, text, modules_before)
    return with_origin(config, origin)


def _find(path: Path) -> _Source:
    """Return the file to run for a path: a Python file, or the one in a run directory."""
    try:
        file = path.resolve()
        if path.is_dir():
            return _run_directory(path)
        if path.is_file() and path.suffix == ".py":
            return _Source(path, file, path.stem, file.parent, [])
        exists = path.exists()
    except (OSError, RuntimeError) as error:  # no permission, a name that is too long, a loop of links
        raise ConfigError(f"{path}: expected a cfg.py or a run directory, got {error}.") from error
    if exists:
        raise ConfigError(f"{path}: expected a Python file whose name ends in .py, or a run directory.")
    near = [str(path.parent / name) for name in difflib.get_close_matches(path.name, _names(path.parent))]
    advice = f"did you mean {either(near)}?" if near else "expected a cfg.py or a run directory."
    raise ConfigError(f"{path}: no such file; {advice}")


def _run_directory(path: Path) -> _Source:
    file, stored = path / "cfg.py", path / "config.json"
    if not (file.is_file() and stored.is_file()):
        names = _names(path)
        loadable = f"; it has {both(names[:5])}" if names else ""
        raise ConfigError(
            f"{path}: expected a cfg.py, or a run directory, which holds cfg.py and config.json; "
            f"got another directory{loadable}."
        )
    try:
        fields, _, folder = read_stored(stored)
    except OSError as error:
        raise ConfigError(f"{stored}: expected a file that can be read, got {error.strerror}.") from error
    name = fields.get("name")
    stem = name if isinstance(name, str) else path.resolve().name
    return _Source(file, file.resolve(), stem, folder or file.resolve().parent, read_overrides(path / "overrides.json"))


def _names(folder: Path) -> list[str]:
    """Return the names in a folder that can be loaded: Python files and run directories."""
    if not folder.is_dir() or not os.access(folder, os.R_OK | os.X_OK):
        return []
    return sorted(p.name for p in folder.iterdir() if p.suffix == ".py" or (p / "config.json").is_file())


@contextmanager
def _importable(source: _Source) -> Iterator[ModuleType]:
    """Yield an empty module, registered under its name; undo all changes if running its code fails."""
    before = sys.path[:]
    folders = list(dict.fromkeys(str(f) for f in (source.file.parent, source.folder) if f.is_dir()))
    sys.path[:] = [*folders, *(folder for folder in before if folder not in folders)]
    importlib.invalidate_caches()
    name = _module_name(source.file)
    replaced = sys.modules.get(name)
    spec = spec_from_file_location(name, source.file)
    assert spec is not None  # the file's name ends in .py
    sys.modules[name] = module = module_from_spec(spec)
    try:
        yield module
    except BaseException:
        sys.path[:] = before
        sys.modules.pop(name)
        if replaced is not None:
            sys.modules[name] = replaced
        raise
    _loaded.add(name)


def _module_name(file: Path) -> str:
    """Return the stem if `import stem` finds this very file, in a spawned worker too; else a name of its own."""
    stem = file.stem
    if stem not in sys.stdlib_module_names and (stem not in sys.modules or stem in _loaded):
        spec = PathFinder.find_spec(stem)
        if spec is not None and spec.origin is not None and Path(spec.origin).resolve() == file:
            return stem
    return f"{stem.replace('.', '_')}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"


def _run(source: _Source, module: ModuleType) -> bytes:
    """Run the file in the module; return its content. An exception becomes a ConfigError that names the line."""
    from disttrain.seeding import random_state_kept, seed_config  # it imports torch, as a cfg.py does

    text, code = _compiled(source)
    try:
        with random_state_kept():
            seed_config()
            exec(code, vars(module))  # noqa: S102 - a cfg.py is the user's own program
    except SyntaxError as error:  # in a module that it imports
        raise ConfigError(_syntax_message(error)) from error
    except (Exception, SystemExit) as error:  # any exception of the user's program
        raise ConfigError(_exception_message(source, error)) from error
    return text


def _compiled(source: _Source) -> tuple[bytes, CodeType]:
    try:
        text = source.file.read_bytes()
        return text, compile(text, str(source.file), "exec", dont_inherit=True)
    except OSError as error:
        raise ConfigError(f"{source.shown}: expected a file that can be read, got {error.strerror}.") from error
    except SyntaxError as error:
        raise ConfigError(_syntax_message(error, source.shown)) from error
    except ValueError as error:
        raise ConfigError(f"{source.shown}: expected Python source, got {error}.") from error


def _syntax_message(error: SyntaxError, shown: Path | None = None) -> str:
    """Return the message of a syntax error, with its line and a caret below the error."""
    message = f"{shown or error.filename}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    if not error.text:
        return message
    line = error.text.rstrip("\r\n")
    indent = len(line) - len(line.lstrip())
    caret = max((error.offset or 1) - 1 - indent, 0)
    return f"{message}\n    {line.lstrip()}\n    {' ' * caret}^"


def _exception_message(source: _Source, error: BaseException) -> str:
    """Return the message of an exception, with the line of the cfg.py at which it happened."""
    frames = traceback.extract_tb(error.__traceback__)
    cfg_frames = [frame for frame in frames if frame.filename == str(source.file)]
    place = f"{source.shown}, line {cfg_frames[-1].lineno}" if cfg_frames else str(source.shown)
    if isinstance(error, DisttrainError):
        lines = str(error).splitlines()
        return f"{place}: {lines[0]}" if len(lines) == 1 else "\n  ".join([f"{place}:", *lines])
    line = f"\n    {cfg_frames[-1].line}" if cfg_frames and cfg_frames[-1].line else ""
    is_deeper = cfg_frames and frames[-1] is not cfg_frames[-1]
    deeper = f"\n(raised in {frames[-1].filename}:{frames[-1].lineno})" if is_deeper else ""
    return f"{place}: {type(error).__name__}: {error}{_advice(error)}{line}{deeper}"


def _advice(error: BaseException) -> str:
    """Return the advice for a class that was called where the Config takes it: `AdamW(lr=1e-3)` lacks parameters."""
    lacks = re.match(r"(\w+)\.__init__\(\) missing \d+ required positional argument", str(error))
    if not isinstance(error, TypeError) or lacks is None:
        return ""
    name = lacks[1]
    return f"; if a field of the Config is to build it during the run, write partial({name}, KEYWORD=...) there"


def _config_of(source: _Source, module: ModuleType) -> Config:
    """Return the module's variable `config`."""
    config = getattr(module, "config", None)
    if isinstance(config, Config):
        return config
    others = [name for name, value in vars(module).items() if isinstance(value, Config)]
    advice = f"; rename {both(others)} to config" if others else "; end it in config = Config(...)"
    actual = "none" if not hasattr(module, "config") else got(config)
    raise ConfigError(f"{source.shown}: expected a Config named config, got {actual}{advice}.")
