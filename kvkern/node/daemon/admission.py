"""Who may connect to the daemon, who may operate it, and how much of it one user may take. Reads no messages.

    engines     root, the daemon's own user, and those of --allow-uid and --allow-gid: they get the arena
    operators   root, the daemon's own user, and those of --operator-uid and --operator-gid: they may clear, evict and record
    strangers   everyone else: they are turned away before a byte of theirs is read

The kernel says who a client is (peer_credentials.py), at the moment when it connects.
"""

from __future__ import annotations

import logging
import os
import resource
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...config import format_nbytes
from ...errors import ConfigError
from ..peer_credentials import Peer

logger = logging.getLogger("kvkern")

MAX_CONNECTIONS = 512
MIN_CONNECTIONS = 16  # with room for fewer the daemon does not start
OPERATORS_SHARE = 8  # one connection in 8, the last ones, is kept for operators
USER_SHARE = 2  # a user who is no operator has at most one connection in 2, and one place for a process in 2
MAX_UNREAD_NBYTES = 64 << 20  # of requests that have arrived and wait, of all connections of a user
MAX_UNSENT_NBYTES = 256 << 20  # of answers that wait to be read, of all connections of a user
IN_FLIGHT = 1 << 19  # descriptors of the arena that clients may leave unreceived, if this process may have so many
OTHER_FILES = 128  # open files that the daemon needs beside its connections: arena, locks, a store of few connections


@dataclass(frozen=True, slots=True)
class Users:
    """Some users and groups. A member of a group is a process that had the group when it connected."""

    uids: frozenset[int] = frozenset()
    gids: frozenset[int] = frozenset()

    def include(self, peer: Peer) -> bool:
        """Return True if the peer is one of the users, or a member of one of the groups."""
        return peer.uid in self.uids or peer.gid in self.gids or not self.gids.isdisjoint(peer.groups)


class Client(Protocol):
    """What is known of a connection here."""

    peer: Peer

    @property
    def unread_nbytes(self) -> int:
        """Bytes of requests that have arrived and are not carried out yet."""

    @property
    def unsent_nbytes(self) -> int:
        """Bytes of answers that wait because the client does not read."""

    @property
    def unread_since(self) -> int:
        """Order of the clients by when their unread requests began to arrive."""

    def close(self, why: str) -> None:
        """Hang up."""


