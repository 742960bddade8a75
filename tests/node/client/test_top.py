"""`kvkern top`: what it shows of a real daemon, as text, as JSON and live; and sparklines."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvkern.cli import app
from kvkern.errors import ConfigError
from kvkern.node.client.top import overview
from kvkern.node.client.top_screen import screen, sparkline
from kvkern.node.daemon import operator_requests
from tests.node.conftest import ROOT, Daemon, MakeClient, eventually, hits, store
from tests.node.peer import PATIENCE_S
from tests.support import NAMESPACE, chain_keys

HOSTILE = "<script>\x1b[31m[bold red]\n\u202e"


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["top", *arguments], env={"COLUMNS": "120"})
    return done.exit_code, done.output


def test_once(daemon: Daemon, make_client: MakeClient) -> None:
    client = make_client("engine-a")
    client.describe_namespace(NAMESPACE, {"model": "llama", "salt": "abcdef0123456789"})
    chain = chain_keys("a", 5)
    assert store(client, chain) == 5
    assert hits(client, chain) == 5
    eventually(lambda: overview(daemon.socket, -1)[1]["tenants"], "a count of the namespaces")
    status, text = run("--once", "--socket", str(daemon.socket))
    assert status == 0
    for expected in (
        "kvkern default",
        "ready",
        "5 of 5 chunks",
        "llama",
        "abcdef01",
        "engine-a",
        chain[0].hex()[:16],
        "1 MiB",
    ):
        assert expected in text


def test_json_is_what_the_page_shows(daemon: Daemon, make_client: MakeClient) -> None:
    assert store(make_client("engine-a"), chain_keys("a", 3)) == 3
    status, text = run("--json", "--socket", str(daemon.socket))
    assert status == 0
    found = json.loads(text)
    assert found["daemon"]["id"] == daemon.stat()["daemon"]
    assert found["stat"].keys() == daemon.stat().keys()
    assert [row["engine"] for row in found["engines"]] == ["engine-a"]
    assert found["config"]["capacity_nbytes"] == 1 << 20


def test_a_daemon_without_engines(daemon: Daemon) -> None:
    status, text = run("--once", "--socket", str(daemon.socket))
    assert status == 0
    for expected in ("no engine is connected", "no chunks are cached", "no prefix was hit", "no engine yet"):
        assert expected in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_names_are_text(daemon: Daemon, make_client: MakeClient, width: int) -> None:
    """A model's or an engine's name cannot drive the terminal or style it."""
    client = make_client(HOSTILE)
    client.describe_namespace(NAMESPACE, {"model": HOSTILE})
    assert store(client, chain_keys("a", 1)) == 1
    eventually(lambda: overview(daemon.socket, -1)[1]["tenants"], "a count of the namespaces")
    console = Console(width=width, record=True, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(screen(overview(daemon.socket, -1)[1], width))
    text = console.export_text()
    assert "\x1b[31m" not in console.export_text(styles=True, clear=False)
    assert not [c for c in text if not c.isprintable() and c != "\n"]
    assert width < 200 or "[bold red]" in text


def test_no_daemon(folder: Path) -> None:
    status, text = run("--once", "--socket", str(folder / "s"))
    assert status == 2
    assert str(folder / "s") in text


@pytest.mark.parametrize("every", ["0", "-1", "nan"])
def test_wrong_times(daemon: Daemon, every: str) -> None:
    status, text = run("--socket", str(daemon.socket), "--every", every)
    assert status == 2
    assert "every is" in text


def test_an_older_daemon(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the question for one about chunks, and knows none."""
    monkeypatch.setattr("kvkern.node.client.top.p.OVERVIEW", b"\xffnothing")
    with pytest.raises(ConfigError, match="is older than this command"):
        overview(daemon.socket, -1)
    assert operator_requests.chunk_rows(None, b"", 1) == []


def test_live_until_interrupted(daemon: Daemon, make_client: MakeClient) -> None:
    """In a real terminal: it draws, goes on when the daemon is away and back, and ends on Ctrl-C with status 0."""
    make_client("engine-a")
    mine, theirs = pty.openpty()
    command = [sys.executable, "-m", "kvkern", "top", "--socket", str(daemon.socket), "--every", "0.2"]
    shown = b""

    def sees(text: bytes) -> bool:
        nonlocal shown
        while select.select([mine], [], [], 0.05)[0]:
            shown += os.read(mine, 1 << 16)
        return text in shown

    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    with subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        try:
            eventually(lambda: sees(b"engine-a"), "the first look")
            daemon.stop()
            eventually(lambda: sees(b"Trying again"), "that the daemon is away")
            shown = b""
            daemon.start()
            eventually(lambda: sees(b"version"), "that the daemon is back")
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()
            os.close(theirs)
    while select.select([mine], [], [], 0)[0]:
        try:
            shown += os.read(mine, 1 << 16)
        except OSError:
            break
    os.close(mine)
    assert b"Traceback" not in shown
    assert shown.rstrip().endswith(b"\x1b[?25h") or b"\x1b[?1049l" in shown  # the terminal is as it was


@pytest.mark.parametrize(("values", "width", "top", "drawn"), [
    ([], 5, None, ""), ([0.0], 5, None, "▁"), ([0.0, 1.0], 5, 1.0, "▁█"), ([None, 0.5], 5, 1.0, " ▅"),
    ([0.0, 0.0, 2.0, 2.0], 2, None, "▁█"), ([None] * 4, 2, None, "  "), ([1.0, None], 1, None, "█"),
])  # fmt: skip
def test_sparklines(values: list[float | None], width: int, top: float | None, drawn: str) -> None:
    assert sparkline(values, width, top) == drawn
