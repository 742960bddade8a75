"""Random sequences of what users, nodes and operators do, over a toy cluster.

After each, once everything is quiet: no two daemons were ever on one socket, every node of the workload has one ready cache
pod and no other node has any, nothing is orphaned, and the status says what is.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import random
from collections.abc import Callable
from typing import Any

import pytest

from kvkern.operator.api import ApiError
from kvkern.operator.crds import crd
from kvkern.operator.kinds import OWN, PUBLISHED
from kvkern.operator.names import OWN_GROUP, PUBLISHED_GROUP
from kvkern.operator.reconcile import Reconciler, Settings
from tests.operator.api_server import ApiError as ServerError
from tests.operator.api_server import Store
from tests.operator.conftest import MADE, own
from tests.operator.manifests import kvcache
from tests.operator.store_api import Crash, StoreApi
from tests.operator.toy_cluster import ToyCluster

SEQUENCES = 1000
BATCH = 50  # sequences of one test
STEPS = 8
NODES = 4


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
        reconciler = Reconciler(api, Settings(ask_pods=False), lambda: "2026-01-01T00:00:00Z")
        with contextlib.suppress(Crash, ApiError):  # the next pass goes on
            asyncio.run(reconciler.run(OWN if self.own else PUBLISHED, "default", self.name))

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

    def meddle(self) -> None:
        self.edit("deployments.apps", self.name, lambda live: live["spec"].update(replicas=self.random.randint(0, 9)))

    def act(self) -> None:
        """Let something happen, then an operator that may crash, then the cluster."""
        actions = (
            self.scale_engines, self.scale_engines, self.roll_engines, self.change_image, self.change_memory, self.lose_node,
            self.recover_nodes, self.drain_node, self.delete_a_pod, self.delete_an_object, self.meddle,
        )  # fmt: skip
        action = self.random.choice(actions)
        self.done.append(action.__name__)
        try:
            action()
        except ServerError as error:
            self.done[-1] += f" refused: {error.reason}"
        if self.random.random() < 0.8:
            self.one_pass(self.random.choice([-1, -1, 0, 1, 3]))
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
        role = "kvcache.orchestration.aibrix.ai/role=cache"
        caches = [pod["spec"]["nodeName"] for pod in self.toy.ready_pods("default", role)]
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
        assert not self.store.list("pods", "default", role)


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
