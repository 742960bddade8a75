"""Finds unordered accesses by vector clocks, in one run of any order (Lamport 1978, Mattern 1989).

Agents are streams and host threads. An agent's clock says how much of every other agent's work has happened before it.
Enqueuing orders the host before the operation. An event carries its stream's clock to every agent that waits for it. Two
accesses to the same 64 bytes race if one of them is a write and the later one's clock has not reached the earlier one.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

Clock = dict[str, int]
_LINE = 64


@dataclass(frozen=True, slots=True)
class Span:
    address: int
    nbytes: int
    write: bool


@dataclass(frozen=True, slots=True)
class _Access:
    agent: str
    time: int  # on its agent's clock
    name: str


class Watch:
    """The clocks of all agents and the last accesses to each line. If not `enabled` it keeps clocks only."""

    def __init__(self, enabled: bool = False) -> None:
        self.races: set[tuple[str, str]] = (
            set()
        )  # (first access in this run, a later access that is not ordered after it)
        self._enabled = enabled
        self._clocks: defaultdict[str, Clock] = defaultdict(dict)
        self._writes: dict[int, _Access] = {}
        self._reads: defaultdict[int, dict[str, _Access]] = defaultdict(dict)  # since the last write, one per agent

    def now(self, agent: str) -> Clock:
        """Return a copy of an agent's clock."""
        return dict(self._clocks[agent])

    def join(self, agent: str, clock: Clock) -> None:
        """Order the agent, from now on, after everything that `clock` is after."""
        own = self._clocks[agent]
        for other, time in clock.items():
            own[other] = max(own.get(other, 0), time)

    def enqueue(self, host: str, stream: str) -> Clock:
        """Return the clock of the next operation on a stream."""
        if not self._enabled:
            return {}
        self.join(stream, self._clocks[host])
        return self._tick(stream)

    def host(self, agent: str, name: str, spans: list[Span]) -> None:
        """Report that a host thread touches memory now."""
        if self._enabled:
            self._touch(agent, f"{agent}: {name}", spans, self._tick(agent))

    def device(self, stream: str, name: str, spans: list[Span], clock: Clock) -> None:
        """Report that an operation of a stream runs."""
        if self._enabled:
            self._touch(stream, name, spans, clock)

    def _tick(self, agent: str) -> Clock:
        own = self._clocks[agent]
        own[agent] = own.get(agent, 0) + 1
        return dict(own)

    def _touch(self, agent: str, name: str, spans: list[Span], clock: Clock) -> None:
        access = _Access(agent, clock[agent], name)
        lines: dict[int, bool] = {}
        for span in spans:
            for line in range(span.address // _LINE, -(-(span.address + span.nbytes) // _LINE)):
                lines[line] = lines.get(line, False) or span.write
        for line, write in lines.items():
            earlier = [self._writes[line]] if line in self._writes else []
            if write:
                earlier += self._reads.pop(line, {}).values()
            for other in earlier:
                if other.agent != agent and clock.get(other.agent, 0) < other.time:
                    self.races.add((other.name, name))
            if write:
                self._writes[line] = access
            else:
                self._reads[line][agent] = access
