"""Admission webhooks over HTTPS."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

import pytest

from tests.operator.api_server.client import PODS, Client, pod
from tests.operator.api_server.webhook import running_webhook

CONFIGURATIONS = "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations"


def configuration(client_config: dict[str, Any], **more: Any) -> dict[str, Any]:
    rule = {"operations": ["CREATE"], "apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"]}
    hook = {
        "name": "a.example.com",
        "clientConfig": client_config,
        "rules": [rule],
        "sideEffects": "None",
        "admissionReviewVersions": ["v1"],
        **more,
    }
    return {"metadata": {"name": "w"}, "webhooks": [hook]}


def label_it(request: dict[str, Any]) -> dict[str, Any]:
    patch = [{"op": "add", "path": "/metadata/annotations", "value": {"seen": request["operation"]}}]
    return {"allowed": True, "patchType": "JSONPatch", "patch": base64.b64encode(json.dumps(patch).encode()).decode()}


def seen(call: Client, name: str, **labels: str) -> bool:
    return "annotations" in call.ok("POST", PODS, pod(name, labels=labels))["metadata"]


def test_a_webhook_changes_what_its_rules_and_selectors_name(call: Client) -> None:
    with running_webhook(label_it) as webhook:
        only = {"objectSelector": {"matchLabels": {"inject": "yes"}}}
        call.ok("POST", CONFIGURATIONS, configuration(webhook.client_config(), **only))
        assert (seen(call, "a", inject="yes"), seen(call, "b", inject="no")) == (True, False)
        assert "annotations" not in call.merge(f"{PODS}/b", {"metadata": {"labels": {"inject": "yes"}}})["metadata"]
        stored = call.server.store.create({"apiVersion": "v1", "kind": "Pod", **pod("c", labels={"inject": "yes"})})
        assert stored["metadata"]["annotations"] == {"seen": "CREATE"}  # also what controllers make
        namespace = [{"op": "add", "path": "/webhooks/0/namespaceSelector", "value": {"matchLabels": {"x": "y"}}}]
        call.ok("PATCH", f"{CONFIGURATIONS}/w", namespace, "application/json-patch+json")
        assert not seen(call, "d", inject="yes")
        call.merge("/api/v1/namespaces/default", {"metadata": {"labels": {"x": "y"}}})
        assert seen(call, "e", inject="yes")


@pytest.mark.parametrize("policy", ["Ignore", "Fail"])
def test_the_failure_policy_decides_when_nobody_answers(call: Client, policy: str) -> None:
    with running_webhook(label_it) as webhook:
        config = webhook.client_config()
    call.ok("POST", CONFIGURATIONS, configuration(config, failurePolicy=policy))
    code, body = call("POST", PODS, pod())
    assert code == (201 if policy == "Ignore" else 500)
    assert policy == "Ignore" or 'failed calling webhook "a.example.com"' in body["message"]


def test_a_wrong_certificate_is_a_failure(call: Client) -> None:
    with running_webhook(label_it) as webhook, running_webhook(label_it) as other:
        config = webhook.client_config(caBundle=other.ca_bundle)
        call.ok("POST", CONFIGURATIONS, configuration(config))
        assert call("POST", PODS, pod())[0] == 500
        assert "CERTIFICATE_VERIFY_FAILED" in call.server.store.admission.calls[0][2]


def test_a_slow_webhook_runs_into_its_timeout(call: Client) -> None:
    def slow(request: dict[str, Any]) -> dict[str, Any]:
        time.sleep(1.5)
        return {"allowed": True}

    with running_webhook(slow) as webhook:
        call.ok(
            "POST", CONFIGURATIONS, configuration(webhook.client_config(), timeoutSeconds=1, failurePolicy="Ignore")
        )
        call.ok("POST", PODS, pod())
        assert "timed out" in call.server.store.admission.calls[0][2]


def test_a_webhook_may_refuse(call: Client) -> None:
    with running_webhook(lambda request: {"allowed": False, "status": {"message": "no"}}) as webhook:
        call.ok("POST", CONFIGURATIONS, configuration(webhook.client_config()))
        code, body = call("POST", PODS, pod())
        assert (code, body["message"]) == (403, 'admission webhook "a.example.com" denied the request: no')


def test_a_service_leads_to_where_the_test_says(call: Client) -> None:
    with running_webhook(label_it, "hook.system.svc") as webhook:
        config = {"service": {"namespace": "system", "name": "hook", "path": "/x"}, "caBundle": webhook.ca_bundle}
        call.ok("POST", CONFIGURATIONS, configuration(config))
        assert call("POST", PODS, pod())[0] == 500
        call.server.route_service("system", "hook", webhook.address)
        assert seen(call, "a")
