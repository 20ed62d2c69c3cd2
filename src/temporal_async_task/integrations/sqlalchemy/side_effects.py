"""What happens when a record was created, updated or deleted: after the commit, and never for what was rolled back."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from sqlalchemy import event
from sqlalchemy import inspect as inspect_record
from sqlalchemy.orm import Session, SessionTransaction

from temporal_async_task.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from sqlalchemy.orm import InstanceState, UOWTransaction

logger = logging.getLogger("temporal_async_task")


class MutationType(StrEnum):
    """What was done to a record."""

    CREATE = "create"
    UPDATE = "update"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class RecordMutation:
    """What one transaction has done to one record."""

    record: type[Any]
    """The record's class."""
    type: MutationType
    identity: Any
    """Its primary key (a tuple, if that has several columns)."""
    values: dict[str, Any]
    """Its columns, as they were flushed; of those that were not loaded there is nothing."""
    changes: dict[str, tuple[Any, Any]] = field(default_factory=dict[str, tuple[Any, Any]])
    """Of an update: each changed column's value before (None if it was not loaded) and after."""


class RecordMutationSideEffect:
    """A function that is called when a transaction that has changed records of a class was committed.

    It is called at most once for each record and transaction, after the commit, in the process that made it, and not
    at all if the process dies between the two. What must not be lost is a record's task. It sees what sessions flush;
    bulk statements (``session.execute(update(...))``, SQL) pass it by.

    Args:
        record: The mapped class; its subclasses, too.
        content: Called with a ``RecordMutation``. An async function runs as a task of the event loop, a sync one
            before ``commit()`` returns. An error of it is logged: the commit stands.
        on: For which kinds of change.
        name: Shown in the log.

    Raises:
        ConfigError: ``record`` is no mapped class, or ``on`` names no kind of change.
    """

    def __init__(
        self,
        record: type[Any],
        content: Callable[[RecordMutation], Awaitable[Any] | Any],
        *,
        on: Collection[MutationType | str] | MutationType | str = tuple(MutationType),
        name: str = "",
    ) -> None:
        if inspect_record(record, raiseerr=False) is None:
            raise ConfigError(f"A side effect needs a mapped class of SQLAlchemy, not {record!r}.")
        try:
            self.on = frozenset(MutationType(kind) for kind in ((on,) if isinstance(on, str) else on))
        except ValueError:
            raise ConfigError(f"on= must be of {[str(kind) for kind in MutationType]}, not {on!r}.") from None
        self.record = record
        self.content = content
        self.name = name or str(getattr(content, "__qualname__", content))
        self._seen: WeakKeyDictionary[Session, _Seen] = WeakKeyDictionary()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: set[asyncio.Future[Any]] = set()

    def install(self) -> None:
        """Begin to listen to all sessions of this process. Doing it twice is doing it once."""
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None
        for moment, listener in self._listeners():
            if not event.contains(Session, moment, listener):
                event.listen(Session, moment, listener)

    def remove(self) -> None:
        """Listen no more."""
        for moment, listener in self._listeners():
            if event.contains(Session, moment, listener):
                event.remove(Session, moment, listener)

    def _listeners(self) -> tuple[tuple[str, Callable[..., None]], ...]:
        return (
            ("after_flush", self._after_flush),
            ("after_commit", self._after_commit),
            ("after_soft_rollback", self._after_rollback),
            ("after_transaction_end", self._after_end),
        )

    # What SQLAlchemy tells

    def _after_flush(self, session: Session, _: UOWTransaction) -> None:
        transaction = session.get_nested_transaction() or session.get_transaction()
        if transaction is None:
            return
        found = [
            *(_mutation(MutationType.CREATE, one) for one in session.new if isinstance(one, self.record)),
            *(
                _mutation(MutationType.UPDATE, one)
                for one in session.dirty
                if isinstance(one, self.record) and session.is_modified(one, include_collections=False)
            ),
            *(_mutation(MutationType.DELETE, one) for one in session.deleted if isinstance(one, self.record)),
        ]
        if found:
            self._seen.setdefault(session, _Seen()).add(transaction, found)

    def _after_rollback(self, session: Session, transaction: SessionTransaction) -> None:
        if session in self._seen:
            self._seen[session].drop(transaction)

    def _after_commit(self, session: Session) -> None:
        seen = self._seen.get(session)
        if seen is None:
            return
        nested = session.get_nested_transaction()
        if nested is not None:  # a savepoint was released: it depends on the transaction around it from now on
            seen.hand_up(nested)
            return
        del self._seen[session]
        for mutation in seen.merged():
            if mutation.type in self.on:
                self._call(mutation)

    def _after_end(self, session: Session, transaction: SessionTransaction) -> None:
        if transaction.parent is None:  # not committed, or what follows would have been done: the session was closed
            self._seen.pop(session, None)

    def _call(self, mutation: RecordMutation) -> None:
        try:
            answer = self.content(mutation)
            if inspect.isawaitable(answer):
                self._begin(self._awaited(answer, mutation))
        except Exception as error:
            self._log(mutation, error)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            if self._loop is None or not self._loop.is_running():
                asyncio.run(work)
            else:
                asyncio.run_coroutine_threadsafe(work, self._loop)
        else:
            running = loop.create_task(work)
            self._running.add(running)  # the loop itself holds it weakly only
            running.add_done_callback(self._running.discard)

    async def _awaited(self, answer: Awaitable[Any], mutation: RecordMutation) -> None:
        try:
            await answer
        except Exception as error:
            self._log(mutation, error)

    def _log(self, mutation: RecordMutation, error: Exception) -> None:
        logger.error(
            "Side effect %s failed, after the %s of %s %r was committed",
            self.name,
            mutation.type,
            mutation.record.__name__,
            mutation.identity,
            exc_info=error,
        )


