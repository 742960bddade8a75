"""What the operator meets and must survive: expired tokens, odd answers of pods, spoilt records, faults of its own."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from pathlib import Path
from typing import Any

import httpx
import kr8s.asyncio
import pytest

from kvkern.operator import work_queue
from kvkern.operator.api import Api, ApiError
from kvkern.operator.arenas import _entries
from kvkern.operator.daemons import read_metrics
from kvkern.operator.kinds import POD
from kvkern.operator.merge import LAST_WRITTEN, merge_patch, with_record
from kvkern.operator.webhook.inject import InjectSettings, _looks_like_engine
from kvkern.operator.webhook.pods import Container
from kvkern.operator.work_queue import WorkQueue
from tests.operator.api_server import Options, running_api_server
from tests.operator.conftest import Cluster, own
from tests.operator.test_process import eventually, operator

KVCACHES = "kvcaches.kvkern.io"


def test_a_token_that_a_kubelet_has_replaced(tmp_path: Path) -> None:
    """A pod's token ends after an hour; the file then has another one."""
    with running_api_server() as server:
        for name in ("one", "two"):
            account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": "default"}}
            server.store.create(account)
        kubeconfig = server.kubeconfig_of("default", "one")
        seen: list[str] = []

        async def run() -> None:
            client = await kr8s.asyncio.api(kubeconfig=str(kubeconfig))
            api, send = Api(client), client.call_api

            def expired(method: str, **more: Any) -> Any:
                seen.append(more["headers"]["Authorization"])
                if seen[-1].endswith(":one"):
                    more["headers"] = more["headers"] | {"Authorization": "Bearer nobody's"}
                return send(method, **more)

            client.call_api = expired
            kubeconfig.write_text(server.kubeconfig_of("default", "two").read_text())
            for _ in range(2):
                with pytest.raises(ApiError) as refused:
                    await api.list(POD, "default")
                assert refused.value.status == 403, "known, and without rights"

        asyncio.run(run())
    assert [each.rpartition(":")[2] for each in seen] == ["one", "two", "two"]


def test_a_token_that_stays_wrong_is_an_error(tmp_path: Path) -> None:
    async def refuse(request: httpx.Request) -> httpx.Response:
        return httpx.Response(401, json={"reason": "Unauthorized", "message": "Unauthorized"})

    with running_api_server() as server:

        async def run() -> None:
            client = await kr8s.asyncio.api(kubeconfig=str(server.kubeconfig))
            client._session = httpx.AsyncClient(transport=httpx.MockTransport(refuse), base_url="http://x")
            with pytest.raises(ApiError) as refused:
                await Api(client).groups()
            assert refused.value.status == 401

        asyncio.run(run())


@pytest.mark.parametrize("value", ["+Inf", "-Inf", "NaN", "1e300", "-1"])
def test_figures_that_are_none(value: str) -> None:
    names = ("kvkern_capacity_bytes", "kvkern_slot_bytes", "kvkern_lookup_chunks_total", "kvkern_hit_chunks_total")
    text = "".join(f"# TYPE {name} gauge\n{name} {value}\n" for name in names)
    text += f'# TYPE kvkern_arena_slots gauge\nkvkern_arena_slots{{state="free"}} {value}\n'
    daemon = read_metrics(text)
    assert (daemon.capacity_nbytes, daemon.used_nbytes, daemon.lookups, daemon.hits) == (0, 0, 0, 0)


def test_an_arena_that_keeps_its_size() -> None:
    text = (
        "# TYPE kvkern_capacity_bytes gauge\nkvkern_capacity_bytes 2000\n# TYPE kvkern_slot_bytes gauge\n"
        "kvkern_slot_bytes 10\n# TYPE kvkern_arena_slots gauge\n"
    )
    slots = 'kvkern_arena_slots{{state="free"}} {free}\nkvkern_arena_slots{{state="ready"}} 50\n'
    kept, new = read_metrics(text + slots.format(free=50)), read_metrics(text + slots.format(free=150))
    assert (kept.capacity_nbytes, kept.asked_nbytes) == (1000, 2000)
    assert (new.capacity_nbytes, new.asked_nbytes) == (2000, 2000)


def test_a_spoilt_ledger_names_nothing() -> None:
    """Its keys become parts of paths that are removed."""
    good = json.dumps({"node-0": "2026-01-01T00:00:00Z"})
    data = {"default.cache": good, "nodot": good, "default.": good, ".cache": good, "default...": good, "default.a/b": good,
            "default.deep": "[" * 100_000, "default.text": "x", "default.nodes": json.dumps({"a b": "now"})}  # fmt: skip
    assert _entries({"data": data}) == {"default.cache": {"node-0": "2026-01-01T00:00:00Z"}, "default.nodes": {}}


def test_a_record_that_somebody_has_removed_is_written_again() -> None:
    wanted = {"metadata": {"name": "x"}, "spec": {"a": 1, "b": 2}}
    live = with_record(wanted)
    assert merge_patch(wanted, live) == {}
    del live["metadata"]["annotations"][LAST_WRITTEN]
    patch = merge_patch(wanted, live)
    assert list(patch) == ["metadata"]
    live["metadata"]["annotations"] = patch["metadata"]["annotations"]
    assert merge_patch({"metadata": {"name": "x"}, "spec": {"a": 1}}, live)["spec"] == {"b": None}


def test_a_fault_in_a_pass_is_logged_and_other_keys_go_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(work_queue, "LONGEST_PAUSE_S", 0.01)
    seen: list[str] = []

    async def work(key: str) -> float | None:
        seen.append(key)
        if seen.count("bad") == 1 and key == "bad":
            raise OverflowError("a fault")
        return None

    async def run() -> None:
        queue: WorkQueue[str] = WorkQueue(work)
        for key in ("bad", "good"):
            queue.add(key)
        while seen.count("bad") < 2:
            await asyncio.sleep(0.01)
        await queue.close()

    with caplog.at_level(logging.ERROR, "kvkern"):
        asyncio.run(asyncio.wait_for(run(), 10))
    assert "good" in seen
    assert "a fault" in caplog.text


def test_a_long_image_costs_no_time() -> None:
    container = Container(name="e", image="vllm" * 250_000 + "/")
    assert not _looks_like_engine(container, InjectSettings())  # a regular expression took 25 minutes


def test_figures_cause_no_passes(cluster: Cluster, tmp_path: Path) -> None:
    """What the operator writes itself, and what changes all the time, wakes nobody."""
    log = tmp_path / "log"
    cluster.make(own())
    with operator(cluster, log):
        eventually(lambda: ("Deployment", "cache") in cluster.objects(), log)
        time.sleep(2)
        before = len(cluster.server.writes)
        for number in range(20):
            status = {"status": {"nodes": [{"node": "one", "ready": True, "usedBytes": number}]}}
            cluster.server.store.patch(KVCACHES, "cache", status, "default", options=Options(subresource="status"))
            time.sleep(0.1)
        assert len(cluster.server.writes) == before  # a pass would have put the status right
