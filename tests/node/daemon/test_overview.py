"""The overview of a daemon: an hour of samples, hot prefixes, advice, and what it says of engines, tenants and settings."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from kvkern.config import RemoteConfig
from kvkern.node import protocol as p
from kvkern.node.client.admin_client import AdminClient
from kvkern.node.client.cache_client import NodeClient
from kvkern.node.daemon.advice import advice
from kvkern.node.daemon.history import COUNTERS, HOUR_S, MAX_SAMPLES, SAMPLE_S, History
from kvkern.node.daemon.hot_prefixes import MAX_PREFIXES, WINDOW_S, HotPrefixes
from kvkern.node.daemon.node_config import NodeConfig
from kvkern.node.daemon.overview import MAX_SHOWN, settings
from kvkern.node.daemon.quotas import Quotas
from kvkern.tiers.base import ChunkShape
from tests.node.conftest import Daemon, MakeClient, eventually, hits, served, store
from tests.node.peer import GEOMETRY, PATIENCE_S
from tests.support import NAMESPACE, chain_keys, key

# -- an hour of samples --------------------------------------------------------------------------------------------------


def test_an_hour_of_samples() -> None:
    history = History(0.0)
    assert not history.due(SAMPLE_S - 1)
    assert history.due(SAMPLE_S)
    history.add(10.0, {"lookup_chunks": 10, "hit_chunks": 5, "stored_chunks": 4, "slots": 10, "free_slots": 6})
    history.add(20.0, {"lookup_chunks": 10, "hit_chunks": 5, "stored_chunks": 4, "slots": 10, "free_slots": 0})
    series = history.series(100, 25.0)
    assert series == {
        "ago_s": [15, 5], "hit_ratio": [0.5, None], "given": [50, 0], "stored": [40, 0], "remote_read": [0, 0],
        "remote_written": [0, 0], "used": [0.4, 1.0],
    }  # fmt: skip
    assert history.grown({"lookup_chunks": 12, "hit_chunks": 5})["lookup_chunks"] == 12


def test_samples_are_forgotten_after_an_hour() -> None:
    history = History(-SAMPLE_S)
    for number in range(3 * MAX_SAMPLES):
        history.add(number * SAMPLE_S, {"hit_chunks": number, "lookup_chunks": number})
    now_s = (3 * MAX_SAMPLES - 1) * SAMPLE_S
    series = history.series(1, now_s)
    assert {len(values) for values in series.values()} == {MAX_SAMPLES - 1}
    assert max(series["ago_s"]) <= HOUR_S
    assert history.grown({"hit_chunks": 3 * MAX_SAMPLES})["hit_chunks"] == MAX_SAMPLES


# -- hot prefixes --------------------------------------------------------------------------------------------------------


def test_hot_prefixes() -> None:
    hot = HotPrefixes()
    a, b = chain_keys("a", 4), chain_keys("b", 9)
    for keys in (a, a[:2], a, b[:1], []):
        hot.note(keys)
    assert hot.hottest(2) == [
        {"key": a[0].hex(), "hits": 3, "chunks": 10, "longest": 4},
        {"key": b[0].hex(), "hits": 1, "chunks": 1, "longest": 1},
    ]
    hot.turn(WINDOW_S)
    hot.note(b[:8])
    assert hot.hottest(1) == [{"key": a[0].hex(), "hits": 3, "chunks": 10, "longest": 4}]
    assert hot.hottest(9)[1] == {"key": b[0].hex(), "hits": 2, "chunks": 9, "longest": 8}
    hot.turn(2 * WINDOW_S)
    assert hot.hottest(9) == [{"key": b[0].hex(), "hits": 1, "chunks": 8, "longest": 8}]
    hot.turn(3 * WINDOW_S)
    hot.turn(4 * WINDOW_S)
    assert hot.hottest(9) == []


def test_hot_prefixes_are_bounded() -> None:
    hot = HotPrefixes()
    for number in range(3 * MAX_PREFIXES):
        hot.note([key(number)])
        hot.note([key("kept")])
    assert len(hot.hottest(10 * MAX_PREFIXES)) == MAX_PREFIXES
    assert hot.hottest(1)[0]["hits"] == 3 * MAX_PREFIXES


# -- advice --------------------------------------------------------------------------------------------------------------

QUIET = {"connections": 1, "slots": 100, "quarantined_slots": 0}


def told(stat: dict[str, Any], hour: dict[str, int], split: list[str] | None = None) -> list[tuple[str, str]]:
    found = advice(QUIET | stat, dict.fromkeys(COUNTERS, 0) | hour, 100, split or [])
    assert all(item.remedy and item.what for item in found)
    return [(item.level, item.what) for item in found]


@pytest.mark.parametrize(("stat", "hour", "level", "words"), [
    ({}, {"bad_chunks": 3}, "error", "3 chunks failed their checksum"),
    ({}, {"faults": 2}, "error", "2 faults of kvkern"),
    ({"remote": "redis", "remote_works": 0}, {"remote_failures": 9}, "error", "remote store redis does not work"),
    ({"remote": "redis", "remote_works": 1}, {"remote_failures": 9}, "warning", "9 calls to the remote store failed"),
    ({}, {"remote_dropped_chunks": 1}, "warning", "1 chunks were not written"),
    ({}, {"dropped_chunks": 4}, "warning", "4 chunks found no free slot"),
    ({"quarantined_slots": 11}, {}, "warning", "11 of 100 slots wait"),
    ({"connections": 91}, {}, "warning", "91 of 100 connections"),
])  # fmt: skip
def test_advice(stat: dict[str, Any], hour: dict[str, int], level: str, words: str) -> None:
    ((found, what),) = told(stat, hour)
    assert found == level
    assert words in what


def test_nothing_to_say() -> None:
    assert (
        told({"remote": "redis", "remote_works": 1, "quarantined_slots": 10, "connections": 90}, {"evicted_chunks": 9})
        == []
    )
    assert told({"slots": 0}, {}) == []


def test_the_worst_comes_first() -> None:
    levels = [
        level for level, _ in told({"connections": 99}, {"dropped_chunks": 1, "bad_chunks": 1, "faults": 1}, ["m"])
    ]
    assert levels == ["error", "error", "warning", "warning", "warning"]


# -- a real daemon -------------------------------------------------------------------------------------------------------


def overview(daemon: Daemon) -> dict[str, Any]:
    (row,) = daemon.ask(p.List(1, p.OVERVIEW, 1))
    found: dict[str, Any] = json.loads(row["overview"])
    return found


def test_before_the_first_engine(daemon: Daemon) -> None:
    found = overview(daemon)
    assert (found["tenants"], found["engines"], found["hot"], found["advice"]) == ([], [], [], [])
    assert found["daemon"]["id"] == daemon.stat()["daemon"]
    assert found["daemon"]["ready"] is True


def test_no_counter_goes_back_while_another_arena_is_made(folder: Path) -> None:
    with served(NodeConfig(folder / "s", 1 << 20, arena_dir=folder)) as server:
        with closing(
            NodeClient.open(folder / "s", "one", GEOMETRY, timeout_s=PATIENCE_S, patience_s=PATIENCE_S)
        ) as client:
            assert store(client, chain_keys("a", 4)) == 4
        server.sessions, sessions = None, server.sessions  # as between two arenas
        found = server.overview.describe()
        server.sessions = sessions
        assert (found["stat"]["stored_chunks"], found["grown"]["stored_chunks"]) == (4, 4)


def test_what_it_says_of_engines_tenants_and_prefixes(daemon: Daemon, make_client: MakeClient) -> None:
    first, second = make_client("one"), make_client("two")
    first.describe_namespace(NAMESPACE, {"model": "llama", "engine_hash": "a"})
    second.describe_namespace(key("other"), {"model": "llama", "engine_hash": "b"})
    chain = chain_keys("a", 5)
    assert store(first, chain) == 5
    assert hits(second, chain) == hits(second, chain[:3]) + 2 == 5
    lease = second.acquire(chain)
    found = eventually(
        lambda: (seen := overview(daemon))["tenants"] and seen["hot"] and seen, "a count of the namespaces"
    )
    (tenant,) = found["tenants"]
    assert (tenant["namespace"], tenant["chunks"], tenant["limit_nbytes"]) == (NAMESPACE.hex(), 5, None)
    assert tenant["fields"] == {"model": "llama", "engine_hash": "a"}
    assert tenant["nbytes"] == 5 * GEOMETRY.slot_nbytes
    eventually(lambda: [row["hits"] for row in overview(daemon)["hot"]] == [3], "three hits")
    assert overview(daemon)["hot"] == [{"key": chain[0].hex(), "hits": 3, "chunks": 13, "longest": 5}]
    rows = {row["engine"]: row for row in overview(daemon)["engines"]}
    assert rows.keys() == {"one", "two"}
    assert rows["two"]["leases"] == 1
    assert overview(daemon)["num_engines"] == 2
    second.release(lease)


def test_models_under_two_hash_identities(daemon: Daemon, make_client: MakeClient) -> None:
    client = make_client("one")
    for number, root in enumerate((NAMESPACE, key("other"))):
        client.describe_namespace(root, {"model": "llama", "engine_hash": str(number)})
    for root in (NAMESPACE, key("other")):
        chain = chain_keys(root, 2)
        reservation = client.reserve(chain, chain, ChunkShape(root, 0, 16))
        client.arena.headers["written"][list(reservation.slots), 0] = reservation.generations
        assert client.commit(reservation) == 2
    eventually(lambda: len(overview(daemon)["tenants"]) == 2, "a count of the namespaces")
    assert [item["what"] for item in overview(daemon)["advice"]] == [
        "Engines cache llama under different hash identities, so they share nothing"
    ]


def test_rows_are_bounded(folder: Path) -> None:
    with served(NodeConfig(folder / "s", 1 << 20, arena_dir=folder, drain_s=0.1)) as server:
        clients = [NodeClient.open(server.config.socket, f"e{n}", GEOMETRY) for n in range(MAX_SHOWN + 5)]
        with AdminClient(server.config.socket) as admin:
            found = json.loads(admin.ask(p.List(1, p.OVERVIEW, 1))[0]["overview"])
        assert (len(found["engines"]), found["num_engines"]) == (MAX_SHOWN, MAX_SHOWN + 5)
        for client in clients:
            with closing(client):
                pass


def test_settings_hold_no_secret(tmp_path: Path) -> None:
    url = "redis://user:pass-word@host.example:6379/0"
    config = NodeConfig(
        tmp_path / "s", 1 << 20, arena_dir=tmp_path, remote=RemoteConfig(url, "all"), quotas=Quotas({"m*": 5}, 7, True)
    )
    shown = settings(config)
    assert "pass-word" not in json.dumps(shown)
    assert "host.example" not in json.dumps(shown)
    assert (shown["remote"], shown["persist"], shown["quotas"], shown["tenant_quota_nbytes"]) == (
        "redis",
        "all",
        {"m*": 5},
        7,
    )
