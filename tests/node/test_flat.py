"""A full daemon whose engines come and go: memory, descriptors, series and log lines a minute do not grow.

Engines name new models, tenants and themselves all the time, store more than the arena holds, and half of them hang up in the
middle of a store. Pages open and close, Prometheus scrapes, and strangers send wrong bytes. KVKERN_SOAK_FLAT_S sets the
seconds; `make soak` takes 1,200.
"""

from __future__ import annotations

import json
import os
import random
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from statistics import median

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.node.conftest import Daemon, MakeDaemon, hits, store
from tests.node.test_fuzz import descriptors, resident_nbytes
from tests.node.web.conftest import ask, connected
from tests.remote.required_servers import free_port
from tests.support import SHAPE, Threads, chain_keys, key

SECONDS = float(os.environ.get("KVKERN_SOAK_FLAT_S", "16"))
ENGINES = 4
CHUNKS = 24  # of a request; the arena has 127 slots
LOOKS = 40
GROWTH_NBYTES = 8 << 20  # of allocator pools
GROWTH = 1.5  # log lines of the last quarter are at most so many times those of the second
SPARE_LINES = 20  # and so many more
MANY_NAMES = 100_000

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300 + 2 * SECONDS)]


@dataclass(frozen=True)
class Look:
    """What the daemon takes at one moment."""

    rss_nbytes: int
    descriptors: int
    series: int
    log_lines: int  # so far


class Strangers(Threads):
    """Threads that keep the daemon busy until the context is left. An error in one fails the test."""

    def __init__(self, daemon: Daemon, port: int) -> None:
        self._daemon, self._port = daemon, port
        works = [self._engine] * ENGINES + [self._page, self._noise]
        super().__init__(partial(self._run, work, seed) for seed, work in enumerate(works))
        self._errors: list[BaseException] = []
        self.turns = 0

    def _run(self, work: Callable[[random.Random], None], seed: int) -> None:
        draw = random.Random(seed)
        try:
            while not self.stop.is_set():
                work(draw)
                self.turns += 1
        except BaseException as error:
            self._errors.append(error)
            raise

    def _engine(self, draw: random.Random) -> None:
        name = draw.randrange(MANY_NAMES)
        with_index = self._daemon.client(f"engine-{name}")
        try:
            for salt in range(3):
                fields = {"model": f"model-{name}", "salt": f"tenant-{name}-{salt}", "chunk_tokens": "16"}
                with_index.describe_namespace(key(name, salt), fields)
            chain = chain_keys(draw.randrange(12), CHUNKS)
            if hits(with_index, chain) < CHUNKS:
                store(with_index, chain)
            hits(with_index, chain)
            if draw.random() < 0.5:
                lost = chain_keys(("lost", name), 4)
                with_index.reserve(lost, lost, SHAPE)  # and hang up
        finally:
            with_index.close()

    def _page(self, draw: random.Random) -> None:
        for path in ("/", "/v1/overview", "/metrics", f"/{draw.randrange(MANY_NAMES)}"):
            ask(self._port, path)
        with connected(self._port) as sock:
            sock.sendall(b"GET /events HTTP/1.1\r\nhost: localhost\r\n\r\n")
            sock.recv(1 << 12)
        time.sleep(0.1)

    def _noise(self, draw: random.Random) -> None:
        with suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self._daemon.socket))
            sock.sendall(draw.randbytes(draw.randrange(1, 200)))
            sock.settimeout(1)
            sock.recv(1)
        time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        assert not self._errors, self._errors


def look(daemon: Daemon, port: int) -> Look:
    """Return what the daemon takes now."""
    families = text_string_to_metric_families(ask(port, "/metrics").body.decode())
    series = sum(len(family.samples) for family in families)
    return Look(resident_nbytes(daemon.pid), descriptors(daemon.pid), series, daemon.log.count("\n"))


def test_a_full_daemon_stays_flat(make_daemon: MakeDaemon) -> None:
    port = free_port()
    options = ["--metrics", f"127.0.0.1:{port}", "--log-format", "json", "--tenant-quota", "512KiB"]
    daemon = make_daemon(options=options).start()
    looks = []
    with Strangers(daemon, port) as strangers:
        for _ in range(LOOKS):
            time.sleep(SECONDS / LOOKS)
            looks.append(look(daemon, port))
    assert strangers.turns > 10 * ENGINES
    # the first quarter fills the arena and meets as many names as are told apart
    _, second, _, last = (looks[at : at + LOOKS // 4] for at in range(0, LOOKS, LOOKS // 4))

    def grown(figure: Callable[[Look], float]) -> float:
        return median(map(figure, last)) - median(map(figure, second))

    assert grown(lambda x: x.rss_nbytes) < GROWTH_NBYTES
    assert grown(lambda x: x.descriptors) <= 2 * ENGINES  # some hang at this moment, some do not
    assert grown(lambda x: x.series) == 0
    assert last[-1].log_lines - last[0].log_lines <= GROWTH * (second[-1].log_lines - second[0].log_lines) + SPARE_LINES
    assert all(json.loads(line)["event"] for line in daemon.log.splitlines())
