"""Finds the place of a field's value in the user's files, for messages: `loss (cfg.py:12)`."""

import ast
import inspect
from functools import cache, partial
from pathlib import Path
from types import CodeType
from typing import Any

from torch import nn

from disttrain.config import Config
from disttrain.mistakes import is_of_user, shown_path


def field_place(config: Config, field: str) -> str:
    """Return the field with the line of its function, else that of its keyword in the cfg.py, else alone."""
    code = code_of(getattr(config, field))
    if code is not None and is_of_user(code.co_filename):
        return f"{field} ({shown_path(code.co_filename)}:{code.co_firstlineno})"
    file = None if config.origin is None else str(config.origin.file)
    line = None if file is None else _keyword_lines(file).get(field)
    return f"{field} ({shown_path(file)}:{line})" if file is not None and line else field


def code_of(function: Any) -> CodeType | None:
    """Return the code that runs when a function, partial, class, module or other object is called; None without."""
    while isinstance(function, partial):
        function = function.func
    if inspect.isclass(function):
        function = vars(function).get("__init__", function)
    elif isinstance(function, nn.Module):
        function = type(function).forward
    elif not inspect.isroutine(function):
        function = type(function).__call__ if callable(function) else None
    code = getattr(function, "__code__", None)
    return code if isinstance(code, CodeType) else None


@cache
def _keyword_lines(file: str) -> dict[str, int]:
    """Return the last line of the cfg.py at which each keyword or key of a call or a dict has its value."""
    try:
        tree = ast.parse(Path(file).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return {}
    return {node.arg: node.value.lineno for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg}
