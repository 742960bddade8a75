"""An engine's acquire while people look at the daemon: rounds with open pages and without take turns. Prints nothing."""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from multiprocessing.connection import Connection
from statistics import median

from _node import CHUNKS, GIVE_UP_S, SPAWN, Pages, daemon
from node import CLIENTS, Clients, Row, latency, p99

PAGES = 10
SETTLE_S = 0.5  # after pages are opened or closed
GET = b"GET /events HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"


def pages_main(pipe: Connection, port: int) -> None:
    """Open and close PAGES streams of events on request, and read them as browsers do."""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        streams: list[socket.socket] = []
        while True:
            for key, _ in selector.select():
                if key.fileobj is not pipe:
                    assert isinstance(key.fileobj, socket.socket)
                    if not key.fileobj.recv(1 << 16):
                        raise RuntimeError("the daemon has closed a page; look at its log")
                    continue
                order = pipe.recv()
                if order == "open":
                    streams = [socket.create_connection(("127.0.0.1", port)) for _ in range(PAGES)]
                    for stream in streams:
                        stream.sendall(GET)
                        if not stream.recv(1 << 12).startswith(b"HTTP/1.1 200"):
                            raise RuntimeError("the daemon refuses a page; look at its log")
                        selector.register(stream, selectors.EVENT_READ)
                else:
                    for stream in streams:
                        selector.unregister(stream)
                        stream.close()
                    streams = []
                pipe.send(order)
                if order == "end":
                    return


class OpenPages:
    """Ten pages in a process of their own. Use it as a context manager while they are to be open."""

    def __init__(self, port: int) -> None:
        self._pipe, theirs = SPAWN.Pipe()
        self._process = SPAWN.Process(target=pages_main, args=(theirs, port), daemon=True)
        self._process.start()

    def __enter__(self) -> OpenPages:
        self._order("open")
        return self

    def __exit__(self, *_: object) -> None:
        self._order("close")

    def close(self) -> None:
        self._order("end")
        self._process.join()

    def _order(self, order: str) -> None:
        self._pipe.send(order)
        if not self._pipe.poll(GIVE_UP_S):
            raise RuntimeError(f"the pages do not {order}")
        self._pipe.recv()


def page_acquire(runs: int, round_s: float) -> Iterator[Row]:
    """Yield one row: an acquire of 128 chunks by CLIENTS clients, with PAGES pages open and without."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    pages = Pages(1)
    options = ("--metrics", f"127.0.0.1:{port}")
    with (
        daemon(pages.geometry, 4 * CLIENTS * CHUNKS, options=options) as node,
        closing(Clients(node.path, CLIENTS, 1)) as clients,
        closing(OpenPages(port)) as open_pages,
    ):
        clients.ask("store")
        alone, watched = [], []
        busy_s = {True: 0.0, False: 0.0}
        for turn in range(runs + 1):
            for looked_at in (True, False) if turn % 2 else (False, True):
                with open_pages if looked_at else nullcontext():
                    time.sleep(SETTLE_S)
                    before_s = node.cpu_s()
                    (watched if looked_at else alone).append(clients.ask("acquire", round_s))
                    busy_s[looked_at] += node.cpu_s() - before_s
        before, row = latency("alone", alone), latency("page_acquire", watched)
        yield row | {
            "pages": PAGES, "alone_p50_us": before["p50_us"], "alone_p99_us": before["p99_us"],
            "ratio": median(p99(w) / p99(a) for w, a in zip(watched[1:], alone[1:], strict=True)),
            "page_cpu_ms_s": 1e3 * (busy_s[True] - busy_s[False]) / ((runs + 1) * round_s),
        }  # fmt: skip
