"""The KVCache of kvkern.io/v1alpha1: all that kvkern can do, and nothing that it cannot."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...config.options import Option
from ...errors import ConfigError
from ...remote.stores.registry import built_in_schemes
from ...remote.stores.url import RemoteUrl
from ..findings import Fields, Finding, Level
from ..kvcache import ArenaPlace, Form, KVCache, PodExtras, Port
from ..names import IMAGE, RPC_PORT, WORKLOAD_ANNOTATION, WORKLOAD_LABEL
from ..options import OPTIONS, as_text, check_options
from .common import (
    MAX_REPLICAS,
    PULL_POLICIES,
    SERVICE_TYPES,
    checked_label_key,
    checked_label_value,
    checked_quantity,
    read_annotations,
    read_env,
    read_labels,
    read_metadata,
    read_pod_labels,
    read_pull_secrets,
    read_sizes,
    read_store,
    read_tolerations,
)
from .published import MAX_PORT


def camel(option: Option) -> str:
    """Return an option's name in a KVCache: tenantQuota for tenant_quota."""
    first, *others = option.name.split("_")
    return first + "".join(map(str.capitalize, others))


def read_own(manifest: Mapping[str, Any], image: str = "") -> KVCache:
    """Return what it asks for. `image` is used where it names none."""
    findings: list[Finding] = []
    known = read_metadata(manifest, findings) | read_annotations(manifest, findings)
    spec = Fields(manifest.get("spec"), "spec", findings)
    memory = checked_quantity(spec, "memory", "2Gi")
    known |= {
        "image": spec.text("image") or image or IMAGE,
        "pull_policy": spec.text("imagePullPolicy", "IfNotPresent", PULL_POLICIES),
        "cpu": checked_quantity(spec, "cpu", "1"),
        "env": read_env(spec),
        "arena": ArenaPlace(spec.text("arena", ArenaPlace.HOST, tuple(ArenaPlace))),
        "min_pods": spec.integer("minPods", 0, 0, MAX_REPLICAS),
        "max_unavailable": spec.integer("maxUnavailable", 1, 1, MAX_REPLICAS),
        "options": _read_options(spec.inside("options")),
    }
    known |= read_sizes(spec, memory, spec.at("memory"))
    workload = spec.inside("workload")
    if name := checked_label_value(workload, "name"):
        if known["workload"] not in ("", name):
            text = f"names {known['workload']}, and spec.workload.name counts"
            findings.append(Finding(Level.IGNORED, f"metadata.annotations.{WORKLOAD_ANNOTATION}", text))
        known["workload"] = name
    known["workload_label"] = checked_label_key(workload, "labelKey", WORKLOAD_LABEL)
    workload.close()
    known["extras"] = _read_extras(spec, known["workload_label"])
    service = spec.inside("service")
    known["service_type"] = service.text("type", "ClusterIP", SERVICE_TYPES)
    port, node_port = service.integer("port", RPC_PORT, 1, MAX_PORT), service.integer("nodePort", 0, 0, MAX_PORT)
    if node_port and known["service_type"] == "ClusterIP":
        service.error(
            service.at("nodePort"), f"is {node_port}, but a service of type ClusterIP has none; give type: NodePort"
        )
    known["ports"] = (Port("rpc", port, RPC_PORT, node_port),)
    service.close()
    known |= _read_remote(spec.inside("remote"), known["pull_policy"])
    spec.close()
    has_remote = bool(known["remote"] or known["remote_secret"][0] or known["redis"])
    check_options(known["env"], known["options"], has_remote, spec)
    return KVCache(form=Form.OWN, findings=tuple(findings), **known)


def _read_extras(spec: Fields, workload_label: str) -> PodExtras:
    return PodExtras(
        read_pod_labels(spec, "podLabels", workload_label), read_labels(spec, "podAnnotations", values=False),
        read_labels(spec, "nodeSelector"), read_tolerations(spec), read_pull_secrets(spec), spec.text("priorityClassName"),
    )  # fmt: skip


def _read_options(options: Fields) -> dict[str, str]:
    found = {}
    for option in OPTIONS:
        name = camel(option)
        if name in options:
            found[option.variable] = as_text(options.anything(name))
    options.close()
    return found


def _read_remote(remote: Fields, pull_policy: str) -> dict[str, Any]:
    found: dict[str, Any] = {"remote": remote.text("url"), "remote_secret": ("", ""), "redis": None}
    secret = remote.inside("urlSecretRef")
    found["remote_secret"] = (secret.text("name"), secret.text("key", "url"))
    if "urlSecretRef" in remote and not found["remote_secret"][0]:
        secret.error(secret.at("name"), "is missing; name the secret")
    secret.close()
    if "redis" in remote:
        found["redis"] = read_store(remote.inside("redis"), "", pull_policy, "redis")
    given = remote.given(("url", "urlSecretRef", "redis"))
    if len(given) > 1:
        remote.error(remote.path, f"has {', '.join(given)}; give one of them")
    if found["remote"]:
        if re.search(r"//[^/@]*:[^/@]+@", found["remote"]):
            remote.error(
                remote.at("url"), "holds a password, which everybody sees who may read a KVCache; use urlSecretRef"
            )
        try:
            scheme = RemoteUrl.parse(found["remote"]).scheme
            if scheme not in built_in_schemes():
                remote.adjusted(
                    "url", f"kvkern has no store of the scheme {scheme}; the image needs a package that has one"
                )
        except ConfigError as error:
            remote.error(remote.at("url"), str(error))
    remote.close()
    return found
