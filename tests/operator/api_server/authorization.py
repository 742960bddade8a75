"""RBAC: what a service account may do. Clients without a token may do everything.

Not there: aggregated ClusterRoles, non-resource URLs, and the rule that nobody grants what he may not do himself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import ApiError
from .json_values import Json

if TYPE_CHECKING:
    from .store import Store

_GROUP = "rbac.authorization.k8s.io"
PREFIX = "system:serviceaccount:"
ANYONE = "system:admin"  # a client without a token


@dataclass(frozen=True)
class Action:
    """What somebody wants to do. `resource` has the subresource in it, as `pods/status`."""

    verb: str
    group: str
    resource: str
    namespace: str = ""
    name: str = ""


def token_of(namespace: str, service_account: str) -> str:
    """Return the bearer token by which a client is a service account."""
    return f"{PREFIX}{namespace}:{service_account}"


def user_of(header: str) -> str:
    """Return the user of an Authorization header. Raises 401 for a token that nobody has."""
    if not header:
        return ANYONE
    token = header.removeprefix("Bearer ")
    if not token.startswith(PREFIX) or token.count(":") != 3:
        raise ApiError(401, "Unauthorized", "Unauthorized")
    return token


def allows(store: Store, user: str, action: Action) -> bool:
    if user == ANYONE:
        return True
    return any(_rule_allows(rule, action) for rule in _rules(store, user, action.namespace))


def check(store: Store, user: str, action: Action) -> None:
    """Raise 403 if no role allows the action."""
    if allows(store, user, action):
        return
    where = f' in the namespace "{action.namespace}"' if action.namespace else " at the cluster scope"
    plural = action.resource.partition("/")[0]
    what = f"{plural}.{action.group}" if action.group else plural
    what += f' "{action.name}"' if action.name else ""
    message = (
        f'{what} is forbidden: User "{user}" cannot {action.verb} resource "{action.resource}" '
        f'in API group "{action.group}"{where}'
    )
    raise ApiError(403, "Forbidden", message, {"name": action.name, "group": action.group, "kind": plural})


def _rules(store: Store, user: str, namespace: str) -> Iterator[Json]:
    bindings = list(store.view(f"clusterrolebindings.{_GROUP}"))
    if namespace:
        bindings += store.view(f"rolebindings.{_GROUP}", namespace)
    for binding in bindings:
        if any(_is_subject(subject, user) for subject in binding.get("subjects") or []):
            reference = binding["roleRef"]
            role = (
                store.find(f"clusterroles.{_GROUP}", reference["name"])
                if reference["kind"] == "ClusterRole"
                else store.find(f"roles.{_GROUP}", reference["name"], binding["metadata"].get("namespace", ""))
            )
            yield from (role or {}).get("rules") or []


def _is_subject(subject: Json, user: str) -> bool:
    if subject["kind"] == "ServiceAccount":
        return user == token_of(subject.get("namespace", ""), subject["name"])
    if subject["kind"] == "Group":
        namespace = user.removeprefix(PREFIX).partition(":")[0]
        return subject["name"] in (
            "system:serviceaccounts",
            f"system:serviceaccounts:{namespace}",
            "system:authenticated",
        )
    return bool(subject["name"] == user)


def _rule_allows(rule: Json, action: Action) -> bool:
    subresource = action.resource.partition("/")[2]
    resources = {"*", action.resource} | ({f"*/{subresource}"} if subresource else set())
    names = rule.get("resourceNames")
    return (
        not {"*", action.verb}.isdisjoint(rule.get("verbs") or [])
        and not {"*", action.group}.isdisjoint(rule.get("apiGroups") or [])
        and not resources.isdisjoint(rule.get("resources") or [])
        and (not names or action.name in names)
    )


def review(store: Store, user: str, body: Json) -> Json:
    """Answer a SelfSubjectAccessReview."""
    asked = (body.get("spec") or {}).get("resourceAttributes") or {}
    resource = asked.get("resource", "*") + (f"/{asked['subresource']}" if asked.get("subresource") else "")
    action = Action(
        asked.get("verb", "*"), asked.get("group", ""), resource, asked.get("namespace", ""), asked.get("name", "")
    )
    return {
        "kind": "SelfSubjectAccessReview",
        "apiVersion": "authorization.k8s.io/v1",
        "metadata": {},
        "spec": body.get("spec") or {},
        "status": {"allowed": allows(store, user, action)},
    }
