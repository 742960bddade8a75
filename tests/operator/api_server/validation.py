"""What a real API server refuses in built-in objects: wrong values, and changes of immutable fields.

Only rules that an operator can run into. Types and unknown fields are the business of builtin_schemas.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from typing import Any

from .crds import definition_errors
from .errors import Cause
from .json_values import Json, clone
from .quantity import is_quantity, quantity
from .selectors import selects

_DNS_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_DNS_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_QUALIFIED = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?)?")
_PORT_NAME = re.compile(r"(?=.{1,15}$)(?=.*[a-z])[a-z0-9]+(-[a-z0-9]+)*")
_ENV_NAME = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")
_LABEL_NAMED = ("Service", "Namespace")
_PATH_NAMED = ("Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding")
_IMMUTABLE = "Invalid value: field is immutable"
_POD_UPDATE = (
    "Forbidden: pod updates may not change fields other than `spec.containers[*].image`,`spec.initContainers[*].image`,"
    "`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing tolerations),"
    "`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)"
)
_STATEFUL_UPDATE = (
    "Forbidden: updates to statefulset spec for fields other than 'replicas', 'ordinals', 'template', 'updateStrategy', "
    "'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden"
)
_STATEFUL_MUTABLE = (
    "replicas",
    "ordinals",
    "template",
    "updateStrategy",
    "persistentVolumeClaimRetentionPolicy",
    "minReadySeconds",
)


def metadata_errors(obj: Json) -> Iterator[Cause]:
    meta, kind = obj["metadata"], obj["kind"]
    name = meta.get("name", "")
    if kind in _PATH_NAMED:
        fits = name not in (".", "..") and "/" not in name and "%" not in name
    elif kind in _LABEL_NAMED:
        fits = bool(_DNS_LABEL.fullmatch(name))
    else:
        fits = len(name) <= 253 and bool(_DNS_NAME.fullmatch(name))
    if not fits:
        text = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.'"
        yield Cause("metadata.name", f'Invalid value: "{name}": {text}')
    yield from label_errors(meta.get("labels"), "metadata.labels")
    annotations = meta.get("annotations") or {}
    for key in annotations:
        if not _QUALIFIED.fullmatch(key):
            yield Cause(
                "metadata.annotations", f'Invalid value: "{key}": name part must consist of alphanumeric characters'
            )
    if sum(len(k) + len(str(v)) for k, v in annotations.items()) > 256 * 1024:
        yield Cause("metadata.annotations", "Too long: must have at most 262144 bytes", "FieldValueTooLong")
    for i, owner in enumerate(meta.get("ownerReferences") or []):
        for field in ("apiVersion", "kind", "name", "uid"):
            if not owner.get(field):
                yield Cause(f"metadata.ownerReferences[{i}].{field}", 'Invalid value: "": must not be empty')
    if sum(bool(o.get("controller")) for o in meta.get("ownerReferences") or []) > 1:
        yield Cause("metadata.ownerReferences", "Invalid value: Only one reference can have Controller set to true")


def label_errors(labels: Json | None, path: str) -> Iterator[Cause]:
    for key, value in (labels or {}).items():
        if not _QUALIFIED.fullmatch(key):
            yield Cause(
                path, f"Invalid value: \"{key}\": name part must consist of alphanumeric characters, '-', '_' or '.'"
            )
        if not isinstance(value, str) or not _LABEL_VALUE.fullmatch(value):
            text = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.' (63 at most)"
            yield Cause(path, f'Invalid value: "{value}": {text}')


def errors(obj: Json, old: Json | None) -> list[Cause]:
    """Return what is wrong with a built-in object whose defaults are filled in."""
    return [*metadata_errors(obj), *_value_errors(obj), *(_change_errors(obj, old) if old else ())]


def _value_errors(obj: Json) -> Iterator[Cause]:
    kind, spec = obj["kind"], obj.get("spec") or {}
    if kind in ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet"):
        template = spec["template"]
        labels = template["metadata"].get("labels")
        yield from label_errors(labels, "spec.template.metadata.labels")
        if not spec.get("selector"):
            yield Cause("spec.selector", "Required value", "FieldValueRequired")
        elif not selects(spec["selector"], labels):
            yield Cause(
                "spec.template.metadata.labels", f"Invalid value: {labels}: `selector` does not match template `labels`"
            )
        if template["spec"].get("restartPolicy") != "Always":
            text = f'Unsupported value: "{template["spec"].get("restartPolicy")}": supported values: "Always"'
            yield Cause("spec.template.spec.restartPolicy", text, "FieldValueNotSupported")
        if isinstance(spec.get("replicas"), int) and spec["replicas"] < 0:
            yield Cause("spec.replicas", f"Invalid value: {spec['replicas']}: must be greater than or equal to 0")
        strategy = spec.get("strategy") or {}
        if strategy.get("type") == "Recreate" and strategy.get("rollingUpdate"):
            text = "Forbidden: may not be specified when strategy `type` is 'Recreate'"
            yield Cause("spec.strategy.rollingUpdate", text, "FieldValueForbidden")
        rolling = strategy.get("rollingUpdate") or {}
        if rolling and all(str(rolling.get(f)) in ("0", "0%") for f in ("maxSurge", "maxUnavailable")):
            yield Cause(
                "spec.strategy.rollingUpdate.maxUnavailable", "Invalid value: 0: may not be 0 when `maxSurge` is 0"
            )
        claims = {claim["metadata"].get("name") for claim in spec.get("volumeClaimTemplates") or []}
        yield from _pod_errors(template["spec"], "spec.template.spec", claims)
    elif kind == "Pod":
        yield from _pod_errors(spec, "spec")
    elif kind == "Service":
        yield from _service_errors(spec)
    elif kind == "PodDisruptionBudget":
        if "minAvailable" in spec and "maxUnavailable" in spec:
            yield Cause("spec", "Invalid value: minAvailable and maxUnavailable cannot be both set")
    elif kind == "Secret":
        for key in obj.get("data") or {}:
            if not re.fullmatch(r"[-._a-zA-Z0-9]+", key):
                yield Cause(f"data[{key}]", "Invalid value: a valid config key must consist of alphanumeric characters")
    elif kind == "CustomResourceDefinition":
        yield from definition_errors(obj)
    elif kind.endswith("WebhookConfiguration"):
        for i, webhook in enumerate(obj.get("webhooks") or []):
            for field in ("admissionReviewVersions", "sideEffects", "clientConfig", "name"):
                if not webhook.get(field):
                    yield Cause(f"webhooks[{i}].{field}", "Required value", "FieldValueRequired")
            if str(webhook.get("name")).count(".") < 2:
                yield Cause(
                    f"webhooks[{i}].name",
                    "Invalid value: should be a domain with at least three segments separated by dots",
                )
            if not 1 <= webhook.get("timeoutSeconds", 10) <= 30:
                yield Cause(
                    f"webhooks[{i}].timeoutSeconds", "Invalid value: the timeout value must be between 1 and 30 seconds"
                )


def _pod_errors(spec: Json, path: str, claims: Set[Any] = frozenset()) -> Iterator[Cause]:
    """Check a pod's spec. `claims` are volumes that a StatefulSet adds; a real server checks less of its template."""
    containers = [("containers", i, c) for i, c in enumerate(spec.get("containers") or [])]
    containers += [("initContainers", i, c) for i, c in enumerate(spec.get("initContainers") or [])]
    if not spec.get("containers"):
        yield Cause(f"{path}.containers", "Required value", "FieldValueRequired")
    yield from _unique([v.get("name") for v in spec.get("volumes") or []], f"{path}.volumes", ".name")
    names = [c.get("name") for _, _, c in containers]
    yield from _unique(names, f"{path}.containers", ".name")
    volumes = {v.get("name") for v in spec.get("volumes") or []} | claims
    for i, volume in enumerate(spec.get("volumes") or []):
        if not _DNS_LABEL.fullmatch(str(volume.get("name", ""))):
            yield Cause(
                f"{path}.volumes[{i}].name",
                f'Invalid value: "{volume.get("name")}": a lowercase RFC 1123 label must be used',
            )
        if len(volume) > 2:
            text = "Forbidden: may not specify more than 1 volume type"
            yield Cause(f"{path}.volumes[{i}]", text, "FieldValueForbidden")
        host = volume.get("hostPath")
        if host is not None and (not host.get("path") or ".." in host["path"].split("/")):
            yield Cause(
                f"{path}.volumes[{i}].hostPath.path", "Invalid value: must not be empty and must not contain '..'"
            )
    for role, i, container in containers:
        yield from _container_errors(container, f"{path}.{role}[{i}]", volumes)
    grace = spec.get("terminationGracePeriodSeconds")
    if isinstance(grace, int) and grace < 0:
        yield Cause(
            f"{path}.terminationGracePeriodSeconds", f"Invalid value: {grace}: must be greater than or equal to 0"
        )


