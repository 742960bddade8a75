"""Patches and server-side apply."""

from __future__ import annotations

from tests.operator.api_server.client import (
    DEPLOYMENTS,
    MAPS,
    WIDGETS,
    Client,
    apply,
    config_map,
    deployment,
    widget,
)


def test_json_and_merge_patches(call: Client) -> None:
    call.ok("POST", MAPS, config_map())
    operations = [{"op": "test", "path": "/data/a", "value": "b"}, {"op": "add", "path": "/data/x~1y", "value": "z"}]
    kind = "application/json-patch+json"
    assert call.ok("PATCH", f"{MAPS}/a", operations, kind)["data"] == {"a": "b", "x/y": "z"}
    assert call("PATCH", f"{MAPS}/a", [{"op": "test", "path": "/data/a", "value": "q"}], kind)[0] == 422
    assert call("PATCH", f"{MAPS}/a", [{"op": "remove", "path": "/data/q"}], kind)[0] == 422
    assert call.merge(f"{MAPS}/a", {"data": {"x/y": None}})["data"] == {"a": "b"}
    assert call("PATCH", f"{MAPS}/a", {}, "application/json")[0] == 415


def test_strategic_patches_merge_lists_by_their_keys(call: Client) -> None:
    call.ok("POST", DEPLOYMENTS, deployment(env=[{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]))
    container = {
        "name": "c",
        "env": [{"name": "B", "$patch": "delete"}, {"name": "C", "value": "3"}],
        "ports": [{"containerPort": 1}],
    }
    patch = {
        "spec": {
            "template": {"spec": {"containers": [container]}},
            "strategy": {"$retainKeys": ["type"], "type": "Recreate"},
        }
    }
    spec = call.ok("PATCH", f"{DEPLOYMENTS}/d", patch, "application/strategic-merge-patch+json")["spec"]
    found = spec["template"]["spec"]["containers"][0]
    assert (found["env"], found["image"]) == (
        [{"name": "A", "value": "1"}, {"name": "C", "value": "3"}],
        "example.com/i:1",
    )
    assert spec["strategy"] == {"type": "Recreate"}
    order = {"$setElementOrder/containers": [{"name": "x"}, {"name": "c"}], "containers": [{"name": "x", "image": "i"}]}
    spec = call.ok(
        "PATCH", f"{DEPLOYMENTS}/d", {"spec": {"template": {"spec": order}}}, "application/strategic-merge-patch+json"
    )["spec"]
    assert [c["name"] for c in spec["template"]["spec"]["containers"]] == ["x", "c"]


def test_server_side_apply_owns_what_it_set(call: Client) -> None:
    env = [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]
    applied = {"apiVersion": "apps/v1", "kind": "Deployment", **deployment(env=env)}
    code, made = apply(call, f"{DEPLOYMENTS}/d", applied)
    assert (code, made["metadata"]["managedFields"][0]["operation"]) == (201, "Apply")
    call.merge(f"{DEPLOYMENTS}/d", {"spec": {"replicas": 7}})
    applied = {"apiVersion": "apps/v1", "kind": "Deployment", **deployment(env=env[1:])}
    code, changed = apply(call, f"{DEPLOYMENTS}/d", applied)
    assert code == 200
    assert changed["spec"]["template"]["spec"]["containers"][0]["env"] == env[1:]
    assert changed["spec"]["replicas"] == 7  # another's field
    applied["spec"]["replicas"] = 2
    code, status = apply(call, f"{DEPLOYMENTS}/d", applied)
    assert (code, status["details"]["causes"][0]["field"]) == (409, ".spec.replicas")
    assert apply(call, f"{DEPLOYMENTS}/d", applied, force="true")[1]["spec"]["replicas"] == 2
    revision = call.ok("GET", f"{DEPLOYMENTS}/d")["metadata"]["resourceVersion"]
    assert apply(call, f"{DEPLOYMENTS}/d", applied)[1]["metadata"]["resourceVersion"] == revision
    del applied["spec"]["replicas"]
    assert apply(call, f"{DEPLOYMENTS}/d", applied)[1]["spec"]["replicas"] == 1  # nobody owns it: the default


def test_apply_to_a_custom_resource_merges_keyed_lists(widgets: Client) -> None:
    body = {"apiVersion": "example.com/v1", "kind": "Widget", **widget(items=[{"name": "a", "n": 1}])}
    assert apply(widgets, f"{WIDGETS}/w", body)[0] == 201
    other = {**body, "spec": {"items": [{"name": "b", "n": 2}]}}
    assert apply(widgets, f"{WIDGETS}/w", other, "you")[1]["spec"]["items"] == [
        {"name": "a", "n": 1},
        {"name": "b", "n": 2},
    ]
    assert apply(widgets, f"{WIDGETS}/w", {**body, "spec": {}})[1]["spec"]["items"] == [{"name": "b", "n": 2}]
    assert apply(widgets, f"{WIDGETS}/w/status", {**body, "spec": {}, "status": {"x": 1}})[1]["status"] == {"x": 1}
