"""The operator's commands against a daemon: what they print. Bad input ends with one line and exit status 2."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kvkern.cli import app
from kvkern.node import framing
from kvkern.node import protocol as p
from kvkern.node.client import admin_client
from kvkern.node.client.admin_client import AdminClient
from tests.node.conftest import ROOT, Daemon, MakeClient, MakeDaemon, eventually, write_payload
from tests.support import NAMESPACE, SHAPE, chain_keys

CHAIN = chain_keys("a", 3)


def run(daemon: Daemon, *arguments: str) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(app, [*arguments, "--socket", str(daemon.socket)])


def refused(result: Result) -> str:
    """Check that the command failed, and return the one line that says why."""
    assert (result.exit_code, result.stdout) == (2, "")
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("kvkern: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture
def filled(daemon: Daemon, make_client: MakeClient) -> Daemon:
    """A daemon with three chunks."""
    client = make_client()
    reservation = client.reserve(CHAIN, CHAIN, SHAPE)
    write_payload(client.arena, reservation)
    assert client.commit(reservation) == 3
    return daemon


def test_serve_in_a_process_of_its_own(daemon: Daemon) -> None:
    """The other commands run in processes of their own too, as an operator runs them."""
    assert f"kvkern: serving on {daemon.socket}\n" in daemon.log
    command = [sys.executable, "-m", "kvkern"]
    there = ["--socket", str(daemon.socket)]
    asked = subprocess.run([*command, "stat", "--json", *there], capture_output=True, text=True, cwd=ROOT, check=True)
    assert json.loads(asked.stdout)["pid"] == daemon.pid
    asked = subprocess.run([*command, "evict", "xy", *there], capture_output=True, text=True, cwd=ROOT)
    assert (asked.returncode, asked.stdout, asked.stderr.count("\n")) == (2, "", 1)
    assert daemon.stop() == 0


def test_before_the_first_engine(daemon: Daemon) -> None:
    assert run(daemon, "ls").stdout == "nothing is cached\n"
    assert json.loads(run(daemon, "ls", "--json").stdout) == []
    assert json.loads(run(daemon, "stat", "--json").stdout)["connections"] == 1
    assert run(daemon, "get", "00").exit_code == 1
    assert run(daemon, "evict", "00").stdout == "0 chunks forgotten\n"
    assert run(daemon, "clear").stdout == "0 chunks forgotten\n"


def test_stat(filled: Daemon) -> None:
    row = json.loads(run(filled, "stat", "--json").stdout)
    assert {"pid", "uptime_s", "arena", "bad_frames", "hit_ratio", "quarantined_slots"} <= row.keys()
    assert (row["chunks"], row["stored_chunks"], row["slots"], row["sessions"]) == (3, 3, 127, 2)
    lines = run(filled, "stat").stdout.splitlines()
    assert lines[0].split() == ["what", "value"]
    assert ["chunks", "3"] in [line.split() for line in lines]


def test_ls(filled: Daemon) -> None:
    rows = json.loads(run(filled, "ls", "--json").stdout)
    assert {row["key"] for row in rows} == {key.hex() for key in CHAIN}
    assert {row["namespace"] for row in rows} == {NAMESPACE.hex()}
    assert {(row["position"], row["chunk_tokens"], row["payload_nbytes"], row["leases"]) for row in rows} == {
        (position, 16, 256, 0) for position in range(3)
    }
    assert len(json.loads(run(filled, "ls", "--json", "--limit", "2").stdout)) == 2
    (row,) = json.loads(run(filled, "ls", "--json", "--prefix", CHAIN[1].hex()[:8].upper()).stdout)
    assert row["key"] == CHAIN[1].hex()
    assert json.loads(run(filled, "ls", "--json", "--prefix", CHAIN[1].hex()).stdout) == [row]


def test_the_table_shows_whole_keys(filled: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """However narrow the terminal is, because an operator copies the keys into `kvkern get`."""
    monkeypatch.setenv("COLUMNS", "40")
    lines = run(filled, "ls").stdout.splitlines()
    assert lines[0].split()[:3] == ["key", "namespace", "slot"]
    assert sorted(line.split()[0] for line in lines[1:]) == sorted(key.hex() for key in CHAIN)


def test_get(filled: Daemon) -> None:
    row = json.loads(run(filled, "get", CHAIN[2].hex(), "--json").stdout)
    assert (row["key"], row["position"]) == (CHAIN[2].hex(), 2)
    assert ["position", "2"] in [line.split() for line in run(filled, "get", CHAIN[2].hex()[:10]).stdout.splitlines()]
    absent = run(filled, "get", "00" * 32, "--json")
    assert (absent.exit_code, absent.stdout) == (1, "")
    assert absent.stderr == (
        f"kvkern: no cached chunk has a key that starts with {'00' * 32}; `kvkern ls` lists the keys\n"
    )


def test_evict(filled: Daemon) -> None:
    assert run(filled, "evict", CHAIN[1].hex()[:16]).stdout == "1 chunks forgotten\n"
    assert json.loads(run(filled, "evict", CHAIN[1].hex(), "--json").stdout) == {"chunks": 0}
    assert json.loads(run(filled, "evict", CHAIN[0].hex(), "--json").stdout) == {"chunks": 1}
    assert [row["key"] for row in json.loads(run(filled, "ls", "--json").stdout)] == [CHAIN[2].hex()]


def test_clear(filled: Daemon) -> None:
    assert run(filled, "clear", "--namespace", "ff" * 32).stdout == "0 chunks forgotten\n"
    assert json.loads(run(filled, "clear", "--namespace", NAMESPACE.hex(), "--json").stdout) == {"chunks": 3}
    assert json.loads(run(filled, "clear", "--json").stdout) == {"chunks": 0}
    assert run(filled, "ls").stdout == "nothing is cached\n"


@pytest.mark.parametrize("digits", ["x", "0", "0x", "zz", "00 00", "é" * 2, "00" * 33])
def test_what_is_no_key(filled: Daemon, digits: str) -> None:
    for command in (["get", digits], ["evict", digits], ["ls", "--prefix", digits]):
        line = refused(run(filled, *command))
        assert repr(digits) in line
        assert "an even number" in line
        assert "`kvkern ls` shows them" in line
    assert "64: `kvkern ls` shows them" in refused(run(filled, "clear", "--namespace", digits))
    assert filled.stat()["chunks"] == 3


@pytest.mark.parametrize("command", [["get", ""], ["evict", ""], ["clear", "--namespace", ""]])
def test_an_empty_key_is_not_everything(filled: Daemon, command: list[str]) -> None:
    """A shell gives an empty key where a variable is not set."""
    assert "is ''; expected hex digits" in refused(run(filled, *command))
    assert filled.stat()["chunks"] == 3


@pytest.mark.parametrize("command", ["stat", "ls", "get", "evict", "clear"])
def test_no_daemon(folder: Path, command: str) -> None:
    arguments = [command, "00"] if command in ("get", "evict") else [command]
    path = folder / "s"
    result = CliRunner().invoke(app, [*arguments, "--socket", str(path)])
    line = refused(result)
    assert f"no daemon answers on {path} (No such file or directory); start one: kvkern serve" in line
    path.write_text("")
    assert "Connection refused" in refused(CliRunner().invoke(app, [*arguments, "--socket", str(path)]))
    long = str(folder / ("x" * 107))
    assert "107 bytes" in refused(CliRunner().invoke(app, [*arguments, "--socket", long]))


def test_a_socket_that_may_not_be_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", denied)
    line = refused(CliRunner().invoke(app, ["stat", "--socket", str(folder / "s")]))
    assert f"this user may not open {folder / 's'}; join the group of the socket, or run as its owner" in line


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--capacity", "0"], "capacity is '0' = 0 bytes"),
        (["--capacity", "much"], "expected a size such as '8GiB'"),
        (["--capacity", "65TiB"], "64 TiB"),
        (["--capacity", "1MiB", "--name", "a/b"], "name is 'a/b'; use up to 64 letters"),
        (["--capacity", "1MiB", "--arena-dir", "/nowhere"], "which is no directory"),
        (["--capacity", "1MiB", "--drain", "nan"], "must lie in 0..3600"),
        (["--capacity", "1MiB", "--socket", "/nowhere/s"], "create the folder, or choose another --socket"),
        (["--capacity", "1MiB", "--socket", "/" + "x" * 107], "107 bytes"),
    ],
)  # fmt: skip
def test_bad_options_of_serve(tmp_path: Path, options: list[str], why: str) -> None:
    arguments = ["serve", "--socket", str(tmp_path / "no" / "s"), "--arena-dir", str(tmp_path), *options]
    assert why in refused(CliRunner().invoke(app, arguments))


@pytest.mark.parametrize(
    "arguments", [["serve"], ["get"], ["ls", "--limit", "0"], ["ls", "--limit", "1001"], ["wrong"]]
)
def test_what_the_parser_refuses(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Traceback" not in result.stderr


# -- the operator's connection -----------------------------------------------------------------------------------------


def test_a_daemon_that_hangs(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_client, "TIMEOUT_S", 0.2)
    daemon.signal(signal.SIGSTOP)
    assert "timed out" in refused(run(daemon, "stat"))
    daemon.signal(signal.SIGCONT)
    monkeypatch.undo()
    assert run(daemon, "stat").exit_code == 0


def test_a_daemon_that_ends_meanwhile(make_daemon: MakeDaemon) -> None:
    """It announces its end, which is neither an answer nor a fault. While transfers are under way it still answers."""
    daemon = make_daemon(options=["--drain", "60"]).start()
    with closing(daemon.client()) as client, AdminClient(daemon.socket) as operator:
        reservation = client.reserve(CHAIN, CHAIN, SHAPE)
        daemon.signal(signal.SIGTERM)
        eventually(lambda: not daemon.socket.exists())
        assert operator.ask(p.Stat(1))[0]["pid"] == daemon.pid
        client.commit(reservation)
        assert daemon.wait() == 0
        with pytest.raises(ValueError, match="does not answer"):
            operator.ask(p.Stat(1))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (framing.encode(p.Refused("because")), "the daemon refuses: because"),
        (framing.encode(p.Draining()), "answers Hello with Draining"),
        (b"\xff" * 8, "a frame has 4294967295 bytes, at most"),
        (b"\x01\x00\x00\x00\xc0", "a frame of 1 bytes holds no message"),
        (b"", "the daemon hung up"),
        (framing.encode(p.Welcome(p.VERSION, 1)) + framing.encode(p.Described(1, "")), "answers with Described"),
        (framing.encode(p.Welcome(p.VERSION, 1)) + b"\xff" * 8, "a frame has 4294967295 bytes, at most"),
    ],
    ids=["refused", "draining", "length", "no_message", "nothing", "other", "length_later"],
)
def test_a_mad_daemon(folder: Path, said: bytes, why: str) -> None:
    path = folder / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(1 << 16)
                sock.sendall(said)
                if said:
                    sock.recv(1 << 16)

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            assert why in refused(CliRunner().invoke(app, ["stat", "--socket", str(path)]))
        finally:
            thread.join()


def test_serve_refuses_a_policy_nobody_knows(tmp_path: Path) -> None:
    arguments = ["serve", "--capacity", "1MiB", "--policy", "fifo", "--arena-dir", str(tmp_path)]
    said = refused(CliRunner().invoke(app, [*arguments, "--socket", str(tmp_path / "s")]))
    assert "policy is 'fifo'; expected one of lru, arc, s3fifo, lirs, grit" in said