def _container_errors(container: Json, path: str, volumes: Set[Any]) -> Iterator[Cause]:
    if not _DNS_LABEL.fullmatch(str(container.get("name", ""))):
        yield Cause(
            f"{path}.name", f'Invalid value: "{container.get("name", "")}": a lowercase RFC 1123 label must be used'
        )
    if not container.get("image"):
        yield Cause(f"{path}.image", "Required value", "FieldValueRequired")
    mounts = container.get("volumeMounts") or []
    for i, mount in enumerate(mounts):
        if mount.get("name") not in volumes:
            yield Cause(f"{path}.volumeMounts[{i}].name", f'Not found: "{mount.get("name")}"', "FieldValueNotFound")
    paths = [m.get("mountPath") for m in mounts]
    for i, where in enumerate(paths):
        if where in paths[:i]:
            yield Cause(f"{path}.volumeMounts[{i}].mountPath", f'Invalid value: "{where}": must be unique')
    for i, variable in enumerate(container.get("env") or []):
        if not _ENV_NAME.fullmatch(str(variable.get("name", ""))):
            yield Cause(
                f"{path}.env[{i}].name",
                f'Invalid value: "{variable.get("name")}": a valid environment variable name is needed',
            )
        if variable.get("value") and variable.get("valueFrom"):
            yield Cause(
                f"{path}.env[{i}].valueFrom", 'Invalid value: "": may not be specified when `value` is not empty'
            )
    yield from _unique([p["name"] for p in container.get("ports") or [] if "name" in p], f"{path}.ports", ".name")
    for i, port in enumerate(container.get("ports") or []):
        if not 0 < port.get("containerPort", 0) < 65536:
            yield Cause(f"{path}.ports[{i}].containerPort", "Invalid value: must be between 1 and 65535, inclusive")
        if "name" in port and not _PORT_NAME.fullmatch(port["name"]):
            yield Cause(
                f"{path}.ports[{i}].name",
                f'Invalid value: "{port["name"]}": must be an IANA service name of at most 15 characters',
            )
    resources = container.get("resources") or {}
    limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
    for field, amounts in (("limits", limits), ("requests", requests)):
        for name, amount in amounts.items():
            if not is_quantity(amount) or quantity(amount) < 0:
                yield Cause(
                    f"{path}.resources.{field}[{name}]", f'Invalid value: "{amount}": must be a quantity of at least 0'
                )
    for name, amount in requests.items():
        if (
            name in limits
            and is_quantity(amount)
            and is_quantity(limits[name])
            and quantity(amount) > quantity(limits[name])
        ):
            text = f'Invalid value: "{amount}": must be less than or equal to {name} limit of {limits[name]}'
            yield Cause(f"{path}.resources.requests", text)
    for name in ("livenessProbe", "readinessProbe", "startupProbe"):
        probe = container.get(name)
        handlers = [h for h in ("exec", "httpGet", "tcpSocket", "grpc") if h in (probe or {})]
        if probe and len(handlers) != 1:
            yield Cause(f"{path}.{name}", "Required value: must specify a handler type", "FieldValueRequired")
        if probe and name != "readinessProbe" and probe.get("successThreshold") != 1:
            yield Cause(f"{path}.{name}.successThreshold", "Invalid value: must be 1")


