"""An engine's first connection to its daemon. It may take as long as the daemon needs to make a large arena.

no answer for PROBE_S   -> ask the daemon for its counters, on a connection of its own
it tells them           -> it is at work: wait on, and log how far it is
it does not             -> give up when it has given no sign for the time that the engine grants: an error, or the engine
                           goes on without a cache and the link connects later
it refuses                 -> an error, or the engine goes on without a cache if the reason may pass by itself
"""

from __future__ import annotations

import logging
import time

from ...config import format_nbytes
from ...errors import ArenaError, KvkernError
from .. import framing
from .. import protocol as p
from .admin_client import AdminClient
from .reconnecting_link import ReconnectingLink, RefusedForNow

logger = logging.getLogger("kvkern")

PROBE_S = 10.0  # how long a connection waits for the arena until the daemon is asked
ANSWERS_S = 2.0  # how long the daemon may take to answer then
LINE_S = 10.0  # between two lines of the log while no daemon answers


def connect_first(
    link: ReconnectingLink,
    prefault: bool,
    timeout_s: float,  # how long the daemon may give no sign
    required: bool = True,  # False: go on without a daemon
) -> bool:
    """Connect, before the link's thread is started. Returns False without a connection if no daemon is `required`.

    Otherwise closes the link and raises ConfigError if no daemon answers, or KvkernError if it refuses. Raises both ways if
    somebody must act: this user may not open the socket or use the cache, another user serves there, or the cache is another
    model's.
    """
    begin = time.monotonic()
    deadline, next_line_s = begin + timeout_s, begin + LINE_S
    while True:
        try:
            left_s = deadline - time.monotonic()
            link.connect(prefault, max(0.1, min(left_s, PROBE_S)))
            return True
        except OSError as error:
            now = time.monotonic()
            if isinstance(error, TimeoutError) and (made := _made_nbytes(link)) is not None:
                logger.info(
                    "kvkern: the daemon on %(socket)s is making its arena, %(made)s so far; waiting",
                    {"event": "daemon_makes_arena", "socket": link.path, "made": format_nbytes(made)},
                )
                deadline = time.monotonic() + timeout_s
            elif now > deadline and not required and not isinstance(error, PermissionError):
                logger.warning(
                    "kvkern: no daemon answers on %(socket)s (%(error)s) after %(waited)d s. The engine goes on without a "
                    "cache, and connects by itself when `kvkern serve` runs there",
                    {"event": "daemon_missing", "socket": link.path, "error": _reason(error), "waited": now - begin},
                )
                return False
            elif isinstance(error, PermissionError) or now > deadline:
                link.close()
                raise framing.connect_error(link.path, error) from error
            else:
                if now >= next_line_s:
                    next_line_s = now + LINE_S
                    logger.warning(
                        "kvkern: no daemon answers on %(socket)s yet (%(error)s); waiting for it, at most %(left)d s more",
                        {
                            "event": "daemon_awaited",
                            "socket": link.path,
                            "error": _reason(error),
                            "left": deadline - now,
                        },
                    )
                time.sleep(0.1)
        except (RefusedForNow, p.ProtocolError, ArenaError) as error:
            if required:
                link.close()
                raise
            logger.warning(
                "kvkern: the daemon on %(socket)s cannot be used: %(error)s. The engine goes on without a cache, and tries "
                "again by itself",
                {"event": "daemon_unusable", "socket": link.path, "error": error},
            )
            return False
        except BaseException:
            link.close()
            raise


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _made_nbytes(link: ReconnectingLink) -> int | None:
    """Return how much of its arena the daemon has made, or None if it does not answer within ANSWERS_S."""
    try:
        with AdminClient(link.path, link.daemon_uid, ANSWERS_S) as daemon:
            return int(daemon.ask(p.Stat(1))[0].get("arena_nbytes", 0))
    except KvkernError:
        return None
