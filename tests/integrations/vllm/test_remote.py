"""Real engines that share only a remote store: one computes, another loads the same bits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kvkern.errors import ConfigError
from tests.integrations.vllm.engine import Engine, prompt
from tests.node.conftest import eventually

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


def test_an_engine_loads_what_another_one_has_written(llama: str, tmp_path: Path) -> None:
    options = {"remote": f"file://{tmp_path}/values", "persist": "all"}
    texts = [prompt(700, 401), prompt(300, 402)]
    with Engine(llama, kvkern_options=options) as first:
        computed = [first.one(text) for text in texts]
        first.settle()
        eventually(lambda: first.cache.counters.remote_written_chunks >= 21 + 9, "the write")
    with Engine(llama, kvkern_options=options) as second:
        loaded = [second.one(text) for text in texts]
        assert [reply.cached_tokens for reply in loaded] == [672, 288]
        assert [reply.tokens for reply in loaded] == [reply.tokens for reply in computed]
        counters = second.cache.counters
        assert counters.remote_hit_chunks == 21 + 9
        native = [second.one(text) for text in texts]
        assert [reply.logprobs for reply in native] == [reply.logprobs for reply in loaded]
        assert [reply.logprobs for reply in native] == [reply.logprobs for reply in computed]
        second.settle()
        assert second.accounted()
        other = prompt(700, 403)
        reply = second.one(other)  # a store that goes away costs nothing but hits
        second.settle()
        eventually(lambda: second.cache.counters.remote_written_chunks >= 21, "the write")  # else it goes on meanwhile
        shutil.rmtree(tmp_path / "values")
        (tmp_path / "values").write_bytes(b"")
        second.reset_native()
        assert second.one(other).tokens == reply.tokens
        assert second.one(prompt(700, 404)).cached_tokens == 0


def test_a_spoiled_value_is_computed(llama: str, tmp_path: Path) -> None:
    options = {"remote": f"file://{tmp_path}/values", "persist": "all"}
    text = prompt(700, 405)
    with Engine(llama, kvkern_options=options) as engine:
        computed = engine.one(text)
        engine.settle()
        eventually(lambda: engine.cache.counters.remote_written_chunks >= 21, "the write")
        values = [path for path in (tmp_path / "values").rglob("*") if path.is_file() and path.stat().st_size > 8192]
        assert len(values) >= 21
        for path in values:
            with path.open("r+b") as file:
                file.seek(9000)
                (byte,) = file.read(1)
                file.seek(9000)
                file.write(bytes([byte ^ 1]))
        engine.reset_everything()  # DRAM is empty, and this engine's names are its own from now on
        assert engine.one(text).tokens == computed.tokens
    with Engine(llama, kvkern_options=options) as other:
        again = other.one(text)
        assert (again.tokens, again.logprobs) == (computed.tokens, computed.logprobs)
        assert again.cached_tokens == 0
        assert other.cache.counters.remote_bad_chunks >= 1


def test_what_is_refused() -> None:
    from kvkern.integrations.vllm.options import parse_options

    for options, message in (
        ({"capacity": "1GiB", "persist": "all"}, "persist is 'all', but there is no remote"),
        ({"socket": "/run/kvkern.sock", "remote": "file:///x"}, "remote and socket .* `kvkern serve --remote`"),
        ({"capacity": "1GiB", "remote": 5}, "remote in .* is of the type int"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_options({"kvkern": options})
