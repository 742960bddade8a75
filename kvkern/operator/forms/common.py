"""What all forms have: metadata, annotations, variables, resources, sizes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from ..findings import Fields, Finding, Level
from ..kvcache import External, Store
from ..names import (
    ANNOTATIONS,
    ANTI_AFFINITY_ANNOTATION,
    BACKEND_ANNOTATION,
    DEFAULT_GPU_KEY,
    GPU_KEY_ANNOTATION,
    GPU_TYPE_ANNOTATION,
    MODE_ANNOTATION,
    WORKLOAD_ANNOTATION,
)
from ..quantities import parse_memory, parse_quantity
from ..sizing import capacity_of

PULL_POLICIES = ("Always", "IfNotPresent", "Never")
SERVICE_TYPES = ("ClusterIP", "NodePort", "LoadBalancer")
MEMBERS = (1, 3, 5)
MAX_REPLICAS = 10_000
SERVER_OPTIONS = {  # variable -> why users may not set it: the operator does
    "KVKERN_SOCKET": "engines look for the socket in the folder on the node",
    "KVKERN_ARENA_DIR": "`arena` says where the chunks are",
    "KVKERN_CAPACITY": "it follows from the memory of the pod",
    "KVKERN_RPC": "probes and engines ask on port 9600",
    "KVKERN_METRICS": "Prometheus asks on port 8080",
    "KVKERN_NAME": "each KVCache is a trust domain of its own",
}
ETCD_VARIABLES = dict.fromkeys(
    ("MY_POD_NAME", "DATA_DIR", "PEERS_DOMAIN", "CLUSTER_TOKEN", "OTHERS", "INITIAL_CLUSTER"),
    "its members find each other by it",
)
# A label of the pods of N-redis is N-redis-<10 letters>, and has up to 63 characters.
MAX_NAME = 46
_NAME = re.compile(rf"[a-z]([-a-z0-9]{{0,{MAX_NAME - 2}}}[a-z0-9])?")
_LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_ENV_NAME = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")
_PORT_NAME = re.compile(r"(?=.{1,63}$)[a-z0-9]+(-[a-z0-9]+)*")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")


def read_metadata(manifest: Mapping[str, Any], findings: list[Finding]) -> dict[str, Any]:
    """Return the fields of a KVCache that come from its metadata."""
    metadata = manifest.get("metadata")
    metadata = metadata if isinstance(metadata, Mapping) else {}
    generation = metadata.get("generation")
    name, namespace = str(metadata.get("name", "")), str(metadata.get("namespace") or "default")
    if not _NAME.fullmatch(name):
        findings.append(
            Finding(
                Level.ERROR,
                "metadata.name",
                f"is {name[:80]!r}; use up to {MAX_NAME} lower-case letters, digits and '-', beginning with a letter, because "
                "services and pods are named after it",
            )
        )
    if not _NAMESPACE.fullmatch(namespace):
        text = f"is {namespace[:80]!r}; use up to 63 lower-case letters, digits and '-'"
        findings.append(Finding(Level.ERROR, "metadata.namespace", text))
    for field in manifest.keys() - {"apiVersion", "kind", "metadata", "spec", "status"}:
        findings.append(Finding(Level.IGNORED, str(field), "kvkern does not know this field"))  # noqa: PERF401
    return {
        "name": name,
        "namespace": namespace,
        "api": str(manifest.get("apiVersion")),
        "uid": str(metadata.get("uid") or ""),
        "generation": generation if isinstance(generation, int) else 0,
    }


def read_annotations(manifest: Mapping[str, Any], findings: list[Finding]) -> dict[str, Any]:
    """Return the fields of a KVCache that come from the published annotations."""
    metadata = manifest.get("metadata")
    values = metadata.get("annotations") if isinstance(metadata, Mapping) else None
    fields = Fields(values, "metadata.annotations", findings)
    found: dict[str, Any] = {"workload": checked_label_value(fields, WORKLOAD_ANNOTATION)}
    gpu, key = fields.text(GPU_TYPE_ANNOTATION), fields.text(GPU_KEY_ANNOTATION)
    if gpu:
        found["node_labels"] = ((key or DEFAULT_GPU_KEY, gpu),)
    elif key:
        fields.ignored(GPU_KEY_ANNOTATION, f"it acts only beside {GPU_TYPE_ANNOTATION}")
    fields.text(ANTI_AFFINITY_ANNOTATION)  # it acts always: no node has two pods of a cache
    backend = fields.text(BACKEND_ANNOTATION)
    if backend not in ("", "vineyard", "kvkern"):
        fields.adjusted(BACKEND_ANNOTATION, f"is {backend!r}; kvkern serves on each node whatever it says")
    fields.ignored(MODE_ANNOTATION, "kvkern has one mode: a daemon on each node")
    for name in values or () if isinstance(values, Mapping) else ():
        prefix = str(name).split("/")[0]
        if prefix.endswith(ANNOTATIONS.rstrip("/")) and prefix != ANNOTATIONS.rstrip("/"):
            fields.ignored(name, "it configures another backend")
        elif prefix == ANNOTATIONS.rstrip("/") and name not in (
            WORKLOAD_ANNOTATION, GPU_TYPE_ANNOTATION, GPU_KEY_ANNOTATION, ANTI_AFFINITY_ANNOTATION, BACKEND_ANNOTATION,
            MODE_ANNOTATION,
        ):  # fmt: skip
            fields.ignored(name, "kvkern does not know this annotation")
    return found  # annotations of other programs are theirs


def checked_label_key(fields: Fields, name: str, default: str) -> str:
    """Read the key of a label."""
    return _matching(fields, name, _LABEL_KEY, "no label's key can be that", default)


def checked_label_value(fields: Fields, name: str) -> str:
    """Read a label's value."""
    return _matching(fields, name, _LABEL_VALUE, "no label can be that; name the workload")


