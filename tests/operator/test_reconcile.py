"""Passes over a KVCache, against an API server over a real socket. Every pass is that of an operator that has just started."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.operator.api_server import ConnectionLost, Write
from tests.operator.conftest import Cluster, own
from tests.operator.manifests import kvcache

# A KVCache with everything, and for each field another value -> the objects that change, by kind and the end of their name
EVERYTHING = own(
    image="kvkern:1", imagePullPolicy="Always", imagePullSecrets=[{"name": "pull"}], cpu="2", memory="8Gi",
    sharedMemorySize="128Mi", env=[{"name": "TZ", "value": "UTC"}], workload={"name": "coder"}, minPods=2, maxUnavailable=1,
    arena="Host", nodeSelector={"pool": "gpu"}, tolerations=[{"key": "a", "operator": "Exists"}], priorityClassName="high",
    podLabels={"team": "a"}, podAnnotations={"note": "a"}, service={"type": "NodePort", "port": 9601},
    options={"policy": "lru", "fair": True, "quota": ["m=1GiB"], "drain": 10}, remote={"redis": {"image": "redis:7"}},
)  # fmt: skip
CHANGES: list[tuple[str, Any, set[tuple[str, str]]]] = [
    ("image", "kvkern:2", {("Deployment", "cache")}),
    ("imagePullPolicy", "Never", {("Deployment", "cache"), ("StatefulSet", "cache-redis")}),
    ("imagePullSecrets", [], {("Deployment", "cache")}),
    ("cpu", "3", {("Deployment", "cache")}),
    ("memory", "16Gi", {("Deployment", "cache")}),
    ("sharedMemorySize", "256Mi", {("Deployment", "cache")}),
    ("env", [{"name": "TZ", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}], {("Deployment", "cache")}),
    ("env", [], {("Deployment", "cache")}),
    ("workload", {"name": "other"}, {("Deployment", "cache")}),
    ("workload", {"name": "coder", "labelKey": "app"}, {("Deployment", "cache")}),
    ("minPods", 3, {("Deployment", "cache")}),
    ("maxUnavailable", 2, {("Deployment", "cache"), ("PodDisruptionBudget", "cache")}),
    ("arena", "Pod", {("Deployment", "cache")}),
    ("nodeSelector", {}, {("Deployment", "cache")}),
    ("nodeSelector", {"pool": "big"}, {("Deployment", "cache")}),
    ("tolerations", [], {("Deployment", "cache")}),
    ("priorityClassName", "low", {("Deployment", "cache")}),
    ("priorityClassName", None, {("Deployment", "cache")}),
    ("podLabels", {"team": "b"}, {("Deployment", "cache")}),
    ("podLabels", {}, {("Deployment", "cache")}),
    ("podAnnotations", {}, {("Deployment", "cache")}),
    ("service", {"type": "NodePort", "port": 9602}, {("Service", "cache-rpc")}),
    ("service", {"type": "ClusterIP", "port": 9601}, {("Service", "cache-rpc"), ("NetworkPolicy", "cache")}),
    ("service", {"type": "LoadBalancer", "port": 9601, "nodePort": 30001}, {("Service", "cache-rpc")}),
    ("options", {"policy": "grit"}, {("Deployment", "cache")}),
    ("options", {}, {("Deployment", "cache")}),
    ("remote", {"url": "redis://elsewhere:6379"},
     {("Deployment", "cache"), ("NetworkPolicy", "cache"), ("NetworkPolicy", "cache-redis"), ("Service", "cache-redis"),
      ("StatefulSet", "cache-redis")}),
    ("remote", {"redis": {"image": "redis:8"}}, {("StatefulSet", "cache-redis")}),
    ("remote", {"redis": {"image": "redis:7", "resources": {"limits": {"cpu": "1", "memory": "2Gi"}}}},
     {("StatefulSet", "cache-redis")}),
]  # fmt: skip


def changed(before: dict[Any, Any], after: dict[Any, Any]) -> set[Any]:
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


def edit(cluster: Cluster, name: str, is_own: bool, **spec: Any) -> None:
    """Change fields as a user does. None removes one."""
    live = copy.deepcopy(cluster.kvcache(name, own=is_own))
    live["spec"] = {key: value for key, value in (live["spec"] | spec).items() if value is not None}
    cluster.server.store.update(live)


@pytest.mark.parametrize("name", ["published", "runtime", "own"])
def test_a_second_pass_writes_nothing(cluster: Cluster, name: str) -> None:
    """What is there is compared with what is wanted, although the API server fills in defaults and rewrites quantities."""
    made = cluster.make(kvcache(name))
    is_own = name == "own"
    assert cluster.passes(made["metadata"]["name"], own=is_own) == 2
    owners = {each["metadata"]["ownerReferences"][0]["uid"] for each in cluster.objects().values()}
    assert owners == {made["metadata"]["uid"]}
    assert cluster.status(made["metadata"]["name"], own=is_own)["ConfigValid"][0] == "True"


@pytest.mark.parametrize(("field", "value", "objects"), CHANGES)
def test_a_changed_field_changes_its_objects_alone(
    cluster: Cluster, field: str, value: Any, objects: set[tuple[str, str]]
) -> None:
    """And in the end they are as if the KVCache had always been so."""
    cluster.make(EVERYTHING)
    cluster.passes("cache", own=True)
    before = cluster.essence()
    edit(cluster, "cache", True, **{field: value})
    cluster.passes("cache", own=True)
    after = cluster.essence()
    assert changed(before, after) == objects
    cluster.server.store.delete("kvcaches.kvkern.io", "cache", "default")
    cluster.server.store.collect()
    assert not cluster.objects()
    new = copy.deepcopy(EVERYTHING)
    new["spec"] = {name: each for name, each in (new["spec"] | {field: value}).items() if each is not None}
    cluster.make(new)
    cluster.passes("cache", own=True)
    assert not changed(after, cluster.essence())


def test_it_converges_from_a_crash_at_every_write(cluster: Cluster) -> None:
    """The operator ends after its n-th write, once before and once after the server has carried it out."""
    cluster.make(EVERYTHING)
    cluster.passes("cache", own=True)
    wanted = cluster.essence()
    most = len(wanted) + 1
    for when in ("before", "after"):
        for number in range(most):
            cluster.server.store.delete("kvcaches.kvkern.io", "cache", "default")
            cluster.server.store.collect()
            cluster.make(EVERYTHING)
            first = len(cluster.server.writes)

            def crash(at: int, _verb: str, _object: Any, first: int = first, number: int = number) -> None:
                if at >= first + number:
                    raise ConnectionLost

            stop = cluster.server.on_write(crash, when)  # type: ignore[arg-type]
            assert cluster.one_pass("cache", own=True) is not None
            stop()
            cluster.passes("cache", own=True)
            assert not changed(wanted, cluster.essence()), (when, number)


@pytest.mark.parametrize("status", [409, 429, 500, 503, "close before", "close after"])
def test_it_converges_from_refusals(cluster: Cluster, status: Any) -> None:
    cluster.make(EVERYTHING)
    for verb in ("create", "get", "list", "patch"):
        cluster.server.fail_next(verb, "*", status, times=2)
    cluster.passes("cache", own=True, most=40)
    assert cluster.status("cache", own=True)["Degraded"] == ("True", "StoreNotReady"), "nobody runs the pods here"


def test_somebody_elses_object_is_not_touched(cluster: Cluster) -> None:
    theirs = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "cache-rpc", "namespace": "default"},
              "spec": {"selector": {"app": "theirs"}, "ports": [{"port": 80}]}}  # fmt: skip
    before = cluster.make(theirs)
    cluster.make(EVERYTHING)
    assert cluster.one_pass("cache", own=True) is not None
    assert cluster.objects()["Service", "cache-rpc"] == before
    assert ("Deployment", "cache") in cluster.objects()
    status = cluster.kvcache("cache", own=True)["status"]
    (degraded,) = (each for each in status["conditions"] if each["type"] == "Degraded")
    assert "belongs to somebody else" in degraded["message"]
    assert status["reason"] == "CannotWrite"


def test_what_others_change_is_put_right_and_what_they_add_stays(cluster: Cluster) -> None:
    cluster.make(EVERYTHING)
    cluster.passes("cache", own=True)
    wanted = cluster.essence()
    live = copy.deepcopy(cluster.objects()["Deployment", "cache"])
    live["spec"]["replicas"] = 7
    live["spec"]["template"]["spec"]["containers"][0]["image"] = "other:1"
    live["metadata"]["annotations"]["theirs"] = "stays"
    live["spec"]["template"]["metadata"]["annotations"]["kubectl.kubernetes.io/restartedAt"] = "now"
    cluster.server.store.update(live)
    cluster.passes("cache", own=True)
    metadata, spec = cluster.essence()["Deployment", "cache"]
    assert metadata["annotations"].pop("theirs") == "stays"
    assert spec["template"]["metadata"]["annotations"].pop("kubectl.kubernetes.io/restartedAt") == "now"
    assert (metadata, spec) == wanted["Deployment", "cache"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"memory": "100Mi"}, "give at least 512Mi"),
        ({"options": {"quota": ["nonsense"]}}, "quota"),
        ({"remote": {"url": "redis://:secret@host:6379"}}, "use urlSecretRef"),
        ({"remote": {"url": "no-url"}}, "spec.remote.url"),
        ({"options": {"persist": "all"}}, "there is no"),
        ({"env": [{"name": "KVKERN_DRAIN", "value": "soon"}]}, "drain"),
    ],
)
def test_a_bad_value_changes_nothing_and_is_named(cluster: Cluster, spec: dict[str, Any], words: str) -> None:
    cluster.make(own())
    cluster.passes("cache", own=True)
    before = cluster.essence()
    edit(cluster, "cache", True, **spec)
    cluster.passes("cache", own=True)
    assert cluster.essence() == before
    status = cluster.kvcache("cache", own=True)["status"]
    (valid,) = (each for each in status["conditions"] if each["type"] == "ConfigValid")
    assert (valid["status"], status["reason"]) == ("False", "Invalid")
    assert words in valid["message"]
    edit(cluster, "cache", True, memory="4Gi", options=None, remote=None, env=None)
    cluster.passes("cache", own=True)
    assert cluster.status("cache", own=True)["ConfigValid"] == ("True", "Valid")


def test_cache_pods_follow_the_nodes_of_the_workload(cluster: Cluster) -> None:
    def replicas() -> int:
        return int(cluster.objects()["Deployment", "cache"]["spec"]["replicas"])

    cluster.make(own())
    cluster.passes("cache", own=True)
    assert replicas() == 0
    assert cluster.status("cache", own=True)["WorkloadFound"] == ("False", "NoPods")
    for number, node in enumerate(("one", "one", "two", "")):
        cluster.engine(f"engine-{number}", node)
    cluster.passes("cache", own=True)
    assert replicas() == 2
    assert cluster.status("cache", own=True)["NodesCovered"] == ("False", "NodesWithoutCache")
    for number in range(4):
        cluster.server.store.delete("pods", f"engine-{number}", "default", grace_s=0)
    cluster.passes("cache", own=True)
    assert replicas() == 2, "a restart of the engines must not end their cache"
    cluster.time = "2026-01-01T00:06:00Z"
    cluster.passes("cache", own=True)
    assert replicas() == 0


def test_a_cache_pod_goes_first_only_while_its_node_has_no_engine(cluster: Cluster) -> None:
    cost = "controller.kubernetes.io/pod-deletion-cost"
    cluster.make(own())
    labels = {"kvcache.orchestration.aibrix.ai/name": "cache", "kvcache.orchestration.aibrix.ai/role": "cache"}
    pod = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "c", "image": "c:1"}]}}
    meta = {"name": "cache-5d4f", "namespace": "default"}
    spec = {"selector": {"matchLabels": labels}, "template": pod}
    made = cluster.make({"apiVersion": "apps/v1", "kind": "ReplicaSet", "metadata": meta, "spec": spec})
    owner = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "cache-5d4f", "uid": made["metadata"]["uid"]}
    for node in ("one", "two"):
        spec = {"nodeName": node, "containers": [{"name": "c", "image": "c:1"}]}
        metadata = {"name": f"cache-{node}", "namespace": "default", "labels": labels, "ownerReferences": [owner]}
        cluster.make({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    cluster.engine("engine-one", "one")
    cluster.passes("cache", own=True)

    def marked() -> list[str]:
        pods = cluster.server.store.list("pods", "default")
        return [pod["metadata"]["name"] for pod in pods if cost in pod["metadata"].get("annotations", {})]

    assert marked() == ["cache-two"]
    cluster.engine("engine-two", "two")
    cluster.passes("cache", own=True)
    assert marked() == []


def test_a_kvcache_leaves_the_pods_of_another_one_of_its_name_alone(cluster: Cluster) -> None:
    """One of each group. The first has the name; the second says so, marks nothing and ends nothing."""
    cluster.make(own())
    cluster.engine("engine", "one")
    cluster.passes("cache", own=True)
    labels = {"kvcache.orchestration.aibrix.ai/name": "cache", "kvcache.orchestration.aibrix.ai/role": "cache"}
    spec = {"nodeName": "one", "containers": [{"name": "kvcache", "image": "kvkern:1"}]}
    cluster.make({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "default", "labels": labels},
                  "spec": spec})  # fmt: skip
    theirs = kvcache("published")
    theirs["metadata"] |= {
        "name": "cache",
        "annotations": {"kvcache.orchestration.aibrix.ai/pod-affinity-workload": "x"},
    }
    cluster.make(theirs)
    cluster.engine("other", "two", workload="x")
    before = cluster.server.store.get("pods", "p", "default")
    assert cluster.one_pass("cache", own=False) is not None
    assert cluster.server.store.get("pods", "p", "default") == before
    status = cluster.status("cache", own=False)
    assert (status["Degraded"], status["Available"][0]) == (("True", "CannotWrite"), "False")


def test_a_workload_that_has_no_pods_for_a_while_changes_nothing(cluster: Cluster) -> None:
    """Its Deployment has the name that the KVCache says, and selects by other labels, as many do."""
    labels = {"app": "vllm", "model.aibrix.ai/name": "coder"}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "e", "image": "e:1"}]}}
    cluster.make({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "coder", "namespace": "default"},
                  "spec": {"replicas": 1, "selector": {"matchLabels": {"app": "vllm"}}, "template": template}})  # fmt: skip
    cluster.engine("engine", "one")
    cluster.make(own())
    cluster.passes("cache", own=True)
    before = cluster.objects()["Deployment", "cache"]["spec"]["template"]
    cluster.server.store.delete("pods", "engine", "default", grace_s=0)
    cluster.passes("cache", own=True)
    assert cluster.objects()["Deployment", "cache"]["spec"]["template"] == before
    assert cluster.status("cache", own=True)["WorkloadFound"] == ("False", "NoPods")


def test_a_workload_that_is_found_by_its_name_only(cluster: Cluster) -> None:
    """The annotation equals metadata.name of the engine's Deployment, but its pods have another label."""
    labels = {"model.aibrix.ai/name": "coder-33b"}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "e", "image": "e:1"}]}}
    cluster.make({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "coder", "namespace": "default"},
                  "spec": {"replicas": 1, "selector": {"matchLabels": labels}, "template": template}})  # fmt: skip
    cluster.engine("engine", "one", workload="coder-33b")
    cluster.make(own())
    cluster.passes("cache", own=True)
    assert cluster.status("cache", own=True)["WorkloadFound"] == ("True", "FoundByName")
    affinity = cluster.objects()["Deployment", "cache"]["spec"]["template"]["spec"]["affinity"]["podAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]
    (near,) = term["labelSelector"]["matchExpressions"]
    assert (near["key"], near["values"]) == ("model.aibrix.ai/name", ["coder-33b"])


def test_a_volume_for_etcd_remakes_the_stateful_set(cluster: Cluster) -> None:
    """Volumes of a StatefulSet cannot be changed. Its pods stay."""
    cluster.make(kvcache("published"))
    name = "deepseek-coder-7b-kvcache"
    cluster.passes(name, own=False)
    before = cluster.objects()["StatefulSet", f"{name}-etcd"]["metadata"]["uid"]
    edit(cluster, name, False, metadata={"etcd": {"storage": {"size": "1Gi"}}})
    cluster.passes(name, own=False)
    after = cluster.objects()["StatefulSet", f"{name}-etcd"]
    assert after["metadata"]["uid"] != before
    assert after["spec"]["volumeClaimTemplates"]


def test_what_the_published_operator_has_made_is_taken_over(cluster: Cluster) -> None:
    """Its Deployment and Services become ours, or go; so do its bare pods of etcd, in whose place a StatefulSet comes."""
    made = cluster.make(kvcache("published"))
    name, prefix = made["metadata"]["name"], "kvcache.orchestration.aibrix.ai"
    owner = {"apiVersion": made["apiVersion"], "kind": "KVCache", "name": name, "uid": made["metadata"]["uid"],
             "controller": True, "blockOwnerDeletion": True}  # fmt: skip

    def theirs(kind: str, called: str, role: str, spec: dict[str, Any], api: str = "v1") -> None:
        labels = {f"{prefix}/name": name} | ({f"{prefix}/role": role} if role else {})
        metadata = {"name": called, "namespace": "default", "labels": labels, "ownerReferences": [owner]}
        cluster.make({"apiVersion": api, "kind": kind, "metadata": metadata, "spec": spec})

    etcd = {f"{prefix}/name": name, f"{prefix}/role": "metadata"}
    client = [{"name": "etcd-for-vineyard-port", "port": 2379}]
    theirs("Pod", f"{name}-etcd-0", "metadata", {"containers": [{"name": "etcd", "image": "vineyardd:1"}]})
    theirs("Service", f"{name}-etcd-0", "metadata", {"selector": etcd, "ports": client})
    theirs("Service", f"{name}-etcd-service", "metadata", {"selector": etcd, "ports": client})
    theirs(
        "Service", f"{name}-rpc", "", {"selector": {f"{prefix}/name": name}, "ports": [{"name": "rpc", "port": 9600}]}
    )
    selector = {f"{prefix}/name": name}  # ours says more, and it cannot be changed
    pod = {"metadata": {"labels": selector}, "spec": {"containers": [{"name": "kvcache", "image": "vineyardd:1"}]}}
    theirs("Deployment", name, "cache", {"selector": {"matchLabels": selector}, "template": pod}, "apps/v1")

    cluster.passes(name, own=False)
    taken = cluster.essence()
    assert not [
        each for each in cluster.server.store.list("pods", "default") if each["metadata"]["name"] == f"{name}-etcd-0"
    ]
    cluster.server.store.delete("kvcaches.orchestration.aibrix.ai", name, "default")
    cluster.make(kvcache("published"))
    cluster.passes(name, own=False)
    assert taken == cluster.essence()


@pytest.mark.parametrize("plural", ["deployments.apps", "statefulsets.apps"])
def test_a_refusal_of_a_value_removes_nothing(cluster: Cluster, plural: str) -> None:
    """An object that cannot be as wanted stays as it is, unless it is a fixed field that is to change."""
    cluster.make(EVERYTHING)
    cluster.passes("cache", own=True)
    before = {key: each["metadata"]["uid"] for key, each in cluster.objects().items()}
    edit(cluster, "cache", True, imagePullPolicy="Never")
    cluster.server.fail_next("patch", plural, 422)
    assert cluster.one_pass("cache", own=True) is not None
    assert cluster.status("cache", own=True)["Degraded"] == ("True", "CannotWrite")
    cluster.passes("cache", own=True)
    assert before == {key: each["metadata"]["uid"] for key, each in cluster.objects().items()}


def test_writes_are_logged_by_the_double(cluster: Cluster) -> None:
    """The tests above count writes: this is one."""
    cluster.make(own())
    cluster.one_pass("cache", own=True)
    assert all(isinstance(write, Write) and "kvkern-operator" in write.user_agent for write in cluster.server.writes)
    assert cluster.server.writes
