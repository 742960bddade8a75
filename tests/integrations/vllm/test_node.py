"""Real engines on a real daemon: engines load each other's chunks, daemons and engines are killed, tenants stay apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvkern.demo import process_group
from kvkern.errors import ConfigError
from kvkern.integrations.vllm import shim
from kvkern.integrations.vllm.options import parse_options, refuse_unshareable
from kvkern.node import protocol as p
from kvkern.node.client.admin_client import AdminClient
from kvkern.node.client.trace_recorder import TraceWriter
from tests.integrations.vllm.engine import TOOL_CALL_TOKEN, Engine, Reply, prompt
from tests.node.conftest import ROOT, Daemon, eventually, reseal

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]
IDLE = {"leases": 0, "quarantined_leases": 0, "quarantined_slots": 0}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    running = Daemon(tmp_path_factory.mktemp("arena"), "64MiB").start()
    yield running
    running.close()


@pytest.fixture(scope="module")
def node_engine(llama: str, daemon: Daemon) -> Iterator[Engine]:
    with Engine(llama, kvkern_options={"socket": str(daemon.socket)}) as running:
        yield running


class OtherEngine:
    """An engine in another process on the same daemon."""

    def __init__(self, model: str, daemon: Daemon, log: Path) -> None:
        command = [sys.executable, "-m", "tests.integrations.vllm.engine_child", model, str(daemon.socket)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
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
        """Kill all its processes with SIGKILL, except Python's tracker, which then removes their shared memory."""
        process_group.end(self.process.pid)
        self.process.wait()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self._log.close()


def idle(daemon: Daemon) -> bool:
    """Return True if no client holds a lease and nothing is quarantined. Clients may keep granted slots in stock."""
    return daemon.stat().items() >= IDLE.items()


def test_a_hit_through_the_daemon_equals_native_hit_and_recompute(node_engine: Engine, daemon: Daemon) -> None:
    recompute, native, hit = node_engine.three_ways(prompt(700, 101))
    assert (recompute.cached_tokens, native.cached_tokens, hit.cached_tokens) == (0, 672, 672)
    assert hit.tokens == native.tokens == recompute.tokens
    assert hit.logprobs == native.logprobs == recompute.logprobs
    node_engine.settle()
    eventually(lambda: idle(daemon), "an idle daemon")