def checked_port_name(fields: Fields, name: str, default: str) -> str:
    """Read the name of a Service's port."""
    return _matching(fields, name, _PORT_NAME, "use lower-case letters, digits and '-'", default)


def _matching(fields: Fields, name: str, pattern: re.Pattern[str], why: str, default: str = "") -> str:
    """Read a text that has to match; empty is the default."""
    text = fields.text(name) or default
    if not pattern.fullmatch(text):
        fields.error(fields.at(name), f"is {text[:80]!r}; {why}")
        return default
    return text


def read_env(fields: Fields, own: Mapping[str, str] = SERVER_OPTIONS, name: str = "env") -> tuple[dict[str, Any], ...]:
    """Read variables of a container. The operator's own, variable -> why, cannot be replaced."""
    kept: dict[str, dict[str, Any]] = {}
    paths: dict[str, str] = {}
    for number, entry in enumerate(fields.items(name)):
        path = f"{fields.at(name)}[{number}]"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str) or not entry["name"]:
            fields.error(path, "has no name")
            continue
        variable = {str(key): value for key, value in entry.items() if value is not None}
        if problem := _env_problem(variable):
            fields.error(path, problem)
        elif variable["name"] in own:
            text = f"{variable['name']} is set by the operator: {own[variable['name']]}"
            fields.findings.append(Finding(Level.IGNORED, path, text))
        else:
            if earlier := paths.get(variable["name"]):
                text = f"{variable['name']} is there again as {path}, and the last one counts"
                fields.findings.append(Finding(Level.IGNORED, earlier, text))
            kept[variable["name"]], paths[variable["name"]] = variable, path
    return tuple(kept.values())


