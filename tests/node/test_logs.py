"""The log of a real daemon: JSON alone, one line per record, whatever clients name, and few lines in a storm of them."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvkern.cli.output import print_table
from kvkern.node import protocol as p
from kvkern.observability import logs
from tests.node.conftest import Daemon, eventually
from tests.node.peer import Peer

HOSTILE = 'engine"}\nkvkern: forged\r{"event": "forged"}\x1b[2J\u2028'


class JsonDaemon(Daemon):
    """A daemon that logs JSON."""

    def _serves(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"the daemon ended: {self.log}"
        return '"event": "ready"' in self.log

    @property
    def rows(self) -> list[dict[str, object]]:
        """Its lines. Fails the test if one is no JSON."""
        return [json.loads(line) for line in self.log.splitlines()]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[JsonDaemon]:
    daemon = JsonDaemon(tmp_path, options=("--log-format", "json"))
    try:
        yield daemon.start()  # type: ignore[misc]
    finally:
        daemon.close()


def test_every_line_is_json_from_the_first_to_the_last(daemon: JsonDaemon) -> None:
    with Peer(daemon.socket) as peer:
        assert isinstance(peer.greet(engine=HOSTILE), p.Welcome)
        peer.say(p.Describe(1, b"r" * 32, {"model": HOSTILE}))
        assert isinstance(peer.hear(), p.Described)
    eventually(lambda: "client_left" in daemon.log)
    assert daemon.stop() == 0
    rows = daemon.rows
    events = {row["event"] for row in rows}
    assert {"ready", "serving", "client_left"} <= events
    assert "forged" not in events
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", str(row["time"])) for row in rows)
    assert {row["level"] for row in rows} == {"info"}
    left = next(row for row in rows if row["event"] == "client_left")
    assert isinstance(left["fields"], dict)
    assert left["fields"].keys() == {"pid", "uid", "why"}


def test_a_start_that_fails_is_a_line_of_json(daemon: JsonDaemon, tmp_path: Path) -> None:
    other = JsonDaemon(tmp_path, options=("--log-format", "json"))
    other.socket = daemon.socket
    try:
        other.launch()
        assert other.wait() == 2
        (row,) = other.rows
        assert (row["event"], row["level"]) == ("not_serving", "error")
        assert "another daemon already has" in str(row["message"])
    finally:
        other.close()


def test_a_storm_of_clients_is_a_few_lines(daemon: JsonDaemon) -> None:
    """Three hundred clients come, break the protocol and go: ten lines of a kind, one more every 5 s, and their count."""
    for _ in range(300):
        with socket.socket(socket.AF_UNIX) as wrong:
            wrong.connect(str(daemon.socket))
            wrong.sendall(b"\xff" * 16)
            wrong.recv(4096)
    assert daemon.stop() == 0
    rows = daemon.rows
    lines = [row for row in rows if row["event"] == "client_left"]
    counts = [row["fields"] for row in rows if row["event"] == "log_lines_left_out"]
    told = sum(count["count"] for count in counts if count["kind"] == "client_left")  # type: ignore[index]
    assert logs.BURST <= len(lines) <= logs.BURST + 20
    assert told + len(lines) == 300


def test_a_hostile_name_forges_no_line_of_text(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    try:
        daemon.start()
        with Peer(daemon.socket) as peer:
            assert isinstance(peer.greet(engine=HOSTILE), p.Welcome)
        eventually(lambda: "client pid" in daemon.log)
        assert daemon.stop() == 0
        assert all(line.startswith(("kvkern: ", "arena: ")) and line.isprintable() for line in daemon.log.splitlines())
        assert "kvkern: forged" not in daemon.log.splitlines()
    finally:
        daemon.close()


def test_a_daemon_whose_output_nobody_takes(tmp_path: Path) -> None:
    """A full disk under its output, or a reader that is gone, does not end it."""
    daemon = Daemon(tmp_path)
    daemon.wrapper = ("bash", "-c", 'exec "$@" > /dev/full', "bash")
    try:
        daemon.start()
        assert daemon.stat()["name"] == "default"
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.log
    finally:
        daemon.close()


def test_a_hostile_name_cannot_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([{"model": HOSTILE}])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)