def test_many_requests_at_once(node_engine: Engine, daemon: Daemon) -> None:
    texts = [prompt(150 + 50 * (i % 5), 200 + i) for i in range(12)]
    first = node_engine.run(texts)
    node_engine.reset_native()
    again = node_engine.run(texts)
    assert [reply.tokens for reply in again] == [reply.tokens for reply in first]
    assert all(reply.cached_tokens >= (len(text) - 1) // 32 * 32 for reply, text in zip(again, texts, strict=True))
    node_engine.settle()
    eventually(lambda: idle(daemon), "an idle daemon")


def test_another_process_loads_what_this_one_has_computed(
    node_engine: Engine, daemon: Daemon, llama: str, tmp_path: Path
) -> None:
    ours, theirs = prompt(700, 102), prompt(700, 103)
    computed = node_engine.one(ours)
    node_engine.settle()
    other = OtherEngine(llama, daemon, tmp_path / "log")
    try:
        loaded = other.one(ours)
        assert loaded.cached_tokens == 672
        assert (loaded.tokens, loaded.logprobs) == (computed.tokens, computed.logprobs)
        first = other.one(theirs)  # and the other way round, as soon as it is stored
        again = node_engine.one(theirs)
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
    node_engine.reset_native()
    assert node_engine.one(ours).tokens == computed.tokens


def test_a_killed_daemon_is_a_miss_and_a_restarted_one_serves_what_was_stored(
    node_engine: Engine, daemon: Daemon
) -> None:
    text, other = prompt(700, 104), prompt(700, 105)
    first = node_engine.one(text)
    node_engine.settle()
    daemon.kill()
    node_engine.reset_native()
    alone = node_engine.one(text)
    assert (alone.cached_tokens, alone.tokens) == (0, first.tokens)
    assert node_engine.one(other).cached_tokens == 0
    daemon.start()
    eventually(
        lambda: node_engine.cache.connected and node_engine.cache.usage()["known_chunks"], "the engine's reconnection"
    )
    node_engine.reset_native()
    back = node_engine.one(text)
    assert (back.cached_tokens, back.tokens, back.logprobs) == (672, first.tokens, first.logprobs)
    node_engine.settle()
    eventually(lambda: idle(daemon), "an idle daemon")


@pytest.mark.parametrize("forged", [False, True], ids=["a_bit", "with_its_checksums"])
def test_a_spoiled_chunk_of_the_node_is_computed_again(node_engine: Engine, daemon: Daemon, forged: bool) -> None:
    """Also if checksums that fit the other bytes are put into its header: the daemon has told what they were."""
    text = prompt(700, 116 + forged)
    known = daemon.ask(p.List(1, b"", 1000))
    first = node_engine.one(text)
    node_engine.reset_native()
    before_keys = {row["key"] for row in known}
    (spoiled,) = [
        row for row in daemon.ask(p.List(1, b"", 1000)) if row["position"] == 5 and row["key"] not in before_keys
    ]
    if forged:
        reseal(node_engine.cache.arena, [spoiled["slot"]])
    else:
        node_engine.cache.arena.parts(0)[spoiled["slot"], 99] ^= 1
    before = node_engine.cache.counters.bad_chunks
    again = node_engine.one(text)
    assert (again.tokens, again.cached_tokens) == (first.tokens, 0)
    assert node_engine.cache.counters.bad_chunks == before + 1
    node_engine.reset_native()
    whole = node_engine.one(text)
    assert (whole.tokens, whole.cached_tokens) == (first.tokens, 672)


def test_tenants_never_share(node_engine: Engine, daemon: Daemon) -> None:
    text = prompt(300, 107)
    before = {row["namespace"] for row in daemon.ask(p.List(1, b"", 1000))}
    assert [salted(node_engine, text, salt) for salt in ("a", "b", "a", "b")] == [0, 0, 288, 288]
    assert len({row["namespace"] for row in daemon.ask(p.List(1, b"", 1000))} - before) == 2


def test_after_a_reset_an_engine_neither_reads_nor_feeds_what_it_shared(
    node_engine: Engine, daemon: Daemon, llama: str, tmp_path: Path
) -> None:
    """The engine may have new weights that the others do not have. Chunks it shared before stay available to the others."""
    text, later = prompt(700, 108), prompt(700, 109)
    node_engine.one(text)
    salted(node_engine, text, "a")
    node_engine.settle()
    node_engine.reset_everything()
    assert node_engine.one(text).cached_tokens == 0
    assert salted(node_engine, text, "a") == 0
    node_engine.one(later)
    node_engine.reset_native()
    assert node_engine.one(later).cached_tokens == 672  # its own, of after the reset
    other = OtherEngine(llama, daemon, tmp_path / "log")
    try:
        assert other.one(text).cached_tokens == 672
        assert other.one(later).cached_tokens == 0
    finally:
        other.kill()
    chunks = daemon.stat()["chunks"]
    node_engine.reset_everything()  # once more: what is its own goes at once
    eventually(lambda: daemon.stat()["chunks"] < chunks, "the end of the engine's own chunks")
    assert node_engine.one(later).cached_tokens == 0


def test_a_recording_says_what_vllm_did(node_engine: Engine, daemon: Daemon, tmp_path: Path) -> None:
    """The recording has prompts, replies, sessions and stop reasons, also of a turn that vLLM answers from its own cache."""
    from vllm import SamplingParams

    def ask(tokens: list[int], forced: int, params: SamplingParams, **more: Any) -> list[int]:
        """Return a reply that repeats the token `forced`."""
        params.logit_bias, params.temperature, params.detokenize = {forced: 100.0}, 0, False
        inputs = {"prompt_token_ids": tokens}
        node_engine.llm.llm_engine.add_request(f"recorded-{len(tokens)}-{forced}", inputs, params, **more)
        while node_engine.llm.llm_engine.has_unfinished_requests():
            for output in node_engine.llm.llm_engine.step():
                reply = list(output.outputs[0].token_ids)
        node_engine.settle()
        return reply

    with AdminClient(daemon.socket) as operator:
        heard = operator.recorded_requests(0.2)
        assert next(heard) is None  # it has asked
        began_s = time.time()
        first = prompt(700, 110)
        second = first + ask(first, TOOL_CALL_TOKEN, SamplingParams(max_tokens=40), session_id="s")
        ask(second, 7, SamplingParams(max_tokens=40, stop_token_ids=[7]), session_id="s")
        ask(first, 9, SamplingParams(max_tokens=3))
        ask(prompt(5, 0), 9, SamplingParams(max_tokens=1))  # vLLM tells the end of a request with its next step
        with TraceWriter(tmp_path / "t.jsonl") as writer:
            while writer.requests < 3:
                if (request := next(heard)) is not None and request.arrived_s >= began_s:
                    writer.add(request)
    lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    times = [line.pop("timestamp") for line in lines]
    assert times == sorted(times)
    assert lines == [
        {
            "input_length": 700, "output_length": 40, "hash_ids": list(range(21)), "session_id": 0,
            "stop": "tool_call",
        },
        {"input_length": 740, "output_length": 1, "hash_ids": list(range(23)), "session_id": 0, "stop": "end_turn"},
        {"input_length": 700, "output_length": 3, "hash_ids": list(range(21))},
    ]  # fmt: skip


def salted(engine: Engine, tokens: list[int], salt: str) -> int:
    """Return the cached tokens of a prompt under a salt, after vLLM has emptied its own cache."""
    engine.reset_native()
    inputs = {"prompt_token_ids": tokens, "cache_salt": salt}
    (output,) = engine.llm.generate([inputs], engine.params(), use_tqdm=False)
    engine.settle()
    return int(output.num_cached_tokens or 0)


def test_a_seed_is_demanded_only_where_vllm_has_no_fixed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = parse_options({"kvkern": {"socket": "/run/kvkern.sock"}})
    own = parse_options({"kvkern": {"capacity": "1GiB"}})
    plain: Any = SimpleNamespace()
    for fixed in (True, False):
        monkeypatch.setattr(shim, "HASH_SEED_IS_FIXED", fixed)
        monkeypatch.setenv("PYTHONHASHSEED", "7")
        refuse_unshareable(shared, plain)
        monkeypatch.delenv("PYTHONHASHSEED")
        refuse_unshareable(own, plain)
        if fixed:
            refuse_unshareable(shared, plain)
        else:
            with pytest.raises(ConfigError, match="PYTHONHASHSEED=0"):
                refuse_unshareable(shared, plain)
