"""Lines for operators: one a change of state, with the likeliest reason. No engine runs."""

from __future__ import annotations

import time
from typing import Any

import pytest

from kvkern.integrations.vllm import shim
from kvkern.integrations.vllm.never_hits import LINE_S, MIN_REQUESTS, NeverHits
from kvkern.integrations.vllm.notices import Notices
from kvkern.integrations.vllm.room_notice import QUIET_S, RoomNotice
from kvkern.metrics import CacheCounters

pytestmark = pytest.mark.vllm


def watched(found: int = 0, tenants: int = 1, requests: int = MIN_REQUESTS) -> NeverHits:
    watch = NeverHits(16)
    for number in range(requests):
        watch.note_request(bytes([number % tenants]) * 32, found, 0)
    return watch


@pytest.mark.parametrize(
    ("watch", "counters", "usage", "reason"),
    [
        ({}, {"stored_chunks": 3}, {"connected": 0}, "daemon does not answer"),
        ({}, {"failed_chunks": 180}, {}, "not one was written by every worker"),
        ({}, {"stored_chunks": 3, "bad_chunks": 2}, {}, "failed verification"),
        ({"found": 24}, {"stored_chunks": 24}, {}, "240 chunks were found, but vLLM loaded none"),
        ({"tenants": MIN_REQUESTS}, {"stored_chunks": 3}, {}, "cache_salt"),
        ({}, {}, {"known_chunks": 9}, "Compare its model"),
        ({}, {"stored_chunks": 90, "evicted_chunks": 80}, {"slots": 10}, "10 slots, and 80 chunks were evicted"),
        ({}, {"stored_chunks": 3}, {}, "the same 16 tokens"),
    ],
)
def test_the_likeliest_reason(
    watch: dict[str, int], counters: dict[str, int], usage: dict[str, int], reason: str
) -> None:
    line = watched(**watch).line(0.0, CacheCounters(**counters), usage)
    assert line is not None
    assert line.startswith("kvkern: 10 requests have asked for cached chunks, and none was served. ")
    assert reason in line


def test_at_most_one_line_a_minute_and_none_too_early() -> None:
    start = time.monotonic()
    watch = watched()
    assert not watch.is_due(start + LINE_S - 1)
    assert not watched(requests=MIN_REQUESTS - 1).is_due(start + 10 * LINE_S)
    lines = 0
    for second in range(3600):
        if watch.is_due(start + second):
            lines += watch.line(start + second, CacheCounters(stored_chunks=1), {}) is not None
    assert 3 <= lines <= 60


def test_no_line_once_something_was_served_or_while_nothing_is_stored() -> None:
    watch = watched()
    assert watch.line(0.0, CacheCounters(), {}) is None
    assert watch.is_due(time.monotonic() + LINE_S + 1)
    watch.note_request(bytes(32), 3, 3)
    assert not watch.is_due(time.monotonic() + LINE_S + 1)


def test_a_full_cache_is_one_line_until_there_is_room_again() -> None:
    """96 requests that find no slot in 17 s, and again ten minutes later."""
    notice = RoomNotice()
    lines = [notice.note_dropped(4, now_s * 17 / 96, 57) for now_s in range(96)]
    assert [line for line in lines if line][1:] == []
    assert "57 slots" in (lines[0] or "")
    assert notice.ended(QUIET_S) is None
    assert "384 chunks were not stored" in (notice.ended(17 + QUIET_S) or "")
    assert notice.ended(18 + QUIET_S) is None
    assert notice.note_dropped(1, 600, 57) is not None


@pytest.mark.parametrize(("usage", "lines"), [({}, 1), ({"connected": 1}, 1), ({"connected": 0}, 0)])
def test_a_lost_daemon_is_no_full_cache(monkeypatch: pytest.MonkeyPatch, usage: dict[str, int], lines: int) -> None:
    class FakeCache:
        def usage(self) -> dict[str, int]:
            return {"slots": 57, **usage}

    said: list[str] = []
    monkeypatch.setattr(shim.logger, "warning", lambda line, values: said.append(line % values))
    cache: Any = FakeCache()
    Notices(cache, 16).note_dropped(3)
    assert len(said) == lines
