"""The double of the Kubernetes API server: over its socket, as a client sees it, and its faults."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest

from tests.operator.api_server import ApiServer, ConnectionLost, running_api_server
from tests.operator.api_server.cel_rules import escape, evaluate
from tests.operator.api_server.quantity import canonical

PODS = "/api/v1/namespaces/default/pods"
SERVICES = "/api/v1/namespaces/default/services"
MAPS = "/api/v1/namespaces/default/configmaps"
DEPLOYMENTS = "/apis/apps/v1/namespaces/default/deployments"
SETS = "/apis/apps/v1/namespaces/default/statefulsets"
WIDGETS = "/apis/example.com/v1/namespaces/default/widgets"
DEFINITIONS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
Answer = tuple[int, Any]


class Client:
    """A client that hides nothing: one connection per request."""

    def __init__(self, server: ApiServer, agent: str = "tester/1") -> None:
        self.server, self.agent = server, agent
        self.headers: dict[str, str] = {}

    def __call__(
        self, method: str, path: str, body: Any = None, kind: str = "application/json", **query: Any
    ) -> Answer:
        connection = http.client.HTTPConnection(urlsplit(self.server.url).netloc, timeout=10)
        headers = {"User-Agent": self.agent, "Content-Type": kind}
        content = None if body is None else json.dumps(body)
        connection.request(method, f"{path}?{urlencode(query)}" if query else path, content, headers)
        response = connection.getresponse()
        self.headers = dict(response.headers)
        answer = json.loads(response.read())
        connection.close()
        return response.status, answer

    def ok(self, method: str, path: str, body: Any = None, kind: str = "application/json", **query: Any) -> Any:
        code, answer = self(method, path, body, kind, **query)
        assert code in (200, 201), answer
        return answer

    def merge(self, path: str, patch: Any, **query: Any) -> Any:
        return self.ok("PATCH", path, patch, "application/merge-patch+json", **query)

    def watch(self, path: str, count: int, **query: Any) -> list[Any]:
        """Return the next `count` events, or fewer if the stream ends."""
        connection = http.client.HTTPConnection(urlsplit(self.server.url).netloc, timeout=10)
        connection.request("GET", f"{path}?{urlencode({'watch': 'true', 'timeoutSeconds': 5, **query})}")
        response = connection.getresponse()
        events = []
        while len(events) < count and (line := response.readline()):
            events.append(json.loads(line))
        connection.close()
        return events


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with running_api_server() as running:
        yield running


@pytest.fixture
def call(server: ApiServer) -> Client:
    return Client(server)


def config_map(name: str = "a", **meta: Any) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, **meta}, "data": {"a": "b"}}


def pod_template(**container: Any) -> dict[str, Any]:
    spec = {"containers": [{"name": "c", "image": "example.com/i:1", **container}]}
    return {"metadata": {"labels": {"app": "a"}}, "spec": spec}


def pod(name: str = "p", **meta: Any) -> dict[str, Any]:
    return {"metadata": {"name": name, **meta}, "spec": pod_template()["spec"]}


def deployment(name: str = "d", **container: Any) -> dict[str, Any]:
    selector = {"matchLabels": {"app": "a"}}
    return {"metadata": {"name": name}, "spec": {"selector": selector, "template": pod_template(**container)}}


def definition(spec: dict[str, Any] | None = None, subresources: bool = True) -> dict[str, Any]:
    properties = spec or {
        "size": {"type": "integer", "default": 3, "minimum": 1},
        "mode": {"type": "string", "enum": ["a", "b"]},
        "port": {"x-kubernetes-int-or-string": True},
        "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
        "fixed": {"type": "string", "x-kubernetes-validations": [{"rule": "self == oldSelf", "message": "is fixed"}]},
        "dash-ed": {"type": "string"},
        "items": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {"name": {"type": "string"}, "n": {"type": "integer"}},
            },
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["name"],
        },
    }
    rules = [] if spec else [{"rule": "self.size < 10 || self.mode == 'b'", "message": "needs mode b"}]
    root = {
        "type": "object",
        "properties": {
            "spec": {"type": "object", "properties": properties, "x-kubernetes-validations": rules},
            "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
        },
    }
    version: dict[str, Any] = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": root}}
    version["additionalPrinterColumns"] = [{"name": "Size", "type": "integer", "jsonPath": ".spec.size"}]
    if subresources:
        version["subresources"] = {"status": {}}
    names = {"plural": "widgets", "kind": "Widget", "shortNames": ["wd"]}
    spec_of_all = {"group": "example.com", "scope": "Namespaced", "names": names, "versions": [version]}
    return {"metadata": {"name": "widgets.example.com"}, "spec": spec_of_all}


def widget(**spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": "w"}, "spec": spec}


@pytest.fixture
def widgets(call: Client) -> Client:
    call.ok("POST", DEFINITIONS, definition())
    return call


def causes(answer: Answer) -> list[tuple[str, str]]:
    assert (answer[0], answer[1]["reason"]) == (422, "Invalid"), answer
    return [(cause["field"], cause["reason"]) for cause in answer[1]["details"]["causes"]]


# Discovery


def test_discovery_lists_resources_with_their_subresources(call: Client) -> None:
    assert call.ok("GET", "/version")["gitVersion"] == "v1.30.0"
    assert call.ok("GET", "/api")["versions"] == ["v1"]
    core = {r["name"]: r for r in call.ok("GET", "/api/v1")["resources"]}
    assert {"pods", "pods/status", "pods/eviction", "nodes/status", "secrets"} <= core.keys()
    assert (core["nodes"]["namespaced"], core["pods"]["shortNames"]) == (False, ["po"])
    groups = {g["name"] for g in call.ok("GET", "/apis")["groups"]}
    assert {"apps", "policy", "networking.k8s.io", "coordination.k8s.io", "apiextensions.k8s.io"} <= groups
    assert call("GET", "/apis/example.com/v1")[0] == 404


def test_a_definition_serves_its_group_at_once(call: Client) -> None:
    made = call.ok("POST", DEFINITIONS, definition())
    assert {c["type"]: c["status"] for c in made["status"]["conditions"]} == {
        "NamesAccepted": "True",
        "Established": "True",
    }
    names = [r["name"] for r in call.ok("GET", "/apis/example.com/v1")["resources"]]
    assert names == ["widgets", "widgets/status"]
    call.ok("POST", WIDGETS, widget())
    call.ok("DELETE", f"{DEFINITIONS}/widgets.example.com")
    assert call("GET", WIDGETS)[0] == 404
    assert call("GET", "/apis/example.com/v1")[0] == 404


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"a": {}}, "spec.versions[0].schema.openAPIV3Schema.properties[spec].properties[a].type"),
        (
            {"a": {"type": "integer", "default": "x"}},
            "spec.versions[0].schema.openAPIV3Schema.properties[spec].properties[a].default",
        ),
        (
            {"a": {"type": "string", "x-kubernetes-validations": [{"rule": "self =="}]}},
            "spec.versions[0].schema.openAPIV3Schema.properties[spec].properties[a].x-kubernetes-validations[0].rule",
        ),
    ],
)
def test_a_wrong_definition_is_refused(call: Client, spec: dict[str, Any], field: str) -> None:
    assert [name for name, _ in causes(call("POST", DEFINITIONS, definition(spec)))] == [field]


# Metadata and verbs


def test_create_sets_metadata_and_refuses_a_second(call: Client) -> None:
    made = call.ok("POST", DEPLOYMENTS, deployment())
    meta = made["metadata"]
    assert (meta["generation"], meta["namespace"], len(meta["uid"])) == (1, "default", 36)
    code, status = call("POST", DEPLOYMENTS, deployment())
    assert (code, status["reason"], status["details"]["kind"]) == (409, "AlreadyExists", "deployments")
    assert status["message"] == 'deployments.apps "d" already exists'
    assert call("POST", DEPLOYMENTS, {**deployment("e"), "kind": "Pod"})[0] == 400
    assert call("POST", "/api/v1/namespaces/none/pods", pod())[1]["message"] == 'namespaces "none" not found'


def test_generate_name_makes_distinct_names(call: Client) -> None:
    body = {"metadata": {"generateName": "a-"}}
    names = {call.ok("POST", MAPS, body)["metadata"]["name"] for _ in range(5)}
    assert len(names) == 5
    assert all(len(name) == 7 for name in names)


def test_a_stale_revision_is_a_conflict(call: Client) -> None:
    old = call.ok("POST", MAPS, config_map())
    new = call.ok("PUT", f"{MAPS}/a", {**old, "data": {"a": "c"}})
    assert int(new["metadata"]["resourceVersion"]) > int(old["metadata"]["resourceVersion"])
    code, status = call("PUT", f"{MAPS}/a", {**old, "data": {"a": "d"}})
    assert (code, status["reason"]) == (409, "Conflict")
    assert call.ok("PUT", f"{MAPS}/a", config_map())["data"] == {"a": "b"}  # without a revision
    stale = {"metadata": {"resourceVersion": old["metadata"]["resourceVersion"]}, "data": {"a": "e"}}
    assert call("PATCH", f"{MAPS}/a", stale, "application/merge-patch+json")[0] == 409


def test_an_update_without_a_change_makes_no_revision(call: Client, server: ApiServer) -> None:
    old = call.ok("POST", DEPLOYMENTS, deployment())
    revision = server.store.objects.revision
    assert call.ok("PUT", f"{DEPLOYMENTS}/d", old)["metadata"]["resourceVersion"] == old["metadata"]["resourceVersion"]
    assert call.ok("PUT", f"{DEPLOYMENTS}/d", deployment())["metadata"]["generation"] == 1
    assert server.store.objects.revision == revision


def test_generation_counts_changes_of_the_spec_alone(widgets: Client) -> None:
    widgets.ok("POST", WIDGETS, {**widget(), "status": {"a": 1}})
    assert "status" not in widgets.ok("GET", f"{WIDGETS}/w")
    assert widgets.merge(f"{WIDGETS}/w", {"metadata": {"labels": {"a": "b"}}})["metadata"]["generation"] == 1
    assert widgets.merge(f"{WIDGETS}/w", {"spec": {"size": 4}, "status": {"a": 1}})["metadata"]["generation"] == 2
    changed = widgets.merge(f"{WIDGETS}/w/status", {"spec": {"size": 5}, "status": {"a": 2}})
    assert (changed["spec"]["size"], changed["status"], changed["metadata"]["generation"]) == (4, {"a": 2}, 2)


def test_dry_run_writes_nothing(call: Client) -> None:
    assert call.ok("POST", SERVICES, {"metadata": {"name": "s"}, "spec": {"ports": [{"port": 80}]}}, dryRun="All")[
        "spec"
    ]["clusterIP"]
    assert call("GET", f"{SERVICES}/s")[0] == 404
    call.ok("POST", MAPS, config_map())
    assert call.merge(f"{MAPS}/a", {"data": {"a": "c"}}, dryRun="All")["data"] == {"a": "c"}
    call.ok("DELETE", f"{MAPS}/a", dryRun="All")
    assert call.ok("GET", f"{MAPS}/a")["data"] == {"a": "b"}


def test_lists_select_and_page(call: Client) -> None:
    for i in range(5):
        call.ok("POST", MAPS, config_map(f"m{i}", labels={"n": str(i), "odd": str(i % 2)}))
    names = lambda found: [o["metadata"]["name"] for o in found["items"]]  # noqa: E731
    assert names(call.ok("GET", MAPS, labelSelector="odd=1")) == ["m1", "m3"]
    assert names(call.ok("GET", MAPS, labelSelector="n in (0,4),odd!=1")) == ["m0", "m4"]
    assert names(call.ok("GET", MAPS, labelSelector="!n")) == []
    assert names(call.ok("GET", "/api/v1/configmaps", fieldSelector="metadata.name=m2")) == ["m2"]
    assert call("GET", MAPS, fieldSelector="spec.size=1")[0] == 400
    first = call.ok("GET", MAPS, limit=2)
    call.ok("DELETE", f"{MAPS}/m4")
    second = call.ok("GET", MAPS, limit=2, **{"continue": first["metadata"]["continue"]})
    third = call.ok("GET", MAPS, limit=2, **{"continue": second["metadata"]["continue"]})
    assert names(first) + names(second) + names(third) == ["m0", "m1", "m2", "m3", "m4"]  # of one moment
    assert "continue" not in third["metadata"]
    assert "kind" not in first["items"][0]
    call.server.compact()
    again = call.ok("GET", MAPS, limit=2)
    call.server.compact()
    assert call("GET", MAPS, **{"continue": again["metadata"]["continue"]})[0] == 410


# Patches


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


def apply(call: Client, path: str, body: Any, manager: str = "me", **query: Any) -> Answer:
    return call("PATCH", path, body, "application/apply-patch+yaml", fieldManager=manager, **query)


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


# Custom resources


def test_unknown_fields_are_pruned_and_defaults_set(widgets: Client) -> None:
    made = widgets.ok("POST", WIDGETS, widget(other=1, free={"x": 1}, port="http", items=[{"name": "a", "q": 1}]))
    assert made["spec"] == {"size": 3, "free": {"x": 1}, "port": "http", "items": [{"name": "a"}]}
    assert "unknown field" in widgets.headers["Warning"]
    code, status = widgets("PUT", f"{WIDGETS}/w", {**made, "spec": {"other": 1}}, fieldValidation="Strict")
    assert (code, status["message"]) == (400, 'strict decoding error: unknown field "spec.other"')
    table = widgets.ok("GET", WIDGETS)
    assert table["kind"] == "WidgetList"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"size": 0}, [("spec.size", "FieldValueInvalid")]),
        ({"size": "x"}, [("spec.size", "FieldValueTypeInvalid")]),
        ({"mode": "c"}, [("spec.mode", "FieldValueNotSupported")]),
        ({"items": [{"n": 1}]}, [("spec.items[0].name", "FieldValueRequired")]),
        ({"items": [{"name": "a"}, {"name": "a"}]}, [("spec.items[1]", "FieldValueDuplicate")]),
        ({"size": 10}, [("spec", "FieldValueInvalid")]),
        ({"port": []}, [("spec.port", "FieldValueTypeInvalid")]),
    ],
)
def test_wrong_custom_resources_are_refused(
    widgets: Client, spec: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    assert causes(widgets("POST", WIDGETS, widget(**spec))) == expected


def test_transition_rules_compare_with_the_old_object(widgets: Client) -> None:
    widgets.ok("POST", WIDGETS, widget(fixed="a"))
    assert causes(widgets("PATCH", f"{WIDGETS}/w", {"spec": {"fixed": "b"}}, "application/merge-patch+json")) == [
        ("spec.fixed", "FieldValueInvalid")
    ]
    widgets.merge(f"{WIDGETS}/w", {"spec": {"fixed": None}})
    assert widgets.merge(f"{WIDGETS}/w", {"spec": {"fixed": "c", "size": 10, "mode": "b"}})["spec"]["fixed"] == "c"


def test_custom_updates_need_a_revision(widgets: Client) -> None:
    widgets.ok("POST", WIDGETS, widget())
    assert causes(widgets("PUT", f"{WIDGETS}/w", widget())) == [("metadata.resourceVersion", "FieldValueInvalid")]


def test_cel_knows_kubernetes_functions() -> None:
    assert escape("a-b.c/d__e") == "a__dash__b__dot__c__slash__d__underscores__e"
    assert (
        evaluate("quantity(self).isLessThan(quantity('2Gi')) && isQuantity('1') && !isQuantity('x')", {"self": "1Gi"})
        is True
    )
    assert evaluate("self.split(',').exists(x, x.find('[0-9]+') == '12')", {"self": "a,b12"}) is True
    with pytest.raises(ValueError, match="nowhere"):
        evaluate("nowhere(self)", {"self": 1})


# Built-in objects


@pytest.mark.parametrize(
    ("written", "stored"),
    [
        ("2000m", "2"),
        ("1024Mi", "1Gi"),
        ("1.5Gi", "1536Mi"),
        ("0.5", "500m"),
        ("1000", "1k"),
        ("0", "0"),
        ("100", "100"),
        ("1e3", "1e3"),
    ],
)
def test_quantities_are_stored_in_one_form(written: str, stored: str) -> None:
    assert canonical(written) == stored
    assert canonical(stored) == stored


def test_defaults_of_a_pod_template(call: Client) -> None:
    body = deployment(
        resources={"limits": {"cpu": "2000m", "memory": "1024Mi"}},
        readinessProbe={"tcpSocket": {"port": 1}},
        ports=[{"containerPort": 1}],
    )
    volumes = [{"name": "h", "hostPath": {"path": "/x"}}, {"name": "m", "configMap": {"name": "m"}}, {"name": "e"}]
    body["spec"]["template"]["spec"]["volumes"] = volumes
    spec = call.ok("POST", DEPLOYMENTS, body)["spec"]
    assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "25%", "maxSurge": "25%"}}
    assert (spec["revisionHistoryLimit"], spec["progressDeadlineSeconds"], spec["replicas"]) == (10, 600, 1)
    template = spec["template"]["spec"]
    assert (template["dnsPolicy"], template["restartPolicy"], template["terminationGracePeriodSeconds"]) == (
        "ClusterFirst",
        "Always",
        30,
    )
    container = template["containers"][0]
    assert container["resources"] == {"limits": {"cpu": "2", "memory": "1Gi"}}
    assert container["readinessProbe"]["failureThreshold"] == 3
    assert (container["imagePullPolicy"], container["ports"]) == (
        "IfNotPresent",
        [{"containerPort": 1, "protocol": "TCP"}],
    )
    assert template["volumes"][0]["hostPath"]["type"] == ""
    assert template["volumes"][1]["configMap"]["defaultMode"] == 420
    assert template["volumes"][2]["emptyDir"] == {}


def test_types_and_values_of_built_in_objects(call: Client) -> None:
    code, status = call("POST", DEPLOYMENTS, deployment(env=[{"name": "A", "value": 1}]))
    assert (code, status["reason"]) == (400, "BadRequest")
    wrong = deployment(volumeMounts=[{"name": "v", "mountPath": "/v"}])
    wrong["spec"]["selector"]["matchLabels"]["app"] = "b"
    assert [field for field, _ in causes(call("POST", DEPLOYMENTS, wrong))] == [
        "spec.template.metadata.labels", "spec.template.spec.containers[0].volumeMounts[0].name",
    ]  # fmt: skip
    call.ok("POST", DEPLOYMENTS, deployment(nonsense=1))
    assert "nonsense" in call.headers["Warning"]


def test_a_service_gets_an_address_that_stays(call: Client) -> None:
    made = call.ok("POST", SERVICES, {"metadata": {"name": "s"}, "spec": {"ports": [{"port": 80}]}})
    assert made["spec"]["ports"] == [{"port": 80, "protocol": "TCP", "targetPort": 80}]
    ip = made["spec"]["clusterIP"]
    assert made["spec"]["clusterIPs"] == [ip]
    put = {"metadata": {"name": "s"}, "spec": {"ports": [{"port": 81}], "type": "NodePort"}}
    changed = call.ok("PUT", f"{SERVICES}/s", put)["spec"]
    assert (changed["clusterIP"], 30000 <= changed["ports"][0]["nodePort"] < 32768) == (ip, True)
    assert call.ok("PUT", f"{SERVICES}/s", put)["spec"] == changed
    assert causes(call("PATCH", f"{SERVICES}/s", {"spec": {"clusterIP": "None"}}, "application/merge-patch+json"))
    headless = call.ok(
        "POST", SERVICES, {"metadata": {"name": "h"}, "spec": {"clusterIP": "None", "ports": [{"port": 1}]}}
    )
    assert headless["spec"]["clusterIP"] == "None"


def test_immutable_fields(call: Client) -> None:
    call.ok("POST", DEPLOYMENTS, deployment())
    labels = {"app": "a", "x": "y"}
    patch = {"spec": {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}}}}
    merge = "application/merge-patch+json"
    assert causes(call("PATCH", f"{DEPLOYMENTS}/d", patch, merge)) == [("spec.selector", "FieldValueInvalid")]
    call.ok("POST", SETS, {**deployment("s"), "spec": {**deployment()["spec"], "serviceName": "x"}})
    assert causes(call("PATCH", f"{SETS}/s", {"spec": {"serviceName": "y"}}, merge)) == [
        ("spec", "FieldValueForbidden")
    ]
    call.merge(f"{SETS}/s", {"spec": {"replicas": 3}})
    call.ok("POST", PODS, pod())
    new_image = [{"op": "replace", "path": "/spec/containers/0/image", "value": "j"}]
    assert (
        call.ok("PATCH", f"{PODS}/p", new_image, "application/json-patch+json")["spec"]["containers"][0]["image"] == "j"
    )
    assert causes(call("PATCH", f"{PODS}/p", {"spec": {"hostNetwork": True}}, merge)) == [
        ("spec", "FieldValueForbidden")
    ]


def test_a_pod_needs_its_service_account(call: Client) -> None:
    body = pod()
    body["spec"]["serviceAccountName"] = "later"
    assert call("POST", PODS, body)[0] == 403
    call.ok("POST", "/api/v1/namespaces/default/serviceaccounts", {"metadata": {"name": "later"}})
    assert call.ok("POST", PODS, body)["status"]["phase"] == "Pending"


def test_scale(call: Client) -> None:
    call.ok("POST", DEPLOYMENTS, deployment())
    scale = call.ok("GET", f"{DEPLOYMENTS}/d/scale")
    scale["spec"]["replicas"] = 4
    call.ok("PUT", f"{DEPLOYMENTS}/d/scale", scale)
    assert call.ok("GET", f"{DEPLOYMENTS}/d")["spec"]["replicas"] == 4
    assert call("PUT", f"{DEPLOYMENTS}/d/scale", {**scale, "spec": {"replicas": 5}})[0] == 409


# Deletion


def owner_of(obj: Any, **more: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "name": obj["metadata"]["name"],
        "uid": obj["metadata"]["uid"],
        **more,
    }


def exists(call: Client, name: str) -> bool:
    return call("GET", f"{MAPS}/{name}")[0] == 200


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


# Watches


def test_a_watch_replays_from_a_revision_and_knows_what_left_the_selector(call: Client) -> None:
    call.ok("POST", MAPS, config_map("a", labels={"x": "1"}))
    revision = call.ok("GET", MAPS)["metadata"]["resourceVersion"]
    call.merge(f"{MAPS}/a", {"data": {"a": "c"}})
    call.merge(f"{MAPS}/a", {"metadata": {"labels": {"x": "2"}}})
    call.merge(f"{MAPS}/a", {"metadata": {"labels": {"x": "1"}}})
    call.ok("DELETE", f"{MAPS}/a")
    events = call.watch(MAPS, 4, resourceVersion=revision, labelSelector="x=1")
    assert [e["type"] for e in events] == ["MODIFIED", "DELETED", "ADDED", "DELETED"]
    revisions = [int(e["object"]["metadata"]["resourceVersion"]) for e in events]
    assert revisions == sorted(revisions)
    assert revisions[0] > int(revision)


def test_a_watch_shows_what_happens_meanwhile(call: Client) -> None:
    call.ok("POST", MAPS, config_map("a"))
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.extend(call.watch(MAPS, 2)))
    thread.start()
    deadline = time.monotonic() + 5
    while not call.server.store.objects.listeners and time.monotonic() < deadline:
        time.sleep(0.01)
    call.ok("POST", MAPS, config_map("b"))
    thread.join(10)
    assert [(e["type"], e["object"]["metadata"]["name"]) for e in seen] == [("ADDED", "a"), ("ADDED", "b")]


def test_bookmarks_timeouts_and_lost_revisions(call: Client) -> None:
    call.server.watch_interval_s = 0.05
    call.ok("POST", MAPS, config_map("a"))
    revision = call.ok("GET", MAPS)["metadata"]["resourceVersion"]
    bookmark = call.watch(MAPS, 1, resourceVersion=revision, allowWatchBookmarks="true")[0]
    assert (bookmark["type"], bookmark["object"]["metadata"]["resourceVersion"]) == ("BOOKMARK", revision)
    assert call.watch(MAPS, 1, resourceVersion=revision, timeoutSeconds=0.1) == []
    call.server.compact()
    lost = call.watch(MAPS, 2, resourceVersion=revision)
    assert [(e["type"], e["object"]["code"], e["object"]["reason"]) for e in lost] == [("ERROR", 410, "Expired")]


# Faults


@pytest.mark.parametrize(
    ("status", "reason"),
    [(409, "Conflict"), (429, "TooManyRequests"), (500, "InternalError"), (503, "ServiceUnavailable")],
)
def test_faults_answer_instead(call: Client, status: int, reason: str) -> None:
    call.server.fail_next("create", "configmaps", status, times=2, retry_after_s=3)
    for _ in range(2):
        code, body = call("POST", MAPS, config_map())
        assert (code, body["reason"]) == (status, reason)
        assert call.headers.get("Retry-After") == ("3" if status in (429, 503) else None)
    call.ok("POST", MAPS, config_map())
    assert call.server.requests["create", "configmaps"] == 3
    assert [(w.verb, w.resource, w.name) for w in call.server.writes] == [("create", "configmaps", "a")]


def test_connections_close_before_and_after_the_write(call: Client) -> None:
    for when, written in (("close before", False), ("close after", True)):
        call.server.fail_next("create", "configmaps", when)  # type: ignore[arg-type]
        with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
            call("POST", MAPS, config_map())
        assert exists(call, "a") is written


def test_callbacks_at_writes(call: Client) -> None:
    seen: list[tuple[str, int, str, str]] = []
    for when in ("before", "after"):
        call.server.on_write(
            lambda n, verb, obj, when=when: seen.append((when, n, verb, obj["metadata"]["name"])), when, "tester"  # type: ignore[arg-type,misc]
        )  # fmt: skip
    call.ok("POST", MAPS, config_map())
    assert call("POST", MAPS, config_map())[0] == 409  # no write, so no callback
    Client(call.server, "other/1").ok("POST", MAPS, config_map("b"))
    assert seen == [("before", 0, "create", "a"), ("after", 0, "create", "a")]
    assert [w.user_agent for w in call.server.writes] == ["tester/1", "other/1"]

    def prevent(number: int, verb: str, obj: Any) -> None:
        raise ConnectionLost

    remove = call.server.on_write(prevent, "before")
    with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
        call("POST", MAPS, config_map("c"))
    remove()
    assert not exists(call, "c")


def test_watches_break(call: Client) -> None:
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(_events_or_error(call)))
    thread.start()
    deadline = time.monotonic() + 5
    while not call.server.break_watches() and time.monotonic() < deadline:
        time.sleep(0.01)
    thread.join(10)
    assert time.monotonic() < deadline - 1  # the watch itself would have taken five seconds
    assert len(seen) == 1
    assert seen[0] in ([], "broken")


def _events_or_error(call: Client) -> Any:
    try:
        return call.watch(MAPS, 1)
    except (http.client.HTTPException, OSError):
        return "broken"
