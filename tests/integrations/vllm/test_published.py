"""The published deployment by its command and variables alone: two servers on one daemon, and a server before its daemon."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.integrations.vllm.engine import prompt
from tests.integrations.vllm.published import ALIAS, VARIABLES, PublishedServer
from tests.integrations.vllm.server import build_served_model
from tests.node.conftest import Daemon, eventually
from tests.remote.required_servers import free_port

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.first, pytest.mark.timeout(900)]
WAIT_S = 120


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of the tests' Llama, whose weights are float32."""
    return build_served_model(tmp_path_factory.mktemp("published") / "model")


@contextmanager
def daemon(arena_dir: Path, *options: str) -> Iterator[Daemon]:
    """A daemon that is not started yet. It is ended with the context."""
    made = Daemon(arena_dir, "64MiB", options)
    try:
        yield made
    finally:
        made.close()


def total(server: PublishedServer, name: str) -> float:
    """Return the sum of a counter's series; 0 before its first count."""
    return sum(value for series, value in server.metrics().items() if re.match(rf"{name}_total\b", series))


def text_of(port: int, path: str = "/metrics") -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return str(answer.read().decode())


def lines_with(server: PublishedServer, words: str) -> list[str]:
    return [line for line in server.log.splitlines() if words in line]


def test_two_servers_share_by_variables_alone(model: str, tmp_path: Path) -> None:
    """The second loads what the first has computed. The log names what every variable does. /metrics is on a second port."""
    rpc, ports = free_port(), (free_port(), free_port())
    words = " ".join(f"t{i}" for i in prompt(300, 1))
    with daemon(tmp_path, "--rpc", f"127.0.0.1:{rpc}") as node:
        node.start()
        env = VARIABLES | {
            "AIBRIX_LLM_KV_CACHE_SOCKET": str(node.socket), "AIBRIX_LLM_KV_CACHE_RPC_ENDPOINT": f"127.0.0.1:{rpc}",
        }  # fmt: skip
        for number, port in enumerate(ports):
            with PublishedServer(model, tmp_path / f"log{number}", **env, KVKERN_METRICS_PORT=str(port)) as server:
                answer = server.client().chat.completions.create(
                    messages=[{"role": "user", "content": words}], temperature=0, max_tokens=8, model=ALIAS
                )
                assert answer.usage.completion_tokens > 0
                counter = ("kvkern:stored_chunks", "kvkern:hit_chunks")[number]

                def counted(server: PublishedServer = server, counter: str = counter) -> bool:
                    server.one(prompt(40, 2))  # what a step counts is told in a later one
                    return total(server, counter) > 0

                eventually(counted, f"a count of {counter}", WAIT_S)
                assert number or not total(server, "kvkern:hit_chunks")
                scraped = text_of(port)
                assert "kvkern:lookup_chunks_total" in scraped
                assert "vllm:num_requests_running" in scraped
                with pytest.raises(urllib.error.HTTPError, match="404"):
                    text_of(port, "/v1/models")
                for variable in ("SOCKET", "CHUNK_SIZE", "KV_CACHE_NS", "RPC_ENDPOINT"):
                    assert lines_with(server, f"(AIBRIX_LLM_KV_CACHE_{variable})"), variable
                for variable in ("VINEYARD_CACHE_CPU_MEM_LIMIT_GB=10", "VINEYARD_CACHE_ENABLE_ASYNC_UPDATE=1"):
                    assert len(lines_with(server, f"{variable} has no effect: ")) == 1, variable
                assert not lines_with(server, "kvkern: rpc_endpoint "), "it is the same daemon"


def test_a_server_whose_daemon_comes_later(model: str, tmp_path: Path) -> None:
    """It waits, serves without a cache, and hits when the daemon is there. The RPC endpoint is another daemon's."""
    other, rpc = tmp_path / "other", free_port()
    other.mkdir()
    text = prompt(300, 3)
    with (
        daemon(tmp_path) as node,
        daemon(other, "--rpc", f"127.0.0.1:{rpc}", "--name", "other") as elsewhere,
    ):
        elsewhere.start()
        env = VARIABLES | {
            "AIBRIX_LLM_KV_CACHE_SOCKET": str(node.socket), "AIBRIX_LLM_KV_CACHE_RPC_ENDPOINT": f"127.0.0.1:{rpc}",
            "KVKERN_CONNECT_S": "11", "KVKERN_METRICS_PORT": str(free_port()), "VLLM_SERVER_DEV_MODE": "1",
        }  # fmt: skip
        with PublishedServer(model, tmp_path / "log", **env) as server:
            assert lines_with(server, f"no daemon answers on {node.socket} yet")
            assert lines_with(server, "The engine goes on without a cache")
            # in bfloat16, in which a hit and a computed prompt may round differently
            assert len(server.one(text).tokens) == 4
            assert total(server, "kvkern:stored_chunks") == 0
            node.start()
            eventually(
                lambda: lines_with(server, "this worker uses the daemon's cache"), "a line of the worker", WAIT_S
            )

            def hit() -> bool:
                assert len(server.one(text).tokens) == 4
                server.reset()
                return total(server, "kvkern:hit_chunks") > 0

            eventually(hit, "a hit after the daemon came", WAIT_S)
            assert lines_with(server, f"kvkern: rpc_endpoint 127.0.0.1:{rpc} is the daemon ")
            node.stop()
            assert len(server.one(text).tokens) == 4
            assert server.process.poll() is None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"AIBRIX_LLM_KV_CACHE_CHUNK_SIZE": "16"}, ["KV_CACHE_CHUNK_SIZE is 16", "block size of 128", "multiples of 32"]),
        ({"AIBRIX_LLM_KV_CACHE_RPC_ENDPOINT": "nowhere"}, ["rpc_endpoint is 'nowhere'", "AIBRIX_LLM_KV_CACHE_RPC_ENDPOINT"]),
        ({"KVKERN_SOKCET": "/s"}, ["unknown variable KVKERN_SOKCET", "KVKERN_SOCKET"]),
        ({"AIBRIX_LLM_KV_CACHE_SOCKET": ""}, ["do not say where the cache is", "KVKERN_SOCKET"]),
    ],
    ids=["chunk", "endpoint", "unknown", "nowhere"],
)  # fmt: skip
def test_a_variable_that_cannot_be_honoured_ends_the_start(
    model: str, tmp_path: Path, changed: dict[str, str], words: list[str]
) -> None:
    server = PublishedServer(
        model, tmp_path / "log", **VARIABLES | {"AIBRIX_LLM_KV_CACHE_SOCKET": str(tmp_path / "s")} | changed
    )
    assert server.process.wait(300) != 0
    line = lines_with(server, "ConfigError")[-1]
    assert all(word in line for word in words), line
