"""Reads the package's source as syntax trees: the names each module defines, imports and refers to. Imports nothing."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = "disttrain"
UNCOUNTED = {"TypeVar", "ParamSpec", "TypeVarTuple"}  # calls whose result is a local helper of the type checker

Target = tuple[str, str | None]  # a module, and a name in it; None stands for the module itself
Function = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
Comprehension = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(frozen=True)
class Module:
    """A source file: path under the root, tree, all statements, lines of the top-level names, imports by local name."""

    path: str
    tree: ast.Module
    statements: tuple[ast.stmt, ...]
    names: dict[str, int]
    imports: dict[str, Target]

    @property
    def is_room(self) -> bool:
        return self.path.endswith("__init__.py")

    @property
    def public(self) -> dict[str, int]:
        return {name: line for name, line in self.names.items() if not name.startswith("_") and name != "logger"}

    @property
    def exported(self) -> list[str]:
        """The strings of `__all__`."""
        assigned = [s for s in top_level(self.tree.body) if isinstance(s, ast.Assign) and "__all__" in defined(s)]
        return [name for statement in assigned for name in ast.literal_eval(statement.value)]


House = dict[str, Module]  # by dotted name; a room's `__init__.py` has the name of the room


class _Unquoted(ast.NodeTransformer):
    """Replaces strings in an annotation by the expressions they hold, except in `Literal`."""

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        try:
            return ast.parse(node.value, mode="eval").body if isinstance(node.value, str) else node
        except SyntaxError:  # the text of an `Annotated`
            return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        return node if ast.unparse(node.value).endswith("Literal") else self.generic_visit(node)


@cache
def read_tree(text: str) -> tuple[ast.Module, tuple[ast.stmt, ...]]:
    """Return the tree of a file and all its statements; quoted annotations become expressions. Callers share them."""
    tree = ast.parse(text)
    nodes = [*ast.walk(tree)]
    for node in nodes:
        for field in ("annotation", "returns"):
            if isinstance(annotation := getattr(node, field, None), ast.expr):
                setattr(node, field, _Unquoted().visit(annotation))
    return tree, tuple(node for node in nodes if isinstance(node, ast.stmt))


def top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a module, including those inside top-level `if`, `try` and `with`."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.With):
            inner = [s for handler in getattr(statement, "handlers", []) for s in handler.body]
            yield from top_level([s for s in ast.iter_child_nodes(statement) if isinstance(s, ast.stmt)] + inner)


def defined(statement: ast.stmt) -> list[str]:
    """Return the names that a top-level statement defines; imports and type variables define none."""
    match statement:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Assign(value=ast.Call(func=function)) if ast.unparse(function).split(".")[-1] in UNCOUNTED:
            return []
        case ast.Assign(targets=targets):
            return [name for target in targets for name in _stored(target)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []


def imported(node: ast.AST, known: set[str]) -> Iterator[tuple[str, Target]]:
    """Yield (local name, target) for each name of the package that an import statement binds."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name in known:
                yield (alias.asname, (alias.name, None)) if alias.asname else (PACKAGE, (PACKAGE, None))
    elif isinstance(node, ast.ImportFrom) and node.module in known:
        for alias in node.names:
            yield alias.asname or alias.name, (node.module, alias.name)


def read_module(root: Path, path: Path, known: set[str]) -> Module:
    """Read a file of the package, or one that uses the package whose modules are `known`."""
    tree, inner = read_tree(path.read_text())
    names: dict[str, int] = {}
    for statement in top_level(tree.body):
        for name in defined(statement):
            names.setdefault(name, statement.lineno)
    imports = {local: target for node in inner for local, target in imported(node, known)}
    return Module(path.relative_to(root).as_posix(), tree, inner, names, imports)


def read_house(root: Path) -> House:
    """Read every module of the package under `root`."""
    paths = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: read_module(root, path, set(paths)) for name, path in paths.items()}


def origin(house: House, target: Target) -> Target:
    """Return the module that defines a name and its name there: follow imports; a room's name hides its file's."""
    for _ in house:
        module, name = target
        if name is None or name in house[module].names:
            break
        if name in house[module].imports:
            target = house[module].imports[name]
        elif f"{module}.{name}" in house:
            target = (f"{module}.{name}", None)
    return target


def references(house: House, module: Module, node: ast.AST, own: str = "") -> Iterator[Target]:
    """Yield the definitions that the code under `node` refers to; `own` is the dotted name of `module`, if it has one.

    Import statements and strings refer to nothing. A name that a function binds itself is not the module's.
    """
    for first, *rest in _chains(node):
        if own and first in module.names:
            yield own, first
        elif first in module.imports:
            target = origin(house, module.imports[first])
            while target[1] is None and rest:
                target, rest = origin(house, (target[0], rest[0])), rest[1:]
            yield target


def _chain(node: ast.AST) -> list[str]:
    """Return ["a", "b", "c"] for the expression `a.b.c`, nothing for other nodes."""
    if isinstance(node, ast.Name):
        return [node.id] if isinstance(node.ctx, ast.Load) else []
    if isinstance(node, ast.Attribute) and (before := _chain(node.value)):
        return [*before, node.attr]
    return []


def _stored(node: ast.AST) -> list[str]:
    return [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)]


def _bound(function: ast.AST) -> set[str]:
    """Return the parameters and the local variables of a function."""
    bound, outside = set(), set()
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
        elif isinstance(node, ast.Global):
            outside |= {*node.names}
    return bound - outside


@cache
def _chains(node: ast.AST) -> tuple[list[str], ...]:
    return tuple(_loaded(node, frozenset()))


def _loaded(node: ast.AST, hidden: frozenset[str]) -> Iterator[list[str]]:
    """Yield the chains of names that code reads from its module's scope."""
    if chain := _chain(node):
        if chain[0] not in hidden:
            yield chain
        return
    inside, body = hidden, set[ast.AST]()
    if isinstance(node, Function):  # decorators, defaults and annotations belong to the scope outside
        inside = hidden | _bound(node)
        body = {*node.body} if isinstance(node.body, list) else {node.body}
    elif isinstance(node, Comprehension):
        inside, body = hidden | {n for g in node.generators for n in _stored(g.target)}, {*ast.iter_child_nodes(node)}
    for child in ast.iter_child_nodes(node):
        yield from _loaded(child, inside if child in body else hidden)
