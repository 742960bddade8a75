"""The demo with a remote store: phases and verdicts with a fake vLLM, the order of its nodes, and its Redis server."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

for _module in ("matplotlib", "tokenizers", "torch"):
    pytest.importorskip(_module, reason="the demo's packages are not installed: pip install kvkern[demo]")

from kvkern import cli, demo_remote  # noqa: E402
from kvkern.demo import (  # noqa: E402
    engine_process,
    messages,
    model,
    preconditions,
    redis_server,
    remote_store,
    report,
    run,
    verdict,
)
from kvkern.demo.messages import Answer, Done, Job, Progress  # noqa: E402
from kvkern.remote.stores.registry import make_store  # noqa: E402
from kvkern.remote.stores.url import RemoteUrl  # noqa: E402
from tests.demo.fake_engine import PLAN, FakeEngine, Prefix, play, remote_answers  # noqa: E402
from tests.remote.required_servers import answers as listens  # noqa: E402
from tests.remote.required_servers import need as need_store  # noqa: E402

URL = "redis://user:hush@nowhere:6379"


def of(case: str, answers: Sequence[Answer]) -> list[Answer]:
    return [answer for answer in answers if answer.case == case]


def changed(case: str, answers: list[Answer], **fields: object) -> list[Answer]:
    """Return the answers with `fields` changed in the first answer of `case`."""
    index = next(index for index, answer in enumerate(answers) if answer.case == case)
    return [*answers[:index], msgspec.structs.replace(answers[index], **fields), *answers[index + 1 :]]


# --- phases


def test_recompute_is_measured_on_the_same_documents() -> None:
    answers = [event for event in play("computed", FakeEngine(kvkern=False)) if isinstance(event, Answer)]
    assert [(answer.case, answer.prompt_id, answer.cached_tokens) for answer in answers] == [
        ("recompute", prompt_id, 0) for prompt_id in ("short-0", "long-0") for _ in range(PLAN.long_runs)
    ]


def test_every_load_of_the_other_node_comes_through_the_remote_and_has_its_native_hit() -> None:
    answers = remote_answers()
    ours, native = of("remote", answers), of("native_hit", answers)
    assert [answer.prompt_id for answer in ours] == ["short-0"] * PLAN.node_pairs + ["long-0"] * PLAN.node_pairs
    for loaded, hit in zip(ours, native, strict=True):
        assert loaded.remote_tokens == loaded.loaded_tokens == loaded.cached_tokens == hit.cached_tokens > 0
        assert hit.loaded_tokens == hit.remote_tokens == 0


def test_progress_names_chunks_that_were_not_asked_for_or_not_read() -> None:
    lines = [event.text for event in play("remote", FakeEngine(kvkern=True)) if isinstance(event, Progress)]
    assert [line for line in lines if "chunks" in line] == [
        "2 chunks were not asked for: the store was slow, or it kept another request waiting",
        "3 chunks were not read from the store: computing them is faster",
    ]


# --- verdicts and report


def test_right_answers_pass_with_figures_of_both_lengths() -> None:
    findings = verdict.check_remote(remote_answers())
    assert [finding.line() for finding in findings if not finding.ok] == []
    assert [finding.num_compared for finding in findings] == [2 * PLAN.node_pairs] * 3
    assert "100 tokens in 0.014 s, 3.40x of a native hit and 7.4x faster than computing; 256 tok" in findings[0].line()


@pytest.mark.parametrize(
    ("case", "fields", "failing", "says"),
    [
        ("remote", {"loaded_tokens": 0}, 0, "loaded nothing"),
        ("remote", {"remote_tokens": 80}, 1, "loaded 96 tokens, of which the store gave 80"),
        ("fill", {"cached_tokens": 96}, 1, "found 96 tokens before any node had computed them"),
        ("recompute", {"cached_tokens": 16}, 1, "found 16 tokens before any node had computed them"),
        ("remote", {"tokens": (1,)}, 2, "other tokens than native_hit"),
        ("remote", {"cached_tokens": 80}, 2, "reused 80 tokens, vLLM itself 96"),
    ],
)
def test_one_changed_answer_fails_exactly_one_check(
    case: str, fields: dict[str, object], failing: int, says: str
) -> None:
    findings = verdict.check_remote(changed(case, remote_answers(), **fields))
    assert [finding.ok for finding in findings] == [index != failing for index in range(3)]
    assert says in findings[failing].line()


def test_no_answers_at_all_are_a_failure() -> None:
    assert not any(finding.ok for finding in verdict.check_remote([]))


def test_rows_table_chart_and_json(tmp_path: Path) -> None:
    options = run.Options(json_path=tmp_path / "demo.json", workdir=tmp_path, remote=URL)
    clock = run.PhaseClock(Console(file=(out := io.StringIO()), width=110))
    assert run._conclude(options, remote_answers(), clock, run.Setup(tmp_path, PLAN)) == run.EXIT_OK
    assert "another node, remote" in out.getvalue()
    assert "nothing in memory and read it from the remote store" in " ".join(out.getvalue().split())
    assert (tmp_path / "demo-remote.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    written = json.loads((tmp_path / "demo.json").read_text())
    assert written["tokens_equal"] is True
    assert [(row["case"], row["prompt_tokens"], row["runs"]) for row in written["rows"]] == [
        (case, length, PLAN.long_runs if case == "recompute" else PLAN.node_pairs)
        for length in (100, 256)
        for case in ("recompute", "native_hit", "remote")
    ]
    ours = [row for row in report.rows(remote_answers()) if row.case == "remote"]
    assert all(row.native_ttft_s is not None and row.loaded_tokens == row.cached_tokens for row in ours)


def test_wrong_tokens_of_the_other_node_exit_with_1(tmp_path: Path) -> None:
    options = run.Options(json_path=tmp_path / "demo.json", workdir=tmp_path, remote=URL)
    clock = run.PhaseClock(Console(file=io.StringIO()))
    setup = run.Setup(tmp_path, PLAN)
    assert run._conclude(options, remote_answers(wrong_when_loaded=True), clock, setup) == run.EXIT_WRONG
    assert json.loads((tmp_path / "demo.json").read_text())["tokens_equal"] is False


# --- the order of things


class FakeDaemon:
    """Replaces the daemons that run.py starts, and records which of them run at the same time."""

    seen: list[tuple[str, ...]]
    running: set[str]

    def __init__(self, capacity: str, log: Path, name: str = "node", options: Sequence[str] = ()) -> None:
        self.name, self.socket = name, log.with_name(f"{name}.sock")
        self.seen.append((capacity, name, *options))

    def __enter__(self) -> FakeDaemon:
        self.running.add(self.name)
        return self

    def __exit__(self, *_: object) -> None:
        self.running.remove(self.name)


WRITTEN = {"chunks": 5, "remote_written_chunks": 5, "remote_dropped_chunks": 0, "remote_failures": 0, "slot_nbytes": 9}


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A demo with fake parts. Records `jobs` with the daemons beside each, the daemon's counters `row`, and deleted keys."""
    made: dict[str, Any] = {"jobs": [], "row": dict(WRITTEN), "deleted": []}
    kept: dict[str | None, set[Prefix]] = {}  # by salt
    monkeypatch.setattr(FakeDaemon, "seen", [], raising=False)
    monkeypatch.setattr(FakeDaemon, "running", set(), raising=False)
    monkeypatch.setattr(run.supervised_daemon, "Daemon", FakeDaemon)
    monkeypatch.setattr(run.supervised_daemon, "keys", lambda socket: [b"key of " + socket.name.encode()])

    def wait_for(socket: Path, condition: Callable[[dict[str, int]], bool], limit_s: float) -> dict[str, int]:
        assert not condition({"chunks": 5, "remote_written_chunks": 3, "remote_dropped_chunks": 1})
        assert condition(made["row"])
        row: dict[str, int] = made["row"]
        return row

    def fake(job: Job, logs: engine_process.Logs) -> Iterator[messages.Event]:
        made["jobs"].append((job.phase, job.salt, set(FakeDaemon.running), job.engine.kvkern_socket))
        ours = job.engine.kvkern_socket is not None
        yield from play(job.phase, FakeEngine(ours, kept=kept.setdefault(job.salt, set()) if ours else set()), job.plan)
        yield Done(start_s=0.0)

    monkeypatch.setattr(run.supervised_daemon, "wait_for", wait_for)
    monkeypatch.setattr(engine_process, "run", fake)
    monkeypatch.setattr(remote_store, "check", lambda url: None)
    monkeypatch.setattr(remote_store, "delete", lambda url, keys: made["deleted"].append((url, keys)))
    (tmp_path / "config.json").write_text(json.dumps(model.ModelConfig().hf_config()))
    for name in ("tokenizer.json", "model.safetensors"):
        (tmp_path / name).touch()
    made["options"] = run.Options(model=tmp_path, workdir=tmp_path, capacity="1GiB", remote=URL)
    return made


