"""The resources that the server serves: built-in ones, and how they behave. Custom ones are made in crds.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import unknown_path

if TYPE_CHECKING:
    from .structural import StructuralSchema

READ = ("get", "list", "watch")
VERBS = ("create", "delete", "deletecollection", "get", "list", "patch", "update", "watch")


@dataclass(frozen=True, eq=False)
class Resource:
    """One resource in one version. Versions of a resource share their objects, whose key is (group, plural)."""

    group: str
    version: str
    kind: str
    plural: str
    namespaced: bool = True
    short_names: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    status: bool = False
    scale: bool = False
    generation: bool = False
    unconditional_update: bool = True
    schema: StructuralSchema | None = None  # of a custom resource
    columns: tuple[dict[str, Any], ...] = ()
    list_kind: str = ""

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def key(self) -> tuple[str, str]:
        return (self.group, self.plural)

    @property
    def label(self) -> str:
        """The name in messages, such as `deployments.apps`."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def singular(self) -> str:
        return self.kind.lower()

    @property
    def subresources(self) -> tuple[str, ...]:
        found = [name for name, has in (("status", self.status), ("scale", self.scale)) if has]
        return (*found, "eviction", "binding") if self.key == ("", "pods") else tuple(found)


def _built_in() -> Iterator[Resource]:
    core: list[tuple[str, str, bool, tuple[str, ...], bool]] = [
        ("Pod", "pods", True, ("po",), True),
        ("Service", "services", True, ("svc",), True),
        ("Node", "nodes", False, ("no",), True),
        ("Namespace", "namespaces", False, ("ns",), True),
        ("ConfigMap", "configmaps", True, ("cm",), False),
        ("Secret", "secrets", True, (), False),
        ("ServiceAccount", "serviceaccounts", True, ("sa",), False),
        ("Event", "events", True, ("ev",), False),
        ("PersistentVolumeClaim", "persistentvolumeclaims", True, ("pvc",), True),
        ("Endpoints", "endpoints", True, ("ep",), False),
    ]
    for kind, plural, namespaced, short, status in core:
        categories = ("all",) if plural in ("pods", "services") else ()
        yield Resource("", "v1", kind, plural, namespaced, short, categories, status)
    for kind, plural, name, scale in [
        ("Deployment", "deployments", "deploy", True),
        ("StatefulSet", "statefulsets", "sts", True),
        ("ReplicaSet", "replicasets", "rs", True),
        ("DaemonSet", "daemonsets", "ds", False),
    ]:
        yield Resource("apps", "v1", kind, plural, True, (name,), ("all",), True, scale, generation=True)
    yield Resource("apps", "v1", "ControllerRevision", "controllerrevisions")
    yield Resource(
        "policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets", True, ("pdb",), status=True, generation=True,
        unconditional_update=False,
    )  # fmt: skip
    yield Resource("networking.k8s.io", "v1", "NetworkPolicy", "networkpolicies", True, ("netpol",), generation=True)
    for kind, plural, namespaced in [
        ("Role", "roles", True),
        ("RoleBinding", "rolebindings", True),
        ("ClusterRole", "clusterroles", False),
        ("ClusterRoleBinding", "clusterrolebindings", False),
    ]:
        yield Resource("rbac.authorization.k8s.io", "v1", kind, plural, namespaced)
    yield Resource("coordination.k8s.io", "v1", "Lease", "leases", unconditional_update=False)
    yield Resource("discovery.k8s.io", "v1", "EndpointSlice", "endpointslices", generation=True)
    yield Resource("events.k8s.io", "v1", "Event", "events", True, ("ev",))
    yield Resource(
        "apiextensions.k8s.io", "v1", "CustomResourceDefinition", "customresourcedefinitions", False, ("crd", "crds"),
        ("api-extensions",), status=True, generation=True, unconditional_update=False,
    )  # fmt: skip
    for kind in ("MutatingWebhookConfiguration", "ValidatingWebhookConfiguration"):
        yield Resource(
            "admissionregistration.k8s.io", "v1", kind, f"{kind.lower()}s", False, (), ("api-extensions",),
            generation=True, unconditional_update=False,
        )  # fmt: skip


class Registry:
    """Which resources are served now. Guarded by the store's lock."""

    def __init__(self) -> None:
        self._served = {(r.group, r.version, r.plural): r for r in _built_in()}

    def __iter__(self) -> Iterator[Resource]:
        return iter(list(self._served.values()))

    def add(self, resource: Resource) -> None:
        self._served[resource.group, resource.version, resource.plural] = resource

    def remove(self, group: str, plural: str) -> None:
        for served in [k for k in self._served if (k[0], k[2]) == (group, plural)]:
            del self._served[served]

    def find(self, group: str, version: str, plural: str) -> Resource:
        resource = self._served.get((group, version, plural))
        if resource is None:
            raise unknown_path()
        return resource

    def of_kind(self, api_version: str, kind: str) -> Resource | None:
        return next((r for r in self if r.api_version == api_version and r.kind == kind), None)

    def named(self, name: str) -> Resource:
        """Return the resource `plural` or `plural.group`. Of plurals in several groups, the built-in or first one wins."""
        plural, _, group = name.partition(".")
        for resource in self:
            if resource.plural == plural and (not group or resource.group == group):
                return resource
        raise KeyError(f"no resource {name!r} is served; served are {sorted({r.label for r in self})}")
