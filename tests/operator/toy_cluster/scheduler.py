"""The scheduler: required rules only. A pod counts on its node until it is gone, also while it terminates.

Rules: nodeSelector, node affinity with matchFields, taints, cpu, memory, other resources and the number of pods, host ports,
required pod affinity and anti-affinity (that of pods on the node too). Not there: preferences, preemption, spreading.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from tests.operator.api_server import ApiError
from tests.operator.api_server.json_values import Json
from tests.operator.api_server.quantity import quantity
from tests.operator.api_server.selectors import meets, selects
from tests.operator.api_server.subresources import bind

from .base import PODS, World, finished, terminating

_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"


class Scheduler:
    """Binds pods, in an order and to nodes that chance chooses among those that fit."""

    def __init__(self, world: World) -> None:
        self._world = world

    def sync(self) -> None:
        waiting = [
            pod
            for pod in self._world.view("pods")
            if not pod["spec"].get("nodeName") and not terminating(pod) and not finished(pod)
        ]
        self._world.random.shuffle(waiting)
        for pod in waiting:
            self._place(pod)

    def _place(self, pod: Json) -> None:
        nodes = self._world.view("nodes")
        placed = [p for p in self._world.view("pods") if p["spec"].get("nodeName") and not finished(p)]
        refusals = {n["metadata"]["name"]: self.why_not(n, pod, nodes, placed) for n in nodes}
        fits = [name for name, why in refusals.items() if not why]
        meta = pod["metadata"]
        if fits:
            try:
                bind(self._world.store, meta["name"], meta["namespace"], self._world.random.choice(fits))
            except ApiError as error:  # gone, or bound by somebody else
                if error.code not in (404, 409):
                    raise
            return
        counts = Counter(refusals.values())
        reasons = ", ".join(f"{n} {why}" for why, n in sorted(counts.items()))
        self._say(
            pod, f"0/{len(nodes)} nodes are available: {reasons}." if nodes else "no nodes available to schedule pods"
        )

    def _say(self, pod: Json, message: str) -> None:
        said = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
        others = [c for c in pod["status"].get("conditions") or [] if c["type"] != "PodScheduled"]
        self._world.set_status(PODS, pod, {**pod["status"], "conditions": [*[dict(c) for c in others], said]})

    def tolerates(self, node: Json, pod: Json) -> bool:
        """Whether the node is right for the pod, apart from what else is there."""
        return not _node_refuses(node, pod)

    def why_not(self, node: Json, pod: Json, nodes: list[Json], placed: list[Json]) -> str:
        """Return why a pod may not go to a node, or an empty string."""
        there = [p for p in placed if p["spec"]["nodeName"] == node["metadata"]["name"]]
        return _node_refuses(node, pod) or _lacks_room(node, pod, there) or self._pods_refuse(node, pod, nodes, placed)

    def _pods_refuse(self, node: Json, pod: Json, nodes: list[Json], placed: list[Json]) -> str:
        labels_of = {n["metadata"]["name"]: n["metadata"].get("labels") or {} for n in nodes}
        own = node["metadata"].get("labels") or {}

        def near(term: Json) -> list[Json]:
            """Return the pods that share the node's domain."""
            key = term["topologyKey"]
            return [p for p in placed if key in own and labels_of.get(p["spec"]["nodeName"], {}).get(key) == own[key]]

        terms = _terms(pod, "podAffinity")
        if terms and not all(any(self._term_means(t, pod, p) for p in near(t)) for t in terms):
            somewhere = any(self._term_means(t, pod, p) for t in terms for p in placed)
            if somewhere or not all(self._term_means(t, pod, pod) and t["topologyKey"] in own for t in terms):
                return "node(s) didn't match pod affinity rules"
        if any(self._term_means(t, pod, p) for t in _terms(pod, "podAntiAffinity") for p in near(t)):
            return "node(s) didn't match pod anti-affinity rules"
        for other in placed:
            for term in _terms(other, "podAntiAffinity"):
                key = term["topologyKey"]
                same = key in own and labels_of.get(other["spec"]["nodeName"], {}).get(key) == own[key]
                if same and self._term_means(term, other, pod):
                    return "node(s) didn't satisfy existing pods anti-affinity rules"
        return ""

    def _term_means(self, term: Json, owner: Json, pod: Json) -> bool:
        """Whether a term of one pod means another."""
        namespace = pod["metadata"]["namespace"]
        if not selects(term.get("labelSelector"), pod["metadata"].get("labels")):
            return False
        if "namespaceSelector" in term:
            found = self._world.store.find("namespaces", namespace)
            if found and selects(term["namespaceSelector"], found["metadata"].get("labels")):
                return True
            return namespace in (term.get("namespaces") or [])
        return namespace in (term.get("namespaces") or [owner["metadata"]["namespace"]])


