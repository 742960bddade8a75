"""A recorded trace holds the requests in the order of their arrival, and the replay reads it."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvkern.cache.base import RequestEnd
from kvkern.cli import app
from kvkern.node import framing
from kvkern.node import protocol as p
from kvkern.node.client import trace_recorder
from kvkern.node.client.cache_client import NodeClient
from kvkern.node.client.trace_recorder import HOLD_S, TraceWriter
from kvkern.node.daemon import client_connection
from kvkern.node.daemon.node_config import NodeConfig
from kvkern.policy.base import Stop, Use
from kvkern.replay.trace import read_trace
from tests.node.conftest import GEOMETRY, ROOT, Daemon, MakeClient, Peer, eventually, served
from tests.support import chain_keys

A, B = chain_keys("a", 5), chain_keys("b", 2)


def recorded(arrived_s: float, keys: list[bytes], **more: Any) -> p.Recorded:
    said = {"prompt_tokens": 16 * len(keys), "output_tokens": -1, "stop": Stop.UNKNOWN, "session": 0} | more
    return p.Recorded(arrived_s, framing.join_keys(keys), **said)


def lines_of(path: Path) -> list[dict[str, Any]]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.splitlines()]


@pytest.mark.parametrize("set_by_s", [-86_400.0, 86_400.0])
def test_a_wall_clock_that_is_set(tmp_path: Path, set_by_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a day, and back: the order and the times of the requests stay, and none is held back."""
    wall_s, steady_s = 1e9, 500.0
    monkeypatch.setattr(trace_recorder.time, "time", lambda: wall_s)
    monkeypatch.setattr(trace_recorder.time, "monotonic", lambda: steady_s)
    with TraceWriter(tmp_path / "t.jsonl") as writer:
        for number, jump_s in enumerate((0.0, set_by_s, -set_by_s)):
            wall_s += jump_s + 10.0
            steady_s += 10.0
            writer.add(trace_recorder.on_steady_clock(recorded(wall_s - 2.0, A[: number + 1])))
        writer.write_due(steady_s + HOLD_S)
        assert writer._held == []
    assert [(line["timestamp"], len(line["hash_ids"])) for line in lines_of(tmp_path / "t.jsonl")] == [
        (0, 1), (10_000, 2), (20_000, 3),
    ]  # fmt: skip


def test_a_wall_clock_that_is_set_while_a_request_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for set_by_s, age_s in ((86_400.0, trace_recorder.MAX_AGE_S), (-86_400.0, 0.0)):
        monkeypatch.setattr(trace_recorder.time, "time", lambda set_by_s=set_by_s: 1e9 + set_by_s)
        monkeypatch.setattr(trace_recorder.time, "monotonic", lambda: 90_000.0)
        assert trace_recorder.on_steady_clock(recorded(1e9 - 1, A)).arrived_s == 90_000.0 - age_s


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz"])
def test_lines_are_in_the_order_of_arrival(tmp_path: Path, name: str) -> None:
    with TraceWriter(tmp_path / name) as writer:
        writer.add(recorded(1002.0, A[:3], output_tokens=7, stop=Stop.TOOL_CALL, session=99))
        writer.add(recorded(1000.0, B))
        writer.write_due(1003.0)
        writer.add(recorded(1001.0, A[:2] + B, output_tokens=0, stop=Stop.END_TURN, session=99, prompt_tokens=70))
    assert lines_of(tmp_path / name) == [
        {"timestamp": 0, "input_length": 32, "hash_ids": [0, 1]},
        {
            "timestamp": 1000, "input_length": 70, "hash_ids": [2, 3, 0, 1], "output_length": 0, "session_id": 0,
            "stop": "end_turn",
        },
        {
            "timestamp": 2000, "input_length": 48, "hash_ids": [2, 3, 4], "output_length": 7, "session_id": 0,
            "stop": "tool_call",
        },
    ]  # fmt: skip
    trace = read_trace(tmp_path / name)
    assert (len(trace), trace.num_unique, trace.num_backwards) == (3, 5, 0)
    assert trace.stops.tolist() == [Stop.UNKNOWN, Stop.END_TURN, Stop.TOOL_CALL]


def test_what_ends_very_late_is_written_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_recorder, "MAX_HELD", 1)
    with TraceWriter(tmp_path / "t.jsonl") as writer:
        writer.add(recorded(1000.0, A))
        writer.write_due(1000.0 + HOLD_S)
        assert not writer._held
        writer.add(recorded(999.0, B))
        writer.add(recorded(1001.0, A))
        writer.write_due(1001.0)
        assert len(writer._held) == 1
    assert [line["timestamp"] for line in lines_of(tmp_path / "t.jsonl")] == [0, 0, 1000]


