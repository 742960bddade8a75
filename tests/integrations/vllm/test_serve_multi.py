"""`vllm serve` with kvkern inside MultiConnector, behind vLLM's ExampleConnector, and with a Redis that freezes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integrations.vllm.engine import prompt
from tests.integrations.vllm.server import Server, build_served_model, transfer_config
from tests.remote.required_servers import need
from tests.remote.stores.redis.servers import RedisServer, redis_server

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.first, pytest.mark.timeout(900)]
PASSWORD = "s3cret-of-the-store"


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    need("redis", program="redis-server", module="redis")
    with redis_server(tmp_path_factory.mktemp("redis"), "--requirepass", PASSWORD) as running:
        yield running


@pytest.fixture(scope="module")
def example_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ExampleConnector keeps prompts."""
    return tmp_path_factory.mktemp("example")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, redis: RedisServer, example_folder: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    remote = f"redis://127.0.0.1:{redis.port}/0?password_env=STORE_PASSWORD"
    example = {
        "kv_connector": "ExampleConnector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(example_folder)},
    }  # fmt: skip
    outer = {
        "kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": [example, transfer_config(capacity="64MiB", remote=remote, persist="all")]},
    }  # fmt: skip
    # ExampleConnector keeps a prompt cut off if it is computed in several steps, and a load of it ends the engine
    whole = ("--max-num-batched-tokens", "1024")
    running = Server(build_served_model(folder / "model"), outer, folder / "log", *whole, STORE_PASSWORD=PASSWORD)
    with running:
        yield running


@pytest.fixture(autouse=True)
def _fresh(server: Server, example_folder: Path) -> None:
    server.reset(external=True)
    forget(example_folder)


def forget(folder: Path) -> None:
    """Delete all that ExampleConnector holds."""
    for path in folder.iterdir():
        shutil.rmtree(path)


def test_kvkern_serves_what_the_other_connector_lacks(server: Server, example_folder: Path) -> None:
    """Its statistics come through a front end that knows connectors by name alone."""
    text = prompt(300, 1)
    computed = server.one(text)
    server.reset()
    forget(example_folder)
    hits = server.counter("kvkern:hit_chunks")
    hit = server.one(text)
    assert hit.cached_tokens == 288
    assert (hit.tokens, hit.logprobs) == (computed.tokens, computed.logprobs)
    assert server.counter("kvkern:hit_chunks") == hits + 9


def test_what_the_other_connector_loads_is_stored_under_its_own_tokens(server: Server, example_folder: Path) -> None:
    """ExampleConnector gives a prompt's blocks, and kvkern, which lost them, stores them: later kvkern alone gives them."""
    text, hits = prompt(310, 2), server.counter("kvkern:hit_chunks")
    computed = server.one(text)
    server.reset(external=True)
    loaded = server.one(text)
    assert loaded.cached_tokens == 288
    assert server.counter("kvkern:hit_chunks") == hits  # it came from ExampleConnector
    assert (loaded.tokens, loaded.logprobs) == (computed.tokens, computed.logprobs)
    server.reset()
    forget(example_folder)
    hit = server.one(text)
    assert hit.cached_tokens == 288
    assert (hit.tokens, hit.logprobs) == (computed.tokens, computed.logprobs)
    assert server.counter("kvkern:hit_chunks") == hits + 9


def test_flipped_bytes_are_misses_and_no_request_fails(server: Server, example_folder: Path) -> None:
    text = prompt(300, 4)
    computed, bad = server.one(text), server.counter("kvkern:bad_chunks")
    server.reset()
    forget(example_folder)
    assert server.flip_bytes() >= 9
    again = server.one(text)
    assert again.cached_tokens == 0
    assert again.tokens == computed.tokens
    assert server.counter("kvkern:bad_chunks") > bad


def test_a_frozen_store_delays_no_reply_and_not_the_end(
    server: Server, redis: RedisServer, example_folder: Path
) -> None:
    """The last test of this file: it ends the server, while chunks are being written to the store."""
    assert PASSWORD not in server.log
    redis.stop()
    try:
        replies = [server.one(prompt(700, seed)) for seed in range(10, 14)]
        assert len(replies) == 4
        shared = server.shared_memory()
        begin = time.monotonic()
        server.stop(seconds=60)
        assert time.monotonic() - begin < 10, server.log[-4000:]
        assert not [path for path in shared if path.exists()]
    finally:
        redis.go_on()
