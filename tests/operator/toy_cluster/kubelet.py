"""The kubelets of all nodes, and what happens to pods when a node is lost.

Pending --start_steps--> Running --ready_steps--> Ready; marked for deletion --stop_steps--> gone
lost node: Ready becomes False at once; after lost_steps its pods are marked, and they run on until the node is back or removed
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tests.operator.api_server.json_values import Json

from .base import PODS, World, condition, finished, ready, terminating


@dataclass
class Pace:
    """How many steps things take; `jitter` adds up to that many by chance. May be changed at any time."""

    start_steps: int = 1
    ready_steps: int = 1
    stop_steps: int = 2
    lost_steps: int = 3
    jitter: int = 0


@dataclass
class Kubelets:
    """Runs pods that have a node. `started` is called after the containers of a pod were started."""

    world: World
    started: Callable[[], None]
    pace: Pace = field(default_factory=Pace)
    lost: set[str] = field(default_factory=set)  # nodes that are gone
    broken_images: set[str] = field(default_factory=set)  # never pulled
    unready_images: set[str] = field(default_factory=set)  # run, and never become ready
    _due: dict[tuple[str, str], int] = field(default_factory=dict)  # (uid, what) -> step
    _addresses: int = 0

    def sync(self) -> None:
        nodes = {node["metadata"]["name"] for node in self.world.view("nodes")}
        pods = [pod for pod in self.world.view("pods") if pod["spec"].get("nodeName")]
        self.world.random.shuffle(pods)
        for pod in pods:
            node = pod["spec"]["nodeName"]
            if node not in nodes:
                self.world.delete_pod(pod, 0)  # the pod garbage collector
            elif node in self.lost:
                self._lose(pod)
            else:
                self._run(pod)
        living = {pod["metadata"]["uid"] for pod in pods}
        self._due = {key: step for key, step in self._due.items() if key[0] in living}

    def _wait(self, pod: Json, what: str, steps: int) -> bool:
        """Whether `steps` steps have passed since the first call for this pod."""
        key = (pod["metadata"]["uid"], what)
        if key not in self._due:
            self._due[key] = self.world.step + steps + self.world.random.randint(0, self.pace.jitter)
        return self.world.step >= self._due[key]

    def _run(self, pod: Json) -> None:
        self._due.pop((pod["metadata"]["uid"], "lost"), None)
        if terminating(pod):
            if finished(pod) or pod["status"]["phase"] == "Pending" or self._wait(pod, "stop", self.pace.stop_steps):
                self.world.delete_pod(pod, 0)
        elif pod["status"]["phase"] == "Pending":
            why = self._obstacle(pod)
            if why:
                self._set(pod, "Pending", waiting=why)
            elif self._wait(pod, "start", self.pace.start_steps):
                self._set(pod, "Running")
                self.started()
        elif pod["status"]["phase"] == "Running" and self._wait(pod, "ready", self.pace.ready_steps):
            images = {c["image"] for c in pod["spec"]["containers"]}
            if ready(pod) is bool(images & self.unready_images):
                self._set(pod, "Running", up=not images & self.unready_images)

    def _lose(self, pod: Json) -> None:
        if ready(pod):
            self._set(pod, pod["status"]["phase"])
        if self._wait(pod, "lost", self.pace.lost_steps) and not terminating(pod):
            self.world.delete_pod(pod)

    def _obstacle(self, pod: Json) -> str:
        """Return why a pod's containers cannot start: images, and secrets and config maps that do not exist."""
        spec, namespace = pod["spec"], pod["metadata"]["namespace"]
        containers = spec["containers"] + (spec.get("initContainers") or [])
        if any(c["image"] in self.broken_images for c in containers):
            return "ImagePullBackOff"
        needed = [
            ("secrets", v["secret"].get("secretName"), v["secret"]) for v in spec.get("volumes") or [] if "secret" in v
        ]
        needed += [
            ("configmaps", v["configMap"].get("name"), v["configMap"])
            for v in spec.get("volumes") or []
            if "configMap" in v
        ]
        for container in containers:
            for source in [e.get("valueFrom") or {} for e in container.get("env") or []] + (
                container.get("envFrom") or []
            ):
                for plural, word in (("secrets", "secret"), ("configmaps", "configMap")):
                    for kind in (f"{word}KeyRef", f"{word}Ref"):
                        if kind in source:
                            needed.append((plural, source[kind].get("name"), source[kind]))
        for plural, name, source in needed:
            if not source.get("optional") and self.world.store.find(plural, name or "", namespace) is None:
                return "CreateContainerConfigError"
        return ""

    def _set(self, pod: Json, phase: str, up: bool = False, waiting: str = "") -> None:
        now = self.world.store.now()
        state: Json = {"waiting": {"reason": waiting}} if waiting else {"running": {"startedAt": now}}
        before = {s["name"]: s for s in pod["status"].get("containerStatuses") or []}
        statuses = []
        for container in pod["spec"]["containers"]:
            had = before.get(container["name"], {}).get("state", {})
            statuses.append(
                {
                    "name": container["name"],
                    "image": container["image"],
                    "imageID": "",
                    "ready": up,
                    "restartCount": 0,
                    "started": not waiting,
                    "state": had if had.keys() == state.keys() else state,
                }
            )
        if not pod["status"].get("podIP") and not waiting:
            self._addresses += 1
        ip = pod["status"].get("podIP") or f"10.244.{self._addresses // 250}.{self._addresses % 250 + 1}"
        kinds = [("PodScheduled", True), ("Initialized", True), ("ContainersReady", up), ("Ready", up)]
        status: Json = {
            **pod["status"],
            "phase": phase,
            "startTime": pod["status"].get("startTime", now),
            "containerStatuses": statuses,
            "conditions": [{"type": kind, "status": str(is_so)} for kind, is_so in kinds],
        }
        if not waiting:
            status |= {"podIP": ip, "podIPs": [{"ip": ip}], "hostIP": "10.0.0.1"}
        self.world.set_status(PODS, pod, status)

    def keep_nodes(self) -> None:
        """Set the Ready condition of nodes, and the taints that lost ones get."""
        for node in self.world.view("nodes"):
            lost = node["metadata"]["name"] in self.lost
            wanted = "Unknown" if lost else "True"
            if condition(node, "Ready") == wanted and any(
                c["type"] == "Ready" for c in node["status"].get("conditions") or []
            ):
                continue
            others = [dict(c) for c in node["status"].get("conditions") or [] if c["type"] != "Ready"]
            self.world.set_status(
                ("", "nodes"), node, {**node["status"], "conditions": [*others, {"type": "Ready", "status": wanted}]}
            )
            self.world.edit(("", "nodes"), node, lambda new, lost=lost: _taint(new, lost))  # type: ignore[misc]


def _taint(node: Json, lost: bool) -> None:
    key = "node.kubernetes.io/unreachable"
    others = [t for t in node["spec"].get("taints") or [] if t["key"] != key]
    taints = others + ([{"key": key, "effect": effect} for effect in ("NoSchedule", "NoExecute")] if lost else [])
    node["spec"].pop("taints", None)
    if taints:
        node["spec"]["taints"] = taints