class _Seen:
    """What a session has flushed and not committed yet, in order, each with its innermost transaction."""

    def __init__(self) -> None:
        self._mutations: list[tuple[SessionTransaction, RecordMutation]] = []

    def add(self, transaction: SessionTransaction, mutations: list[RecordMutation]) -> None:
        self._mutations += [(transaction, mutation) for mutation in mutations]

    def drop(self, ended: SessionTransaction) -> None:
        """Forget what was rolled back with a transaction, and those inside of it."""
        self._mutations = [(within, one) for within, one in self._mutations if not _is_inside(within, ended)]

    def hand_up(self, released: SessionTransaction) -> None:
        parent = _around(released)
        self._mutations = [(parent if within is released else within, one) for within, one in self._mutations]

    def merged(self) -> list[RecordMutation]:
        """One mutation for each record."""
        merged: dict[Any, RecordMutation] = {}
        for _, mutation in self._mutations:
            key = (mutation.record, mutation.identity)
            earlier = merged.pop(key, None)
            together = mutation if earlier is None else _together(earlier, mutation)
            if together is not None:
                merged[key] = together
        return list(merged.values())


def _together(earlier: RecordMutation, later: RecordMutation) -> RecordMutation | None:
    """What two mutations of one transaction amount to."""
    values = earlier.values | later.values
    match earlier.type, later.type:
        case MutationType.CREATE, MutationType.DELETE:
            return None
        case MutationType.CREATE, _:
            return replace(earlier, values=values)
        case MutationType.UPDATE, MutationType.UPDATE:
            changes = dict(earlier.changes)
            for name, (before, after) in later.changes.items():
                changes[name] = (changes[name][0] if name in changes else before, after)
            return replace(later, values=values, changes=changes)
        case MutationType.DELETE, MutationType.CREATE:  # replaced by another with its key
            return replace(later, type=MutationType.UPDATE)
        case _:
            return replace(later, values=values)


def _mutation(kind: MutationType, record: Any) -> RecordMutation:
    state: InstanceState[Any] = inspect_record(record)
    columns = [attribute.key for attribute in state.mapper.column_attrs]
    values = {name: state.dict[name] for name in columns if name in state.dict}
    changes: dict[str, tuple[Any, Any]] = {}
    if kind is MutationType.UPDATE:
        for name in columns:
            history = state.attrs[name].history
            if history.added:
                changes[name] = (history.deleted[0] if history.deleted else None, history.added[0])
    identity = tuple(state.mapper.primary_key_from_instance(record))
    return RecordMutation(state.mapper.class_, kind, identity[0] if len(identity) == 1 else identity, values, changes)


def _around(transaction: SessionTransaction) -> SessionTransaction:
    """The savepoint or transaction around a savepoint."""
    around = transaction.parent
    while around is not None and not around.nested and around.parent is not None:
        around = around.parent  # of a flush: no transaction of its own
    return around or transaction


def _is_inside(inner: SessionTransaction, outer: SessionTransaction) -> bool:
    at: SessionTransaction | None = inner
    while at is not None:
        if at is outer:
            return True
        at = at.parent
    return False
