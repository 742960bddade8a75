"""A policy's memory does not grow: a hostile tier makes many calls, and the test measures the policy in bytes.

KVKERN_SOAK_OPERATIONS sets how many chunks the calls and answers of each policy name; `make soak` uses ten million.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvkern.policy import POLICIES, make_policy, policy_factory
from kvkern.policy.base import EvictionPolicy, Stop, Use
from kvkern.policy.grit import Grit
from kvkern.policy.grit_model import GritModel
from kvkern.policy.namespace_shares import NamespaceShares

SOAK = os.environ.get("KVKERN_SOAK_OPERATIONS")
OPERATIONS = int(SOAK or 400_000)
CAPACITY = 200
FEW_GHOSTS = 8_000  # so few that GRIT forgets ghosts in a short run; a soak has as many as production
SLACK_NBYTES = 1 << 16
RSS_SLACK_NBYTES = 24 << 20


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


class Hostile:
    """Makes a tier's calls in a mix that no engine makes. Keeps to the protocol and counts the chunks it names."""

    def __init__(self, policy: EvictionPolicy, namespaces: bool) -> None:
        self.policy = policy
        self.operations = 0
        self._rng = random.Random(4)
        self._namespaces = namespaces
        self._resident: set[bytes] = set()
        self._pins_made: deque[list[bytes]] = deque()
        self._pinned: set[bytes] = set()
        self._fresh = 0
        self._number = 0
        self._now, self._gap = 0.0, 1.0
        self._chains: OrderedDict[int, list[bytes]] = OrderedDict()

    def step(self) -> None:
        """Make calls that name some hundred chunks."""
        rng = self._rng
        act = rng.choice((self._flood, self._sessions, self._sessions, self._unwritten, self._pins, self._removal))
        self._now += rng.choice((0.0, 0.01, 1.0, 60.0, -30.0))
        if rng.random() < 0.01:
            self._gap = min(self._gap * 1.5, 1e9)
            self._now += rng.choice((1.0, -0.5)) * self._gap
        act()

    def _flood(self) -> None:
        """Make requests of one new chunk, each with its own number, session and namespace."""
        for _ in range(30):
            self._request(self._new(1), session=self._number)

    def _sessions(self) -> None:
        """Use chains that grow, are named twice and end. Some sessions come back after a long time."""
        rng = self._rng
        session = rng.choice((self._number, self._number - rng.randrange(40)))
        chain = self._chains.setdefault(session, [])
        chain += self._new(rng.randint(1, 12))
        if len(chain) > 200:
            del self._chains[session]
        if len(self._chains) > 60:
            self._chains.popitem(last=False)
        use = self._request(list(chain), session)
        self.policy.access(chain, use)
        self.policy.access((), use)
        self.operations += len(chain)

    def _unwritten(self) -> None:
        """Access chunks that are never stored, in requests with and without a number."""
        for _ in range(10):
            chain = self._new(5)
            self.policy.access(chain, self._use(self._rng.choice((0, self._number)), 0))
            self.operations += len(chain)

    def _pins(self) -> None:
        keys = self._some(20)
        keys = [k for k in keys if k not in self._pinned]
        self.policy.pin(keys)
        self._pinned.update(keys)
        self._pins_made.append(keys)
        self.operations += len(keys)
        if len(self._pins_made) > 8:
            keys = [k for k in self._pins_made.popleft() if k in self._pinned]
            self.policy.unpin(keys)
            self._pinned.difference_update(keys)
            self.operations += len(keys)

    def _removal(self) -> None:
        """Remove resident chunks, pinned or not, and some chunks that were never resident."""
        keys = self._some(30) + self._new(5)
        self.policy.remove(keys)
        self._resident.difference_update(keys)
        self._pinned.difference_update(keys)
        self.operations += len(keys)

    def _some(self, count: int) -> list[bytes]:
        return self._rng.sample(sorted(self._resident), min(count, len(self._resident)))

    def _request(self, chain: list[bytes], session: int) -> Use:
        self._number += 1
        use = self._use(self._number, session)
        self.policy.access(chain, use)
        missing = [k for k in chain if k not in self._resident]
        self.policy.insert(missing, use)
        self._resident.update(missing)
        gone = self.policy.victims(len(self._resident) - CAPACITY)
        self._resident.difference_update(gone)
        self.operations += len(chain) + len(missing) + len(gone)
        return use

    def _use(self, number: int, session: int) -> Use:
        namespace = b""
        if self._namespaces:  # one large tenant, eight that take turns, and a new tenant each time
            namespace = b"%d" % self._rng.choice((0, self._number // 3000 % 8 + 1, -self._number - 1))
        return Use(self._now, number, namespace, self._rng.randrange(-1, 5000), Stop(self._rng.randrange(3)), session)

    def _new(self, count: int) -> list[bytes]:
        self._fresh += count
        return [key(number) for number in range(self._fresh - count, self._fresh)]


def held_nbytes(value: object, seen: set[int]) -> int:
    """Return the bytes of an object and of all objects it holds that are not in `seen`: containers, arrays, attributes.

    Code and classes do not count.
    """
    if id(value) in seen or isinstance(value, type | Callable):  # type: ignore[arg-type]
        return 0
    seen.add(id(value))
    total = sys.getsizeof(value)
    if isinstance(value, np.ndarray):
        return total if value.base is None else total + held_nbytes(value.base, seen)
    parts: Iterator[Any] = iter(())
    if isinstance(value, dict):
        parts = (part for item in value.items() for part in item)
    elif isinstance(value, list | tuple | set | frozenset | deque):
        parts = iter(value)
    total += sum(held_nbytes(part, seen) for part in parts)
    return total + sum(held_nbytes(part, seen) for part in getattr(value, "__dict__", {}).values())


def rss_nbytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def make(name: str) -> EvictionPolicy:
    if not name.startswith("shares"):
        return make_policy(name, CAPACITY) if SOAK or name != "grit" else Grit(CAPACITY, max_ghosts=FEW_GHOSTS)
    if SOAK:
        return NamespaceShares(policy_factory("grit", CAPACITY))
    model = GritModel()
    return NamespaceShares(lambda: Grit(CAPACITY, model, max_ghosts=FEW_GHOSTS))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [*POLICIES, "shares of grit"])
def test_nothing_grows(name: str) -> None:
    """Measure the policy ten times, in a soak the process too. The last five sizes are no larger than the first five."""
    policy = make(name)
    tier, begin = Hostile(policy, namespaces=name.startswith("shares")), time.perf_counter()
    sizes: list[tuple[int, int]] = []
    for tenth in range(1, 11):
        while tier.operations < OPERATIONS * tenth // 10:
            tier.step()
        sizes.append((held_nbytes(policy, set()), rss_nbytes()))
        if SOAK:
            print(f"{name}: {tier.operations:,} {time.perf_counter() - begin:.0f} s, {sizes[-1][0]:,} {sizes[-1][1]:,}")
    held, rss = (list(column) for column in zip(*sizes, strict=True))
    assert max(held[5:]) <= max(held[:5]) * 1.05 + SLACK_NBYTES
    if SOAK:
        assert max(rss[5:]) <= max(rss[:5]) + RSS_SLACK_NBYTES
