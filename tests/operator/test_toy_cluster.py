"""The toy cluster: rollouts, scheduling, kubelets, evictions and the observer of sockets."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.operator.api_server import Store
from tests.operator.toy_cluster import Pace, ToyCluster

SOCKETS = "/var/run/vineyard-kubernetes/default/a"
ROLE = "kvcache.orchestration.aibrix.ai/role"
Json = dict[str, Any]


def template(image: str = "i:1", labels: Json | None = None, **spec: Any) -> Json:
    container = {"name": "c", "image": image, "resources": spec.pop("resources", {})}
    return {"metadata": {"labels": {"app": "a", **(labels or {})}}, "spec": {"containers": [container], **spec}}


def workload(kind: str, pod: Json, name: str = "a", **spec: Any) -> Json:
    selector = {"matchLabels": {"app": "a"}}
    whole = {"selector": selector, "template": pod, **spec}
    return {"apiVersion": "apps/v1", "kind": kind, "metadata": {"name": name, "namespace": "default"}, "spec": whole}


def make(nodes: int = 3, **pace: int) -> tuple[Store, ToyCluster]:
    store = Store()
    return store, ToyCluster(store, seed=1, nodes=nodes, pace=Pace(**pace))


def names(cluster: ToyCluster) -> list[str]:
    return [pod["metadata"]["name"] for pod in cluster.store.view("pods")]


def images(cluster: ToyCluster) -> set[str]:
    return {pod["spec"]["containers"][0]["image"] for pod in cluster.store.view("pods")}


def set_image(store: Store, plural: str, image: str, name: str = "a") -> None:
    patch = [{"op": "replace", "path": "/spec/template/spec/containers/0/image", "value": image}]
    store.patch(plural, name, patch, "default", "json")


def conditions(obj: Json) -> dict[str, str]:
    return {c["type"]: c["status"] for c in obj["status"].get("conditions") or []}


# Deployments


def test_a_deployment_becomes_available() -> None:
    store, cluster = make()
    store.create(workload("Deployment", template(), replicas=3))
    cluster.settle()
    found = store.get("deployments", "a", "default")
    counts = {f"{name}eplicas": 3 for name in ("r", "updatedR", "readyR", "availableR")}
    assert found["status"] == {"observedGeneration": 1, **counts, "conditions": found["status"]["conditions"]}
    assert conditions(found) == {"Available": "True", "Progressing": "True"}
    assert found["metadata"]["annotations"] == {"deployment.kubernetes.io/revision": "1"}


@pytest.mark.parametrize(("surge", "unavailable"), [(1, 0), (0, 1), ("50%", "25%")])
def test_a_rollout_keeps_its_limits(surge: Any, unavailable: Any) -> None:
    store, cluster = make()
    strategy = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}}
    store.create(workload("Deployment", template(), replicas=4, strategy=strategy))
    cluster.settle()
    set_image(store, "deployments", "i:2")
    most, least = {1: 5, 0: 4}.get(surge, 6), {1: 3, 0: 4}.get(unavailable, 3)
    for _ in range(60):
        cluster.step()
        living = [p for p in store.view("pods") if "deletionTimestamp" not in p["metadata"]]
        assert len(living) <= most
        assert len(cluster.ready_pods()) >= least
    assert images(cluster) == {"i:2"}
    assert sorted(s["spec"]["replicas"] for s in store.view("replicasets")) == [0, 4]


def test_recreate_waits_until_old_pods_are_gone() -> None:
    store, cluster = make(stop_steps=5)
    store.create(workload("Deployment", template(), replicas=2, strategy={"type": "Recreate"}))
    cluster.settle()
    set_image(store, "deployments", "i:2")
    for _ in range(40):
        cluster.step()
        assert len(images(cluster)) <= 1
    assert images(cluster) == {"i:2"}


def test_a_marked_pod_is_replaced_while_it_runs() -> None:
    store, cluster = make(stop_steps=5)
    store.create(workload("Deployment", template(), replicas=1, strategy={"type": "Recreate"}))
    cluster.settle()
    store.delete("pods", names(cluster)[0], "default")
    cluster.step(4)
    assert [p["status"]["phase"] for p in store.view("pods")] == ["Running", "Running"]
    cluster.settle()
    assert len(names(cluster)) == 1


def test_scale_down_takes_the_cheapest_pod() -> None:
    store, cluster = make()
    store.create(workload("Deployment", template(), replicas=3))
    cluster.settle()
    dear, cheap, middle = names(cluster)
    for name, cost in ((dear, "5"), (cheap, "-5"), (middle, "0")):
        annotation = {"controller.kubernetes.io/pod-deletion-cost": cost}
        store.patch("pods", name, {"metadata": {"annotations": annotation}}, "default")
    store.patch("deployments", "a", {"spec": {"replicas": 2}}, "default")
    cluster.settle()
    assert names(cluster) == sorted([dear, middle])
    store.patch("deployments", "a", {"spec": {"replicas": 1}}, "default")
    cluster.settle()
    assert names(cluster) == [dear]


def test_a_broken_image_stops_a_rollout() -> None:
    store, cluster = make()
    cluster.kubelets.broken_images.add("i:2")
    store.create(workload("Deployment", template(), replicas=4))
    cluster.settle()
    set_image(store, "deployments", "i:2")
    cluster.settle()
    assert len(cluster.ready_pods()) == 3  # a quarter may be unavailable
    waiting = [p for p in store.view("pods") if p["status"]["phase"] == "Pending"]
    assert waiting[0]["status"]["containerStatuses"][0]["state"] == {"waiting": {"reason": "ImagePullBackOff"}}


def test_deleting_a_deployment_leaves_nothing() -> None:
    store, cluster = make()
    store.create(workload("Deployment", template(), replicas=2))
    cluster.settle()
    store.delete("deployments", "a", "default")
    cluster.settle()
    assert (names(cluster), store.view("replicasets")) == ([], [])


# StatefulSets and DaemonSets


def test_a_stateful_set_starts_and_rolls_in_order() -> None:
    store, cluster = make()
    store.create(workload("StatefulSet", template(), replicas=3, serviceName="a"))
    seen: list[int] = []
    for _ in range(30):
        cluster.step()
        seen.append(len(names(cluster)))
    assert names(cluster) == ["a-0", "a-1", "a-2"]
    assert seen == sorted(seen)
    assert {1, 2, 3} <= set(seen)
    set_image(store, "statefulsets", "i:2")
    order: list[str] = []
    for _ in range(60):
        cluster.step()
        marked = [p["metadata"]["name"] for p in store.view("pods") if "deletionTimestamp" in p["metadata"]]
        assert len(marked) <= 1
        order += [name for name in marked if name not in order]
    assert order == ["a-2", "a-1", "a-0"]
    status = store.get("statefulsets", "a", "default")["status"]
    assert status["currentRevision"] == status["updateRevision"]
    assert (status["readyReplicas"], status["updatedReplicas"]) == (3, 3)


def test_an_unready_pod_stops_an_ordered_stateful_set() -> None:
    store, cluster = make()
    cluster.kubelets.unready_images.add("i:1")
    store.create(workload("StatefulSet", template(), replicas=2, serviceName="a"))
    cluster.settle()
    assert names(cluster) == ["a-0"]
    set_image(store, "statefulsets", "i:2")  # the known trap: the broken pod is never replaced
    cluster.settle()
    assert images(cluster) == {"i:1"}


def test_a_parallel_stateful_set_and_on_delete() -> None:
    store, cluster = make()
    extra: Json = {"podManagementPolicy": "Parallel", "updateStrategy": {"type": "OnDelete"}}
    store.create(workload("StatefulSet", template(), replicas=3, serviceName="a", **extra))
    cluster.step(1)
    assert len(names(cluster)) == 3
    cluster.settle()
    set_image(store, "statefulsets", "i:2")
    cluster.settle()
    assert images(cluster) == {"i:1"}
    store.delete("pods", "a-1", "default")
    cluster.settle()
    assert store.get("pods", "a-1", "default")["spec"]["containers"][0]["image"] == "i:2"


def test_a_stateful_set_claims_storage_that_stays() -> None:
    store, cluster = make()
    claim = {
        "metadata": {"name": "data"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}},
    }
    store.create(workload("StatefulSet", template(), replicas=1, serviceName="a", volumeClaimTemplates=[claim]))
    cluster.settle()
    store.delete("statefulsets", "a", "default")
    cluster.settle()
    assert [c["metadata"]["name"] for c in store.view("persistentvolumeclaims")] == ["data-a-0"]
    assert store.view("controllerrevisions.apps") == []


@pytest.mark.parametrize("kind", ["Deployment", "StatefulSet"])
def test_a_new_owner_adopts_orphans(kind: str) -> None:
    store, cluster = make()
    plural, more = f"{kind.lower()}s", {"serviceName": "a"} if kind == "StatefulSet" else {}
    store.create(workload(kind, template(), replicas=2, **more))
    cluster.settle()
    before = {pod["metadata"]["uid"] for pod in store.view("pods")}
    store.delete(plural, "a", "default", propagation="Orphan")
    cluster.settle()
    assert {pod["metadata"]["uid"] for pod in store.view("pods")} == before
    made = store.create(workload(kind, template(), replicas=2, **more))
    cluster.settle()
    assert {pod["metadata"]["uid"] for pod in store.view("pods")} == before
    store.delete(plural, made["metadata"]["name"], "default")
    cluster.settle()
    assert names(cluster) == []
    assert cluster.world.refused == []


def test_a_daemon_set_has_one_pod_on_every_node_that_fits() -> None:
    store, cluster = make()
    cluster.add_node("tainted", taints=[{"key": "gpu", "effect": "NoSchedule"}])
    store.create(workload("DaemonSet", template()))
    cluster.settle()
    assert sorted(p["spec"]["nodeName"] for p in store.view("pods")) == ["node-0", "node-1", "node-2"]
    set_image(store, "daemonsets", "i:2")
    for _ in range(60):
        cluster.step()
        assert len(cluster.ready_pods()) >= 2
    assert images(cluster) == {"i:2"}


# Scheduling


def pod(name: str, **spec: Any) -> Json:
    meta = {"name": name, "namespace": "default", "labels": {"app": name}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": template(**spec)["spec"]}


def where(store: Store, name: str) -> str:
    node: str = store.get("pods", name, "default")["spec"].get("nodeName", "")
    return node


def near(app: str) -> Json:
    return {"labelSelector": {"matchLabels": {"app": app}}, "topologyKey": "kubernetes.io/hostname"}


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({"nodeSelector": {"x": "y"}}, "node affinity/selector"),
        ({"resources": {"requests": {"cpu": "65"}}}, "Insufficient cpu"),
        ({"resources": {"limits": {"nvidia.com/gpu": "1"}}}, "Insufficient nvidia.com/gpu"),
        (
            {"affinity": {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [near("none")]}}},
            "pod affinity rules",
        ),
    ],
)
def test_a_pod_that_fits_nowhere_says_why(spec: Json, why: str) -> None:
    store, cluster = make()
    store.create(pod("p", **spec))
    cluster.settle()
    (said,) = store.get("pods", "p", "default")["status"]["conditions"]
    assert (said["type"], said["status"], said["reason"]) == ("PodScheduled", "False", "Unschedulable")
    assert said["message"] == f"0/3 nodes are available: 3 {said['message'].partition(': 3 ')[2]}"
    assert why in said["message"]


def test_affinity_anti_affinity_and_match_fields() -> None:
    store, cluster = make()
    field = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["node-1"]}]}
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    store.create(pod("first", affinity={"nodeAffinity": {required: {"nodeSelectorTerms": [field]}}}))
    cluster.settle()
    assert where(store, "first") == "node-1"
    store.create(pod("with", affinity={"podAffinity": {required: [near("first")]}}))
    store.create(pod("away", affinity={"podAntiAffinity": {required: [near("first")]}}))
    cluster.settle()
    assert where(store, "with") == "node-1"
    assert where(store, "away") not in ("", "node-1")
    store.create(pod("none", affinity={"podAffinity": {required: [{**near("first"), "namespaces": ["other"]}]}}))
    cluster.settle()
    assert where(store, "none") == ""


def test_terminating_pods_count_until_they_are_gone() -> None:
    store, cluster = make(nodes=1, stop_steps=6)
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    store.create(
        pod("old", affinity={"podAntiAffinity": {required: [near("new")]}})
    )  # the rule of the pod that is there
    cluster.settle()
    store.delete("pods", "old", "default")
    store.create(pod("new"))
    cluster.step(4)
    assert (where(store, "new"), "old" in names(cluster)) == ("", True)
    cluster.settle()
    assert (where(store, "new"), "old" in names(cluster)) == ("node-0", False)


# Kubelets, nodes, evictions


def test_a_pod_waits_for_its_secret() -> None:
    store, cluster = make()
    store.create(pod("p", volumes=[{"name": "s", "secret": {"secretName": "later"}}]))
    cluster.settle()
    assert store.get("pods", "p", "default")["status"]["phase"] == "Pending"
    store.create({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "later", "namespace": "default"}})
    cluster.settle()
    assert conditions(store.get("pods", "p", "default"))["Ready"] == "True"


def test_a_lost_node_keeps_its_containers() -> None:
    store, cluster = make(nodes=2, lost_steps=4)
    store.create(workload("Deployment", template(), replicas=1))
    cluster.settle()
    (lost,) = store.view("pods")
    node = lost["spec"]["nodeName"]
    cluster.lose_node(node)
    cluster.step(2)
    assert conditions(store.get("pods", lost["metadata"]["name"], "default"))["Ready"] == "False"
    cluster.settle()
    states = {p["spec"]["nodeName"]: "deletionTimestamp" in p["metadata"] for p in store.view("pods")}
    assert states[node] is True
    assert sorted(states.values()) == [False, True]
    cluster.recover_node(node)
    cluster.settle()
    assert len(names(cluster)) == 1
    cluster.remove_node(store.view("pods")[0]["spec"]["nodeName"])
    cluster.settle()
    assert len(cluster.ready_pods()) == 1


def test_a_drain_respects_the_budget() -> None:
    store, cluster = make(nodes=1)
    budget = {"minAvailable": 2, "selector": {"matchLabels": {"app": "a"}}}
    meta = {"name": "b", "namespace": "default"}
    store.create({"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": meta, "spec": budget})
    store.create(workload("Deployment", template(), replicas=3))
    cluster.settle()
    assert store.get("poddisruptionbudgets", "b", "default")["status"]["disruptionsAllowed"] == 1
    assert len(cluster.drain("node-0")) == 2
    cluster.settle()
    assert len(cluster.ready_pods()) == 2


# The observer


def daemon(strategy: Json, apart: bool) -> Json:
    volumes = [{"name": "s", "hostPath": {"path": SOCKETS}}]
    required = "requiredDuringSchedulingIgnoredDuringExecution"
    affinity = {"podAntiAffinity": {required: [near("a")]}} if apart else {}
    pod_template = template(labels={ROLE: "cache"}, volumes=volumes, affinity=affinity)
    return workload("Deployment", pod_template, replicas=1, strategy=strategy)


@pytest.mark.parametrize(("apart", "most"), [(True, 1), (False, 2)])
def test_the_observer_sees_two_daemons_on_a_socket(apart: bool, most: int) -> None:
    store, cluster = make(nodes=1)
    store.create(daemon({"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 1 if apart else 0}}, apart))
    cluster.settle()
    assert cluster.daemons_by_socket() == {("node-0", SOCKETS): [f"default/{names(cluster)[0]}"]}
    set_image(store, "deployments", "i:2")
    cluster.settle()
    assert images(cluster) == {"i:2"}
    assert cluster.most_daemons == {("node-0", SOCKETS): most}
    assert bool(cluster.observer.clashes) is (most > 1)


def test_the_observer_looks_at_every_start() -> None:
    store, cluster = make(nodes=1)
    store.create(daemon({"type": "Recreate"}, apart=False))
    seen: list[int] = []
    cluster.kubelets.started = lambda: seen.append(len(cluster.daemons_by_socket()))
    cluster.settle()
    set_image(store, "deployments", "i:2")
    cluster.settle()
    assert seen == [1, 1]


def test_the_same_seed_gives_the_same_run() -> None:
    def run(seed: int) -> list[Any]:
        store = Store()
        cluster = ToyCluster(store, seed=seed, nodes=3, pace=Pace(jitter=3), lag=0.3)
        store.create(workload("Deployment", template(), replicas=5))
        cluster.step(20)
        return [(p["spec"].get("nodeName"), p["status"]["phase"]) for p in store.view("pods")]

    assert run(1) == run(1)
    assert any(run(seed) != run(1) for seed in range(2, 5))


def test_it_runs_in_a_thread() -> None:
    store, cluster = make()
    store.create(workload("Deployment", template(), replicas=1))
    with cluster.running(interval_s=0.001):
        deadline = time.monotonic() + 20
        while not cluster.ready_pods() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(cluster.ready_pods()) == 1
    steps = cluster.world.step
    time.sleep(0.02)
    assert cluster.world.step == steps
