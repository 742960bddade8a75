"""What the API server is told of the webhook: its service, its CAs, and which pods it is asked about."""

from __future__ import annotations

import base64
import binascii
import contextlib
from dataclasses import dataclass

from ..kinds import Kind
from ..names import MANAGED_BY
from ..objects.metadata import Manifest
from .inject import LABEL

PATH = "/inject"
NAME = "pods.kvkern.io"
TIMEOUT_S = 5
SECRET = Kind("v1", "Secret", "secrets")
REGISTRATION = Kind(
    "admissionregistration.k8s.io/v1", "MutatingWebhookConfiguration", "mutatingwebhookconfigurations", namespaced=False
)
_NAMESPACE_NAME = "kubernetes.io/metadata.name"  # a label that Kubernetes itself gives, from 1.21 on


@dataclass(frozen=True, slots=True)
class Place:
    """The Service of the webhook."""

    service: str
    namespace: str  # and the operator's
    namespaces: tuple[str, ...] = ()  # whose pods it changes; empty: all

    @property
    def dns_names(self) -> tuple[str, ...]:
        """The names under which it is called; the API server uses the first."""
        name = f"{self.service}.{self.namespace}"
        return f"{name}.svc", f"{name}.svc.cluster.local"

    @property
    def registration(self) -> str:
        """The name of its MutatingWebhookConfiguration, which has no namespace."""
        return f"{self.service}.{self.namespace}"


def registration(place: Place, bundle: bytes) -> Manifest:
    """Return the MutatingWebhookConfiguration. A webhook that does not answer stops no pod."""
    outside = ["kube-system", place.namespace]
    names: list[Manifest] = [{"key": _NAMESPACE_NAME, "operator": "NotIn", "values": outside}]
    if place.namespaces:
        names.append({"key": _NAMESPACE_NAME, "operator": "In", "values": list(place.namespaces)})
    service = {"name": place.service, "namespace": place.namespace, "path": PATH, "port": 443}
    rule = {
        "apiGroups": [""],
        "apiVersions": ["v1"],
        "operations": ["CREATE"],
        "resources": ["pods"],
        "scope": "Namespaced",
    }
    return {
        "apiVersion": REGISTRATION.api,
        "kind": REGISTRATION.kind,
        "metadata": {
            "name": place.registration,
            "labels": {"app.kubernetes.io/name": "kvkern", "app.kubernetes.io/managed-by": MANAGED_BY},
        },
        "webhooks": [
            {
                "name": NAME,
                "admissionReviewVersions": ["v1"],
                "clientConfig": {"service": service, "caBundle": base64.b64encode(bundle).decode()},
                "failurePolicy": "Ignore",
                "matchPolicy": "Equivalent",
                "namespaceSelector": {"matchExpressions": names},
                "objectSelector": {"matchLabels": {LABEL: "true"}},
                "reinvocationPolicy": "IfNeeded",
                "rules": [rule],
                "sideEffects": "None",
                "timeoutSeconds": TIMEOUT_S,
            }
        ],
    }


def bundle_of(live: Manifest | None) -> bytes:
    """Return the CAs that the API server has been told of."""
    for webhook in (live or {}).get("webhooks") or ():
        if webhook.get("name") == NAME:
            with contextlib.suppress(binascii.Error):
                return base64.b64decode((webhook.get("clientConfig") or {}).get("caBundle") or "")
    return b""
