"""Tickets own slots until workers are done with them, also over a reset."""

from __future__ import annotations

import pytest

from kvkern.integrations.vllm.tickets import NO_TICKET, Tickets
from kvkern.tiers.base import Lease

pytestmark = pytest.mark.vllm


def lease(slot: int) -> Lease:
    return Lease((bytes(32),), (slot,))


def test_a_ticket_owns_until_it_is_closed_once() -> None:
    tickets = Tickets()
    assert not tickets
    first, second = tickets.open([lease(1)]), tickets.open([lease(2)])
    assert NO_TICKET < first < second
    assert tickets
    assert tickets.close(first) == [lease(1)]
    assert tickets.close(first) == tickets.close(NO_TICKET) == ()
    assert tickets.close(second) == [lease(2)]
    assert not tickets
    assert tickets.open([]) > second


def test_tickets_from_before_a_reset() -> None:
    tickets = Tickets()
    old, ended = tickets.open([lease(1)]), tickets.open([lease(2)])
    assert tickets.from_before_reset() == []
    tickets.note_reset()
    new = tickets.open([lease(3)])
    tickets.close(ended)
    assert tickets.from_before_reset() == [old]
    tickets.note_reset()
    assert tickets.from_before_reset() == [old, new]
