"""`vllm serve` as README and docs start it, with requests of the official client: hits, resets, broken bytes, statistics."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvkern.integrations.vllm.metric_definitions import engine_metrics
from tests.integrations.vllm.engine import prompt
from tests.integrations.vllm.server import Server, build_served_model, transfer_config
from tests.remote.required_servers import free_port

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]
SECRET = "s3cret-of-the-store"
PARAMS = ["x", "", [1], [], 7, 0, True, 1.5]  # what a client may put where an object belongs


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server: an embedded cache, a store that does not answer, KV events and statistics."""
    folder = tmp_path_factory.mktemp("serve")
    running = Server(
        build_served_model(folder / "model"),
        transfer_config(capacity="64MiB", remote=f"redis://me:{SECRET}@127.0.0.1:1/0", published_metrics=True),
        folder / "log",
        "--kv-events-config",
        json.dumps({"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"tcp://127.0.0.1:{free_port()}"}),
    )
    with running:
        yield running


@pytest.fixture(autouse=True)
def _fresh(server: Server) -> None:
    server.reset(external=True)


def test_a_hit_equals_a_native_hit_and_a_computed_prompt(server: Server) -> None:
    text = prompt(700, 1)
    computed, native = server.one(text), server.one(text)
    server.reset()
    hit = server.one(text)
    assert (computed.cached_tokens, native.cached_tokens, hit.cached_tokens) == (0, 672, 672)
    assert hit.tokens == native.tokens == computed.tokens
    assert hit.logprobs == native.logprobs == computed.logprobs  # float32: bit for bit


def test_streamed_and_chat_replies_hit(server: Server) -> None:
    client, words = server.client(), " ".join(f"t{i}" for i in prompt(300, 2))
    chat = {"messages": [{"role": "user", "content": words}], "temperature": 0, "max_tokens": 8, "model": server.model}
    replies = []
    for _ in range(2):
        stream = client.completions.create(model=server.model, prompt=words, max_tokens=8, temperature=0, stream=True)
        answer = client.chat.completions.create(**chat)
        replies.append(
            ("".join(part.choices[0].text for part in stream if part.choices), answer.choices[0].message.content)
        )
        server.reset()
    assert replies[0] == replies[1]
    assert server.counter("kvkern:hit_chunks") > 0


def test_a_plain_reset_keeps_kvkerns_chunks_and_an_external_one_drops_them(server: Server) -> None:
    text = prompt(300, 3)
    server.one(text)
    server.reset()
    assert server.one(text).cached_tokens == 288
    server.reset(external=True)
    assert server.one(text).cached_tokens == 0


def test_flipped_bytes_are_misses(server: Server) -> None:
    text = prompt(300, 4)
    computed, bad = server.one(text), server.counter("kvkern:bad_chunks")
    server.reset()
    assert server.flip_bytes() >= 9
    again = server.one(text)
    assert again.cached_tokens == 0
    assert (again.tokens, again.logprobs) == (computed.tokens, computed.logprobs)
    assert server.counter("kvkern:bad_chunks") > bad


@pytest.mark.parametrize(
    ("tiers", "cached"),
    [([], 0), ([{"medium": "STORAGE"}], 0), ([{"locality": "REMOTE"}], 0), ([{"medium": "CPU"}], 288), ("x", 288)],
)
def test_a_request_loads_from_the_tiers_that_it_names(server: Server, tiers: Any, cached: int) -> None:
    text = prompt(300, 5)
    computed = server.one(text)
    server.reset()
    reply = server.one(text, kv_transfer_params={"kv_load_tiers": tiers})
    assert reply.cached_tokens == cached
    assert reply.tokens == computed.tokens


def test_metrics_are_those_of_the_catalogue_and_count_a_load(server: Server) -> None:
    text = prompt(300, 7)

    def total(name: str, *labels: str) -> float:
        found = [v for series, v in server.metrics().items() if series.partition("{")[0] == name]
        of = [
            v
            for series, v in server.metrics().items()
            if series.startswith(name + "{") and all(x in series for x in labels)
        ]
        assert found, name
        return sum(of)

    watched = (
        ("kvkern:lookup_tokens_total", 'tier="vllm"'), ("kvkern:hit_tokens_total", 'tier="dram"'),
        ("kvkern:loaded_tokens_total",), ("kvkern:load_seconds_count",), ("kvkern:load_bytes_per_second_count",),
        ("kvkern:requests_total", 'loaded="yes"'), ("kvkern:first_token_seconds_count", 'loaded="yes"'),
        ("kvkern:not_loaded_requests_total", 'reason="store_failed"'), ("kvkern:stored_tokens_total",),
        ("vllm:cache_service_time_load_seconds_count",),
    )  # fmt: skip
    server.one(text)
    server.reset()
    before = [total(*series) for series in watched]
    assert server.one(text).cached_tokens == 288
    for _ in range(100):  # the front end hears of a load in a later step
        grown = [total(*series) - old for series, old in zip(watched, before, strict=True)]
        if grown[4] and grown[6]:
            break
        server.one(prompt(40, 8))
    assert grown[1] == grown[2] == 288
    assert grown[0] >= 300
    assert grown[3] == grown[4] == grown[5] == grown[6] == grown[9] == 1
    known = {metric.vllm_name: metric for metric in engine_metrics(published=True)}
    text_now = server.metrics_text()
    families = {f.name: f for f in text_string_to_metric_families(text_now)}
    ours = {n for n in families if n.startswith(("kvkern:", "vllm:cache_service_")) and not n.endswith("_created")}
    assert ours == set(known)
    assert all(families[name].type == metric.kind.value for name, metric in known.items())


def test_what_clients_send_does_not_end_the_engine(server: Server) -> None:
    """vLLM's front end answers some of these with an error. The engine serves on, and hits."""
    text = prompt(300, 6)
    computed = server.one(text)
    for params in PARAMS:
        body = {"model": server.model, "prompt": text, "max_tokens": 1}
        server.post("/v1/completions", body | {"vllm_xargs": {"kv_transfer_params": params}})
        server.post("/v1/completions", body | {"kv_transfer_params": params})
    for params in (
        {"kvkern": []}, {"kvkern": {"session": [], "stop": 5, "x": None}}, {"max_load_tokens": -1}, {"max_load_tokens": "x"},
        {"max_offload_tokens": 1.5}, {"kv_load_tiers": [5, {"medium": 5}, {"medium": None}]}, {"do_remote_prefill": True},
        {"remote_block_ids": [1], "remote_engine_id": "x"},
    ):  # fmt: skip
        assert server.one(text, kv_transfer_params=params).tokens == computed.tokens, params
    server.reset()
    assert server.one(text).cached_tokens == 288


def test_statistics_grow_and_no_series_appears_twice_while_requests_are_preempted(server: Server) -> None:
    """Scraped ten times a second. Eight requests need more blocks than there are, and some load from a broken cache."""
    stop, samples = threading.Event(), []

    def scrape() -> None:
        while not stop.wait(0.1):
            samples.append(server.metrics())

    texts = [prompt(300, seed) for seed in range(20, 28)]
    for text in texts[:4]:
        server.one(text)
    server.reset()
    server.flip_bytes()
    preempted = server.counter("vllm:num_preemptions")
    with ThreadPoolExecutor(9) as threads:
        scraper = threads.submit(scrape)
        try:
            for number in range(50):
                list(threads.map(lambda text: server.one(text, tokens=200), texts))
                server.reset()
                if number and len(samples) > 20 and server.counter("vllm:num_preemptions") > preempted:
                    break
        finally:
            stop.set()
        scraper.result()
    assert server.counter("vllm:num_preemptions") > preempted
    assert len(samples) > 20
    for earlier, later in pairwise(samples):
        for series, value in earlier.items():
            name = series.partition("{")[0]
            if name.endswith(("_total", "_count", "_sum", "_bucket")):
                assert later[series] >= value, series
    last = samples[-1]
    assert any(series.startswith("kvkern:hit_chunks_total") for series in last)
    assert server.counter("vllm:external_prefix_cache_hits") <= server.counter("vllm:external_prefix_cache_queries")
    assert server.counter("kvkern:hit_chunks") <= server.counter("kvkern:lookup_chunks")


def test_the_password_of_the_store_is_not_in_the_log(server: Server) -> None:
    assert SECRET not in server.log
    assert "redis://me:***@127.0.0.1:1/0" in server.log  # vLLM prints its options
    assert "password_file=PATH" in server.log


def test_the_server_ends_at_once_and_leaves_nothing(server: Server) -> None:
    """The last test of this file: it ends the server."""
    shared = server.shared_memory()
    assert any("kvkern" in path.name for path in shared)
    assert server.stop(seconds=30) < 10
    assert not [path for path in shared if path.exists()]
