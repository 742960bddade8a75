"""Values that a real API server fills into built-in objects. Works in place. Knows nothing of requests or of storage."""

from __future__ import annotations

import base64
from typing import Any

from .json_values import Json
from .quantity import canonical, canonicalise, is_quantity

_WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet")


def set_defaults(obj: Json) -> None:
    """Fill in the defaults of a built-in object of any kind."""
    kind, spec = obj["kind"], obj.get("spec")
    if kind in _WORKLOADS and isinstance(spec, dict):
        _workload(kind, spec)
    elif kind == "Pod" and isinstance(spec, dict):
        pod_spec(spec)
        _pod_alone(spec)
    elif kind == "Service":
        _service(obj.setdefault("spec", {}))
    elif kind == "Node":
        for amounts in ("capacity", "allocatable"):
            canonicalise(obj.get("status", {}).get(amounts))
    elif kind == "Namespace":
        obj.setdefault("spec", {}).setdefault("finalizers", ["kubernetes"])
        obj["metadata"].setdefault("labels", {})["kubernetes.io/metadata.name"] = obj["metadata"].get("name")
    elif kind == "Secret":
        obj.setdefault("type", "Opaque")
        for name, text in obj.pop("stringData", {}).items():
            obj.setdefault("data", {})[name] = base64.b64encode(text.encode()).decode()
    elif kind == "PersistentVolumeClaim" and isinstance(spec, dict):
        claim_spec(spec)
    elif kind == "NetworkPolicy" and isinstance(spec, dict):
        _network_policy(spec)
    elif kind in ("RoleBinding", "ClusterRoleBinding"):
        obj.get("roleRef", {}).setdefault("apiGroup", "rbac.authorization.k8s.io")
        for subject in obj.get("subjects", []):
            if subject.get("kind") in ("User", "Group"):
                subject.setdefault("apiGroup", "rbac.authorization.k8s.io")
    elif kind.endswith("WebhookConfiguration"):
        for webhook in obj.get("webhooks", []):
            _webhook(webhook, mutating=kind.startswith("Mutating"))
    elif kind == "CustomResourceDefinition" and isinstance(spec, dict):
        _definition(spec)


def _workload(kind: str, spec: Json) -> None:
    template = spec.setdefault("template", {})
    template.setdefault("metadata", {}).setdefault("creationTimestamp", None)
    pod_spec(template.setdefault("spec", {}))
    if kind != "DaemonSet":
        spec.setdefault("replicas", 1)
    if kind in ("Deployment", "StatefulSet", "DaemonSet"):
        spec.setdefault("revisionHistoryLimit", 10)
    if kind == "Deployment":
        spec.setdefault("progressDeadlineSeconds", 600)
        _rolling(spec.setdefault("strategy", {}), {"maxUnavailable": "25%", "maxSurge": "25%"})
    elif kind == "DaemonSet":
        _rolling(spec.setdefault("updateStrategy", {}), {"maxUnavailable": 1, "maxSurge": 0})
    elif kind == "StatefulSet":
        spec.setdefault("podManagementPolicy", "OrderedReady")
        spec.setdefault("serviceName", "")
        _rolling(spec.setdefault("updateStrategy", {}), {"partition": 0})
        spec.setdefault("persistentVolumeClaimRetentionPolicy", {"whenDeleted": "Retain", "whenScaled": "Retain"})
        for claim in spec.get("volumeClaimTemplates", []):
            claim.setdefault("apiVersion", "v1")
            claim.setdefault("kind", "PersistentVolumeClaim")
            claim.setdefault("metadata", {}).setdefault("creationTimestamp", None)
            claim_spec(claim.setdefault("spec", {}))
            claim.setdefault("status", {"phase": "Pending"})


def _rolling(strategy: Json, values: Json) -> None:
    strategy.setdefault("type", "RollingUpdate")
    if strategy["type"] == "RollingUpdate":
        rolling = strategy.setdefault("rollingUpdate", {})
        for name, value in values.items():
            rolling.setdefault(name, value)


def claim_spec(spec: Json) -> None:
    spec.setdefault("volumeMode", "Filesystem")
    canonicalise(spec.get("resources", {}).get("requests"))


def pod_spec(spec: Json) -> None:
    """Fill in what a pod and a pod template have in common."""
    spec.setdefault("restartPolicy", "Always")
    spec.setdefault("terminationGracePeriodSeconds", 30)
    spec.setdefault("dnsPolicy", "ClusterFirst")
    spec.setdefault("securityContext", {})
    spec.setdefault("schedulerName", "default-scheduler")
    if "serviceAccountName" in spec:
        spec["serviceAccount"] = spec["serviceAccountName"]  # the deprecated twin
    elif "serviceAccount" in spec:
        spec["serviceAccountName"] = spec["serviceAccount"]
    for role in ("initContainers", "containers"):
        for container in spec.get(role) or []:
            _container(container, bool(spec.get("hostNetwork")))
    for volume in spec.get("volumes") or []:
        _volume(volume)


