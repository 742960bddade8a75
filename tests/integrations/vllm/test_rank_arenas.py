"""A rank whose arena is not the scheduler's has none of its chunks."""

from __future__ import annotations

import pytest

from kvkern.integrations.vllm import shim
from kvkern.integrations.vllm.rank_arenas import RankArenas

pytestmark = pytest.mark.vllm


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(shim.logger, "error", lambda message, fields: found.append(message % fields))
    return found


def test_ranks_arrive_one_after_the_other(lines: list[str]) -> None:
    ranks = RankArenas()
    ranks.own = lambda: (1, 2)
    assert ranks.absent() == []
    ranks.note({1: (), 0: ()})
    assert ranks.absent() == [0, 1]
    ranks.note({1: (1, 2)})
    assert ranks.absent() == [0]
    ranks.note({0: (1, 2)})
    assert ranks.absent() == []
    assert not lines


def test_a_rank_with_an_earlier_arena_is_absent_with_one_line(lines: list[str]) -> None:
    """As soon as the scheduler has an arena to compare with. A cache of the engine's own is compared otherwise."""
    ranks, own = RankArenas(), [()]
    ranks.own = lambda: own[0]
    ranks.note({0: (1, 2), 1: (1, 3), 2: ()})
    assert ranks.absent() == [2]
    assert not lines
    own[0] = (1, 3)  # type: ignore[call-overload]
    assert [ranks.absent(), ranks.absent()] == [[0, 2], [0, 2]]
    (line,) = lines
    assert "the ranks 0 have another one than the scheduler. Nothing is loaded or stored; restart this engine" in line
