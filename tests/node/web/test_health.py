"""What the RPC port tells: health to everybody, figures to this machine."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import msgspec
import pytest

from kvkern import __version__
from kvkern.errors import ConfigError
from kvkern.node import protocol as p
from kvkern.node.client.admin_client import AdminClient
from tests.node.conftest import MakeDaemon, eventually, store
from tests.node.web.conftest import Web, ask, connected, ports_of, web_daemon
from tests.support import chain_keys


@pytest.mark.parametrize("path", ["/healthz", "/livez", "/readyz"])
def test_health_says_which_daemon_it_is(web: Web, path: str) -> None:
    with AdminClient(web.server.config.socket) as admin:
        (stat,) = admin.ask(p.Stat(1))
    for port in (web.rpc, web.metrics):
        answer = ask(port, path)
        assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
        assert answer.json == {
            "daemon": stat["daemon"], "pid": os.getpid(), "name": "default", "version": __version__,
            "socket": str(web.server.config.socket), "ready": True,
        }  # fmt: skip
    assert len(bytes.fromhex(stat["daemon"])) == 16


def test_a_socket_whose_path_is_no_text(folder: Path) -> None:
    """Linux's paths are bytes, JSON is Unicode."""
    odd = folder / os.fsdecode(b"\xff\xfe")
    odd.mkdir()
    with web_daemon(odd, policy_state=odd / "p", arena_dir=folder) as web:
        assert ask(web.rpc, "/healthz").json["socket"] == f"{folder}/\\udcff\\udcfe/s"
        overview = ask(web.metrics, "/v1/overview").json
        assert overview["daemon"]["socket"] == f"{folder}/\\udcff\\udcfe/s"
        assert overview["config"]["policy_state"] == f"{folder}/\\udcff\\udcfe/p"
        with AdminClient(web.server.config.socket) as admin:
            (row,) = admin.ask(p.List(1, p.OVERVIEW, 1))  # what `kvkern top` asks
        assert msgspec.json.decode(str(row["overview"]))["config"] == overview["config"]
    with pytest.raises(ConfigError, match=r"arena_dir is .*, which is no UTF-8"), web_daemon(folder, arena_dir=odd):
        pass


def test_every_start_has_another_id(folder: Path) -> None:
    found = []
    for _ in range(2):
        with web_daemon(folder) as web:
            found.append(ask(web.rpc).json["daemon"])
    assert found[0] != found[1]


def test_not_ready_while_it_ends_or_makes_an_arena(web: Web) -> None:
    web.server._draining = True
    assert ask(web.rpc, "/readyz").status == 503
    assert ask(web.rpc, "/readyz").json["ready"] is False
    assert ask(web.rpc, "/livez").status == ask(web.rpc, "/healthz").status == 200
    web.server._draining = False
    assert ask(web.rpc, "/readyz").status == 200
    web.server._arena_lock._locked = True  # as while an arena is made
    try:
        assert ask(web.rpc, "/readyz").status == 503
    finally:
        web.server._arena_lock._locked = False


def test_figures_are_those_of_the_socket(web: Web) -> None:
    client = web.client()
    assert store(client, chain_keys("a", 3)) == 3
    with AdminClient(web.server.config.socket) as admin:
        (stat,) = admin.ask(p.Stat(1))
        rows = admin.ask(p.List(1, b"", 100))
    found = ask(web.rpc, "/v1/stat").json
    assert found.keys() == stat.keys()
    assert {name: found[name] for name in ("chunks", "stored_chunks", "slots", "daemon")} == {
        name: stat[name] for name in ("chunks", "stored_chunks", "slots", "daemon")
    }
    assert ask(web.rpc, "/v1/chunks").json == rows
    assert ask(web.rpc, f"/v1/chunks?prefix={rows[1]['key'][:8]}").json == [rows[1]]
    assert ask(web.rpc, "/v1/chunks?limit=2").json == rows[:2]
    client.close()


@pytest.mark.parametrize(
    "query",
    ["prefix=a", "prefix=zz", "prefix=" + "00" * 33, "limit=0", "limit=1001", "limit=-1", "limit=x", "limit=999999999"],
)
def test_wrong_queries_are_answered_by_name(web: Web, query: str) -> None:
    answer = ask(web.rpc, f"/v1/chunks?{query}")
    assert answer.status == 400
    assert query.partition("=")[0] in answer.json["error"]


def test_ports_do_not_mix(web: Web) -> None:
    assert {path: ask(web.rpc, path).status for path in ("/metrics", "/", "/events", "/v1/overview")} == dict.fromkeys(
        ("/metrics", "/", "/events", "/v1/overview"), 404
    )
    assert {path: ask(web.metrics, path).status for path in ("/v1/stat", "/v1/chunks", "/docs")} == dict.fromkeys(
        ("/v1/stat", "/v1/chunks", "/docs"), 404
    )


def test_a_probe_that_only_connects(web: Web) -> None:
    """The published liveness probe: a TCP connection that is closed at once."""
    for _ in range(200):
        connected(web.rpc).close()
    assert ask(web.rpc).status == 200
    eventually(lambda: ask(web.rpc, "/v1/stat").json["connections"] == 0)


def test_metrics_are_prometheus_text(web: Web) -> None:
    answer = ask(web.metrics, "/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert b"\nkvkern_connections 0.0\n" in answer.body
    assert ask(web.metrics, "/metrics", "HEAD").status == 200


def test_off_by_default(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon().start()
    inodes = {os.readlink(f"/proc/{daemon.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{daemon.pid}/fd")}
    listening = [line.split() for line in Path(f"/proc/{daemon.pid}/net/tcp").read_text().splitlines()[1:]]
    assert not [row for row in listening if f"socket:[{row[9]}]" in inodes]


def test_options_of_the_command(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(options=["--rpc", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]).start()
    metrics, rpc = ports_of(daemon)
    assert ask(rpc).json["daemon"] == ask(metrics).json["daemon"] == daemon.stat()["daemon"]
    assert ask(rpc).json["pid"] == daemon.pid
    assert f"metrics and page on http://127.0.0.1:{metrics}/" in daemon.log
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.log
    daemon.options = ("--rpc", f"127.0.0.1:{rpc}")  # the port is free again
    daemon.start()
    assert ask(rpc).status == 200


def test_a_port_that_is_taken(make_daemon: MakeDaemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        daemon = make_daemon(options=["--rpc", f"127.0.0.1:{port}"])
        daemon.launch()
        assert daemon.wait() == 2
        assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in daemon.log
        assert "another --rpc" in daemon.log