def _container(container: Json, host_network: bool) -> None:
    container.setdefault("terminationMessagePath", "/dev/termination-log")
    container.setdefault("terminationMessagePolicy", "File")
    image = str(container.get("image", ""))
    tag = image.rsplit("/", 1)[-1].partition("@")[0].partition(":")[2]
    latest = "@" not in image and tag in ("", "latest")
    container.setdefault("imagePullPolicy", "Always" if latest else "IfNotPresent")
    resources = container.setdefault("resources", {})
    canonicalise(resources.get("limits"))
    canonicalise(resources.get("requests"))
    for port in container.get("ports") or []:
        port.setdefault("protocol", "TCP")
        if host_network:
            port.setdefault("hostPort", port.get("containerPort"))
    for variable in container.get("env") or []:
        source = variable.get("valueFrom") or {}
        if "fieldRef" in source:
            source["fieldRef"].setdefault("apiVersion", "v1")
        if "resourceFieldRef" in source:
            divisor = source["resourceFieldRef"].get("divisor", "0")
            source["resourceFieldRef"]["divisor"] = canonical(divisor) if is_quantity(divisor) else divisor
        if variable.get("value") == "":
            del variable["value"]  # Go omits the empty string
    for name in ("livenessProbe", "readinessProbe", "startupProbe"):
        if container.get(name):
            _probe(container[name])
    for hook in (container.get("lifecycle") or {}).values():
        _http_get(hook)


def _probe(probe: Json) -> None:
    for name, value in (("timeoutSeconds", 1), ("periodSeconds", 10), ("successThreshold", 1), ("failureThreshold", 3)):
        probe.setdefault(name, value)
    _http_get(probe)
    if "grpc" in probe:
        probe["grpc"].setdefault("service", "")


def _http_get(handler: Json) -> None:
    if "httpGet" in handler:
        handler["httpGet"].setdefault("scheme", "HTTP")
        handler["httpGet"].setdefault("path", "/")


def _volume(volume: Json) -> None:
    kinds = [name for name in volume if name != "name"]
    if not kinds:
        volume["emptyDir"] = {}
    for name, mode in (("configMap", True), ("secret", True), ("downwardAPI", True), ("projected", True)):
        if name in volume and mode:
            volume[name].setdefault("defaultMode", 0o644)
    if "hostPath" in volume:
        volume["hostPath"].setdefault("type", "")
    limit = (volume.get("emptyDir") or {}).get("sizeLimit")
    if is_quantity(limit):
        volume["emptyDir"]["sizeLimit"] = canonical(limit)
    items = [volume.get("downwardAPI") or {}]
    for source in (volume.get("projected") or {}).get("sources") or []:
        items.append(source.get("downwardAPI") or {})
        if "serviceAccountToken" in source:
            source["serviceAccountToken"].setdefault("expirationSeconds", 3600)
    for item in (i for downward in items for i in downward.get("items") or []):
        if "fieldRef" in item:
            item["fieldRef"].setdefault("apiVersion", "v1")


def _pod_alone(spec: Json) -> None:
    spec.setdefault("enableServiceLinks", True)
    spec.setdefault("preemptionPolicy", "PreemptLowerPriority")
    spec.setdefault("priority", 0)
    spec.setdefault("serviceAccountName", "default")
    spec["serviceAccount"] = spec["serviceAccountName"]
    for role in ("initContainers", "containers"):
        for container in spec.get(role) or []:
            resources = container["resources"]
            for name, amount in (resources.get("limits") or {}).items():
                resources.setdefault("requests", {}).setdefault(name, amount)
    tolerations = spec.setdefault("tolerations", [])
    for taint in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"):
        tolerated = any(
            t.get("key") in (taint, None, "") and t.get("effect") in ("NoExecute", None, "") for t in tolerations
        )
        if not tolerated:
            tolerations.append({"key": taint, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300})


def _service(spec: Json) -> None:
    kind = spec.setdefault("type", "ClusterIP")
    spec.setdefault("sessionAffinity", "None")
    if spec["sessionAffinity"] == "ClientIP":
        spec.setdefault("sessionAffinityConfig", {"clientIP": {"timeoutSeconds": 10800}})
    for port in spec.get("ports") or []:
        port.setdefault("protocol", "TCP")
        if port.get("targetPort") in (None, "", 0):
            port["targetPort"] = port.get("port")
    if kind != "ExternalName":
        spec.setdefault("internalTrafficPolicy", "Cluster")
        spec.setdefault("ipFamilies", ["IPv4"])
        spec.setdefault("ipFamilyPolicy", "SingleStack")
    if kind in ("NodePort", "LoadBalancer"):
        spec.setdefault("externalTrafficPolicy", "Cluster")
    if kind == "LoadBalancer":
        spec.setdefault("allocateLoadBalancerNodePorts", True)


def _network_policy(spec: Json) -> None:
    if not spec.get("policyTypes"):
        spec["policyTypes"] = ["Ingress", "Egress"] if spec.get("egress") else ["Ingress"]
    for rule in (spec.get("ingress") or []) + (spec.get("egress") or []):
        for port in rule.get("ports") or []:
            port.setdefault("protocol", "TCP")


def _webhook(webhook: Json, mutating: bool) -> None:
    defaults: dict[str, Any] = {
        "failurePolicy": "Fail",
        "matchPolicy": "Equivalent",
        "namespaceSelector": {},
        "objectSelector": {},
        "timeoutSeconds": 10,
    }
    if mutating:
        defaults["reinvocationPolicy"] = "Never"
    for name, value in defaults.items():
        webhook.setdefault(name, value)
    service = webhook.get("clientConfig", {}).get("service")
    if service:
        service.setdefault("port", 443)
    for rule in webhook.get("rules", []):
        rule.setdefault("scope", "*")


def _definition(spec: Json) -> None:
    names = spec.setdefault("names", {})
    names.setdefault("singular", str(names.get("kind", "")).lower())
    names.setdefault("listKind", f"{names.get('kind', '')}List")
    spec.setdefault("conversion", {"strategy": "None"})
