"""What can be learnt from a function's signature, its kind and its code."""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import sys
import types
import typing
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Mapping,
)
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import typing_extensions

from temporal_async_task.errors import ConfigError, StepUsageError
from temporal_async_task.steps import Result

_hints: WeakKeyDictionary[Callable[..., Any], Any] = WeakKeyDictionary()


def return_type(call: Callable[..., Any]) -> Any:
    """What a callable's result is decoded to: its return annotation, None without one.

    Raises:
        StepUsageError: The annotation names what is not there at run time.
    """
    function = _function(call)
    if inspect.isclass(function):
        return function
    owner: Any = getattr(call, "__self__", None)
    try:
        hint = _hints[function]
    except (KeyError, TypeError):
        try:
            hint = _result_of(_annotations(function).get("return"))
        except ConfigError as error:
            raise StepUsageError(f"{error} Or name the type: step.with_options(result_type=...).") from error
        if isinstance(function, types.FunctionType):
            _hints[function] = hint
    if owner is not None and hint is vars(typing)["Self"]:
        return owner if inspect.isclass(owner) else owner.__class__
    return hint


def signature_types(function: Callable[..., Any], scope: Mapping[str, Any]) -> tuple[bool, Any, Any]:
    """Of a task's function: whether it takes params, their type, and the type of its result.

    Args:
        function: The task's function.
        scope: The local names where it is defined.

    Raises:
        ConfigError: It takes more than one parameter, or an annotation names what is not there at run time.
    """
    name = name_of(function)
    parameters = list(inspect.signature(function).parameters.values())
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in parameters if p.default is p.empty and p.kind not in {p.VAR_POSITIONAL, p.VAR_KEYWORD}]
    if len(needed) > 1 or any(parameter.kind not in kinds for parameter in needed):
        raise ConfigError(
            f"Task function {name} takes {len(needed)} parameters. A task takes one (its params, as a model or "
            f"dataclass) or none."
        )
    first = next((parameter for parameter in parameters if parameter.kind in kinds), None)
    hints = _annotations(_function(function), scope)
    params_type = hints.get(first.name) if first else None
    return first is not None, params_type, _result_of(hints.get("return"), generator=True)


def is_async(call: Callable[..., Any]) -> bool:
    """Whether a callable is to be called on the event loop."""
    call = _bare(call)
    return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(type(call).__call__)


def is_sync(function: Callable[..., Any]) -> bool:
    """Whether all of a task's code is one sync call: it asks for no steps, and needs no event loop."""
    return not (is_async(function) or inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function))


def names(function: Callable[..., Any], thing: object) -> bool:
    """Whether a function's own code names a thing, as a global (``wait_for``) or of a module (``tasks.wait_for``)."""
    function = inspect.unwrap(_bare(function))
    code: types.CodeType | None = getattr(function, "__code__", None)
    return code is not None and _code_names(code, getattr(function, "__globals__", {}), thing)


def _code_names(code: types.CodeType, scope: Mapping[str, object], thing: object) -> bool:
    before: object = None
    for instruction in dis.get_instructions(code):
        if instruction.opname in {"LOAD_GLOBAL", "LOAD_NAME"}:
            before = scope.get(instruction.argval)
        elif instruction.opname in {"LOAD_ATTR", "LOAD_METHOD"} and isinstance(before, types.ModuleType):
            before = getattr(before, instruction.argval, None)
        else:
            before = None
        if before is thing:
            return True
    return any(_code_names(inner, scope, thing) for inner in code.co_consts if isinstance(inner, types.CodeType))


def name_of(thing: Any) -> str:
    """What a class, a function or a type with arguments is called in messages."""
    name: str = getattr(thing, "__qualname__", None) or str(thing)
    return name


def _bare(call: Callable[..., Any]) -> Callable[..., Any]:
    """What a partial, of a partial perhaps, is made of."""
    while isinstance(call, functools.partial):
        call = call.func
    return call


def _function(call: Callable[..., Any]) -> Callable[..., Any]:
    call = _bare(call)
    if inspect.ismethod(call):
        return call.__func__
    if not inspect.isroutine(call) and not inspect.isclass(call):
        return type(call).__call__
    return call


def _annotations(function: Callable[..., Any], scope: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A function's annotations, resolved; names in strings are looked up in ``scope`` and where the function was made.

    An annotation that is a string (``from __future__ import annotations``) does not know the local names around its
    function, unless the function uses them itself.
    """
    local = dict(scope or {})
    if isinstance(function, types.FunctionType):
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # a cell that is still empty
                local[name] = cell.cell_contents
    try:
        hints = typing.get_type_hints(function, localns=local or None, include_extras=True)
        return {name: _for_pydantic(hint) for name, hint in hints.items()}
    except NameError as error:
        raise ConfigError(
            f"The annotations of {name_of(function)} cannot be resolved: {error}. They tell how values are decoded, so "
            f"what they name must be importable at run time, not only under TYPE_CHECKING."
        ) from error
    except TypeError:  # builtins and the like, which have none
        return {}


def _for_pydantic(hint: Any) -> Any:
    """A TypedDict of ``typing`` as one of ``typing_extensions``, which is the one pydantic takes before Python 3.12."""
    if sys.version_info >= (3, 12) or not typing.is_typeddict(hint):
        return hint
    fields = {name: _for_pydantic(field) for name, field in typing.get_type_hints(hint, include_extras=True).items()}
    make: Any = typing_extensions.TypedDict
    return make(hint.__name__, fields, total=hint.__total__)


def _result_of(hint: Any, *, generator: bool = False) -> Any:
    """The type of the value in the end: of ``Awaitable[T]`` it is T."""
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (Awaitable, Coroutine) and args:
        return _result_of(args[-1])
    if generator and origin in (Generator, Iterator, Iterable):
        returned = 2  # of what a generator yields, receives and returns
        return _result_of(args[returned]) if len(args) > returned else None
    if generator and origin in (AsyncGenerator, AsyncIterator, AsyncIterable):
        yielded = args[0] if args else None
        for part in (yielded, *typing.get_args(yielded)):
            if typing.get_origin(part) is Result:
                return _result_of(typing.get_args(part)[0])
        return None
    return None if hint is Any or isinstance(hint, TypeVar) else hint
