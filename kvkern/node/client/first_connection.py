"""An engine's first connection to its daemon. It may take as long as the daemon needs to make a large arena.

no answer for PROBE_S   -> ask the daemon for its counters, on a connection of its own
it tells them           -> it is at work: wait on, and log how far it is
it does not             -> give up when it has given no sign for the time that the engine grants
"""

from __future__ import annotations

import logging
import time

from ...config import format_nbytes
from ...errors import KvkernError
from .. import framing
from .. import protocol as p
from .admin_client import AdminClient
from .reconnecting_link import ReconnectingLink

logger = logging.getLogger("kvkern")

PROBE_S = 10.0  # how long a connection waits for the arena until the daemon is asked
ANSWERS_S = 2.0  # how long the daemon may take to answer then


def connect_first(
    link: ReconnectingLink,
    prefault: bool,
    timeout_s: float,  # how long the daemon may give no sign
) -> None:
    """Connect, before the link's thread is started.

    Closes the link and raises ConfigError if no daemon answers, or KvkernError if it refuses.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            left_s = deadline - time.monotonic()
            return link.connect(prefault, max(0.1, min(left_s, PROBE_S)))
        except OSError as error:
            if isinstance(error, TimeoutError) and (made := _made_nbytes(link)) is not None:
                logger.info(
                    "kvkern: the daemon on %(socket)s is making its arena, %(made)s so far; waiting",
                    {"event": "daemon_makes_arena", "socket": link.path, "made": format_nbytes(made)},
                )
                deadline = time.monotonic() + timeout_s
            elif isinstance(error, PermissionError) or time.monotonic() > deadline:
                link.close()
                raise framing.connect_error(link.path, error) from error
            else:
                time.sleep(0.1)
        except BaseException:
            link.close()
            raise


def _made_nbytes(link: ReconnectingLink) -> int | None:
    """Return how much of its arena the daemon has made, or None if it does not answer within ANSWERS_S."""
    try:
        with AdminClient(link.path, link.daemon_uid, ANSWERS_S) as daemon:
            return int(daemon.ask(p.Stat(1))[0].get("arena_nbytes", 0))
    except KvkernError:
        return None
