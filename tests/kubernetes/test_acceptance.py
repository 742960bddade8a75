"""What users do with KVCaches, by kubectl, against an API server and a running operator. See docs/kubernetes.md.

    make test-kubernetes                the API server that KUBECONFIG names
    pytest tests/kubernetes             the double of tests/operator

It needs no kubelet, no scheduler and no nodes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import pytest
import yaml

from tests.kubernetes.conftest import Cluster, KubectlError, operator
from tests.operator.manifests import EXAMPLES, kvcache
from tests.operator.test_reconcile import CHANGES, EVERYTHING

PUBLISHED, OWN = "kvcache.orchestration.aibrix.ai", "kvcache.kvkern.io"
PUBLISHED_NAME = "deepseek-coder-7b-kvcache"
MADE = ("serviceaccounts", "services", "networkpolicies", "poddisruptionbudgets", "statefulsets", "deployments")


def here(cluster: Cluster, manifest: dict[str, Any]) -> dict[str, Any]:
    """Return the object for the test's namespace."""
    metadata = {
        key: value for key, value in manifest["metadata"].items() if key not in ("namespace", "uid", "generation")
    }
    return manifest | {"metadata": metadata}


def reason(cluster: Cluster, kind: str, name: str) -> str:
    found = cluster.get(kind, name)
    if found is None or found.get("status", {}).get("observedGeneration") != found["metadata"]["generation"]:
        return ""
    return str(found["status"]["reason"])


def owned(cluster: Cluster, name: str) -> list[str]:
    """Return the objects that belong to a KVCache."""
    return [
        f"{plural}/{each['metadata']['name']}"
        for plural in MADE
        for each in cluster.get(plural)
        if any(
            owner["name"] == name and owner["kind"] == "KVCache"
            for owner in each["metadata"].get("ownerReferences", ())
        )
    ]


def own(**spec: Any) -> dict[str, Any]:
    return {"apiVersion": "kvkern.io/v1alpha1", "kind": "KVCache", "metadata": {"name": "cache"},
            "spec": {"memory": "4Gi", "workload": {"name": "coder"}} | spec}  # fmt: skip


def test_the_published_files(cluster: Cluster) -> None:
    """The engine's Deployment and Service and the KVCache, as they are but for the images, in this order."""
    with operator(cluster):
        engine = list(yaml.safe_load_all((EXAMPLES / "published_engine.yaml").read_text()))
        cluster.apply([here(cluster, each) for each in engine])
        cluster.apply(here(cluster, kvcache("published")))
        cluster.eventually(lambda: cluster.get("deployment", PUBLISHED_NAME), "the Deployment")
        for kind, name in (
            ("statefulset", f"{PUBLISHED_NAME}-etcd"), ("service", f"{PUBLISHED_NAME}-rpc"),
            ("service", f"{PUBLISHED_NAME}-etcd-service"),
        ):  # fmt: skip
            cluster.eventually(lambda kind=kind, name=name: cluster.get(kind, name), name)
        (port,) = cluster.get("service", f"{PUBLISHED_NAME}-rpc")["spec"]["ports"]
        assert (port["port"], port["targetPort"]) == (9600, 9600)
        if cluster.real:  # nobody schedules the Deployment's pods here
            cluster.engine("engine", cluster.nodes[0], "deepseek-coder-7b-instruct")
        cluster.eventually(lambda: reason(cluster, PUBLISHED, PUBLISHED_NAME) == "Ready", "Ready")
        table = cluster.kubectl("get", PUBLISHED, "-n", cluster.namespace)
        assert table.split("\n")[1].split()[:4] == [PUBLISHED_NAME, "True", "1", "1"]


@pytest.mark.parametrize("name", ["runtime", "own"])
def test_the_other_forms(cluster: Cluster, name: str) -> None:
    manifest = here(cluster, kvcache(name))
    kind = OWN if name == "own" else PUBLISHED
    with operator(cluster):
        cluster.apply(manifest)
        cluster.engine("engine-a", cluster.nodes[0], "deepseek-coder-7b-instruct")
        cluster.engine("engine-b", cluster.nodes[1], "deepseek-coder-7b-instruct")
        cluster.eventually(lambda: reason(cluster, kind, manifest["metadata"]["name"]) == "Ready", "Ready")
        status = cluster.get(kind, manifest["metadata"]["name"])["status"]
        assert (status["ready"], status["desired"]) == (2, 2)
        assert sorted(each["node"] for each in status["nodes"]) == cluster.nodes


