"""A wall clock that is set back or forth by a day changes nothing: all that waits or grows old counts by another clock."""

from __future__ import annotations

import ast
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kvkern.node.client.cache_client import NodeClient
from kvkern.node.daemon.node_config import NodeConfig
from tests.import_graph import MODULES
from tests.node import conftest
from tests.node.conftest import GEOMETRY, eventually, hits, served, store
from tests.remote.stores.conformance import HIT, Bench, key_of
from tests.remote.stores.file.files import VALUE, makes, nbytes_in, temporaries_in, values_in, wait_for
from tests.support import chain_keys

folder = conftest.folder

WALL_CLOCK = {"time.time", "time.time_ns", "time.localtime", "time.gmtime", "datetime.now", "datetime.utcnow"}
READERS = {  # each with its reason
    "kvkern/node/daemon/server.py": "when a request of a recorded trace arrived, and when the daemon started, for people",
    "kvkern/node/client/trace_recorder.py": "how long ago that was, at once by the monotonic clock",
    "kvkern/node/daemon/overview.py": "when the overview was made, for people",
    "kvkern/observability/tracing.py": "OpenTelemetry's spans have wall-clock times",
    "kvkern/operator/leader.py": "what a lease shows; whether it is old is judged by the monotonic clock",
    "kvkern/operator/run.py": "times in a status: a clock set forth ends the pause before unneeded cache pods go",
    "kvkern/operator/webhook/service.py": "certificates are valid between two dates",
    "kvkern/file_digests.py": "the age of a file: one that looks old is not read again while its signature stays",
}


def test_who_reads_it() -> None:
    found = {
        module.rel
        for module in MODULES
        for node in ast.walk(ast.parse(module.path.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in WALL_CLOCK
    }
    assert found == set(READERS)


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """Sets the clock of this process, by seconds from what it is."""
    real_s, real_ns = time.time, time.time_ns

    def set_by(seconds: float) -> None:
        monkeypatch.setattr(time, "time", lambda: real_s() + seconds)
        monkeypatch.setattr(time, "time_ns", lambda: real_ns() + int(seconds * 1e9))

    yield set_by
    monkeypatch.undo()


DAYS = [86_400.0, -86_400.0, 0.0]


def test_leases_and_chunks_of_a_daemon(folder: Path, tmp_path: Path, set_clock: Callable[[float], None]) -> None:
    config = NodeConfig(folder / "s", 1 << 20, arena_dir=tmp_path, prefault=False)
    chain = chain_keys("a", 8)
    with served(config), closing(NodeClient.open(config.socket, "e", GEOMETRY, prefault=False)) as client:
        eventually(lambda: store(client, chain) == 8 or hits(client, chain) == 8, "slots, and chunks in them")
        for seconds in DAYS:
            lease = client.acquire(chain)
            set_clock(seconds)
            assert len(lease.slots) == 8
            client.release(lease)
            assert len(client.acquire(chain).slots) == 8


def test_values_in_a_folder(tmp_path: Path, set_clock: Callable[[float], None]) -> None:
    """Nothing is evicted early, nothing stays for ever, and no file of a writer is taken for a leftover."""
    path = tmp_path / "store"
    bench = Bench(makes(path, f"capacity={6 * VALUE}"), count=2, payload_nbytes=8192)
    space = bench.store._capacity
    wait_for(lambda: space._complete)
    for turn, seconds in enumerate(DAYS):
        set_clock(seconds)
        keys = [key_of(10 * turn), key_of(10 * turn + 1)]
        assert bench.put(keys, bench.values(turn)) == [True] * 2
        assert bench.get(keys, bench.into()) == [HIT] * 2
    assert len(values_in(path)) == 6
    assert bench.put([key_of(100)], bench.values()[:1]) == [True]
    assert bench.exists([key_of(0), key_of(1), key_of(100)]).count(False) == 1  # one of the oldest two
    assert space.used_nbytes == nbytes_in(path) == 6 * VALUE
    assert temporaries_in(path) == []
    bench.close()