class Admission:
    """The connections of a daemon, and the rules for new ones."""

    def __init__(self, engines: Users, operators: Users, max_connections: int = 0) -> None:
        self.max_connections = max_connections or MAX_CONNECTIONS
        self._engines, self._operators = engines, operators
        self._unmapped = unmapped_uid()
        self._own = Users(frozenset({0, os.getuid()}))
        self._connections: Counter[int] = Counter()  # by uid
        self._unread: Counter[int] = Counter()  # bytes, by uid

    # -- who ---------------------------------------------------------------------------------------------------------

    def is_engine(self, peer: Peer) -> bool:
        """Return True if the peer may have the arena, and read all of it."""
        return self._own.include(peer) or self._engines.include(peer)

    def is_operator(self, peer: Peer) -> bool:
        """Return True if the peer may clear, evict and record."""
        return self._own.include(peer) or self._operators.include(peer)

    def refusal(self, peer: Peer) -> str:
        """Return why the peer may not connect now, and what to do; empty if it may."""
        if peer.uid == self._unmapped:
            return (
                f"uid {peer.uid} stands for all users that the daemon's user namespace does not know, so nobody can tell who "
                f"this is; run the engine and the daemon in the same user namespace"
            )
        operator = self.is_operator(peer)
        if not operator and not self._engines.include(peer):
            return (
                f"uid {peer.uid} may not use this cache, because a process that maps its arena reads all of it. "
                f"Run a daemon of your own, or let this user in with --allow-uid {peer.uid}"
            )
        limit, total = self.max_connections, sum(self._connections.values())
        if total >= limit:
            return f"{limit} connections are open already, the limit; close some, or run another daemon"
        if operator:
            return ""
        if self._connections[peer.uid] >= limit // USER_SHARE:
            return (
                f"uid {peer.uid} has {limit // USER_SHARE} connections open already, the limit of a user; close some, or run "
                f"another daemon"
            )
        if total >= limit - limit // OPERATORS_SHARE:
            return (
                f"{total} connections are open already, and the last {limit // OPERATORS_SHARE} of {limit} are kept for "
                f"operators; close some, or run another daemon"
            )
        return ""

    # -- how much ----------------------------------------------------------------------------------------------------

    def enter(self, peer: Peer) -> None:
        """Count a connection that is let in."""
        self._connections[peer.uid] += 1

    def leave(self, peer: Peer) -> None:
        """Stop counting a connection that has ended."""
        self._connections[peer.uid] -= 1
        if not self._connections[peer.uid]:
            del self._connections[peer.uid]
            self._unread.pop(peer.uid, None)

    def count_unread(self, peer: Peer, nbytes: int, clients: Collection[Client]) -> None:
        """Count unread bytes of requests: more, or less if negative. Hang up on a client whose user has too many.

        It is the client whose requests wait for the longest time. Honest clients end their requests within milliseconds.
        """
        self._unread[peer.uid] += nbytes
        if nbytes > 0 and self._unread[peer.uid] > MAX_UNREAD_NBYTES:
            of_user = [client for client in _clients_of(peer.uid, clients) if client.unread_nbytes]
            if of_user:
                min(of_user, key=lambda client: client.unread_since).close(
                    f"left requests incomplete while its user had more than {format_nbytes(MAX_UNREAD_NBYTES)} of them"
                )

    def bound_unsent(self, clients: Collection[Client]) -> None:
        """Hang up on clients that read least, of users whose clients leave too many answers unread. Call it regularly."""
        unsent: Counter[int] = Counter()
        for client in clients:
            unsent[client.peer.uid] += client.unsent_nbytes
        for uid, nbytes in unsent.items():
            while nbytes > MAX_UNSENT_NBYTES:
                worst = max(_clients_of(uid, clients), key=lambda client: client.unsent_nbytes)
                nbytes -= worst.unsent_nbytes
                worst.close(
                    f"left most of the {format_nbytes(MAX_UNSENT_NBYTES)} of answers unread that a user may leave"
                )


def _clients_of(uid: int, clients: Collection[Client]) -> Iterator[Client]:
    return (client for client in clients if client.peer.uid == uid)


def unmapped_uid(proc: Path = Path("/proc")) -> int:
    """Return the uid that stands for users outside this process's user namespace. -1: it knows all users."""
    try:
        known = [line.split() for line in (proc / "self/uid_map").read_text().splitlines()]
        if known in ([], [["0", "0", "4294967295"]]):
            return -1
        return int((proc / "sys/kernel/overflowuid").read_text())
    except (OSError, ValueError):
        return -1


def connections_within_file_limit(
    others: int = 0,  # files that other parts of the process may have open
) -> int:
    """Raise this process's limit on open files as far as it needs and may. Return how many connections fit below it.

    Raises ConfigError if too few do.
    """
    others += OTHER_FILES
    needed = MAX_CONNECTIONS + others
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The same limit holds for descriptors that were sent and are not received yet, of all daemons of this user. A client
    # may leave them there, so the more the better.
    wanted = IN_FLIGHT if hard == resource.RLIM_INFINITY else min(IN_FLIGHT, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return MAX_CONNECTIONS
    fit = soft - others
    remedy = f"raise it to {needed} (ulimit -n {needed}, LimitNOFILE={needed} in systemd)"
    if fit < MIN_CONNECTIONS:
        raise ConfigError(f"the limit on open files is {soft}, too few for a daemon; {remedy}")
    logger.warning(
        "kvkern: the limit on open files is %(limit)d, so at most %(fit)d clients can connect, not %(most)d; to "
        "have all, %(remedy)s",
        {"event": "few_open_files", "limit": soft, "fit": fit, "most": MAX_CONNECTIONS, "remedy": remedy},
    )  # fmt: skip
    return fit
