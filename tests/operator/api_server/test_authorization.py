"""RBAC for clients that are service accounts."""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from tests.operator.api_server.authorization import Action, allows, token_of
from tests.operator.api_server.client import MAPS, Client, config_map

RBAC = "/apis/rbac.authorization.k8s.io/v1"


def rule(verbs: list[str], resources: list[str], **more: Any) -> dict[str, Any]:
    return {"apiGroups": [""], "verbs": verbs, "resources": resources, **more}


def grant(call: Client, rules: list[dict[str, Any]], cluster: bool = False) -> None:
    where, kind = (RBAC, "ClusterRole") if cluster else (f"{RBAC}/namespaces/default", "Role")
    subject = {"kind": "ServiceAccount", "name": "me", "namespace": "default"}
    call.ok("POST", f"{where}/{kind.lower()}s", {"metadata": {"name": "r"}, "rules": rules})
    body = {"metadata": {"name": "b"}, "subjects": [subject], "roleRef": {"kind": kind, "name": "r"}}
    call.ok("POST", f"{where}/{kind.lower()}bindings", body)


def get_as(call: Client, token: str, path: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(urlsplit(call.server.url).netloc, timeout=10)
    connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_a_service_account_may_do_what_its_roles_say(call: Client) -> None:
    call.ok("POST", MAPS, config_map())
    token = yaml.safe_load(call.server.kubeconfig_of("default", "me").read_text())["users"][0]["user"]["token"]
    code, body = get_as(call, token, MAPS)
    assert code == 403
    assert body["message"] == (
        'configmaps is forbidden: User "system:serviceaccount:default:me" cannot list resource "configmaps" '
        'in API group "" in the namespace "default"'
    )
    grant(call, [rule(["list"], ["configmaps"])])
    assert get_as(call, token, MAPS)[0] == 200
    assert get_as(call, token, f"{MAPS}/a")[0] == 403
    assert get_as(call, token, "/api/v1/configmaps")[0] == 403  # of all namespaces
    assert get_as(call, "somebody", MAPS)[0] == 401


@pytest.mark.parametrize(
    ("rules", "action", "expected"),
    [
        (rule(["*"], ["pods"]), Action("get", "", "pods", "x"), True),
        (rule(["*"], ["pods"]), Action("get", "", "pods/status", "x"), False),
        (rule(["*"], ["pods/status"]), Action("get", "", "pods/status", "x"), True),
        (rule(["*"], ["pods"]), Action("get", "apps", "pods", "x"), False),
        (rule(["get"], ["pods"], resourceNames=["a"]), Action("get", "", "pods", "x", "a"), True),
        (rule(["get"], ["pods"], resourceNames=["a"]), Action("get", "", "pods", "x", "b"), False),
        (rule(["get"], ["pods"], resourceNames=["a"]), Action("get", "", "pods", "x"), False),
    ],
)
def test_rules(call: Client, rules: dict[str, Any], action: Action, expected: bool) -> None:
    grant(call, [rules], cluster=True)
    assert allows(call.server.store, token_of("default", "me"), action) is expected
    assert not allows(call.server.store, token_of("other", "me"), action)