def _service_errors(spec: Json) -> Iterator[Cause]:
    ports = spec.get("ports") or []
    if not ports and spec.get("clusterIP") != "None" and spec.get("type") != "ExternalName":
        yield Cause("spec.ports", "Required value", "FieldValueRequired")
    for i, port in enumerate(ports):
        if not 0 < port.get("port", 0) < 65536:
            yield Cause(
                f"spec.ports[{i}].port", f"Invalid value: {port.get('port')}: must be between 1 and 65535, inclusive"
            )
        if len(ports) > 1 and not port.get("name"):
            yield Cause(f"spec.ports[{i}].name", "Required value", "FieldValueRequired")
        if port.get("name") and not _DNS_LABEL.fullmatch(port["name"]):
            yield Cause(
                f"spec.ports[{i}].name", f'Invalid value: "{port["name"]}": a lowercase RFC 1123 label must be used'
            )
        if port.get("nodePort") and spec.get("type") == "ClusterIP":
            text = "Forbidden: may not be used when `type` is 'ClusterIP'"
            yield Cause(f"spec.ports[{i}].nodePort", text, "FieldValueForbidden")
    yield from _unique([p.get("name") for p in ports] if len(ports) > 1 else [], "spec.ports", ".name")
    yield from _unique([(p.get("protocol"), p.get("port")) for p in ports], "spec.ports", "")
    if spec.get("type") not in ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"):
        text = f'Unsupported value: "{spec.get("type")}": supported values: "ClusterIP", "LoadBalancer", "NodePort"'
        yield Cause("spec.type", text, "FieldValueNotSupported")
    if spec.get("externalTrafficPolicy") and spec.get("type") not in ("NodePort", "LoadBalancer"):
        text = f'Invalid value: "{spec["externalTrafficPolicy"]}": may only be set for externally-accessible services'
        yield Cause("spec.externalTrafficPolicy", text)
    if spec.get("clusterIP") == "None" and spec.get("type") in ("NodePort", "LoadBalancer"):
        yield Cause("spec.clusterIPs[0]", "Invalid value: \"None\": may not be set to 'None' for this service type")