def _env_problem(variable: Mapping[str, Any]) -> str:
    """Return what Kubernetes would refuse; empty: nothing."""
    name, value, source = variable["name"], variable.get("value", ""), variable.get("valueFrom")
    if not _ENV_NAME.fullmatch(name):
        return f"name is {name[:60]!r}; use letters, digits, '-', '_' and '.', with no digit at the beginning"
    if not isinstance(value, str):
        return f"value of {name[:60]} is {str(value)[:60]!r}, which is no text; put it in quotes"
    if source is not None and (not isinstance(source, Mapping) or len(source) != 1 or value):
        return f"valueFrom of {name[:60]} must be an object with one field, such as secretKeyRef, and have no value beside it"
    if unknown := [key for key in variable if key not in ("name", "value", "valueFrom")]:
        return f"has {unknown[0][:60]!r}; a variable has name, and value or valueFrom"
    return ""


def read_labels(fields: Fields, name: str, values: bool = True) -> dict[str, str]:
    """Read labels; with `values` False annotations, whose values are any texts."""
    found = {}
    for key, value in fields.mapping(name).items():
        if not _LABEL_KEY.fullmatch(str(key)):
            fields.error(fields.at(name), f"has the key {str(key)[:80]!r}, which no label can have")
        elif not isinstance(value, str) or (values and not _LABEL_VALUE.fullmatch(value)):
            fields.error(
                fields.at(f"{name}.{key}"), f"is {str(value)[:80]!r}, which cannot be; expected a text, in quotes"
            )
        else:
            found[key] = value
    return found


def read_pod_labels(fields: Fields, name: str, workload_label: str) -> dict[str, str]:
    """Read labels that users give cache pods. The operator's own, and the workload's, cannot be among them."""
    found = read_labels(fields, name)
    for key in list(found):
        if key == workload_label or key.startswith((ANNOTATIONS, "app.kubernetes.io/")):
            why = "it says which pods are the workload's" if key == workload_label else "the operator sets it"
            fields.findings.append(Finding(Level.IGNORED, fields.at(f"{name}.{key}"), why))
            del found[key]
    return found


def read_tolerations(fields: Fields, name: str = "tolerations") -> tuple[dict[str, Any], ...]:
    """Read tolerations of taints."""
    found = fields.items(name)
    for number, each in enumerate(found):
        if not isinstance(each, Mapping):
            fields.error(f"{fields.at(name)}[{number}]", "is no object; give key, operator and effect")
    return tuple(dict(each) for each in found if isinstance(each, Mapping))


def read_pull_secrets(fields: Fields, name: str = "imagePullSecrets") -> tuple[str, ...]:
    """Read the names of secrets."""
    found = []
    for number, each in enumerate(fields.items(name)):
        if isinstance(each, Mapping) and isinstance(each.get("name"), str) and each["name"]:
            found.append(each["name"])
        else:
            fields.error(f"{fields.at(name)}[{number}]", "has no name; give name: SECRET")
    return tuple(found)


def checked_quantity(fields: Fields, name: str, default: str) -> str:
    """Read a quantity above zero."""
    text = fields.quantity(name, default)
    try:
        if parse_quantity(text, fields.at(name)) <= 0:
            fields.error(fields.at(name), f"is {text!r}; it must be above 0")
    except ConfigError:
        fields.error(fields.at(name), f"is {text[:60]!r}; expected a quantity such as 500m, 2 or 4Gi")
        return default
    return text


def read_sizes(fields: Fields, memory: str, memory_path: str) -> dict[str, Any]:
    """Return capacity and the size of /dev/shm. `fields` may hold sharedMemorySize."""
    found: dict[str, Any] = {"memory": memory}
    try:
        found["capacity_nbytes"] = capacity_of(memory, memory_path)
    except ConfigError as error:
        fields.error(memory_path, str(error))
    if fields.filled("sharedMemorySize"):
        found["shared_memory"] = checked_quantity(fields, "sharedMemorySize", "64Mi")
    return found


