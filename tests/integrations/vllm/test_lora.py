"""LoRA: KV is named by the content of the adapter's files, so a retrained adapter is never given the KV of the old one."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm.lora.request import LoRARequest

from tests.integrations.vllm.adapters import OPTIONS, write_adapter
from tests.integrations.vllm.engine import Engine, Reply, prompt
from tests.node.conftest import Daemon, eventually

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]
TEXT = prompt(200, 901)
CACHED = 192


def adapted(engine: Engine, name: str, number: int, path: Path | str, keep: bool = False) -> Reply:
    """Run TEXT with an adapter. Without `keep` vLLM's own cache is emptied before."""
    engine.settle()
    if not keep:
        engine.reset_native()
    reply = engine.run([TEXT], lora_request=LoRARequest(name, number, str(path)))[0]
    engine.settle()
    return reply


def same(first: Reply, second: Reply) -> bool:
    return (first.tokens, first.logprobs) == (second.tokens, second.logprobs)


def test_adapters_with_a_store(llama: str, tmp_path: Path) -> None:
    """One store, two engines. In the second one adapter is as it was, and the other was trained anew in place."""
    options = {"remote": f"file://{tmp_path}/values", "persist": "all"}
    a, b, c = (write_adapter(tmp_path / name, seed) for seed, name in enumerate("abc"))
    with Engine(llama, kvkern_options=options, **OPTIONS) as engine:
        base = engine.one(TEXT)
        first = adapted(engine, "a", 1, a)
        assert (base.cached_tokens, first.cached_tokens) == (0, 0)
        native = adapted(engine, "a", 1, a, keep=True)
        hit = adapted(engine, "a", 1, a)
        assert hit.cached_tokens == native.cached_tokens == CACHED
        assert same(hit, native)
        assert same(hit, first)
        other = adapted(engine, "b", 2, b)
        assert other.cached_tokens == 0
        assert len({base.tokens, first.tokens, other.tokens}) == 3
        engine.reset_native()
        again = engine.one(TEXT)
        assert again.cached_tokens == CACHED
        assert same(again, base)

        parts, slots = engine.dram._arena.parts(0), list(engine.dram._index.values())
        for slot in slots:
            parts[slot, 99] ^= 1
        computed = adapted(engine, "a", 1, a)
        assert same(computed, first)
        assert engine.cache.counters.bad_chunks >= 1
        assert same(adapted(engine, "b", 2, b), other)
        assert adapted(engine, "a", 1, a).cached_tokens == CACHED

        # The files change while the engine holds the old content: its KV is of the old content, and is named so.
        write_adapter(tmp_path / "b", 77)
        old = adapted(engine, "b", 2, b)
        assert old.cached_tokens == CACHED
        assert same(old, other)
        engine.settle()
        eventually(lambda: engine.cache.counters.remote_written_chunks >= 18, "the write")
        truth_of_b = adapted(engine, "c", 3, write_adapter(Path(c), 77))
    with Engine(llama, kvkern_options=options, **OPTIONS) as engine:
        kept = adapted(engine, "a", 1, a)
        assert kept.cached_tokens == CACHED  # the first request of the engine: no worker had the adapter yet
        assert same(kept, first)
        retrained = adapted(engine, "b", 2, b)
        assert retrained.cached_tokens == 0
        assert same(retrained, truth_of_b)
        assert not same(retrained, other)
        assert same(adapted(engine, "b", 2, b), retrained)
        assert adapted(engine, "b", 2, b).cached_tokens == CACHED
        engine.settle()
        assert engine.accounted()


def test_an_adapter_changes_in_a_running_engine(llama: str, tmp_path: Path) -> None:
    """Under one name and path: reloaded in place, removed and loaded again, and loaded under another number."""
    path = tmp_path / "a"
    truth = {}
    with Engine(llama, **OPTIONS) as engine:
        core = engine.llm.llm_engine
        for seed in range(4):  # the truth: names that nothing was cached under
            truth[seed] = adapted(engine, f"t{seed}", 10 + seed, write_adapter(tmp_path / f"t{seed}", seed))
        assert len({reply.tokens for reply in truth.values()}) == 4

        def checked(seed: int, number: int) -> None:
            """The stale blocks of vLLM's own cache reach nobody through kvkern, and the new content is cached."""
            stored = engine.cache.counters.stored_chunks
            adapted(engine, "a", number, path, keep=True)  # vLLM's own cache still holds the old content
            engine.settle()
            assert engine.cache.counters.stored_chunks == stored or seed == 0
            assert same(adapted(engine, "a", number, path), truth[seed])
            hit = adapted(engine, "a", number, path)
            assert hit.cached_tokens == CACHED
            assert same(hit, truth[seed])
            adapted(engine, "a", number, path, keep=True)

        write_adapter(path, 0)
        engine.reset_native()
        checked(0, 1)
        write_adapter(path, 1)
        assert core.add_lora(LoRARequest("a", 1, str(path), load_inplace=True))
        checked(1, 1)
        write_adapter(path, 2)
        assert core.remove_lora(1)
        checked(2, 1)
        write_adapter(path, 3)
        checked(3, 2)

        reload = LoRARequest("a", 2, str(path), load_inplace=True)  # the adapter is read in every step
        write_adapter(path, 1)
        engine.reset_native()
        assert same(engine.run([TEXT], lora_request=reload)[0], truth[1])
        engine.reset_native()
        hit = engine.run([TEXT], lora_request=reload)[0]
        assert hit.cached_tokens == CACHED
        assert same(hit, truth[1])
        engine.settle()
        assert engine.accounted()


def test_adapters_on_a_daemon_with_two_ranks(llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    path = write_adapter(tmp_path / "a", 1)
    daemon = Daemon(tmp_path, "64MiB").start()
    try:
        options = {"tensor_parallel_size": 2, "kvkern_options": {"socket": str(daemon.socket)}} | OPTIONS
        with Engine(llama, **options) as engine:
            first = adapted(engine, "a", 1, path)
            native = adapted(engine, "a", 1, path, keep=True)
            hit = adapted(engine, "a", 1, path)
            assert hit.cached_tokens == native.cached_tokens == CACHED
            assert same(hit, native)
        with Engine(llama, **options) as engine:
            hit = adapted(engine, "a", 1, path)
            assert hit.cached_tokens == CACHED
            assert same(hit, first)
            write_adapter(tmp_path / "a", 2)
            assert engine.llm.llm_engine.remove_lora(1)
            changed = adapted(engine, "a", 1, path)
            assert changed.cached_tokens == 0
            assert changed.tokens != first.tokens
    finally:
        daemon.close()
