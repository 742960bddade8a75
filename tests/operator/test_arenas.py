"""Arenas in the memory of nodes go when nobody needs them: after the KVCache, after the workload, never under a new pod."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

from kvkern.operator.api import ApiError
from kvkern.operator.arenas import LEDGER, ON, Arenas, remover
from kvkern.operator.crds import crd
from kvkern.operator.kinds import OWN, Kind
from kvkern.operator.names import OWN_GROUP, PUBLISHED_GROUP
from kvkern.operator.reconcile import Reconciler, Settings
from tests.operator.api_server import Options, Store
from tests.operator.conftest import own
from tests.operator.store_api import StoreApi
from tests.operator.toy_cluster import ToyCluster

ROLE = "kvcache.orchestration.aibrix.ai/role"


class World:
    """A toy cluster of two nodes with an engine on the first, a KVCache, and an operator in the namespace kvkern-system."""

    def __init__(self, **spec: Any) -> None:
        self.store = Store()
        for group in (OWN_GROUP, PUBLISHED_GROUP):
            self.store.create(crd(group))
        self.store.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "kvkern-system"}})
        self.toy = ToyCluster(self.store, nodes=2)
        self.api, self.time = StoreApi(self.store), "2026-01-01T00:00:00Z"
        self.arenas = Arenas(self.api, "kvkern-system", "kvkern:1", lambda: self.time)
        self.reconciler = Reconciler(self.api, Settings(ask_pods=False), lambda: self.time, self.arenas)
        self.engine("node-0")
        self.store.create(own(**spec))

    def engine(self, node: str) -> None:
        metadata = {"name": f"engine-{node}", "namespace": "default", "labels": {"model.aibrix.ai/name": "coder"}}
        spec = {"nodeName": node, "containers": [{"name": "e", "image": "e:1"}]}
        self.store.create({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})

    def passes(self) -> None:
        """Let operator and cluster act until they have little left to do."""
        for _ in range(4):
            with contextlib.suppress(ApiError):  # what it waits for comes with the next steps
                asyncio.run(self.reconciler.run(OWN, "default", "cache"))
            self.toy.settle(400)

    def sweep(self) -> None:
        asyncio.run(self.arenas.sweep())

    def removers(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.store.list("pods", "", f"{ROLE}=arena-remover")
        return found

    def end_removers(self, phase: str = "Succeeded") -> None:
        """Let the removers on all nodes have run."""
        for pod in self.removers():
            meta = pod["metadata"]
            self.store.patch(
                "pods",
                meta["name"],
                {"status": {"phase": phase}},
                meta["namespace"],
                options=Options(subresource="status"),
            )

    def listed(self) -> dict[str, str]:
        found = self.store.find("configmaps", LEDGER, "kvkern-system")
        return dict((found or {}).get("data") or {})


@pytest.fixture
def world() -> World:
    made = World()
    made.passes()
    return made


def test_the_arena_of_a_deleted_kvcache_goes(world: World) -> None:
    assert list(world.listed()) == ["default.cache"]
    world.sweep()
    assert not world.removers(), "it is in use"
    world.store.delete("kvcaches.kvkern.io", "cache", "default")
    world.store.collect()
    world.sweep()
    world.toy.settle(400)
    world.sweep()
    (pod,) = world.removers()
    assert pod["metadata"]["annotations"][ON] == "node-0"
    paths = {each["hostPath"]["path"] for each in pod["spec"]["volumes"]}
    assert paths == {"/dev/shm/kvkern-kubernetes/default", "/var/run/vineyard-kubernetes/default"}
    world.end_removers()
    world.sweep()
    world.store.collect()
    assert not world.listed()


def test_a_remover_that_fails_runs_again(world: World) -> None:
    world.store.delete("kvcaches.kvkern.io", "cache", "default")
    world.store.collect()
    world.toy.settle(400)
    world.sweep()
    world.end_removers("Failed")
    world.sweep()
    world.toy.settle(400)
    world.sweep()
    assert world.removers()
    assert world.listed()


def test_the_arena_of_a_node_that_the_workload_has_left_goes(world: World) -> None:
    world.store.delete("pods", "engine-node-0", "default", grace_s=0)
    world.engine("node-1")
    world.passes()
    world.sweep()
    assert not world.removers(), "the workload may come back"
    world.time = "2026-01-01T00:16:00Z"
    world.passes()
    world.sweep()
    (pod,) = world.removers()
    assert pod["metadata"]["annotations"][ON] == "node-0"
    world.passes()
    assert [each["metadata"]["uid"] for each in world.removers()] == [pod["metadata"]["uid"]], (
        "a pass lets it be: no cache pod is there, and none will be"
    )
    world.engine("node-0")
    world.passes()
    assert not world.removers(), "the workload is back"


def test_a_remover_shares_no_node_with_a_cache_pod(world: World) -> None:
    """The scheduler sees to it: between a look and a removal a cache pod may come."""
    affinity = remover("default", "cache", "node-0", "kvkern:1", "default")["spec"]["affinity"]
    (alone,) = affinity["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    (pod,) = world.store.list("pods", "default", f"{ROLE}=cache")
    assert alone["labelSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert alone["topologyKey"] == "kubernetes.io/hostname"


def test_one_arena_that_cannot_be_removed_holds_up_no_other(world: World) -> None:
    ledger = world.store.get("configmaps", LEDGER, "kvkern-system")
    ledger["data"] = {f"default.{name}": json.dumps({"node-0": world.time}) for name in ("a", "b")}
    world.store.update(ledger)
    world.store.delete("kvcaches.kvkern.io", "cache", "default")
    world.store.collect()
    world.toy.settle(400)
    create, refused = world.api.create, []

    async def forbidden(kind: Kind, manifest: dict[str, Any], record: bool = True) -> dict[str, Any]:
        if kind.kind == "Pod" and not refused:
            refused.append(manifest["metadata"]["name"])
            raise ApiError(403, "Forbidden", "hostPath volumes are not allowed")
        return await create(kind, manifest, record)

    world.api.create = forbidden  # type: ignore[method-assign]
    world.sweep()
    assert refused
    assert len(world.removers()) == 1


def test_a_new_kvcache_of_the_name_does_not_lose_its_arena(world: World) -> None:
    """What removes the old one ends before new cache pods are made."""
    world.store.delete("kvcaches.kvkern.io", "cache", "default")
    world.store.collect()
    world.toy.settle(400)
    world.sweep()
    assert world.removers()
    world.store.create(own())
    with pytest.raises(ApiError, match="has to end first"):
        asyncio.run(world.reconciler.run(OWN, "default", "cache"))
    assert world.store.find("deployments.apps", "cache", "default") is None
    world.passes()
    assert not world.removers()
    assert world.store.find("deployments.apps", "cache", "default") is not None
    world.sweep()
    assert not world.removers()


def test_a_node_that_is_gone_needs_no_remover(world: World) -> None:
    world.store.delete("kvcaches.kvkern.io", "cache", "default")
    world.store.collect()
    world.toy.settle(400)
    world.sweep()
    assert world.removers()
    world.toy.remove_node("node-0")
    world.sweep()
    world.store.collect()
    assert not world.removers(), "one that no node can run would wait for ever"
    assert not world.listed()


def test_with_an_arena_in_the_pod_the_socket_is_listed() -> None:
    world = World(arena="Pod")
    world.passes()
    assert list(world.listed()) == ["default.cache"]


def test_the_remover_fits_and_empties_the_folders_of_one_kvcache_alone(tmp_path: Path) -> None:
    """Its own command, with its mounts below a folder of this test. The socket's folder stays: engines have mounted it."""
    pod = remover("default", "cache", "node-0", "kvkern:1", "default")
    kubernetes_validate.validate(pod, "1.37", strict=True)
    for name in ("cache", "other"):
        for number in ("0", "1"):
            folder = tmp_path / "remove" / number / name
            folder.mkdir(parents=True)
            (folder / "file").touch()
    shell, flag, script = pod["spec"]["containers"][0]["command"]
    subprocess.run([shell, flag, script.replace("/remove/", f"{tmp_path}/remove/")], check=True, timeout=30)
    assert sorted(path.name for path in (tmp_path / "remove" / "0").iterdir()) == ["other"]
    assert list((tmp_path / "remove" / "1" / "cache").iterdir()) == []
    assert [path.name for path in (tmp_path / "remove" / "1" / "other").iterdir()] == ["file"]
    subprocess.run([shell, flag, script.replace("/remove/", f"{tmp_path}/nothing/")], check=True, timeout=30)