def read_store(fields: Fields, default_image: str, default_pull_policy: str, kind: str) -> Store | None:
    """Read an etcd or a Redis in either form: flat, or with `runtime`. None: it has no replicas."""
    runtime = fields.inside("runtime")
    flat = fields.given(("image", "replicas", "resources"))
    if "runtime" in fields and flat:
        fields.error(fields.path, f"has both `runtime` and {', '.join(flat)}; give one of them")
    source = runtime if "runtime" in fields else fields
    image = source.text("image") or default_image
    pull_policy = source.text("imagePullPolicy", default_pull_policy, PULL_POLICIES)
    replicas = source.integer("replicas", 1, 0, MAX_REPLICAS)
    resources = source.mapping("resources")
    env = read_env(source, ETCD_VARIABLES if kind == "etcd" else {})
    storage_fields = fields.inside("storage")
    if kind == "redis":
        storage_fields.ignored(
            "size", "the server writes nothing to disk, because its data is a cache that may be lost"
        )
    storage = checked_quantity(storage_fields, "size", "10Gi") if "size" in storage_fields and kind == "etcd" else ""
    storage_fields.close()
    source.ignored("template", "give image, env and resources instead")
    if kind == "etcd" and replicas not in (0, *MEMBERS):
        fields.error(source.at("replicas"), f"is {replicas}; use 1, 3 or 5: an even number survives no more losses")
    if kind == "redis" and replicas > 1:
        source.adjusted("replicas", f"is {replicas}; one server runs, because its data is a cache that may be lost")
        replicas = 1
    _check_resources(source, resources)
    runtime.close()
    fields.close()
    return Store(replicas, image, pull_policy, resources, storage, env) if replicas else None


def _check_resources(fields: Fields, resources: Mapping[str, Any]) -> None:
    inside = Fields(resources, fields.at("resources"), fields.findings)
    for kind in ("requests", "limits"):
        for name, value in inside.mapping(kind).items():
            try:
                parse_quantity(value, name)
            except ConfigError:
                fields.error(
                    f"{inside.at(kind)}.{name}", f"is {str(value)[:60]!r}; expected a quantity such as 500m, 2 or 4Gi"
                )
        if any(name not in ("cpu", "memory", "ephemeral-storage") and "/" not in name for name in inside.mapping(kind)):
            fields.error(
                inside.at(kind), "may have cpu, memory, ephemeral-storage and resources with a '/' in their names"
            )
    requests, limits = inside.mapping("requests"), inside.mapping("limits")
    for name in requests.keys() & limits.keys():
        with contextlib.suppress(ConfigError):  # reported above
            if parse_quantity(requests[name], name) > parse_quantity(limits[name], name):
                fields.error(f"{inside.at('requests')}.{name}", f"is {requests[name]}, above the limit {limits[name]}")
    inside.ignored("claims", "etcd and Redis need no devices")
    inside.close()


def memory_limit(resources: Mapping[str, Any]) -> int:
    """Return the bytes that resources allow: their limit, else their request. 0: they name neither."""
    for kind in ("limits", "requests"):
        if isinstance(resources.get(kind), Mapping) and "memory" in resources[kind]:
            return parse_memory(resources[kind]["memory"], "memory")
    return 0


def read_external(fields: Fields) -> External | None:
    """Read `externalConnection`: an address, and a secret as name/key."""
    address, secret = fields.text("address"), fields.text("passwordSecretRef")
    fields.close()
    if not address:
        if secret:
            fields.error(fields.at("address"), "is missing; give host:port")
        return None
    if not re.fullmatch(r"[A-Za-z0-9._\[\]:-]+:\d{1,5}", address) or int(address.rpartition(":")[2]) not in range(
        1, 65536
    ):
        fields.error(fields.at("address"), f"is {address[:80]!r}; expected host:port")
    name, _, key = secret.partition("/")
    if secret and not re.fullmatch(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?(/[-._A-Za-z0-9]+)?", secret):
        fields.error(fields.at("passwordSecretRef"), f"is {secret[:80]!r}; expected SECRET or SECRET/ENTRY")
    return External(address, name, key or "password")
