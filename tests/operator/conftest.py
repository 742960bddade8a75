"""An API server with both definitions, and passes over it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from kvkern.operator.api import Api, ApiError
from kvkern.operator.crds import crd
from kvkern.operator.kinds import OWN, PUBLISHED
from kvkern.operator.names import OWN_API, OWN_GROUP, PUBLISHED_GROUP, WORKLOAD_LABEL
from kvkern.operator.reconcile import Reconciler, Settings
from tests.operator.api_server import ApiServer, running_api_server

NOW = "2026-01-01T00:00:00Z"
MADE = (
    "serviceaccounts", "services", "networkpolicies.networking.k8s.io", "poddisruptionbudgets.policy", "statefulsets.apps",
    "deployments.apps",
)  # fmt: skip
SPENT = ("uid", "resourceVersion", "creationTimestamp", "managedFields", "generation")


@dataclass
class Cluster:
    """An API server and an operator's passes, one by one."""

    server: ApiServer
    time: str = NOW

    def make(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Create an object."""
        made: dict[str, Any] = self.server.store.create(manifest)
        return made

    def passes(self, name: str, *, own: bool, most: int = 20) -> int:
        """Make passes, as a new operator each, until one of them succeeds and writes nothing. Returns how many it took."""
        for number in range(1, most + 1):
            before = len(self.server.writes)
            if self.one_pass(name, own=own) is None and len(self.server.writes) == before:
                return number
        raise AssertionError(f"no rest after {most} passes: {self.server.writes[-10:]}")

    def one_pass(self, name: str, *, own: bool) -> ApiError | None:
        """Make one pass as an operator that has just started. Returns why it failed."""

        async def run() -> None:
            api = await Api.connect(str(self.server.kubeconfig))
            await Reconciler(api, Settings(ask_pods=False), lambda: self.time).run(
                OWN if own else PUBLISHED, "default", name
            )

        try:
            asyncio.run(run())
        except ApiError as error:
            return error
        return None

    def kvcache(self, name: str, *, own: bool) -> dict[str, Any]:
        """Return a KVCache as it is."""
        group = OWN_GROUP if own else PUBLISHED_GROUP
        found: dict[str, Any] = self.server.store.get(f"kvcaches.{group}", name, "default")
        return found

    def status(self, name: str, *, own: bool) -> dict[str, tuple[str, str]]:
        """Return the conditions of a KVCache: status and reason, by type."""
        status = self.kvcache(name, own=own)["status"]
        return {each["type"]: (each["status"], each["reason"]) for each in status["conditions"]}

    def objects(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Return what operators have made, by kind and name."""
        return {
            (each["kind"], each["metadata"]["name"]): each
            for plural in MADE
            for each in self.server.store.list(plural, "default")
            if each["metadata"]["name"] not in ("default", "kubernetes")  # a namespace's own
        }

    def essence(self) -> dict[tuple[str, str], Any]:
        """Return what operators have made, without what differs from one making to the next."""
        found = {}
        for key, each in self.objects().items():
            metadata = {
                name: value for name, value in each["metadata"].items() if name not in (*SPENT, "ownerReferences")
            }
            metadata["annotations"] = {
                k: v for k, v in metadata.get("annotations", {}).items() if k != "kvkern.io/last-written"
            }
            spec = {
                name: value
                for name, value in each.get("spec", {}).items()
                if name not in ("clusterIP", "clusterIPs", "externalTrafficPolicy")
            }
            for port in spec.get("ports", ()) if each["kind"] == "Service" else ():
                port.pop("nodePort", None)
            for container in spec.get("template", {}).get("spec", {}).get("containers", ()):
                container["env"] = [each for each in container.get("env") or () if each["name"] != "VINEYARDD_UID"]
            found[key] = metadata, spec
        return found

    def engine(self, name: str, node: str = "", label: str = WORKLOAD_LABEL, workload: str = "coder") -> dict[str, Any]:
        """Make a pod of the workload."""
        spec: dict[str, Any] = {"containers": [{"name": "engine", "image": "engine:1"}]}
        if node:
            spec["nodeName"] = node
        metadata = {"name": name, "namespace": "default", "labels": {label: workload}}
        return self.make({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with running_api_server() as server:
        for group in (OWN_GROUP, PUBLISHED_GROUP):
            server.store.create(crd(group))
        yield Cluster(server)


def own(name: str = "cache", **spec: Any) -> dict[str, Any]:
    """Return a KVCache of kvkern's own kind that follows the workload `coder`."""
    return {
        "apiVersion": OWN_API,
        "kind": "KVCache",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"memory": "4Gi", "workload": {"name": "coder"}} | spec,
    }
