"""Random sequences of what users, nodes and operators do, over a toy cluster.

After each, once everything is quiet: no two daemons were ever on one socket, and no arena was removed beside a cache pod; every
node of the workload has one ready cache pod and no other node has any; nothing is orphaned, and the status says what is.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from kvkern.operator.api import ApiError
from kvkern.operator.arenas import LEDGER, Arenas
from kvkern.operator.crds import crd
from kvkern.operator.kinds import OWN, PUBLISHED
from kvkern.operator.names import OWN_GROUP, PUBLISHED_GROUP
from kvkern.operator.observed import has_ended
from kvkern.operator.reconcile import Reconciler, Settings
from tests.operator.api_server import ApiError as ServerError
from tests.operator.api_server import Options, Store
from tests.operator.conftest import MADE, own
from tests.operator.manifests import kvcache
from tests.operator.store_api import Crash, StoreApi
from tests.operator.toy_cluster import ToyCluster

SEQUENCES = 1000
BATCH = 50  # sequences of one test
STEPS = 8
NODES = 4
ROLE = "kvcache.orchestration.aibrix.ai/role"


class World:
    """A toy cluster with an engine's Deployment and a KVCache."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.store = Store()
        for group in (OWN_GROUP, PUBLISHED_GROUP):
            self.store.create(crd(group))
        self.toy = ToyCluster(self.store, seed, nodes=NODES, lag=0.2)
        self.own = self.random.random() < 0.5
        manifest = own() if self.own else kvcache("published")
        self.workload = "coder" if self.own else "deepseek-coder-7b-instruct"
        self.store.create(self.engine())
        self.manifest = self.store.create(manifest)
        self.name = manifest["metadata"]["name"]
        self.plural = f"kvcaches.{OWN_GROUP if self.own else PUBLISHED_GROUP}"
        self.done: list[str] = []
        self.minutes = 0  # that have passed; the toy cluster has no clock

    def now(self) -> str:
        return (datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=self.minutes)).strftime("%Y-%m-%dT%H:%M:%SZ")

    def engine(self) -> dict[str, Any]:
        """Return the engines' Deployment. Two engines never share a node, so their number is that of nodes."""
        labels = {"model.aibrix.ai/name": self.workload}
        term = {"labelSelector": {"matchLabels": labels}, "topologyKey": "kubernetes.io/hostname"}
        alone = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
        pod = {"containers": [{"name": "e", "image": "e:1"}], "affinity": alone}
        spec = {
            "replicas": 1,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        }
        return {
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": self.workload, "namespace": "default"},
            "spec": spec,
        }  # fmt: skip

    def one_pass(self, crash_after: int = -1) -> None:
        """Make a pass as an operator that has just started; it may end at one of its writes."""
        api = StoreApi(self.store, crash_after, before=self.random.random() < 0.5)
        arenas = Arenas(api, "default", "kvkern:1", self.now)
        reconciler = Reconciler(api, Settings(ask_pods=False), self.now, arenas)
        with contextlib.suppress(Crash, ApiError):  # the next pass goes on
            asyncio.run(reconciler.run(OWN if self.own else PUBLISHED, "default", self.name))

    def sweep(self, crash_after: int = -1) -> None:
        """Let the operator remove arenas that nobody needs, and what removes them end where it runs."""
        with contextlib.suppress(Crash):
            asyncio.run(Arenas(StoreApi(self.store, crash_after), "default", "kvkern:1", self.now).sweep())
        self.toy.step(self.random.randint(0, 3))
        for pod in self.store.list("pods", "default", f"{ROLE}=arena-remover"):
            if pod.get("status", {}).get("phase") == "Running":
                node = pod["spec"]["nodeName"]
                caches = self.store.list("pods", "default", f"{ROLE}=cache")
                beside = [each for each in caches if each["spec"].get("nodeName") == node and not has_ended(each)]
                assert not beside, f"the arena of {node} is removed under {beside[0]['metadata']['name']}"
                self.set_phase(pod, self.random.choice(["Succeeded", "Succeeded", "Failed"]))

    def listed(self) -> dict[str, str]:
        """Return the ledger."""
        return dict((self.store.find("configmaps", LEDGER, "default") or {}).get("data") or {})

    def set_phase(self, pod: dict[str, Any], phase: str) -> None:
        """Let a pod have ended."""
        name, status = pod["metadata"]["name"], {"status": {"phase": phase, "conditions": []}}
        self.store.patch("pods", name, status, "default", options=Options(subresource="status"))

    def edit(self, plural: str, name: str, change: Callable[[dict[str, Any]], None]) -> None:
        """Change an object as a user does, if it is there."""
        if (live := self.store.find(plural, name, "default")) is not None:
            live = copy.deepcopy(live)
            change(live)
            self.store.update(live)

    # -- what may happen -----------------------------------------------------------------------------------------------

    def scale_engines(self) -> None:
        replicas = self.random.randint(0, NODES)
        self.edit("deployments.apps", self.workload, lambda live: live["spec"].update(replicas=replicas))

    def roll_engines(self) -> None:
        image = f"e:{self.random.randint(1, 99)}"
        self.edit(
            "deployments.apps", self.workload,
            lambda live: live["spec"]["template"]["spec"]["containers"][0].update(image=image),
        )  # fmt: skip

    def change_image(self) -> None:
        image = f"kvkern:{self.random.randint(1, 99)}"
        self.edit(
            self.plural,
            self.name,
            lambda live: (live["spec"] if self.own else live["spec"]["cacheSpec"]).update(image=image),
        )

    def change_memory(self) -> None:
        memory = self.random.choice(["1Gi", "4Gi", "8Gi", "100Mi"])  # the last is refused
        self.edit(
            self.plural,
            self.name,
            lambda live: (live["spec"] if self.own else live["spec"]["cacheSpec"]).update(memory=memory),
        )

    def lose_node(self) -> None:
        self.toy.lose_node(f"node-{self.random.randrange(NODES)}")

    def recover_nodes(self) -> None:
        for number in range(NODES):
            self.toy.recover_node(f"node-{number}")
            self.toy.uncordon(f"node-{number}")

    def drain_node(self) -> None:
        self.toy.drain(f"node-{self.random.randrange(NODES)}")

    def delete_a_pod(self) -> None:
        if pods := self.store.list("pods", "default"):
            self.store.delete("pods", self.random.choice(pods)["metadata"]["name"], "default")

    def delete_an_object(self) -> None:
        made = [(plural, each) for plural in MADE for each in self.store.list(plural, "default") if _owner(each)]
        if made:
            plural, each = self.random.choice(made)
            self.store.delete(plural, each["metadata"]["name"], "default")

    def evict_a_pod(self) -> None:
        """A kubelet short of something ends a cache pod; its object stays."""
        pods = [pod for pod in self.store.list("pods", "default", f"{ROLE}=cache") if pod["spec"].get("nodeName")]
        if pods:
            self.set_phase(self.random.choice(pods), "Failed")

    def wait(self) -> None:
        self.minutes += self.random.choice([1, 6, 20])

    def make_anew(self) -> None:
        """The user deletes the KVCache, and sometime makes it again."""
        if self.store.find(self.plural, self.name, "default") is not None:
            self.store.delete(self.plural, self.name, "default")
            self.store.collect()
            self.toy.step(self.random.randint(0, 6))
            self.sweep(self.random.choice([-1, 0, 1]))
        manifest = own() if self.own else kvcache("published")
        self.store.create(manifest)

    def meddle(self) -> None:
        self.edit("deployments.apps", self.name, lambda live: live["spec"].update(replicas=self.random.randint(0, 9)))

    def act(self) -> None:
        """Let something happen, then an operator that may crash, then the cluster."""
        actions = (
            self.scale_engines, self.scale_engines, self.roll_engines, self.change_image, self.change_memory, self.lose_node,
            self.recover_nodes, self.drain_node, self.delete_a_pod, self.delete_an_object, self.meddle, self.evict_a_pod,
            self.wait, self.wait, self.make_anew,
        )  # fmt: skip
        action = self.random.choice(actions)
        self.done.append(action.__name__)
        try:
            action()
        except ServerError as error:
            self.done[-1] += f" refused: {error.reason}"
        if self.random.random() < 0.8:
            self.one_pass(self.random.choice([-1, -1, 0, 1, 3]))
        if self.random.random() < 0.4:
            self.sweep(self.random.choice([-1, 0, 1]))
        self.toy.step(self.random.randint(0, 6))

    def rest(self) -> None:
        """Heal what is broken, correct what is wrong, and wait until nothing changes any more."""
        self.toy.lag = 0.0  # else "nothing changed for some steps" means little
        self.recover_nodes()
        spec = {"memory": "4Gi"}
        self.edit(
            self.plural, self.name, lambda live: (live["spec"] if self.own else live["spec"]["cacheSpec"]).update(spec)
        )
        for _ in range(30):
            before = self.store.objects.revision
            self.one_pass()
            self.sweep()
            self.toy.settle(400)
            if self.store.objects.revision == before:
                return
        raise AssertionError("the operator and the cluster do not come to rest")

    # -- what must hold ------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise AssertionError if something is not as it must be."""
        assert not self.toy.observer.clashes
        live = self.store.get(self.plural, self.name, "default")
        status = live["status"]
        conditions = {each["type"]: each["status"] for each in status["conditions"]}
        engines = {
            p["spec"]["nodeName"] for p in self.toy.ready_pods("default", f"model.aibrix.ai/name={self.workload}")
        }
        caches = [pod["spec"]["nodeName"] for pod in self.toy.ready_pods("default", f"{ROLE}=cache")]
        if engines:
            assert sorted(caches) == sorted(engines)
            assert status["desired"] == status["ready"] == len(engines)
            assert conditions == {
                "ConfigValid": "True", "WorkloadFound": "True", "NodesCovered": "True", "Progressing": "False",
                "Degraded": "False", "Available": "True",
            }  # fmt: skip
            assert status["reason"] == "Ready"
        else:
            assert conditions["WorkloadFound"] == "False"
        assert status["observedGeneration"] == live["metadata"]["generation"]
        self.store.delete(self.plural, self.name, "default")
        self.store.collect()
        self.toy.settle(400)
        left = [
            each["metadata"]["name"] for plural in MADE for each in self.store.list(plural, "default") if _owner(each)
        ]
        assert not left
        for _ in range(60):
            if not self.listed():
                break
            self.sweep()
            self.toy.settle(400)
        assert not self.listed(), "an arena is left on a node"
        alive = [pod for pod in self.store.list("pods", "default", ROLE) if not has_ended(pod)]
        assert not alive


def _owner(manifest: dict[str, Any]) -> str:
    owners = manifest["metadata"].get("ownerReferences") or []
    return next((each["name"] for each in owners if each["kind"] == "KVCache"), "")


@pytest.mark.parametrize("first", range(0, SEQUENCES, BATCH))
def test_random_sequences(first: int) -> None:
    for seed in range(first, first + BATCH):
        world = World(seed)
        try:
            for _ in range(STEPS):
                world.act()
            world.rest()
            world.check()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {', '.join(world.done)}") from error