def test_every_field_changes_what_it_says(cluster: Cluster) -> None:
    """One after the other, on one KVCache."""
    with operator(cluster):
        cluster.apply(here(cluster, EVERYTHING))
        cluster.eventually(lambda: len(owned(cluster, "cache")) >= 9, "the objects")
        for field, value, objects in CHANGES:
            spec = {key: each for key, each in (EVERYTHING["spec"] | {field: value}).items() if each is not None}
            before = {name: _generation(cluster, *name) for name in objects}
            cluster.apply(here(cluster, EVERYTHING | {"spec": spec}))
            cluster.eventually(
                lambda before=before: all(_generation(cluster, *name) != old for name, old in before.items()),
                f"{field}={value}",
            )
            cluster.apply(here(cluster, EVERYTHING))
            cluster.eventually(lambda: reason(cluster, OWN, "cache"), "the change back")


def _generation(cluster: Cluster, kind: str, name: str) -> str:
    found = cluster.get(kind, name)
    if found is None:
        return ""
    return str(found["metadata"].get("generation") or found["metadata"]["resourceVersion"]) + found["metadata"]["uid"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cpu": "two"}, "spec.cpu"),
        ({"memory": "4 GB"}, "spec.memory"),
        ({"imagePullPolicy": "Sometimes"}, "spec.imagePullPolicy"),
        ({"minPods": -1}, "spec.minPods"),
        ({"arena": "Disk"}, "spec.arena"),
        ({"service": {"type": "Magic"}}, "spec.service.type"),
        ({"service": {"port": 70000}}, "spec.service.port"),
        ({"options": {"policy": "random"}}, "spec.options.policy"),
        ({"options": {"fair": "yes"}}, "spec.options.fair"),
        ({"workload": {}}, "name"),
        ({"env": [{"value": "x"}]}, "name"),
    ],
)
def test_a_bad_value_is_refused_by_the_schema(cluster: Cluster, change: dict[str, Any], words: str) -> None:
    with pytest.raises(KubectlError) as refused:
        cluster.apply(own(**change))
    assert words in str(refused.value)
    assert cluster.get(OWN, "cache") is None


def test_a_value_that_no_schema_can_refuse_is_named(cluster: Cluster) -> None:
    with operator(cluster):
        cluster.apply(own(options={"quota": ["nonsense"]}))
        cluster.eventually(lambda: reason(cluster, OWN, "cache") == "Invalid", "Invalid")
        assert not owned(cluster, "cache")
        cluster.apply(own())
        cluster.eventually(lambda: owned(cluster, "cache"), "the objects")


def test_a_name_that_is_taken(cluster: Cluster) -> None:
    theirs = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "cache-rpc"},
              "spec": {"selector": {"app": "theirs"}, "ports": [{"port": 80}]}}  # fmt: skip
    cluster.apply(theirs)
    with operator(cluster):
        cluster.apply(own())
        cluster.eventually(lambda: reason(cluster, OWN, "cache") == "CannotWrite", "CannotWrite")
        assert cluster.get("service", "cache-rpc")["spec"]["selector"] == {"app": "theirs"}
        cluster.kubectl("delete", "service", "cache-rpc", "-n", cluster.namespace)
        cluster.eventually(lambda: "services/cache-rpc" in owned(cluster, "cache"), "our own service")


