"""No counter of a daemon goes back or counts twice: over engines that come, wait, are killed and come back, and new arenas."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvkern.arena.slots import SlotGeometry
from kvkern.node import protocol as p
from kvkern.node.client.admin_client import AdminClient
from kvkern.node.client.cache_client import NodeClient
from kvkern.node.daemon.server import NodeConfig, Server
from kvkern.observability.catalogue import CATALOGUE, Kind
from kvkern.policy.base import Use
from tests.node.conftest import eventually, served, store
from tests.node.peer import GEOMETRY, PATIENCE_S
from tests.observability.test_daemon_text import Samples, samples, value
from tests.support import NAMESPACE, chain_keys

OTHER_GEOMETRY = SlotGeometry(2 * GEOMETRY.part_nbytes, GEOMETRY.max_planes, GEOMETRY.world_size)
GROWING = {f"kvkern_{m.name}{end}" for m in CATALOGUE for end in ("_total", "_count", "_sum", "_bucket")
           if m.kind is not Kind.GAUGE}  # fmt: skip
CHAINS = {name: chain_keys(name, 6) for name in "abc"}
FIELDS = {"model": "Llama", "chunk_tokens": "16"}
steps = st.lists(
    st.one_of(
        st.tuples(st.just("start"), st.sampled_from("xy")),
        st.tuples(st.just("store"), st.sampled_from("abc")),
        st.tuples(st.just("ask"), st.sampled_from("abc"), st.integers(1, 3), st.integers(1, 6)),
        st.tuples(st.just("kill")),
        st.tuples(st.just("clear")),
        st.tuples(st.just("new arena")),
    ),
    min_size=4,
    max_size=14,
)


class Engines:
    """The engines of one run, and what a daemon must have counted for them."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.folder, self.server = folder, server
        self.client: NodeClient | None = None
        self.geometry = GEOMETRY
        self.looked_up = 0
        self.longest: Counter[tuple[int, int, str]] = Counter()  # (engine, request, chain) -> chunks that counted
        self.engine = 0

    def start(self) -> NodeClient:
        if self.client is None:
            self.engine += 1
            self.client = NodeClient.open(
                self.folder / "s", f"e{self.engine}", self.geometry, timeout_s=PATIENCE_S, patience_s=PATIENCE_S
            )
            self.client.describe_namespace(NAMESPACE, FIELDS)
        return self.client

    def kill(self) -> None:
        """End the connection without a word, as SIGKILL does."""
        if self.client is not None:
            self.client._link.close()
            self.client = None
            self._wait_until_gone()

    def _wait_until_gone(self) -> None:
        """What the client held is in quarantine for as long as its process lives, which is this one: end it."""
        eventually(lambda: not self.server.connections)
        if self.server.sessions is not None:
            for held in self.server.sessions.quarantines:
                held.processes.clear()
            eventually(lambda: self.server.sessions is None or not self.server.sessions.quarantines)

    def do(self, step: tuple) -> None:
        match step:
            case ("start", *_):
                self.start()
            case ("store", name):
                store(self.start(), CHAINS[name])
            case ("ask", name, request, chunks):
                client, keys = self.start(), CHAINS[name][:chunks]
                client.release(client.acquire(keys, use=Use(request=request, namespace=NAMESPACE)))
                at = (self.engine, request, name)
                self.looked_up += max(0, chunks - self.longest[at])
                self.longest[at] = max(self.longest[at], chunks)
            case ("kill",):
                self.kill()
            case ("clear",) | ("new arena",):
                self.kill()
                with AdminClient(self.folder / "s") as admin:
                    admin.ask(p.Clear(1, None))
                self._wait_until_gone()
                if step[0] == "new arena":
                    self.geometry = OTHER_GEOMETRY if self.geometry is GEOMETRY else GEOMETRY


def grown(samples: Samples) -> Samples:
    return {at: v for at, v in samples.items() if at[0] in GROWING}


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps)
def test_counters_never_go_back(run: list[tuple]) -> None:
    with tempfile.TemporaryDirectory(prefix="kvkern-", dir="/tmp") as name:
        folder = Path(name)
        with served(NodeConfig(folder / "s", 1 << 20, arena_dir=folder)) as server:
            engines, before = Engines(folder, server), grown(samples(server))
            for step in run:
                engines.do(step)
                after = grown(samples(server))
                assert not {at: (v, after.get(at)) for at, v in before.items() if after.get(at, -1.0) < v}, step
                before = after
            counted = "lookup_chunks_total"
            eventually(lambda: value(server, counted, tier="dram", model="Llama") == engines.looked_up)
            engines.kill()
