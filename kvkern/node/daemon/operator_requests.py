"""What only operators may ask of a daemon, and the rows that answer them.

every client    Stat, List: they show no more than the arena, which engines read anyway
engines         Clear of a namespace that the engine has described, as it must after a change of weights. Any other of its
                clears forgets nothing and is no reason to hang up: an engine of many tenants may not know its oldest any more
operators       Clear of any namespace or of everything, Evict, and Record, which shows the requests of all engines
"""

from __future__ import annotations

from collections.abc import Callable, Container
from itertools import islice

from .. import protocol as p
from .sessions import Session, Sessions

Row = dict[str, int | float | str]


def why_refused(
    request: p.Request,
    described: Container[bytes],  # namespaces that the client has described on this connection
) -> str:
    """Return why a client that is no operator may not send this request, and what to do; empty if it may."""
    if isinstance(request, p.Clear) and request.namespace is not None:
        if request.namespace in described:
            return ""
        return f"an engine clears only namespaces that it has described, and not {request.namespace.hex()}"
    if not isinstance(request, p.Clear | p.Evict | p.Record):
        return ""
    return (
        f"{type(request).__name__} is for operators: root, the user of the daemon, and those that it starts with "
        f"--operator-uid or --operator-gid"
    )


def rows(
    session: Session,
    request: p.Stat | p.List | p.Evict | p.Clear,
    state: Sessions | None,  # None: there is no arena yet
    stat: Callable[[], Row],
    overview: Callable[[], bytes],  # as JSON
) -> list[Row]:
    """Carry out a request and return the rows of its answer."""
    if isinstance(request, p.Stat):
        return [stat()]
    if isinstance(request, p.List):
        if request.prefix == p.OVERVIEW:
            return [{"overview": overview().decode()}]
        return chunk_rows(state, request.prefix, request.limit)
    if state is None:
        return [{"chunks": 0}]
    if isinstance(request, p.Clear):
        return [{"chunks": state.clear(session, request.namespace, request.begun)}]
    return [{"chunks": state.cache.drop([key for key in state.cache.all_keys() if key.startswith(request.prefix)])}]


def chunk_rows(state: Sessions | None, prefix: bytes, limit: int) -> list[Row]:
    """Return rows of up to `limit` cached chunks whose key starts with `prefix`."""
    if state is None:
        return []
    matching = (key for key in state.cache.all_keys() if key.startswith(prefix))
    return [dict(row) for row in state.cache.describe_chunks(list(islice(matching, limit)))]
