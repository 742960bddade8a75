"""Asks at start whether the daemon behind `rpc_endpoint` is the one behind `socket`. In a thread, so that no step waits."""

from __future__ import annotations

import http.client
import json
import re
import threading
from pathlib import Path

from ...config import Config, host_and_port
from ...errors import KvkernError
from ...node import protocol as p
from ...node.client.admin_client import AdminClient
from ...node.client.cache_client import NodeClient
from . import shim

TIMEOUT_S = 3.0
LOOK_S = 1.0  # between two looks whether there is a daemon
MAX_ANSWER_NBYTES = 1 << 16
_ID = re.compile("[0-9a-f]{1,64}")


def start_rpc_check(client: NodeClient, options: Config) -> None:
    """Compare as soon as the client has connected for the first time. Logs at most one line, and raises nothing."""
    if options.rpc_endpoint:
        threading.Thread(target=_run, args=(client, options), name="kvkern-rpc-check", daemon=True).start()


def _run(client: NodeClient, options: Config) -> None:
    while client.wait_for_arena(LOOK_S) is None:
        if client.closed:
            return
    compare(options)


def compare(options: Config) -> None:
    """Compare the two daemons' ids, and log if they differ or one of them does not tell."""
    try:
        with AdminClient(Path(options.socket), options.daemon_uid, TIMEOUT_S) as daemon:
            here = str(daemon.ask(p.Stat(1))[0].get("daemon", ""))
        there = _daemon_of(options.rpc_endpoint)
    except (OSError, ValueError, http.client.HTTPException, KvkernError) as error:
        shim.logger.info(
            "kvkern: rpc_endpoint %(endpoint)s does not tell which daemon it is (%(error)s), so it was not compared with the "
            "one on %(socket)s. The engine does not need it",
            {"event": "rpc_silent", "endpoint": options.rpc_endpoint, "error": error, "socket": options.socket},
        )
        return
    if here != there:
        shim.logger.warning(
            "kvkern: rpc_endpoint %(endpoint)s is the daemon %(there)s, but the daemon on %(socket)s is %(here)s. The engine "
            "uses the one on the socket. Correct the endpoint, or mount the socket of the other daemon",
            {
                "event": "rpc_other_daemon", "endpoint": options.rpc_endpoint, "there": there or "without an id",
                "socket": options.socket, "here": here or "without an id",
            },
        )  # fmt: skip


def _daemon_of(endpoint: str) -> str:
    """Return the id in the answer of GET /healthz. Raises OSError, ValueError or HTTPException."""
    host, port = host_and_port(endpoint, "rpc_endpoint")
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/healthz")
        answer = json.loads(connection.getresponse().read(MAX_ANSWER_NBYTES))
    except RecursionError:
        answer = None
    finally:
        connection.close()
    daemon = answer.get("daemon") if isinstance(answer, dict) else None
    if not isinstance(daemon, str) or not _ID.fullmatch(daemon):  # a stranger's text is not logged
        raise ValueError("no daemon of kvkern answers there")
    return daemon
