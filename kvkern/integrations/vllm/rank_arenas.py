"""Which arena each rank copies from and to. Only if it is the scheduler's are slots that the scheduler names the rank's slots.

Each process of the engine keeps the first arena that the daemon gave it. If the daemon has made a new one between two of these
first connections, the scheduler and a rank have different ones, and every load would fail its checksum for good.

    no copier yet: no daemon has answered that rank             -> wait for it
    another arena than the scheduler's                          -> one line in the log; restart the engine
    nothing reported, or the scheduler itself has no arena yet  -> nothing is known against the rank
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from . import shim

ArenaId = tuple[int, ...]  # Arena.file_id(), which is the same in all processes of a host. Empty: there is none yet


class RankArenas:
    """The scheduler's knowledge. Ranks report before the first request or, inside MultiConnector, after the first step."""

    def __init__(self) -> None:
        self.own: Callable[[], ArenaId] = lambda: ()  # the scheduler's arena if a daemon gives it; else empty
        self._reported: dict[int, ArenaId] = {}
        self._told = False

    def note(self, reported: Mapping[int, ArenaId]) -> None:
        """Take what ranks have reported: rank -> arena. Empty: the rank has no copier yet."""
        self._reported.update(reported)

    def absent(self) -> list[int]:
        """Return the ranks that cannot use the scheduler's slots. While there are any, requests are not cached."""
        own = self.own()
        others = [rank for rank, arena in self._reported.items() if arena and own and arena != own]
        if others and not self._told:
            self._told = True
            shim.logger.error(
                "kvkern: the daemon made a new arena while this engine connected, so the ranks %(ranks)s have another one than "
                "the scheduler. Nothing is loaded or stored; restart this engine",
                {"event": "arenas_differ", "ranks": ", ".join(map(str, sorted(others)))},
            )
        return sorted(others + [rank for rank, arena in self._reported.items() if not arena])