def _terms(pod: Json, kind: str) -> list[Json]:
    return ((pod["spec"].get("affinity") or {}).get(kind) or {}).get(_REQUIRED) or []


def _node_refuses(node: Json, pod: Json) -> str:
    spec, labels = pod["spec"], node["metadata"].get("labels") or {}
    if any(labels.get(k) != v for k, v in (spec.get("nodeSelector") or {}).items()):
        return "node(s) didn't match Pod's node affinity/selector"
    required = ((spec.get("affinity") or {}).get("nodeAffinity") or {}).get(_REQUIRED)
    if required and not any(_node_term(term, node) for term in required["nodeSelectorTerms"]):
        return "node(s) didn't match Pod's node affinity/selector"
    taints = list(node["spec"].get("taints") or [])
    if node["spec"].get("unschedulable"):
        taints.append({"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"})
    for taint in taints:
        if taint["effect"] != "PreferNoSchedule" and not tolerated(taint, spec.get("tolerations") or []):
            return f"node(s) had untolerated taint {{{taint['key']}: {taint.get('value', '')}}}"
    return ""


def _node_term(term: Json, node: Json) -> bool:
    labels, expressions = node["metadata"].get("labels") or {}, term.get("matchExpressions") or []
    fields, on_fields = {"metadata.name": node["metadata"]["name"]}, term.get("matchFields") or []
    if not expressions and not on_fields:
        return False
    return all(meets(e, labels) for e in expressions) and all(meets(e, fields) for e in on_fields)


def tolerated(taint: Json, tolerations: Iterable[Json]) -> bool:
    for toleration in tolerations:
        if toleration.get("effect") not in (None, "", taint["effect"]):
            continue
        if toleration.get("operator") == "Exists" and toleration.get("key") in (None, "", taint["key"]):
            return True
        if toleration.get("key") == taint["key"] and toleration.get("value", "") == taint.get("value", ""):
            return True
    return False


def requests(pod: Json) -> dict[str, Fraction]:
    """Return what a pod asks for: the sum of its containers, or an init container's request if that is more."""
    total: dict[str, Fraction] = {"pods": Fraction(1)}
    for container in pod["spec"].get("containers") or []:
        for name, amount in _asked(container).items():
            total[name] = total.get(name, Fraction(0)) + quantity(amount)
    for container in pod["spec"].get("initContainers") or []:
        for name, amount in _asked(container).items():
            total[name] = max(total.get(name, Fraction(0)), quantity(amount))
    return total


def _asked(container: Json) -> dict[str, Any]:
    resources = container.get("resources") or {}
    return {**(resources.get("limits") or {}), **(resources.get("requests") or {})}


def _lacks_room(node: Json, pod: Json, there: list[Json]) -> str:
    allocatable = node["status"].get("allocatable") or {}
    used: dict[str, Fraction] = {}
    for other in there:
        for name, amount in requests(other).items():
            used[name] = used.get(name, Fraction(0)) + amount
    for name, amount in requests(pod).items():
        if name == "pods" and "pods" not in allocatable:
            continue
        if used.get(name, Fraction(0)) + amount > quantity(allocatable.get(name, "0")):
            return f"Insufficient {name}"
    taken = {port for other in there for port in _host_ports(other)}
    if taken & set(_host_ports(pod)):
        return "node(s) didn't have free ports for the requested pod ports"
    return ""


def _host_ports(pod: Json) -> list[tuple[str, int]]:
    ports = [p for c in pod["spec"].get("containers") or [] for p in c.get("ports") or []]
    return [(p.get("protocol", "TCP"), p["hostPort"]) for p in ports if p.get("hostPort")]
