"""Built-in objects: defaults, allocated values, and what is refused."""

from __future__ import annotations

import pytest

from tests.operator.api_server.client import DEPLOYMENTS, PODS, SERVICES, SETS, Client, causes, deployment, pod
from tests.operator.api_server.quantity import canonical


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
    back = call.merge(f"{SERVICES}/s", {"spec": {"type": "ClusterIP"}})["spec"]
    assert ("externalTrafficPolicy" in back, "nodePort" in back["ports"][0]) == (False, False)
    refused = call(
        "PATCH", f"{SERVICES}/s", {"spec": {"externalTrafficPolicy": "Local"}}, "application/merge-patch+json"
    )
    assert causes(refused) == [("spec.externalTrafficPolicy", "FieldValueInvalid")]
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


def test_a_stateful_set_may_mount_its_claims(call: Client) -> None:
    body = deployment("s", volumeMounts=[{"name": "data", "mountPath": "/d"}])
    assert causes(call("POST", SETS, body)) == [
        ("spec.template.spec.containers[0].volumeMounts[0].name", "FieldValueNotFound")
    ]
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1024Mi"}}}
    body["spec"]["volumeClaimTemplates"] = [{"metadata": {"name": "data"}, "spec": claim}]
    made = call.ok("POST", SETS, body)["spec"]["volumeClaimTemplates"][0]["spec"]
    assert (made["resources"]["requests"]["storage"], made["volumeMode"]) == ("1Gi", "Filesystem")


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
