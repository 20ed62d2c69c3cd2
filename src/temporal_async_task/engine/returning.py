"""Where a task returns as soon as a step has its result: ``return await step(...)``, ``return Shot(await step(...))``.

No line of the task runs between that step and the end, so its result goes to the server with the run's own, in one
write instead of two.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_lines: WeakKeyDictionary[Callable[..., Any], frozenset[int]] = WeakKeyDictionary()

# What makes a value of others, and runs no code of the application's on the way.
_DISPLAYS = (ast.Dict, ast.List, ast.Tuple, ast.Set, ast.JoinedStr, ast.FormattedValue, ast.keyword)
_LEAVING = (ast.Try, ast.TryStar, ast.With, ast.AsyncWith, ast.AsyncFor)
_ELSEWHERE = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)


def returning_lines(function: Callable[..., Any]) -> frozenset[int]:
    """The lines of a coroutine function where it awaits something, and then returns with no more code of its own.

    Not where something has to be left first (``try``, ``with``), and not where anything is called with what was awaited
    but a class. Empty if the function's source is not available.
    """
    if function not in _lines:
        _lines[function] = frozenset(_find(function))
    return _lines[function]


def _find(function: Callable[..., Any]) -> Iterator[int]:
    if not inspect.iscoroutinefunction(function) or inspect.unwrap(function) is not function:
        return  # of a wrapper, `inspect` would read the source of what it wraps
    try:
        definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        scope = inspect.getclosurevars(function)
    except (OSError, TypeError, SyntaxError, IndexError, ValueError):  # no source; a name that has no value yet
        return
    if not isinstance(definition, ast.AsyncFunctionDef):
        return
    classes = {
        name
        for names in (scope.globals, scope.nonlocals, scope.builtins)
        for name, value in names.items()
        if inspect.isclass(value)
    }
    awaits = [node for node in ast.walk(definition) if isinstance(node, ast.Await)]
    first = function.__code__.co_firstlineno
    for returned in _returned(definition.body):
        found = _awaited(returned, classes)
        if found is not None and not any(other is not found and _overlap(other, found) for other in awaits):
            yield from range(first + found.lineno - 1, first + (found.end_lineno or found.lineno))


def _returned(statements: list[ast.stmt]) -> Iterator[ast.expr]:
    """What is returned where nothing has to be left first."""
    for statement in statements:
        if isinstance(statement, ast.Return) and statement.value is not None:
            yield statement.value
        elif not isinstance(statement, _LEAVING + _ELSEWHERE):
            yield from _returned([part for part in _parts(statement) if isinstance(part, ast.stmt)])


def _parts(statement: ast.stmt) -> Iterator[ast.AST]:
    for part in ast.iter_child_nodes(statement):
        yield part
        if isinstance(part, ast.match_case):
            yield from part.body


def _awaited(value: ast.expr, classes: set[str]) -> ast.Await | None:
    """The one await of which a returned value is made, if no other code has a part in it."""
    found: ast.Await | None = None
    open_nodes: list[ast.AST] = [value]
    while open_nodes:
        node = open_nodes.pop()
        if isinstance(node, ast.Await):
            if found is not None:
                return None
            found = node
        elif isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Name) or node.func.id not in classes:
                return None
            open_nodes += [*node.args, *node.keywords]
        elif isinstance(node, _DISPLAYS):
            open_nodes += ast.iter_child_nodes(node)
        elif not isinstance(node, ast.Name | ast.Constant | ast.expr_context):
            return None
    return found


def _overlap(one: ast.Await, other: ast.Await) -> bool:
    return one.lineno <= (other.end_lineno or other.lineno) and other.lineno <= (one.end_lineno or one.lineno)
