"""Real engines on a real daemon: what one computes the others load; daemons and engines are killed; tenants stay apart."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvkern.errors import ConfigError
from kvkern.integrations.vllm.options import parse_options, refuse_random_hashes
from kvkern.node import protocol as p
from tests.node.conftest import ROOT, Daemon, eventually, write_payload
from tests.support import SHAPE, chain_keys
from tests.vllm_engine.engine import Engine, Reply, prompt

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]
IDLE = {"leases": 0, "quarantined_leases": 0, "quarantined_slots": 0}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    running = Daemon(tmp_path_factory.mktemp("arena"), "64MiB").start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONHASHSEED", "0")
        yield running
    running.close()


@pytest.fixture(scope="module")
def engine(llama: str, daemon: Daemon) -> Iterator[Engine]:
    with Engine(llama, kvkern_options={"socket": str(daemon.socket)}) as running:
        yield running


class OtherEngine:
    """An engine of another process on the same daemon."""

    def __init__(self, model: str, daemon: Daemon, log: Path) -> None:
        command = [sys.executable, "-m", "tests.vllm_engine.engine_child", model, str(daemon.socket)]
        environment = os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": str(ROOT)}
        self._log = log.open("wb")
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            text=True, start_new_session=True,
        )  # fmt: skip
        self._receive()

    def send(self, tokens: list[int]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(tokens) + "\n")
        self.process.stdin.flush()

    def one(self, tokens: list[int]) -> Reply:
        self.send(tokens)
        answer = self._receive()
        return Reply(tuple(answer["tokens"]), tuple(answer["logprobs"]), answer["cached_tokens"])

    def _receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("reply: "):
                return json.loads(line.removeprefix("reply: "))  # type: ignore[no-any-return]
        raise AssertionError(f"the other engine ended; see {self._log.name}")

    def kill(self) -> None:
        """kill -9 of all its processes."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self._log.close()


def idle(daemon: Daemon) -> bool:
    """Whether nobody holds anything but granted slots in stock."""
    return daemon.stat().items() >= IDLE.items()


def test_a_hit_through_the_daemon_equals_native_hit_and_recompute(engine: Engine, daemon: Daemon) -> None:
    text = prompt(700, 101)
    recompute = engine.one(text)
    native = engine.one(text)
    engine.reset_native()
    hit = engine.one(text)
    assert (recompute.cached_tokens, native.cached_tokens, hit.cached_tokens) == (0, 672, 672)
    assert hit.tokens == native.tokens == recompute.tokens
    assert hit.logprobs == native.logprobs == recompute.logprobs
    engine.settle()
    eventually(lambda: idle(daemon), "an idle daemon")


