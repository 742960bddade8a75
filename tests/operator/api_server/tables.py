"""Tables for `kubectl get`, and the documents by which clients discover what is served."""

from __future__ import annotations

import datetime
import re
from typing import Any

from .json_values import Json
from .resources import READ, VERBS, Registry, Resource

VERSION = {"major": "1", "minor": "30", "gitVersion": "v1.30.0", "platform": "linux/amd64"}
_PODS: list[Json] = [
    {"name": "Ready", "type": "string", "jsonPath": ".ready"},
    {"name": "Status", "type": "string", "jsonPath": ".status.phase"},
    {"name": "Node", "type": "string", "jsonPath": ".spec.nodeName", "priority": 1},
]
_WORKLOADS: list[Json] = [
    {"name": "Desired", "type": "integer", "jsonPath": ".spec.replicas"},
    {"name": "Ready", "type": "integer", "jsonPath": ".status.readyReplicas"},
    {"name": "Up-to-date", "type": "integer", "jsonPath": ".status.updatedReplicas"},
    {"name": "Available", "type": "integer", "jsonPath": ".status.availableReplicas"},
]
_AGE: Json = {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}
_STEP = re.compile(
    r"""\.((?:\\.|[^.\[\\])+)|\[(\d+|\*)\]|\['([^']+)'\]|\[\?\(@\.([\w.]+)\s*==\s*["']([^"']*)["']\)\]"""
)


def json_path(obj: Any, path: str) -> list[Any]:
    """Return what a simple JSONPath finds: fields, indices, `[*]` and filters such as `[?(@.type=="Ready")]`."""
    found = [obj]
    for field, index, quoted, key, value in _STEP.findall(path):
        if field or quoted:
            name = quoted or field.replace("\\", "")
            found = [item[name] for item in found if isinstance(item, dict) and name in item]
        elif key:
            found = [e for item in found if isinstance(item, list) for e in item if str(e.get(key)) == value]
        else:
            lists = [item for item in found if isinstance(item, list)]
            found = [e for item in lists for e in (item if index == "*" else item[int(index) : int(index) + 1])]
    return found


def _columns(resource: Resource) -> list[Json]:
    if resource.columns:
        return list(resource.columns)
    if resource.kind == "Pod":
        return [*_PODS, _AGE]
    return [*_WORKLOADS, _AGE] if resource.group == "apps" and resource.scale else [_AGE]


def table(resource: Resource, objects: list[Json], meta: Json, now: datetime.datetime) -> Json:
    """Return objects as a meta.k8s.io/v1 Table with the resource's printer columns."""
    columns = _columns(resource)
    name = {"name": "Name", "type": "string", "format": "name", "description": "", "priority": 0}
    definitions = [
        {"name": c["name"], "type": c["type"], "format": c.get("format", ""), "description": c.get("description", ""),
         "priority": c.get("priority", 0)}
        for c in columns
    ]  # fmt: skip
    rows = []
    for obj in objects:
        cells: list[Any] = [obj["metadata"]["name"]]
        for column in columns:
            found = json_path(_with_ready(obj), column["jsonPath"])
            cells.append(_cell(found[0] if found else None, column["type"], now))
        partial = {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": obj["metadata"]}
        rows.append({"cells": cells, "object": partial})
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": meta,
        "columnDefinitions": [name, *definitions],
        "rows": rows,
    }


def _with_ready(obj: Json) -> Json:
    if obj.get("kind") != "Pod":
        return obj
    statuses = obj.get("status", {}).get("containerStatuses") or []
    ready = sum(bool(s.get("ready")) for s in statuses)
    return {**obj, "ready": f"{ready}/{len(obj['spec'].get('containers') or [])}"}


def _cell(value: Any, kind: str, now: datetime.datetime) -> Any:
    if value is None or kind != "date":
        return value
    age_s = int((now - datetime.datetime.fromisoformat(value.replace("Z", "+00:00"))).total_seconds())
    for unit, size_s in (("d", 86400), ("h", 3600), ("m", 60)):
        if age_s >= 2 * size_s:
            return f"{age_s // size_s}{unit}"
    return f"{age_s}s"


def groups(registry: Registry) -> Json:
    """Return /apis."""
    versions: dict[str, list[str]] = {}
    for resource in registry:
        if resource.group and resource.version not in versions.setdefault(resource.group, []):
            versions[resource.group].append(resource.version)
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group(g, v) for g, v in versions.items()]}


def group(registry: Registry, name: str) -> Json | None:
    """Return /apis/GROUP, or None."""
    found = [g for g in groups(registry)["groups"] if g["name"] == name]
    return {"kind": "APIGroup", "apiVersion": "v1", **found[0]} if found else None


def _group(name: str, versions: list[str]) -> Json:
    entries = [{"groupVersion": f"{name}/{v}", "version": v} for v in versions]
    return {"name": name, "versions": entries, "preferredVersion": entries[0]}


def resource_list(registry: Registry, group: str, version: str) -> Json | None:
    """Return /apis/GROUP/VERSION or /api/v1, or None."""
    found = [r for r in registry if (r.group, r.version) == (group, version)]
    if not found:
        return None
    entries: list[Json] = []
    for resource in found:
        entry = {
            "name": resource.plural,
            "singularName": resource.singular,
            "namespaced": resource.namespaced,
            "kind": resource.kind,
            "verbs": list(VERBS),
            "storageVersionHash": "",
        }
        if resource.short_names:
            entry["shortNames"] = list(resource.short_names)
        if resource.categories:
            entry["categories"] = list(resource.categories)
        entries.append(entry)
        entries += [_subresource(resource, name) for name in resource.subresources]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": found[0].api_version, "resources": entries}


def _subresource(resource: Resource, name: str) -> Json:
    entry: Json = {
        "name": f"{resource.plural}/{name}",
        "singularName": "",
        "namespaced": resource.namespaced,
        "kind": resource.kind,
        "verbs": [READ[0], "patch", "update"],
    }
    if name == "scale":
        entry |= {"kind": "Scale", "group": "autoscaling", "version": "v1"}
    elif name == "eviction":
        entry |= {"kind": "Eviction", "group": "policy", "version": "v1", "verbs": ["create"]}
    elif name == "binding":
        entry |= {"kind": "Binding", "verbs": ["create"]}
    return entry


def open_api(registry: Registry, group: str, version: str) -> Json:
    """Return the OpenAPI v3 document of a group: only that PATCH knows fieldValidation, which `kubectl apply` looks for."""
    parameters = [{"name": name, "in": "query", "schema": {"type": "string"}} for name in ("fieldValidation", "dryRun")]
    paths: Json = {}
    for resource in registry:
        if (resource.group, resource.version) == (group, version):
            kind = {"group": group, "version": version, "kind": resource.kind}
            root = f"/apis/{group}/{version}" if group else f"/api/{version}"
            scope = "/namespaces/{namespace}" if resource.namespaced else ""
            patch = {"parameters": parameters, "x-kubernetes-action": "patch", "x-kubernetes-group-version-kind": kind}
            responses = {"200": {"description": "OK"}}
            paths[f"{root}{scope}/{resource.plural}/{{name}}"] = {"patch": {**patch, "responses": responses}}
    info = {"title": "Kubernetes", "version": "v1.30.0"}
    return {"openapi": "3.0.0", "info": info, "paths": paths, "components": {"schemas": {}}}
