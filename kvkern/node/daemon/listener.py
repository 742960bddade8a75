"""Accepts connections, and turns strangers away before a byte of theirs is read.

A stranger costs the daemon an accept, two questions to the kernel, and one small write; no buffer and no timer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable

from ...arena.process_identity import process_start
from .. import framing
from .. import protocol as p
from ..peer_credentials import Peer, peer_of
from .admission import Admission

logger = logging.getLogger("kvkern")

ACCEPTED_PER_TURN = 16  # connections between two looks at the other sockets
PAUSE_S = 1.0  # when the system has no room for another open file


class Listener:
    """Runs in the event loop's thread, from its making until `close`."""

    def __init__(
        self,
        sock: socket.socket,  # listens and does not block; `close` closes it
        admission: Admission,
        make_client: Callable[[Peer, int], asyncio.Protocol],  # of the peer and its start time, 0 if it cannot be seen
    ) -> None:
        self._socket, self._admission, self._make_client = sock, admission, make_client
        self._loop = asyncio.get_running_loop()
        self._opening: set[asyncio.Task[object]] = set()
        self._closed = False
        self._listen()

    def close(self) -> None:
        """Accept no more."""
        self._closed = True
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def _listen(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._socket, self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTED_PER_TURN):
            try:
                sock, _ = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                logger.error(
                    "kvkern: no client can connect: %(error)s; raise the limit on open files (ulimit -n)",
                    {"event": "no_client_can_connect", "error": error.strerror},
                )
                self._loop.remove_reader(self._socket)
                self._loop.call_later(PAUSE_S, self._listen)
                return
            self._meet(sock)

    def _meet(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        start = 0
        try:
            peer = peer_of(sock)
            refusal = self._admission.refusal(peer)
            if not refusal:
                start = process_start(peer.pid) if peer.pid > 0 else 0
        except OSError as error:
            refusal = f"the daemon cannot find out who this client is ({error.strerror}); try again"
        if refusal:
            logger.info("kvkern: a client was refused: %(why)s", {"event": "client_refused", "why": refusal})
            with sock, contextlib.suppress(OSError):
                sock.send(framing.encode(p.Refused(refusal)))
            return
        client = self._make_client(peer, start)
        task = self._loop.create_task(self._loop.connect_accepted_socket(lambda: client, sock))
        self._opening.add(task)
        task.add_done_callback(lambda done: self._opened(done, client))

    def _opened(self, task: asyncio.Task[object], client: asyncio.Protocol) -> None:
        self._opening.discard(task)
        if task.cancelled() or task.exception() is not None:
            client.connection_lost(None)
