"""PodDisruptionBudgets: the status by which the API server allows evictions."""

from __future__ import annotations

from tests.operator.api_server.json_values import Json
from tests.operator.api_server.selectors import selects

from .base import World, controller_uid, ready, share, terminating

BUDGETS = ("policy", "poddisruptionbudgets")


class Budgets:
    """The disruption controller."""

    def __init__(self, world: World) -> None:
        self._world = world

    def sync(self) -> None:
        for budget in self._world.view("poddisruptionbudgets.policy"):
            self._sync_one(budget)

    def _sync_one(self, budget: Json) -> None:
        spec, namespace = budget["spec"], budget["metadata"]["namespace"]
        pods = [
            p for p in self._world.view("pods", namespace) if selects(spec.get("selector"), p["metadata"].get("labels"))
        ]
        names = {p["metadata"]["name"] for p in pods if not terminating(p)}
        disrupted = {n: t for n, t in (budget["status"].get("disruptedPods") or {}).items() if n in names}
        healthy = sum(ready(p) and not terminating(p) and p["metadata"]["name"] not in disrupted for p in pods)
        if "maxUnavailable" in spec:
            expected = self._wanted_by_controllers(pods)
            desired = max(0, expected - share(spec["maxUnavailable"], expected, up=True))
        else:
            least = spec.get("minAvailable", 1)
            expected = self._wanted_by_controllers(pods) if isinstance(least, str) else len(pods)
            desired = share(least, expected, up=True)
        allowed = max(0, healthy - desired) if expected else 0
        status: Json = {
            "observedGeneration": budget["metadata"]["generation"],
            "expectedPods": expected,
            "desiredHealthy": desired,
            "currentHealthy": healthy,
            "disruptionsAllowed": allowed,
            "conditions": [
                {
                    "type": "DisruptionAllowed",
                    "status": str(allowed > 0),
                    "reason": "SufficientPods" if allowed else "InsufficientPods",
                    "message": "",
                }
            ],
        }
        if disrupted:
            status["disruptedPods"] = disrupted
        current = self._world.current(BUDGETS, budget)
        if current is not None and current["status"] == budget["status"]:  # no eviction meanwhile
            self._world.set_status(BUDGETS, budget, status)

    def _wanted_by_controllers(self, pods: list[Json]) -> int:
        """Return the sum of the replicas that the pods' controllers want."""
        wanted = 0
        for uid in {controller_uid(pod) for pod in pods}:
            found = self._world.by_uid(uid)
            if found is None:
                wanted += sum(controller_uid(pod) == uid for pod in pods)
            elif found[1]["kind"] == "DaemonSet":
                wanted += found[1]["status"].get("desiredNumberScheduled", 0)
            else:
                wanted += found[1]["spec"].get("replicas", 0)
        return wanted