def _unique(values: list[Any], path: str, field: str) -> Iterator[Cause]:
    for i, value in enumerate(values):
        if value in values[:i]:
            yield Cause(f"{path}[{i}]{field}", f'Duplicate value: "{value}"', "FieldValueDuplicate")


def _change_errors(obj: Json, old: Json) -> Iterator[Cause]:
    kind, spec, before = obj["kind"], obj.get("spec") or {}, old.get("spec") or {}
    if kind in ("Deployment", "DaemonSet", "ReplicaSet") and spec.get("selector") != before.get("selector"):
        yield Cause("spec.selector", _IMMUTABLE)
    elif kind == "StatefulSet":
        fixed, fixed_before = ({k: v for k, v in s.items() if k not in _STATEFUL_MUTABLE} for s in (spec, before))
        if fixed != fixed_before:
            yield Cause("spec", _STATEFUL_UPDATE, "FieldValueForbidden")
    elif kind == "Pod" and _fixed_pod(spec, before) != _fixed_pod(before, before):
        yield Cause("spec", _POD_UPDATE, "FieldValueForbidden")
    elif kind == "Service":
        had, has = before.get("clusterIP"), spec.get("clusterIP")
        if had and had != has and "ExternalName" not in (spec.get("type"), before.get("type")):
            yield Cause("spec.clusterIPs[0]", f'Invalid value: ["{has}"]: may not change once set')
    elif kind == "PersistentVolumeClaim":
        fixed, fixed_before = (
            {k: v for k, v in s.items() if k not in ("resources", "volumeName")} for s in (spec, before)
        )
        if fixed != fixed_before:
            yield Cause(
                "spec", "Forbidden: spec is immutable after creation except resources.requests", "FieldValueForbidden"
            )
    elif kind in ("RoleBinding", "ClusterRoleBinding") and obj.get("roleRef") != old.get("roleRef"):
        yield Cause("roleRef", "Invalid value: cannot change roleRef")
    elif kind in ("ConfigMap", "Secret"):
        if old.get("immutable") and any(obj.get(f) != old.get(f) for f in ("data", "binaryData", "immutable")):
            yield Cause("data", "Forbidden: field is immutable when `immutable` is set", "FieldValueForbidden")
        if kind == "Secret" and obj.get("type") != old.get("type"):
            yield Cause("type", _IMMUTABLE)
    elif kind == "CustomResourceDefinition" and spec.get("scope") != before.get("scope"):
        yield Cause("spec.scope", _IMMUTABLE)


def _fixed_pod(spec: Json, before: Json) -> Json:
    """Return the part of a pod's spec that may not change. Tolerations may only be added."""
    fixed: Json = clone(spec)
    for name in ("activeDeadlineSeconds", "terminationGracePeriodSeconds"):
        fixed.pop(name, None)
    for container in (fixed.get("containers") or []) + (fixed.get("initContainers") or []):
        container.pop("image", None)
    tolerations = before.get("tolerations") or []
    fixed["tolerations"] = [t for t in fixed.get("tolerations") or [] if t in tolerations]
    return fixed
