"""A client of the double that hides nothing, and bodies that tests send."""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import urlencode, urlsplit

from .server import ApiServer

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
        events: list[Any] = []
        while len(events) < count and (line := response.readline()):
            events.append(json.loads(line))
        connection.close()
        return events


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


def causes(answer: Answer) -> list[tuple[str, str]]:
    assert (answer[0], answer[1]["reason"]) == (422, "Invalid"), answer
    return [(cause["field"], cause["reason"]) for cause in answer[1]["details"]["causes"]]


def exists(call: Client, name: str) -> bool:
    """Whether there is a ConfigMap of that name."""
    return call("GET", f"{MAPS}/{name}")[0] == 200


def apply(call: Client, path: str, body: Any, manager: str = "me", **query: Any) -> Answer:
    return call("PATCH", path, body, "application/apply-patch+yaml", fieldManager=manager, **query)
