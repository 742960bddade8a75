"""Orders for a fake device: a random one, or every possible one.

The search runs a program many times, each time with other choices (stateless search: Godefroid 1997). At a point with more than
one choice it takes a fingerprint: of all memory, of the progress of each stream and of the host, and of everything that the
host has read or been told so far. Two runs with the same fingerprint have the same future, so the second run stops there. This
needs no assumption about which operations are independent. It needs one run for each edge of the graph of states, not one for
each path; the paths are counted all the same.

The host's points are those where it touches shared memory or queries the device. Enqueuing needs no point: whatever a stream
could do before it, the stream can do after it with the same result.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tests.transfer.gpu.fake_device import Edge, FakeDevice, FakeStream
from tests.transfer.gpu.vector_clocks import Watch


class Random:
    """Picks a random stream or the host, among those that can run. Works with threads: a waiting thread runs the streams."""

    def __init__(self, seed: int, patience_s: float = 60) -> None:
        self._random, self._patience_s = random.Random(seed), patience_s

    def point(self, device: FakeDevice, label: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self._patience_s
        while True:
            with device.lock:
                options: list[FakeStream | None] = [*device.enabled(), *([None] if ready() else [])]
                pick = self._random.choice(options) if options else False
                if pick is None:
                    return
                if pick:
                    device.run(pick)
                    continue
            assert time.monotonic() < deadline, f"{label}: nothing can run, and no thread enqueues"
            time.sleep(1e-4)


class Pruned(BaseException):
    """This state has been explored already. Not an Exception, so that no code under test handles it."""


@dataclass
class Step:
    """What the engine does as soon as it is allowed to."""

    name: str
    may: Callable[[], bool]
    act: Callable[[], None]


@dataclass
class Program:
    """One run from the start. It is built again for every order."""

    main: Callable[[], None]  # calls the copier and drives its lanes
    engine: list[Step]
    complaints: Callable[[bool], list[str]]  # what is wrong now; with True: what is wrong at the end
    memories: list[npt.NDArray[np.uint8]]  # memory that is part of the state, besides the device's own


@dataclass
class Found:
    """The results of a search."""

    runs: int = 0
    states: int = 0  # states with more than one choice
    interleavings: int = 0  # paths through the states
    wrong: dict[str, list[str]] = field(default_factory=dict)  # complaint: an order that leads to it
    edges: set[Edge] = field(default_factory=set)
    races: set[tuple[str, str]] = field(default_factory=set)  # races that the clocks saw in any of the runs


class _Script:
    """Takes the choices of a prefix, then always the first choice. Remembers the states that it met."""

    def __init__(self, prefix: list[int], graph: dict[bytes, list[bytes | None]]) -> None:
        self.program: Program | None = None
        self.trail: list[str] = []
        self.wrong: dict[str, list[str]] = {}
        self.more: list[list[int]] = []  # prefixes not taken
        self.graph = graph
        self._choices, self._prefix = list[int](), prefix
        self._came: tuple[bytes, int] | None = None  # state and choice before this
        self._steps = 0
        self._label = ""
        self._over = False

    def point(self, device: FakeDevice, label: str, ready: Callable[[], bool]) -> None:
        if self._over:
            raise Pruned
        self._label = label
        self._look(device, False)
        while True:
            options = self._options(device, ready)
            assert options, f"deadlock at {label} after {self.trail}"
            who = options[self._choose(device, options) if len(options) > 1 else 0]
            self.trail.append(who if who != "host" else f"host {label}")
            if who == "host":
                return
            if who == "engine":
                self._act(device)
            else:
                device.run(device.streams[who])
            self._look(device, False)

    def finish(self, device: FakeDevice) -> None:
        """Let all remaining work run, then check the end state."""
        assert self.program is not None
        steps = self.program.engine
        self.point(device, "end", lambda: device.idle() and self._steps == len(steps))
        self._look(device, True)
        self._arrive(b"end")

    def _options(self, device: FakeDevice, ready: Callable[[], bool]) -> list[str]:
        assert self.program is not None
        steps = self.program.engine[self._steps :]
        agent, device.agent = device.agent, "engine"
        engine = ["engine"] if steps and steps[0].may() else []
        device.agent = agent
        return [*(s.name for s in device.enabled()), *engine, *(["host"] if ready() else [])]

    def _act(self, device: FakeDevice) -> None:
        assert self.program is not None
        step = self.program.engine[self._steps]
        self._steps += 1
        self.trail[-1] = f"engine: {step.name}"
        agent, device.agent = device.agent, "engine"
        step.act()
        device.agent = agent

    def _look(self, device: FakeDevice, end: bool) -> None:
        assert self.program is not None
        for complaint in (*self.program.complaints(end), *device.faults):
            self.wrong.setdefault(complaint, list(self.trail))

    def _choose(self, device: FakeDevice, options: list[str]) -> int:
        at = len(self._choices)
        if at < len(self._prefix):
            choice = self._prefix[at]
        else:
            choice = 0
            state = self._fingerprint(device)
            self._arrive(state)
            if state in self.graph:
                self._over = True
                raise Pruned
            self.graph[state] = [None] * len(options)
            self.more += [[*self._choices, other] for other in range(1, len(options))]
            self._came = (state, 0)
        self._choices.append(choice)
        return choice

    def _arrive(self, state: bytes) -> None:
        if self._came is not None and self._came[0] in self.graph:
            before, choice = self._came
            self.graph[before][choice] = state

    def came_from(self, state: bytes, choice: int) -> None:
        """Set the state and the choice that this run continues from, for the graph."""
        self._came = (state, choice)

    def _fingerprint(self, device: FakeDevice) -> bytes:
        assert self.program is not None
        digest = hashlib.blake2b(digest_size=16)
        progress = [(s.ran, len(s.queue)) for s in device.streams.values()]
        at = (self._label, device.points, self._steps)  # how far host and engine are
        digest.update(repr((progress, at, len(device.seen), len(device.held))).encode())
        for memory in (*device.memories, *self.program.memories, *device.seen, *device.held):
            digest.update(memory)
        return digest.digest()


def search(
    build: Callable[[FakeDevice], Program],
    drop: Iterable[Edge] = (),
    first: bool = False,  # stop at the first run that goes wrong
    prune: bool = True,  # False: take every path, to count them
    early_reads: bool = True,  # see FakeStream.copy
) -> Found:
    """Run a program in every order, with some edges removed."""
    found, graph = Found(), dict[bytes, list[bytes | None]]()
    todo: list[tuple[list[int], tuple[bytes, int] | None]] = [([], None)]
    start: bytes | None = None
    while todo:
        prefix, came = todo.pop()
        script = _Script(prefix, graph if prune else {})
        if came is not None:
            script.came_from(*came)
        device = FakeDevice(script, drop, Watch(enabled=True), early_reads)
        device.arrived = lambda: False
        script.program = build(device)
        known = set(script.graph)
        found.runs += 1
        try:
            script.program.main()
            script.finish(device)
            found.edges |= device.edges
        except Pruned:
            pass
        found.races |= device.watch.races
        for complaint, trail in script.wrong.items():
            found.wrong.setdefault(complaint, trail)
        new = [state for state in script.graph if state not in known]
        start = start or (new[0] if new else None)
        todo += _pending(script.more, new)
        if first and found.wrong:
            return found
    found.states = len(graph)
    found.interleavings = found.runs if not prune else _paths(graph, start) if start else 1
    return found


def _pending(more: list[list[int]], new: list[bytes]) -> list[tuple[list[int], tuple[bytes, int] | None]]:
    """Return each untaken prefix with the state that it branches from. Prefixes of one length branch from one state."""
    lengths = sorted({len(prefix) for prefix in more})
    states = dict(zip(lengths, new, strict=True))
    return [(prefix, (states[len(prefix)], prefix[-1])) for prefix in more]


def _paths(graph: dict[bytes, list[bytes | None]], start: bytes) -> int:
    """Count the paths from a state to the end. The graph has no cycles, because every step makes progress."""
    counts: dict[bytes, int] = {b"end": 1}
    stack = [start]
    while stack:
        state = stack[-1]
        ways = [way for way in graph[state] if way is not None]
        assert len(ways) == len(graph[state]), "a choice has not been taken"
        missing = [way for way in ways if way not in counts]
        if missing:
            stack += missing
        else:
            counts[state] = sum(counts[way] for way in ways)
            stack.pop()
    return counts[start]


def one_run(build: Callable[[FakeDevice], Program], seed: int, drop: Iterable[Edge] = ()) -> Watch:
    """Run a program once in a random order, watched for races."""
    watch = Watch(enabled=True)
    script = _Chance(seed)
    device = FakeDevice(script, drop, watch)
    device.arrived = lambda: False
    script.program = build(device)
    script.program.main()
    script.finish(device)
    return watch


class _Chance(_Script):
    """Chooses randomly among the engine, the host and the streams."""

    def __init__(self, seed: int) -> None:
        super().__init__([], {})
        self._random = random.Random(seed)

    def _choose(self, device: FakeDevice, options: list[str]) -> int:
        return self._random.randrange(len(options))

    def _look(self, device: FakeDevice, end: bool) -> None:
        pass