def test_two_nodes_run_one_after_the_other_and_share_the_store_alone(
    nodes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.demo(nodes["options"], PLAN) == run.EXIT_OK
    phases, salts, running, sockets = zip(*nodes["jobs"], strict=True)
    assert phases == ("computed", "first", "remote")
    assert running == (set(), {"first"}, {"second"})
    assert sockets[0] is None
    assert sockets[1] != sockets[2]
    assert len(set(salts)) == 1
    assert len(salts[0]) == 16
    assert FakeDaemon.seen == [
        ("1GiB", "first", "--remote", URL, "--persist", "all", "--remote-queue", "1GiB"),
        ("1GiB", "second", "--remote", URL),
    ]
    assert nodes["deleted"] == [(URL, [b"key of first.sock"])]
    printed = capsys.readouterr().out
    assert "redis://nowhere:6379" in printed
    assert "hush" not in printed
    assert run.demo(nodes["options"], PLAN) == run.EXIT_OK
    assert nodes["jobs"][-1][1] != salts[0]  # what an earlier run has left is another tenant's


def test_a_store_that_does_not_take_everything_ends_the_demo_and_is_cleaned(
    nodes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    nodes["row"] |= {"remote_written_chunks": 4, "remote_dropped_chunks": 1}
    assert run.demo(nodes["options"], PLAN) == run.EXIT_ENGINE
    assert [job[0] for job in nodes["jobs"]] == ["computed", "first"]
    assert nodes["deleted"] == [(URL, [b"key of first.sock"])]
    assert "took 4 of 5 chunks of 9 bytes" in " ".join(capsys.readouterr().out.split())


def test_a_store_that_is_gone_in_the_end_does_not_hide_the_result(
    nodes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(url: str, keys: Sequence[bytes]) -> None:
        raise preconditions.NotReadyError("The store cannot be used")

    monkeypatch.setattr(remote_store, "delete", gone)
    assert run.demo(nodes["options"], PLAN) == run.EXIT_OK
    assert (
        "Up to 1 values of the demo stay in the store, because they could not be deleted. The store cannot be used"
        in capsys.readouterr().out
    )


# --- the store


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nowhere", "has no scheme"),
        ("foo://nowhere", "No remote store has the scheme 'foo'"),
        ("file:///dev/null/values", "--remote: "),
        ("redis://user:hush@127.0.0.1:1", "redis://127.0.0.1:1 cannot be used"),
        ("redis://user:hush@127.0.0.1:1?colour=red", "unknown key 'colour'"),
    ],
)
def test_a_wrong_store_is_reported_before_an_engine_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], url: str, says: str
) -> None:
    if url.startswith("redis"):
        pytest.importorskip("redis")
    monkeypatch.setattr(engine_process, "run", lambda job, logs: pytest.fail("started an engine"))
    assert run.demo(run.Options(model=tmp_path, workdir=tmp_path, remote=url), PLAN) == run.EXIT_NOT_READY
    printed = capsys.readouterr().out
    assert says in printed
    assert "hush" not in printed