def test_rendered_objects_apply(cluster: Cluster) -> None:
    """Without an operator. Odd texts arrive as they are: readers of YAML do not agree on what a number is."""
    odd = [
        "08",
        "7e5",
        "1e3",
        "n",
        "Y",
        "yes",
        "0o17",
        "+1e3",
        "8E_1",
        "12:30",
        "2024-01-01",
        "0x10",
        "null",
        "~",
        ".inf",
        "=",
        "",
    ]
    env = [{"name": f"ODD_{number}", "value": value} for number, value in enumerate(odd)]
    (cluster.folder / "kvcache.yaml").write_text(json.dumps(own(env=env)))
    version = json.loads(cluster.kubectl("get", "--raw", "/version"))["gitVersion"].split("+")[0]
    command = [sys.executable, "-m", "kvkern", "operator", "render", "--kubernetes", version, "-f", "kvcache.yaml"]
    rendered = subprocess.run(
        command, cwd=cluster.folder, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    cluster.kubectl("apply", "-n", cluster.namespace, "-f", "-", text=rendered.replace("namespace: default", ""))
    (container,) = cluster.get("deployment", "cache")["spec"]["template"]["spec"]["containers"]
    found = {each["name"]: each.get("value", "") for each in container["env"]}
    assert [found[each["name"]] for each in env] == odd


def test_what_others_change_is_put_right(cluster: Cluster) -> None:
    with operator(cluster):
        cluster.apply(own(minPods=1))
        cluster.eventually(lambda: cluster.get("deployment", "cache"), "the Deployment")
        cluster.kubectl("scale", "deployment", "cache", "-n", cluster.namespace, "--replicas=5")
        cluster.eventually(lambda: cluster.get("deployment", "cache")["spec"]["replicas"] == 1, "one replica")


def test_at_rest_nothing_is_written(cluster: Cluster) -> None:
    """Whatever this API server fills in, rewrites or drops: a pass that has nothing to change changes nothing."""
    cluster.engine("engine", cluster.nodes[0])

    def versions() -> dict[str, str]:
        """Of what no controller of Kubernetes writes, and generations of the rest."""
        found = {}
        for plural in MADE:
            for each in cluster.get(plural):
                key = "generation" if "generation" in each["metadata"] else "resourceVersion"
                found[f"{plural}/{each['metadata']['name']}"] = str(each["metadata"][key])
        return found | {"kvcache": cluster.get(OWN, "cache")["metadata"]["resourceVersion"]}

    with operator(cluster):
        cluster.apply(here(cluster, EVERYTHING | {"spec": _anywhere(EVERYTHING["spec"])}))
        cluster.eventually(lambda: reason(cluster, OWN, "cache") == "Ready", "Ready")
        time.sleep(5)
        before = versions()
        for number in range(4):  # each causes a pass
            cluster.kubectl("annotate", "pod", "engine", f"look={number}", "--overwrite", "-n", cluster.namespace)
            time.sleep(2)
        assert versions() == before


def test_deletion_leaves_nothing(cluster: Cluster) -> None:
    """Kubernetes' garbage collector alone does it: no operator runs any more."""
    with operator(cluster):
        cluster.apply(here(cluster, EVERYTHING))
        cluster.eventually(lambda: len(owned(cluster, "cache")) >= 9, "the objects")
    cluster.kubectl("delete", OWN, "cache", "-n", cluster.namespace)
    cluster.eventually(lambda: not owned(cluster, "cache"), "the garbage collector")
    assert cluster.get(OWN, "cache") is None


def _anywhere(spec: dict[str, Any]) -> dict[str, Any]:
    """Leave out what only some clusters have."""
    return {name: each for name, each in spec.items() if name not in ("nodeSelector", "priorityClassName")}


def test_an_operator_that_is_killed_again_and_again(cluster: Cluster) -> None:
    cluster.engine("engine", cluster.nodes[0])
    cluster.apply(here(cluster, EVERYTHING | {"spec": _anywhere(EVERYTHING["spec"])}))
    for after_s in (1.5, 2.0, 2.5, 3.0):
        with operator(cluster) as process:
            time.sleep(after_s)
            process.kill()
            process.wait()
    with operator(cluster):
        cluster.eventually(lambda: reason(cluster, OWN, "cache") == "Ready", "Ready")
        assert len(owned(cluster, "cache")) == 9


def test_of_two_operators_one_works(cluster: Cluster) -> None:
    """The second takes over when the first is killed, within the lease's duration and a little."""

    def holder() -> str:
        return str((cluster.get("lease", "kvkern-operator") or {}).get("spec", {}).get("holderIdentity", ""))

    with operator(cluster, "one") as first:
        one = cluster.eventually(holder, "a leader")
        with operator(cluster, "two"):
            cluster.apply(own(minPods=1))
            cluster.eventually(lambda: cluster.get("deployment", "cache"), "the Deployment")
            assert holder() == one
            first.kill()
            first.wait()
            cluster.eventually(lambda: holder() not in ("", one), "another leader")
            cluster.apply(own(minPods=2))
            cluster.eventually(lambda: cluster.get("deployment", "cache")["spec"]["replicas"] == 2, "two replicas")
