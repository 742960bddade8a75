"""Who runs on which node's socket folder: the invariant that two daemons never share one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.operator.api_server.json_values import Json

from .base import World

Place = tuple[str, str]  # node, folder on the node
ROLE = "kvcache.orchestration.aibrix.ai/role"


def is_cache_pod(pod: Json) -> bool:
    return (pod["metadata"].get("labels") or {}).get(ROLE) == "cache"


def is_socket_folder(path: str) -> bool:
    return path.startswith("/var/run/vineyard-kubernetes/")


@dataclass(frozen=True)
class Clash:
    """Several daemons on one socket."""

    step: int
    place: Place
    pods: tuple[str, ...]


class Observer:
    """Looks after every start of a container, and at the end of every step. Pods count until they are gone."""

    def __init__(
        self,
        world: World,
        is_daemon: Callable[[Json], bool] = is_cache_pod,
        is_socket: Callable[[str], bool] = is_socket_folder,
    ) -> None:
        self.most: dict[Place, int] = {}  # the most daemons ever seen at once
        self.clashes: list[Clash] = []
        self._world = world
        self._is_daemon = is_daemon
        self._is_socket = is_socket

    def daemons_by_socket(self) -> dict[Place, list[str]]:
        """Return the names (namespace/name) of the daemons' pods whose containers run, for each place."""
        found: dict[Place, list[str]] = {}
        for pod in self._world.view("pods"):
            if pod["status"].get("phase") == "Running" and pod["spec"].get("nodeName") and self._is_daemon(pod):
                for volume in pod["spec"].get("volumes") or []:
                    path = (volume.get("hostPath") or {}).get("path", "")
                    if self._is_socket(path):
                        name = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
                        found.setdefault((pod["spec"]["nodeName"], path.rstrip("/")), []).append(name)
        return found

    def look(self) -> None:
        for place, pods in self.daemons_by_socket().items():
            self.most[place] = max(self.most.get(place, 0), len(pods))
            clash = Clash(self._world.step, place, tuple(pods))
            if len(pods) > 1 and clash not in self.clashes:
                self.clashes.append(clash)
