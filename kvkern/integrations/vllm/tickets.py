"""Tickets: each is the number of one transfer, and owns the slots that workers may touch until they report its end."""

from __future__ import annotations

from collections.abc import Sequence

from ...tiers.base import Lease, Reservation

NO_TICKET = -1


class Tickets:
    """The open tickets of one manager. Numbers grow and are never used twice."""

    def __init__(self) -> None:
        self._owned: dict[int, Sequence[Lease] | Sequence[Reservation]] = {}
        self._last = 0
        self._last_before_reset = 0
        self._spoiled: set[int] = set()

    def open(self, owned: Sequence[Lease] | Sequence[Reservation]) -> int:
        """Return a new ticket that owns these leases or reservations."""
        self._last += 1
        self._owned[self._last] = owned
        return self._last

    def spoil(self) -> None:
        """Note that what the open tickets' stores copy may be wrong."""
        self._spoiled.update(self._owned)

    def end_spoiled(self, ticket: int) -> bool:
        """Return True if the ticket was spoiled. Call it once, before `close`."""
        spoiled = ticket in self._spoiled
        self._spoiled.discard(ticket)
        return spoiled

    def close(self, ticket: int) -> Sequence[Lease] | Sequence[Reservation]:
        """Return what the ticket owned. Nothing if it is closed."""
        return self._owned.pop(ticket, ())

    def note_reset(self) -> None:
        """Remember which tickets are of a time before the cache's reset."""
        self._last_before_reset = self._last

    def from_before_reset(self) -> list[int]:
        """Return the open tickets that are older than the last reset."""
        return [ticket for ticket in self._owned if ticket <= self._last_before_reset]

    def __bool__(self) -> bool:
        return bool(self._owned)
