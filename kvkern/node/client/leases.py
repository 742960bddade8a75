"""A client's leases and reservations, and how a lease is read from the daemon's answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...policy.base import Use
from ...tiers.base import Lease, Reservation
from .. import protocol as p


@dataclass(frozen=True, slots=True)
class NodeLease(Lease):
    """A lease that a daemon gave over one connection."""

    number: int = 0  # the daemon's number of the lease
    connection: int = 0  # the client's number of the connection


@dataclass(frozen=True, slots=True)
class NodeReservation(Reservation):
    """Granted slots whose headers name the chunks to write."""

    namespace: bytes = b""  # 32-byte root
    connection: int = 0  # the client's number of the connection
    use: Use | None = None  # what is known of the request that stores


def lease_of(
    answer: p.Response | None,  # None: none has come
    asked: Sequence[bytes],  # the keys of the question
    num_slots: int,  # of the arena
    connection: int,  # the client's number of the connection
) -> NodeLease | None:
    """Return the lease that an answer gives. None if it gives none, or does not fit the question or the arena."""
    if not isinstance(answer, p.Acquired) or not answer.slots or len(answer.slots) % 4 or len(answer.fingerprints) % 8:
        return None
    slots, known = np.frombuffer(answer.slots, dtype="<u4"), np.frombuffer(answer.fingerprints, dtype="<u8")
    rows = answer.rows or range(len(slots))
    if not len(slots) == len(known) == len(rows) or max(rows) >= len(asked) or int(slots.max()) >= num_slots:
        return None
    keys = tuple(asked[: len(slots)]) if not answer.rows else tuple(asked[row] for row in rows)
    return NodeLease(keys, tuple(slots.tolist()), known, answer.lease, connection)
