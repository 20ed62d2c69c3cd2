"""The application that a command works for: what ``module:attribute`` names."""

from __future__ import annotations

import difflib
import importlib
import os
import pkgutil
import site
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from temporal_async_task.cli.exits import AppError
from temporal_async_task.component import AsyncTaskComponent
from temporal_async_task.config import AsyncTaskComponentConfig
from temporal_async_task.errors import AsyncTaskError
from temporal_async_task.task import TemporalAsyncTask

if TYPE_CHECKING:
    from types import ModuleType, TracebackType

AnyTask = TemporalAsyncTask[Any, Any]

_WANTED = "a component, a task, a list of tasks, or an integration (an object with create_async_tasks())"
_SHOWN = 10
"""So many names are told of a module that has more."""


@dataclass(frozen=True)
class Application:
    """Tasks, and the component that knows them."""

    reference: str
    """``module:attribute``; empty where a command was given none."""
    component: AsyncTaskComponent

    @property
    def tasks(self) -> tuple[AnyTask, ...]:
        return self.component.tasks

    def task(self, name: str) -> AnyTask | None:
        """The task of this name."""
        return next((task for task in self.tasks if task.name == name), None)


def load_application(reference: str | None, **arguments: Any) -> Application:
    """The application of a reference; one that knows no task without a reference.

    Args:
        reference: ``module:attribute``. The current directory comes first on the import path.
        arguments: Fields of the configuration, which come before what the application itself says. None: not given.

    Raises:
        AppError: The reference leads to nothing that has tasks, or the application's own code raises.
        ConfigError: The configuration cannot be used.
    """
    if not reference:
        return Application("", AsyncTaskComponent(AsyncTaskComponentConfig.load(**arguments)))
    found = _resolve(reference)
    if isinstance(found, AsyncTaskComponent):
        if not found.tasks:
            raise AppError(f"The component {reference} has no task: register one with component.register(task).")
        found.config = found.config.with_arguments(f"component {reference}", **arguments)
        return Application(reference, found)
    component = AsyncTaskComponent(AsyncTaskComponentConfig.load(**arguments))
    tasks = _tasks_of(found, reference)
    try:
        component.register_all(tasks)
    except AsyncTaskError as error:
        raise AppError(f"{reference} cannot be used: {error}") from error
    return Application(reference, component)


def _tasks_of(found: Any, reference: str) -> list[AnyTask]:
    if isinstance(found, TemporalAsyncTask):
        return [found]
    create = getattr(cast("object", found), "create_async_tasks", None)
    if callable(create) and not isinstance(found, type):
        found = _users_code(cast("Callable[[], Any]", create), f"The integration {reference} cannot create its tasks")
    if not isinstance(found, list | tuple | set | frozenset):
        raise AppError(f"{reference} is {_kind(found)}. Name {_WANTED}.{_offer(reference)}")
    tasks = list(cast("Iterable[Any]", found))
    if not tasks:
        raise AppError(f"{reference} has no task in it.")
    for task in tasks:
        if not isinstance(task, TemporalAsyncTask):
            raise AppError(f"{reference} has {_kind(task)} in it, which is not a task: decorate it with @async_task.")
    return tasks


