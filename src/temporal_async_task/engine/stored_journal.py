"""The journal as an attempt finds it on the server, and puts it there; and which attempts before it were lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from temporal_async_task.engine import wire
from temporal_async_task.engine.client import insist
from temporal_async_task.engine.journal import Journal, Snapshot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from temporalio import activity
    from temporalio.api.common.v1 import Payload

    from temporal_async_task.engine.values import PayloadValues


class StoredJournal:
    """Reads and encodes the journal of one attempt.

    The server counts the attempts that it has begun; an attempt that ends in order is accounted for in the metadata of
    the header that it leaves. What is between the two was lost with its worker.

    Args:
        values: Of the run.
        info: Of the attempt's activity.
        given: The journal's payloads: heartbeat details, or arguments of an activity that no attempt has written to.
    """

    def __init__(self, values: PayloadValues, info: activity.Info, given: Sequence[Payload]) -> None:
        self._values = values
        self._info = info
        self.given = list(given)
        self.lost = 0
        """Attempts that were lost just before this one; known once the journal is read."""

    async def read(self) -> Journal:
        """The journal, with the lost attempts counted.

        Raises:
            Exception: What the codec or the external storage raises.
        """
        journal = await self._values.decode_journal(self.given)
        accounted = 0
        if self._info.heartbeat_details:
            accounted = int(self.given[0].metadata.get(wire.ATTEMPTS, b"0"))
            if journal.earlier + self._info.attempt <= journal.attempt:  # the activity was reset, and counts anew
                journal.earlier = journal.attempt
        else:  # the first attempt of an activity that goes on where another was stopped
            journal.earlier = journal.attempt
        self.lost = max(self._info.attempt - 1 - accounted, 0)
        journal.count_lost(self.lost)
        return journal

    async def encode(self, snapshot: Snapshot, *, ended: bool = False) -> list[Payload]:
        """The payloads of a journal.

        Args:
            snapshot: The journal.
            ended: This attempt is over, and accounted for.
        """
        header, results = await self._values.encode_journal(snapshot)
        attempts = self._info.attempt if ended else self._info.attempt - 1
        header.metadata[wire.ATTEMPTS] = str(attempts).encode()
        if snapshot.cancelled:
            header.metadata[wire.CANCELLING] = b"true"
        return [header, results]

    async def insist_encode(self, journal: Journal, *, ended: bool = False) -> list[Payload]:
        """As ``encode``, of the journal as it is now; repeated until the codec does it."""
        return await insist(lambda: self.encode(journal.snapshot(), ended=ended), "encode the journal")

    def untouched(self) -> list[Payload]:
        """The payloads as they were given, with this attempt accounted for. Needs no codec: it may be the wrong one."""
        details = self.given or [wire.nothing_begun(), wire.nothing_begun()]
        details[0].metadata[wire.ATTEMPTS] = str(self._info.attempt).encode()
        return details
