"""The KVCache of orchestration.aibrix.ai/v1alpha1: as 0.2 published it, and as 0.3 and later have it.

Both forms have one group, one version and one kind. The fields tell which one it is. Facts: types and controllers of the
releases 0.2.1 and 0.7.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..findings import Fields, Finding
from ..kvcache import Form, KVCache, PodExtras, Port, Store
from ..names import IMAGE, RPC_PORT, WORKLOAD_LABEL
from ..options import check_options
from .common import (
    MAX_REPLICAS,
    MEMBERS,
    PULL_POLICIES,
    SERVICE_TYPES,
    checked_port_name,
    checked_quantity,
    read_annotations,
    read_env,
    read_external,
    read_labels,
    read_metadata,
    read_pod_labels,
    read_pull_secrets,
    read_sizes,
    read_store,
    read_tolerations,
)

_OLD = ("replicas", "etcdReplicas", "cacheSpec")  # fields of 0.2 alone
_NEW = ("mode", "cache", "watcher")  # fields of 0.3 and later alone
_STORES = ("etcd", "redis")
_FLAT = ("image", "replicas", "resources", "storage", "imagePullPolicy", "env", "template")  # of a store
MAX_PORT = 65535
TEMPLATE_NOTE = (
    "of a template, labels, annotations, nodeSelector, tolerations, imagePullSecrets and priorityClassName act"
)


def read_published(manifest: Mapping[str, Any], image: str = "") -> KVCache:
    """Return what it asks for. `image` is used where it names none."""
    findings: list[Finding] = []
    known = read_metadata(manifest, findings) | read_annotations(manifest, findings)
    spec = Fields(manifest.get("spec"), "spec", findings)
    old, new = spec.given(_OLD), [*spec.given(_NEW), *_new_inside(manifest.get("spec"))]
    if old and new:
        spec.error("spec", f"mixes fields of two versions: {', '.join(old)} and {', '.join(new)}; keep those of one")
    if new:
        form = Form.RUNTIME
        known |= _read_runtime_form(spec, image)
    else:
        form = Form.PUBLISHED
        known |= _read_old_form(spec, image)
    service = spec.inside("service")
    known |= _read_service(service)
    service.close()
    spec.close()
    check_options(known["env"], {}, bool(known.get("redis") or known.get("external_redis")), spec)
    return KVCache(form=form, findings=tuple(findings), **known)


def _new_inside(spec: object) -> list[str]:
    """Return the fields of 0.3 and later that lie deeper: there `cache` may be left out."""

    def inside(values: object, name: str) -> object:
        return values.get(name) if isinstance(values, Mapping) else None

    metadata = inside(spec, "metadata")
    places = {"service": inside(spec, "service")} | {f"metadata.{name}": inside(metadata, name) for name in _STORES}
    fields = {"service": ("ports",)} | {f"metadata.{name}": ("runtime", "externalConnection") for name in _STORES}
    return [f"{at}.{name}" for at, names in fields.items() for name in names if inside(places[at], name) is not None]


def _read_old_form(spec: Fields, default_image: str) -> dict[str, Any]:
    cache = spec.inside("cacheSpec")
    image = cache.text("image") or default_image or IMAGE
    pull_policy = cache.text("imagePullPolicy", "IfNotPresent", PULL_POLICIES)
    memory = checked_quantity(cache, "memory", "2Gi")
    found: dict[str, Any] = {"image": image, "pull_policy": pull_policy, "cpu": checked_quantity(cache, "cpu", "1")}
    found |= read_sizes(cache, memory, cache.at("memory")) | {"env": read_env(cache)}
    cache.ignored("replicas", "spec.replicas counts")
    cache.close()
    found["min_pods"] = spec.integer("replicas", 1, 0, MAX_REPLICAS)
    members = spec.integer("etcdReplicas", 1, 0, MAX_REPLICAS)
    metadata = spec.inside("metadata")
    if "etcd" in metadata or "redis" not in metadata:  # without either, 0.2 runs one etcd
        etcd = metadata.inside("etcd")
        replicas = "replicas" in etcd
        found["etcd"] = read_store(etcd, image, pull_policy, "etcd")
        if not replicas and found["etcd"] is not None:
            found["etcd"] = _with_members(spec, found["etcd"], members)
        elif replicas and "etcdReplicas" in spec:
            spec.ignored("etcdReplicas", "spec.metadata.etcd.replicas counts")
    elif "etcdReplicas" in spec:
        spec.ignored("etcdReplicas", "there is no etcd beside metadata.redis")
    if "redis" in metadata:
        found["redis"] = read_store(metadata.inside("redis"), "", pull_policy, "redis")
    metadata.close()
    return found


def _with_members(spec: Fields, etcd: Store, members: int) -> Store | None:
    if members not in (0, *MEMBERS):
        spec.error(spec.at("etcdReplicas"), f"is {members}; use 1, 3 or 5: an even number survives no more losses")
    return replace(etcd, replicas=members) if members else None


def _read_runtime_form(spec: Fields, default_image: str) -> dict[str, Any]:
    spec.ignored("mode", "kvkern has one mode: a daemon on each node")
    spec.ignored("watcher", "the operator itself watches the pods")
    cache = spec.inside("cache")
    image = cache.text("image") or default_image or IMAGE
    pull_policy = cache.text("imagePullPolicy", "IfNotPresent", PULL_POLICIES)
    resources = cache.inside("resources")
    limits, requests = resources.mapping("limits"), resources.mapping("requests")
    resources.ignored("claims", "a cache pod needs no devices")
    resources.close()
    for kind, values in (("limits", limits), ("requests", requests)):
        for name in values:
            if name not in ("cpu", "memory"):
                inside = Fields(values, resources.at(kind), spec.findings)
                inside.ignored(name, "a cache pod takes only cpu and memory")
    for name in ("cpu", "memory"):
        if name in limits and name in requests and str(limits[name]) != str(requests[name]):
            resources.adjusted(f"requests.{name}", f"a cache pod requests its limit, {limits[name]}")
    both = Fields(requests | limits, resources.at("limits"), spec.findings)
    memory = checked_quantity(both, "memory", "2Gi")
    found: dict[str, Any] = {"image": image, "pull_policy": pull_policy, "cpu": checked_quantity(both, "cpu", "1")}
    found |= read_sizes(Fields({}, "", spec.findings), memory, both.at("memory")) | {"env": read_env(cache)}
    found["min_pods"] = cache.integer("replicas", 1, 0, MAX_REPLICAS)
    found["extras"] = _read_template(cache.inside("template"))
    cache.close()
    metadata = spec.inside("metadata")
    for kind in _STORES:
        if kind not in metadata:
            continue
        store = metadata.inside(kind)
        external = read_external(store.inside("externalConnection"))
        if external is None:
            found[kind] = read_store(store, image if kind == "etcd" else "", pull_policy, kind)
        elif kind == "redis":
            found["external_redis"] = external
            for name in ("runtime", *_FLAT):
                store.ignored(name, "externalConnection counts")
            store.close()
        else:
            for name in ("externalConnection", "runtime", *_FLAT):
                store.ignored(name, "kvkern keeps nothing in etcd, and with an external one none is made")
            store.close()
    metadata.close()
    return found


def _read_template(template: Fields) -> PodExtras:
    """Read those fields of a pod's template that users add to. What makes the pod a cache pod is the operator's."""
    metadata, spec = template.inside("metadata"), template.inside("spec")
    extras = PodExtras(
        labels=read_pod_labels(metadata, "labels", WORKLOAD_LABEL),
        annotations=read_labels(metadata, "annotations", values=False),
        node_selector=read_labels(spec, "nodeSelector"),
        tolerations=read_tolerations(spec),
        pull_secrets=read_pull_secrets(spec),
        priority_class=spec.text("priorityClassName"),
    )
    for name in spec.unread():
        spec.ignored(
            name,
            TEMPLATE_NOTE,
        )
    for each in (metadata, spec, template):
        each.close()
    return extras


def _read_service(service: Fields) -> dict[str, Any]:
    found: dict[str, Any] = {"service_type": service.text("type", "ClusterIP", SERVICE_TYPES)}
    given = service.given(("port", "nodePort"))
    if "ports" in service:
        if given:
            service.error(service.path, f"has both ports and {', '.join(given)}; give one of them")
        found["ports"] = tuple(_read_ports(service))
    else:
        port = service.integer("port", RPC_PORT, 1, MAX_PORT)
        node_port = service.integer("nodePort", 0, 0, MAX_PORT)
        found["ports"] = (Port("vineyard-rpc", port, RPC_PORT, node_port),)
    if found["service_type"] == "ClusterIP" and any(each.node_port for each in found["ports"]):
        service.adjusted("nodePort", "a service of type ClusterIP has none; give type: NodePort")
        found["ports"] = tuple(Port(each.name, each.port, each.target) for each in found["ports"])
    return found


def _read_ports(service: Fields) -> list[Port]:
    found = []
    for number, entry in enumerate(service.items("ports")):
        fields = Fields(entry, f"{service.at('ports')}[{number}]", service.findings)
        port = fields.integer("port", RPC_PORT, 1, MAX_PORT)
        if fields.text("protocol", "TCP", ("TCP",)) == "TCP":
            found.append(
                Port(
                    checked_port_name(fields, "name", f"port-{port}"),
                    port,
                    RPC_PORT,
                    fields.integer("nodePort", 0, 0, MAX_PORT),
                )
            )
        fields.ignored("targetPort", f"a daemon answers on {RPC_PORT}")
        fields.ignored("appProtocol", "it is HTTP")
        fields.close()
    for what in ("name", "port"):
        if len({getattr(each, what) for each in found}) < len(found):
            service.error(service.at("ports"), f"has the same {what} twice")
    return found or [Port("vineyard-rpc", RPC_PORT, RPC_PORT)]