def _resolve(reference: str) -> Any:
    name, colon, attribute = reference.partition(":")
    if name.endswith(".py") or "/" in name:
        name = name.removesuffix(".py").strip("./").replace("/", ".")
        raise AppError(f"{reference!r} is a path. Name the module, as in {name}:{attribute or 'component'}.")
    if not all(part.isidentifier() for part in name.split(".")):
        raise AppError(f"{reference!r} is not module:attribute, as in shop:component.")
    module = _module(name)
    if not colon or not attribute:
        raise AppError(f"{reference!r} names a module, and no attribute of it.{_usable(module)}")
    found: Any = module
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            owner = f"Module {name!r}" if found is module else f"{_kind(found).capitalize()} in {reference!r}"
            near = difflib.get_close_matches(part, dir(found), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            file = getattr(module, "__file__", None) or "a namespace package"
            raise AppError(f"{owner} ({file}) has no attribute {part!r}.{hint}{_usable(module)}") from None
    return found


def _module(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        module: ModuleType = _users_code(
            lambda: importlib.import_module(name), f"Module {name!r} cannot be imported", missing=name
        )
    except ModuleNotFoundError as error:
        missing = error.name or name
        parent, _, last = missing.rpartition(".")
        folders = cast("list[str]", list(getattr(sys.modules.get(parent), "__path__", []))) if parent else [here]
        there = [module.name for module in pkgutil.iter_modules(folders)]
        near = difflib.get_close_matches(last, there or (), n=1)
        where = f"package {parent!r}" if parent else f"{here}, nor among the installed packages"
        if parent and not folders:
            where = f"{parent!r}, which is a module and no package"
        if near:
            hint = f"Did you mean {f'{parent}.' if parent else ''}{near[0]}?"
        elif there:
            hint = f"Modules there: {', '.join(sorted(there)[:_SHOWN])}."
        else:
            hint = "Run the command in the folder that your modules are imported from."
        raise AppError(f"There is no module {missing!r} in {where}. {hint}") from None
    return module


def _users_code(call: Callable[[], Any], what: str, *, missing: str = "") -> Any:
    """Call code of the application's, and tell its error by the place in that code.

    Raises:
        ModuleNotFoundError: Of the module ``missing`` or a package that it is in.
        AppError: Anything else.
    """
    try:
        return call()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if isinstance(error, ModuleNotFoundError) and missing and f"{missing}.".startswith(f"{error.name}."):
            raise
        lines = [f"{what}: it {'exits by itself' if isinstance(error, SystemExit) else 'raises'}", *_excerpt(error)]
        raise AppError("\n".join(lines)) from None


def _excerpt(error: BaseException) -> list[str]:
    """The last line of the application's own code, and the error."""
    said = "".join(traceback.format_exception_only(error)).rstrip().splitlines()
    frame = _last_frame(error.__traceback__)
    if frame is None or isinstance(error, SyntaxError):  # which names its place by itself
        return said
    lines = [f'  File "{frame.filename}", line {frame.lineno}, in {frame.name}']
    return [*lines, f"    {frame.line}", *said] if frame.line else [*lines, *said]


def _last_frame(trace: TracebackType | None) -> traceback.FrameSummary | None:
    frames = list(traceback.extract_tb(trace))
    libraries = {sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    libraries |= {*site.getsitepackages(), str(Path(__file__).parents[1])}
    foreign = tuple(os.path.join(os.path.realpath(folder), "") for folder in libraries)  # noqa: PTH118 - the slash at its end
    own = [
        frame
        for frame in frames
        if not frame.filename.startswith("<") and not os.path.realpath(frame.filename).startswith(foreign)
    ]
    return own[-1] if own else None


def _offer(reference: str) -> str:
    module = sys.modules.get(reference.partition(":")[0])
    return "" if module is None else _usable(module)


def _usable(module: ModuleType) -> str:
    """What of a module could be named instead."""
    names = [
        f"{module.__name__}:{name} ({_kind(value)})"
        for name, value in vars(module).items()
        if not name.startswith("_") and _is_usable(value)
    ]
    if not names:
        return f" Nothing in {module.__name__!r} can be named: it takes {_WANTED}."
    return f" There are: {', '.join(names[:_SHOWN])}."


def _is_usable(value: Any) -> bool:
    if isinstance(value, AsyncTaskComponent | TemporalAsyncTask):
        return True
    if isinstance(value, list | tuple) and value:
        return all(isinstance(one, TemporalAsyncTask) for one in cast("Iterable[Any]", value))
    return not isinstance(value, type) and callable(getattr(cast("object", value), "create_async_tasks", None))


def _kind(value: Any) -> str:
    if isinstance(value, AsyncTaskComponent):
        return "a component"
    if isinstance(value, TemporalAsyncTask):
        return "a task"
    if isinstance(value, list | tuple) and value and _is_usable(value):
        return "tasks"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(cast("object", value)).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
