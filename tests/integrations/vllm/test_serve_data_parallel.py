"""`vllm serve` with two data parallel ranks on one daemon: each loads what the other has computed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integrations.vllm.engine import prompt
from tests.integrations.vllm.server import Server, build_served_model, transfer_config
from tests.node.conftest import Daemon, eventually

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.first, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    running = Daemon(tmp_path_factory.mktemp("arena"), "64MiB").start()
    yield running
    running.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, daemon: Daemon) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    transfer = transfer_config(socket=str(daemon.socket))
    running = Server(build_served_model(folder / "model"), transfer, folder / "log", "--data-parallel-size", "2")
    with running:
        yield running


def stored(daemon: Daemon) -> int:
    return int(daemon.stat()["stored_chunks"])


def test_ranks_share_chunks(server: Server, daemon: Daemon) -> None:
    text, before = prompt(300, 1), stored(daemon)
    computed = server.one(text, rank=0)
    eventually(lambda: stored(daemon) == before + 9, "the store, which ends after the reply")
    native = server.one(text, rank=0)
    hit = server.one(text, rank=1)
    assert (computed.cached_tokens, native.cached_tokens, hit.cached_tokens) == (0, 288, 288)
    assert (hit.tokens, hit.logprobs) == (native.tokens, native.logprobs) == (computed.tokens, computed.logprobs)
    served = {
        series: value for series, value in server.metrics().items() if series.startswith("kvkern:hit_chunks_total")
    }
    assert [value for series, value in served.items() if 'engine="1"' in series] == [9]
    assert sum(served.values()) == 9
    back = prompt(300, 3)
    computed = server.one(back, rank=1)
    eventually(lambda: stored(daemon) == before + 18, "the store")
    hit = server.one(back, rank=0)
    assert (computed.cached_tokens, hit.cached_tokens) == (0, 288)
    assert (hit.tokens, hit.logprobs) == (computed.tokens, computed.logprobs)


def test_flipped_bytes_are_misses_in_every_rank(server: Server) -> None:
    text = prompt(300, 2)
    computed = server.one(text, rank=0)
    assert server.flip_bytes() >= 9
    again = server.one(text, rank=1)
    assert again.cached_tokens == 0
    assert (again.tokens, again.logprobs) == (computed.tokens, computed.logprobs)
