"""Admission webhooks: which of them see a request, and the call over HTTPS.

Mutating webhooks run in the order of their names, each on what the one before it left. Not there: `reinvocationPolicy`, and
`matchPolicy: Equivalent` across versions.
"""

from __future__ import annotations

import base64
import http.client
import json
import socket
import ssl
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from . import cel_rules
from .errors import ApiError, bad_request, internal
from .json_values import Json, json_patch
from .resources import Resource
from .selectors import selects

if TYPE_CHECKING:
    from .store import Store

_GROUP = "admissionregistration.k8s.io"


@dataclass(frozen=True)
class Request:
    """What a webhook is asked about."""

    operation: str
    resource: Resource
    namespace: str
    name: str
    obj: Json | None
    old: Json | None
    subresource: str = ""
    dry_run: bool = False
    user: str = "system:admin"

    def body(self) -> Json:
        kind = {"group": self.resource.group, "version": self.resource.version, "kind": self.resource.kind}
        which = {"group": self.resource.group, "version": self.resource.version, "resource": self.resource.plural}
        review: Json = {
            "uid": str(uuid.uuid4()),
            "kind": kind,
            "resource": which,
            "requestKind": kind,
            "requestResource": which,
            "operation": self.operation,
            "userInfo": {"username": self.user, "groups": ["system:authenticated"]},
            "object": self.obj,
            "oldObject": self.old,
            "dryRun": self.dry_run,
            "options": None,
        }
        if self.name:
            review["name"] = self.name
        if self.namespace:
            review["namespace"] = self.namespace
        if self.subresource:
            review["subResource"] = self.subresource
        return review


@dataclass
class Admission:
    """Calls the webhooks that are registered in a store. Blocks for as long as they take; call without the lock."""

    store: Store
    services: dict[tuple[str, str], tuple[str, int]] = field(
        default_factory=dict
    )  # (namespace, name) -> where it listens
    calls: list[tuple[str, str, str]] = field(default_factory=list)  # (webhook, operation, result)

    def mutate(self, request: Request, warnings: list[str]) -> Json:
        """Return the object as the mutating webhooks leave it. Raises what they refuse."""
        obj = request.obj
        assert obj is not None
        for webhook in self._of_kind("mutatingwebhookconfigurations"):
            current = Request(**{**request.__dict__, "obj": obj})
            response = self._ask(webhook, current, warnings)
            if response and response.get("patch"):
                patch = json.loads(base64.b64decode(response["patch"]))
                obj = json_patch(obj, patch)
        return obj

    def validate(self, request: Request, warnings: list[str]) -> None:
        for webhook in self._of_kind("validatingwebhookconfigurations"):
            self._ask(webhook, request, warnings)

    def _of_kind(self, plural: str) -> Iterator[Json]:
        for configuration in self.store.view(f"{plural}.{_GROUP}"):
            yield from configuration.get("webhooks") or []

    def _ask(self, webhook: Json, request: Request, warnings: list[str]) -> Json | None:
        """Return the response of a webhook that concerns the request. Raises if it refuses, or if it fails and must not."""
        name = webhook["name"]
        try:
            if not self._concerns(webhook, request):
                return None
            if request.dry_run and webhook["sideEffects"] not in ("None", "NoneOnDryRun"):
                raise bad_request(f'admission webhook "{name}" does not support dry run')
            response = self._call(webhook, request)
        except (OSError, ValueError, http.client.HTTPException) as error:
            self.calls.append((name, request.operation, f"failed: {error}"))
            if webhook["failurePolicy"] == "Ignore":
                return None
            raise internal(f'failed calling webhook "{name}": failed to call webhook: {error}') from error
        warnings.extend(response.get("warnings") or [])
        self.calls.append((name, request.operation, "allowed" if response.get("allowed") else "denied"))
        if not response.get("allowed"):
            status = response.get("status") or {}
            message = f'admission webhook "{name}" denied the request: {status.get("message", "")}'.rstrip(": ")
            raise ApiError(status.get("code") or 403, status.get("reason") or "Forbidden", message)
        return response

    def _concerns(self, webhook: Json, request: Request) -> bool:
        if request.resource.group == _GROUP or not any(_rule_matches(r, request) for r in webhook.get("rules") or []):
            return False
        shown = [o for o in (request.obj, request.old) if o]
        if request.resource.namespaced or request.resource.kind == "Namespace":
            namespace = self.store.find("namespaces", request.namespace or request.name) or (
                shown[0] if shown else None
            )
            if not selects(webhook["namespaceSelector"], (namespace or {"metadata": {}})["metadata"].get("labels")):
                return False
        if not any(selects(webhook["objectSelector"], o["metadata"].get("labels")) for o in shown):
            return False
        variables = {"object": request.obj, "oldObject": request.old, "request": request.body()}
        conditions = webhook.get("matchConditions") or []
        return all(cel_rules.evaluate(c["expression"], variables) is True for c in conditions)

    def _call(self, webhook: Json, request: Request) -> Json:
        config = webhook["clientConfig"]
        body = request.body()
        review = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": body}
        host, address, path = self._target(config)
        context = ssl.create_default_context(cadata=base64.b64decode(config.get("caBundle", "")).decode() or None)
        timeout_s = webhook["timeoutSeconds"]
        with (
            socket.create_connection(address, timeout=timeout_s) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            connection = http.client.HTTPConnection(host, timeout=timeout_s)
            connection.sock = secure
            headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
            connection.request("POST", f"{path}?timeout={timeout_s}s", json.dumps(review), headers)
            answer = connection.getresponse()
            content = answer.read()
        if answer.status != 200:
            raise ValueError(f"the webhook answered {answer.status}")
        response = json.loads(content).get("response")
        if not isinstance(response, dict) or response.get("uid") != body["uid"]:
            raise ValueError("expected response.uid to be the uid of the request")
        return response

    def _target(self, config: Json) -> tuple[str, tuple[str, int], str]:
        """Return the name that the certificate must have, the address and the path."""
        if config.get("url"):
            url = urlsplit(config["url"])
            host = url.hostname or ""
            return host, (host, url.port or 443), url.path or "/"
        service = config["service"]
        at = (service["namespace"], service["name"])
        if at not in self.services:
            raise ValueError(f'service "{at[1]}" not found: give its address to `route_service`')
        return f"{at[1]}.{at[0]}.svc", self.services[at], service.get("path") or "/"


def _rule_matches(rule: Json, request: Request) -> bool:
    resource = request.resource
    whole = f"{resource.plural}/{request.subresource}" if request.subresource else resource.plural
    accepted: Any = {whole, "*/*"}
    accepted |= (
        {f"{resource.plural}/*", f"*/{request.subresource}"} if request.subresource else {"*", f"{resource.plural}/*"}
    )
    scope = rule.get("scope", "*")
    return (
        not {request.operation, "*"}.isdisjoint(rule.get("operations") or [])
        and not {resource.group, "*"}.isdisjoint(rule.get("apiGroups") or [])
        and not {resource.version, "*"}.isdisjoint(rule.get("apiVersions") or [])
        and not accepted.isdisjoint(rule.get("resources") or [])
        and scope in ("*", "Namespaced" if resource.namespaced else "Cluster")
    )