def test_a_missing_package_has_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvkern.remote.stores.redis.store", None)
    with pytest.raises(preconditions.NotReadyError, match=r"pip install 'kvkern\[redis\]'"):
        remote_store.check("redis://127.0.0.1:1")


def test_only_the_demos_values_are_deleted(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/values?capacity=64MiB"
    keys = [bytes([number]) * 32 for number in range(3)]
    value = memoryview(bytes(4096)), memoryview(bytes(8192))

    async def work() -> list[bool]:
        stored = make_store(RemoteUrl.parse(url))
        await stored.open()
        try:
            there = await stored.exists(keys, 5.0)
            if not any(there):
                await stored.put(keys, [value] * 3, 5.0)
            return there
        finally:
            await stored.close()

    remote_store.check(url)
    assert asyncio.run(work()) == [False] * 3
    remote_store.delete(url, keys[:2])
    assert asyncio.run(work()) == [False, False, True]


# --- a server for it


def test_a_missing_server_is_reported_with_its_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(redis_server, "PROGRAMS", ("no-such-server",))
    monkeypatch.setattr(engine_process, "exit_on_signals", lambda *numbers: None)
    monkeypatch.setattr(demo_remote, "exit_on_signals", lambda *numbers: None)
    with pytest.raises(SystemExit) as status:
        demo_remote.main([])
    assert status.value.code == demo_remote.EXIT_NOT_READY
    assert "apt-get install redis-server" in capsys.readouterr().err


def test_a_server_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken-server"
    broken.write_text("#!/bin/sh\necho no luck today\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(redis_server, "PROGRAMS", (str(broken),))
    with pytest.raises(preconditions.NotReadyError, match="no luck today"), redis_server.running():
        pytest.fail("it runs")


def test_the_demo_runs_on_a_server_that_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    need_store("redis", "redis-server", "redis")
    seen: list[run.Options] = []

    def demo(options: run.Options) -> int:
        seen.append(options)
        assert options.remote is not None
        remote_store.check(options.remote)
        return run.EXIT_WRONG

    monkeypatch.setattr(run, "demo", demo)
    monkeypatch.setattr(engine_process, "exit_on_signals", lambda *numbers: None)
    monkeypatch.setattr(demo_remote, "exit_on_signals", lambda *numbers: None)
    with pytest.raises(SystemExit) as status:
        demo_remote.main(["--json", "some.json"])
    assert status.value.code == run.EXIT_WRONG
    assert seen[0].json_path == Path("some.json")
    assert not listens(_port(seen[0].remote or ""))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_server_ends_with_its_parent(number: int, tmp_path: Path) -> None:
    need_store("redis", "redis-server")
    source = (
        "import signal, time\n"
        "from kvkern.demo import engine_process, redis_server\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # the tests may run under nohup, which ignores it
        "engine_process.exit_on_signals(signal.SIGTERM, signal.SIGHUP)\n"
        "with redis_server.running() as url:\n"
        "    print(url, flush=True)\n"
        "    time.sleep(600)\n"
    )
    env = {**os.environ, "TMPDIR": str(tmp_path)}  # a killed process cannot remove its folder
    with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, env=env) as parent:
        assert parent.stdout is not None
        port = _port(parent.stdout.readline().decode().strip())
        assert listens(port)
        parent.send_signal(number)
        try:
            status = parent.wait(30)
        finally:
            parent.kill()
        assert status == (-number if number == signal.SIGKILL else 128 + number)
    deadline = time.monotonic() + 10
    while listens(port):
        assert time.monotonic() < deadline, "the server still listens"
        time.sleep(0.02)


def test_the_command_line_hands_the_url_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[run.Options] = []
    monkeypatch.setattr(run, "demo", lambda options: seen.append(options) or 0)
    monkeypatch.setattr(engine_process, "exit_on_signals", lambda *numbers: None)
    cli.app(["demo", "--remote", URL], standalone_mode=False)
    cli.app(["demo"], standalone_mode=False)
    assert [options.remote for options in seen] == [URL, None]


def _port(url: str) -> int:
    port = RemoteUrl.parse(url).port
    assert port is not None
    return port