def test_many_requests_at_once(engine: Engine, daemon: Daemon) -> None:
    texts = [prompt(150 + 50 * (i % 5), 200 + i) for i in range(12)]
    first = engine.run(texts)
    engine.reset_native()
    again = engine.run(texts)
    assert [reply.tokens for reply in again] == [reply.tokens for reply in first]
    assert all(reply.cached_tokens >= (len(text) - 1) // 32 * 32 for reply, text in zip(again, texts, strict=True))
    engine.settle()
    eventually(lambda: idle(daemon), "an idle daemon")


def test_another_process_loads_what_this_one_has_computed(
    engine: Engine, daemon: Daemon, llama: str, tmp_path: Path
) -> None:
    ours, theirs = prompt(700, 102), prompt(700, 103)
    computed = engine.one(ours)
    engine.settle()
    other = OtherEngine(llama, daemon, tmp_path / "log")
    try:
        loaded = other.one(ours)
        assert loaded.cached_tokens == 672
        assert (loaded.tokens, loaded.logprobs) == (computed.tokens, computed.logprobs)
        first = other.one(theirs)  # and the other way round, as soon as it is stored
        again = engine.one(theirs)
        assert again.cached_tokens == 672
        assert (again.tokens, again.logprobs) == (first.tokens, first.logprobs)
        sessions = daemon.stat()["sessions"]
        for seed in range(5):  # killed with work under way
            other.send(prompt(900, 300 + seed))
        eventually(lambda: daemon.stat()["stored_chunks"] > 0, "work")
    finally:
        other.kill()
    eventually(lambda: daemon.stat()["sessions"] == sessions - 2, "the end of its sessions")
    eventually(lambda: idle(daemon), "the end of what it held")
    engine.reset_native()
    assert engine.one(ours).tokens == computed.tokens


def test_a_killed_daemon_is_a_miss_and_a_restarted_one_serves_what_was_stored(engine: Engine, daemon: Daemon) -> None:
    text, other = prompt(700, 104), prompt(700, 105)
    first = engine.one(text)
    engine.settle()
    daemon.kill()
    engine.reset_native()
    alone = engine.one(text)
    assert (alone.cached_tokens, alone.tokens) == (0, first.tokens)
    assert engine.one(other).cached_tokens == 0
    daemon.start()
    eventually(lambda: engine.cache.connected and engine.cache.usage()["known_chunks"], "the engine's reconnection")
    engine.reset_native()
    back = engine.one(text)
    assert (back.cached_tokens, back.tokens, back.logprobs) == (672, first.tokens, first.logprobs)
    engine.settle()
    eventually(lambda: idle(daemon), "an idle daemon")


def test_a_spoiled_chunk_of_the_node_is_computed_again(engine: Engine, daemon: Daemon) -> None:
    text = prompt(700, 106)
    first = engine.one(text)
    engine.reset_native()
    (spoiled,) = [row for row in daemon.ask(p.List(1, b"", 1000)) if row["position"] == 5]
    engine.cache.arena.parts(0)[spoiled["slot"], 99] ^= 1
    before = engine.cache.counters.bad_chunks
    again = engine.one(text)
    assert (again.tokens, again.cached_tokens) == (first.tokens, 0)
    assert engine.cache.counters.bad_chunks == before + 1
    engine.reset_native()
    whole = engine.one(text)
    assert (whole.tokens, whole.cached_tokens) == (first.tokens, 672)


def test_tenants_never_share_and_a_reset_forgets_the_engines_namespaces_only(engine: Engine, daemon: Daemon) -> None:
    text = prompt(300, 107)

    def ask(salt: str) -> int:
        engine.reset_native()
        inputs = {"prompt_token_ids": text, "cache_salt": salt}
        (output,) = engine.llm.generate([inputs], engine.params(), use_tqdm=False)
        engine.settle()
        return int(output.num_cached_tokens or 0)

    assert [ask("a"), ask("b"), ask("a"), ask("b")] == [0, 0, 288, 288]
    roots = {row["namespace"] for row in daemon.ask(p.List(1, b"", 1000))}
    assert len(roots) == 2
    stranger = daemon.client("stranger", engine.cache.arena.spec.geometry)
    try:
        keys = chain_keys("stranger", 4)
        reservation = stranger.reserve(keys, keys, SHAPE)
        write_payload(stranger.arena, reservation)
        assert stranger.commit(reservation) == 4
        engine.reset_everything()
        assert [ask("a"), ask("b")] == [0, 0]
        assert stranger.lookup(keys) == 4
    finally:
        stranger.close()


def test_random_hashes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = parse_options({"kvkern": {"socket": "/run/kvkern.sock"}})
    for seed in (None, "random"):
        monkeypatch.setenv("PYTHONHASHSEED", seed) if seed else monkeypatch.delenv("PYTHONHASHSEED", raising=False)
        with pytest.raises(ConfigError, match="PYTHONHASHSEED=0"):
            refuse_random_hashes(shared)
        refuse_random_hashes(parse_options({"kvkern": {"capacity": "1GiB"}}))  # a cache of its own
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    refuse_random_hashes(shared)
