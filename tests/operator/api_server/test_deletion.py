"""Deletion: finalizers, garbage collection, pods, namespaces and budgets."""

from __future__ import annotations

from typing import Any

from tests.operator.api_server.client import MAPS, PODS, Client, causes, config_map, exists, pod


def owner_of(obj: Any, **more: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "name": obj["metadata"]["name"],
        "uid": obj["metadata"]["uid"],
        **more,
    }


def test_finalizers_hold_an_object(call: Client) -> None:
    call.ok("POST", MAPS, config_map(finalizers=["example.com/x"]))
    marked = call.ok("DELETE", f"{MAPS}/a")
    assert marked["metadata"]["deletionTimestamp"]
    assert causes(
        call(
            "PATCH",
            f"{MAPS}/a",
            {"metadata": {"finalizers": ["example.com/x", "b.c/d"]}},
            "application/merge-patch+json",
        )
    )
    call.merge(f"{MAPS}/a", {"metadata": {"finalizers": []}})
    assert not exists(call, "a")


def test_preconditions(call: Client) -> None:
    made = call.ok("POST", MAPS, config_map())
    for name in ("uid", "resourceVersion"):
        assert call("DELETE", f"{MAPS}/a", {"preconditions": {name: "1"}})[0] == 409
        assert exists(call, "a")
    wanted = {name: made["metadata"][name] for name in ("uid", "resourceVersion")}
    assert call.ok("DELETE", f"{MAPS}/a", {"preconditions": wanted})["status"] == "Success"


def test_dependents_go_with_their_last_owner(call: Client) -> None:
    one, two = (call.ok("POST", MAPS, config_map(name)) for name in ("one", "two"))
    call.ok("POST", MAPS, config_map("both", ownerReferences=[owner_of(one), owner_of(two)]))
    call.ok("POST", MAPS, config_map("single", ownerReferences=[owner_of(one)]))
    call.ok("DELETE", f"{MAPS}/one")
    assert not exists(call, "single")
    assert call.ok("GET", f"{MAPS}/both")["metadata"]["ownerReferences"] == [owner_of(two)]
    call.ok("DELETE", f"{MAPS}/two", propagationPolicy="Orphan")
    assert "ownerReferences" not in call.ok("GET", f"{MAPS}/both")["metadata"]


def test_an_owner_that_does_not_exist(call: Client) -> None:
    lost = {"metadata": {"name": "x", "uid": "0"}}
    call.ok("POST", MAPS, config_map("lost", ownerReferences=[owner_of(lost)]))
    assert not exists(call, "lost")
    call.server.store.collect_at_once = False
    call.ok("POST", MAPS, config_map("lost", ownerReferences=[owner_of(lost)]))
    assert exists(call, "lost")
    call.server.store.collect()
    assert not exists(call, "lost")


def test_foreground_deletion_waits_for_blocking_dependents(call: Client) -> None:
    one = call.ok("POST", MAPS, config_map("one"))
    holding = {"ownerReferences": [owner_of(one, blockOwnerDeletion=True)], "finalizers": ["example.com/x"]}
    call.ok("POST", MAPS, config_map("held", **holding))
    call.ok("DELETE", f"{MAPS}/one", {"propagationPolicy": "Foreground"})
    assert call.ok("GET", f"{MAPS}/one")["metadata"]["finalizers"] == ["foregroundDeletion"]
    assert call.ok("GET", f"{MAPS}/held")["metadata"]["deletionTimestamp"]
    call.merge(f"{MAPS}/held", {"metadata": {"finalizers": None}})
    assert (exists(call, "one"), exists(call, "held")) == (False, False)


def test_a_pod_on_a_node_terminates(call: Client) -> None:
    call.ok("POST", PODS, pod())
    call.ok("POST", f"{PODS}/p/binding", {"target": {"name": "n"}})
    assert call("POST", f"{PODS}/p/binding", {"target": {"name": "m"}})[0] == 409
    assert call.ok("DELETE", f"{PODS}/p")["metadata"]["deletionGracePeriodSeconds"] == 30
    call.ok("DELETE", f"{PODS}/p", gracePeriodSeconds=0)
    assert call("GET", f"{PODS}/p")[0] == 404


def test_a_namespace_takes_its_objects_with_it(call: Client) -> None:
    call.ok("POST", "/api/v1/namespaces", {"metadata": {"name": "n"}})
    maps = "/api/v1/namespaces/n/configmaps"
    call.ok("POST", maps, config_map(finalizers=["example.com/x"]))
    call.ok("DELETE", "/api/v1/namespaces/n")
    assert call.ok("GET", "/api/v1/namespaces/n")["status"]["phase"] == "Terminating"
    assert call("POST", maps, config_map("b"))[0] == 403
    call.merge(f"{maps}/a", {"metadata": {"finalizers": None}})
    assert call("GET", "/api/v1/namespaces/n")[0] == 404


def test_deletecollection_takes_what_the_selector_names(call: Client) -> None:
    for name in ("a", "b"):
        call.ok("POST", MAPS, config_map(name, labels={"n": name}))
    call.ok("DELETE", MAPS, labelSelector="n=a")
    assert (exists(call, "a"), exists(call, "b")) == (False, True)


def test_eviction_respects_the_budget(call: Client) -> None:
    budgets = "/apis/policy/v1/namespaces/default/poddisruptionbudgets"
    for name in ("p", "q"):
        call.ok("POST", PODS, pod(name, labels={"app": "a"}))
        status = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
        call.merge(f"{PODS}/{name}/status", {"status": status})
    call.ok(
        "POST",
        budgets,
        {"metadata": {"name": "b"}, "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": "a"}}}},
    )
    code, status = call("POST", f"{PODS}/p/eviction", {})
    assert (code, status["details"]["causes"][0]["reason"]) == (429, "DisruptionBudget")
    healthy = {
        "observedGeneration": 1,
        "disruptionsAllowed": 1,
        "currentHealthy": 2,
        "desiredHealthy": 1,
        "expectedPods": 2,
    }
    call.merge(f"{budgets}/b/status", {"status": healthy})
    call.ok("POST", f"{PODS}/p/eviction", {})
    assert call("POST", f"{PODS}/q/eviction", {})[0] == 429