def test_record_what_engines_had(daemon: Daemon, make_client: MakeClient, tmp_path: Path) -> None:
    out = tmp_path / "t.jsonl.gz"
    command = [sys.executable, "-m", "kvkern", "record", str(out), "--socket", str(daemon.socket)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    eventually(lambda: daemon.stat()["connections"] >= 2 and out.exists(), "the recorder")
    one, two = make_client("one"), make_client("two")
    one.finish(Use(request=1, output_tokens=10, stop=Stop.TOOL_CALL, session=5), RequestEnd(A, 83, 2.0))
    two.finish(Use(request=1, output_tokens=20), RequestEnd(A[:2] + B, 64))
    one.finish(Use(output_tokens=9), RequestEnd(B))  # ends no request
    two.finish(Use(request=2), RequestEnd([], 3, 1e6))  # too short for a chunk, and the oldest that is possible
    with closing(daemon.client("three")) as three:  # what a client sent before it closed arrives
        three.finish(Use(request=1), RequestEnd(B, 40))
        eventually(lambda: not three._link._outbox)
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate(timeout=30)
    assert process.returncode == 0
    assert said == f"kvkern: recording into {out}\n"
    assert printed.startswith("4 requests, 7 distinct chunks in ")
    assert printed.endswith(": a signal ended it\n")
    lines = lines_of(out)
    assert lines[0]["hash_ids"] == []
    found = {tuple(line["hash_ids"]): line for line in lines}
    assert set(found) == {(), (0, 1, 2, 3, 4), (0, 1, 5, 6), (5, 6)}
    assert found[0, 1, 2, 3, 4] | {"timestamp": 0} == {
        "timestamp": 0, "input_length": 83, "hash_ids": [0, 1, 2, 3, 4], "output_length": 10, "session_id": 0,
        "stop": "tool_call",
    }  # fmt: skip
    assert len(read_trace(out)) == 3


def test_ends_when_there_are_enough_or_the_time_is_over_or_the_daemon_ends(daemon: Daemon, tmp_path: Path) -> None:
    def run(name: str, *options: str) -> str:
        result = CliRunner().invoke(
            app, ["record", str(tmp_path / name), "--socket", str(daemon.socket), *options]
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        return result.stdout

    assert "0 requests, 0 distinct chunks" in (said := run("a.jsonl", "--seconds", "0"))
    assert said.endswith(": 0 seconds are over\n")
    command = [sys.executable, "-m", "kvkern", "record", str(tmp_path / "b.jsonl"), "--socket", str(daemon.socket)]
    processes = [
        subprocess.Popen([*command[:4], str(tmp_path / f"{n}.jsonl"), *command[5:], *more], cwd=ROOT,
                         stdout=subprocess.PIPE, text=True)
        for n, more in enumerate((["--requests", "1"], []))
    ]  # fmt: skip
    eventually(lambda: daemon.stat()["connections"] >= 3, "two recorders")
    with closing(daemon.client()) as client:
        eventually(lambda: all((tmp_path / f"{n}.jsonl").exists() for n in range(2)), "files")
        client.finish(Use(request=1), RequestEnd(A, 80))
        printed, _ = processes[0].communicate(timeout=30)
        assert printed.endswith(": 1 requests are recorded\n")
    daemon.stop()
    printed, _ = processes[1].communicate(timeout=30)
    assert printed.startswith("1 requests, 5 distinct chunks")
    assert printed.endswith(": the daemon hung up: it has ended, or this recorder read too slowly\n")


def test_bad_input(daemon: Daemon, tmp_path: Path) -> None:
    def refused(out: Path, socket: Path) -> str:
        result = CliRunner().invoke(app, ["record", str(out), "--socket", str(socket)])
        assert result.exit_code == 2
        return result.stderr.splitlines()[-1]

    there = tmp_path / "there.jsonl"
    there.write_text("mine")
    assert refused(there, daemon.socket) == f"kvkern: {there} exists; give another file"
    assert there.read_text() == "mine"
    assert "cannot be written: No such file or directory" in refused(tmp_path / "no" / "t.jsonl", daemon.socket)
    assert "no daemon answers on" in refused(tmp_path / "new.jsonl", tmp_path / "none")
    assert not (tmp_path / "new.jsonl").exists()


def test_a_recorder_that_does_not_read_is_let_go(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_connection, "MAX_UNSENT_NBYTES", 1 << 16)
    config = NodeConfig(folder / "s", 1 << 20, arena_dir=tmp_path, prefault=False)
    with served(config) as server, Peer(config.socket) as recorder:
        recorder.greet(geometry=None)
        recorder.say(p.Record())
        with closing(NodeClient.open(config.socket, "e", GEOMETRY, prefault=False)) as client:
            many = chain_keys("c", 1000)

            def gone() -> bool:
                client.finish(Use(request=1), RequestEnd(many, 16_000))
                return len(server.connections) == 1

            eventually(gone, "the recorder's end")
            assert client.connected
        assert recorder.hung_up()
