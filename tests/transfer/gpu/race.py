"""Finds unordered accesses by vector clocks, in one run and whatever order that run took (Lamport 1978, Mattern 1989).

Agents are streams and host threads, each with a clock: how much of every agent it is after. Enqueuing orders the host before
the operation; an event carries its stream's clock to whoever waits for it. Two accesses to the same 64 bytes, one of them a
write, race unless the later one's clock has reached the earlier one.
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
    time: int  # of its agent
    name: str


class Watch:
    """Clocks of all agents and the last accesses to each line. `enabled` from the start, or clocks only."""

    def __init__(self, enabled: bool = False) -> None:
        self.races: set[tuple[str, str]] = set()  # (who came first in this run, who is not ordered after it)
        self._enabled = enabled
        self._clocks: defaultdict[str, Clock] = defaultdict(dict)
        self._writes: dict[int, _Access] = {}
        self._reads: defaultdict[int, dict[str, _Access]] = defaultdict(dict)  # since the last write, one an agent

    def now(self, agent: str) -> Clock:
        """A copy of an agent's clock."""
        return dict(self._clocks[agent])

    def join(self, agent: str, clock: Clock) -> None:
        """From now on the agent is after all that `clock` is after."""
        own = self._clocks[agent]
        for other, time in clock.items():
            own[other] = max(own.get(other, 0), time)

    def enqueue(self, host: str, stream: str) -> Clock:
        """The clock of the next thing on a stream."""
        if not self._enabled:
            return {}
        self.join(stream, self._clocks[host])
        return self._tick(stream)

    def host(self, agent: str, name: str, spans: list[Span]) -> None:
        """A host thread touches memory now."""
        if self._enabled:
            self._touch(agent, f"{agent}: {name}", spans, self._tick(agent))

    def device(self, stream: str, name: str, spans: list[Span], clock: Clock) -> None:
        """An operation runs."""
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
