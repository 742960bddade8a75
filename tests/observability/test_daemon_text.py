"""A daemon's metrics: every sample is of the catalogue and the other way round, and what engines do shows."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from kvkern.node.client.cache_client import NodeClient
from kvkern.node.daemon.server import NodeConfig, Server
from kvkern.observability.catalogue import CATALOGUE, Kind
from kvkern.observability.exposition import daemon_text
from kvkern.policy.base import Use
from kvkern.tiers.base import ChunkShape
from tests.node.conftest import eventually, served, store, write_payload
from tests.node.conftest import folder as folder
from tests.node.peer import GEOMETRY, PATIENCE_S
from tests.support import NAMESPACE, chain_keys

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(server: Server) -> Samples:
    """Return every sample by name and labels. Fails if the text is not valid, or if a sample appears twice."""
    found: Samples = {}
    for family in text_string_to_metric_families(daemon_text(server).decode()):
        for sample in family.samples:
            at = (sample.name, tuple(sorted(sample.labels.items())))
            assert at not in found, at
            found[at] = sample.value
    return found


def value(server: Server, name: str, **labels: str) -> float:
    """Return the sum of the series with these labels."""
    wanted = set(labels.items())
    return sum(v for (n, own), v in samples(server).items() if n == f"kvkern_{name}" and wanted <= set(own))


def config(folder: Path) -> NodeConfig:
    return NodeConfig(folder / "s", 1 << 20, arena_dir=folder)


def connect(folder: Path) -> NodeClient:
    return NodeClient.open(folder / "s", "e", GEOMETRY, timeout_s=PATIENCE_S, patience_s=PATIENCE_S)


def test_every_family_is_of_the_catalogue_and_every_metric_is_there(folder: Path) -> None:
    with served(config(folder)) as server:
        text = daemon_text(server).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    wanted = {f"kvkern_{metric.name}": metric for metric in CATALOGUE if metric.daemon is not None}
    assert set(families) == set(wanted)
    assert "kvkern_prefill_seconds_avoided" not in families  # it does not know which of the chunks given are used
    for name, metric in wanted.items():
        assert families[name].type == metric.kind.value
        assert families[name].documentation == metric.help
        for sample in families[name].samples:
            assert set(sample.labels) - {"le"} == set(metric.daemon or ())
            if metric.kind is Kind.COUNTER:
                assert sample.name == metric.daemon_name


def test_what_engines_do_shows_by_model_and_tier(folder: Path) -> None:
    chain = chain_keys("a", 4)
    with served(config(folder)) as server:
        client = connect(folder)
        client.describe_namespace(NAMESPACE, {"model": "Llama", "chunk_tokens": "16", "salt": "0123456789abcdef"})
        client.note_prefill(100.0)
        assert store(client, chain) == 4
        for _ in range(3):  # a request that waits asks again, and counts once
            lease = client.acquire([*chain, *chain_keys("b", 2)], use=Use(request=1, namespace=NAMESPACE))
            client.release(lease)
        assert len(lease.keys) == 4
        expected = {"lookup": 6, "hit": 4, "stored": 4}
        for event, chunks in expected.items():
            labels = {"tier": "dram", "model": "Llama"}
            assert value(server, f"{event}_chunks_total", **labels) == chunks
            assert value(server, f"{event}_tokens_total", **labels) == 16 * chunks
        assert value(server, "not_loaded_chunks_total", reason="not_found") == 2
        assert value(server, "prefill_tokens_per_second", model="Llama") == 100
        assert value(server, "acquire_seconds_count") == 3
        assert value(server, "publish_seconds_count") == 1
        assert value(server, "arena_slots", state="ready") == 4
        tenant = {"model": "Llama", "tenant": "0123456789abcdef"}
        eventually(lambda: value(server, "tenant_chunks", **tenant) == 4)
        client.close()


def test_tokens_count_once_however_many_kv_groups_hold_them(folder: Path) -> None:
    first, second = chain_keys("a", 10), chain_keys("b", 10)
    labels = {"tier": "dram", "model": "Llama"}
    with served(config(folder)) as server:
        client = connect(folder)
        client.describe_namespace(NAMESPACE, {"model": "Llama", "chunk_tokens": "16"})
        for group, chain in enumerate((first, second)):
            reservation = client.reserve(chain, chain, ChunkShape(NAMESPACE, group, 16))
            write_payload(client.arena, reservation)
            assert client.commit(reservation) == 10
        for _ in range(2):  # a request that waits asks again
            for prefix, chain in ((True, first), (False, second)):
                client.release(client.acquire(chain, prefix, use=Use(request=1, namespace=NAMESPACE)))
        for event in ("lookup", "hit", "stored"):
            assert value(server, f"{event}_chunks_total", **labels) == 20
            assert value(server, f"{event}_tokens_total", **labels) == 160
        client.close()


def test_labels_are_bounded(folder: Path) -> None:
    with served(config(folder)) as server:
        client = connect(folder)
        for number in range(100):
            fields = {"model": f"m{number}", "chunk_tokens": "16", "salt": f"{number:016x}"}
            client.describe_namespace(number.to_bytes(32, "little"), fields)
        eventually(lambda: value(server, "namespaces") == 100)
        client.acquire(chain_keys("a", 2), use=Use(request=1, namespace=(99).to_bytes(32, "little")))
        eventually(lambda: value(server, "lookup_chunks_total", model="other") == 2)  # nobody waits for a sure miss
        found = samples(server)
        for label in ("model", "tenant"):
            assert len({dict(labels)[label] for _, labels in found if label in dict(labels)}) <= 33
        client.close()
