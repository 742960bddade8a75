"""The toy cluster: all controllers over one store, step by step or in a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.operator.api_server import Store
from tests.operator.api_server.json_values import Json

from .base import World, ready, terminating
from .budgets import Budgets
from .daemon_sets import DaemonSets
from .deployments import Deployments, ReplicaSets
from .kubelet import Kubelets, Pace
from .observer import Observer, Place, is_cache_pod, is_socket_folder
from .scheduler import Scheduler
from .stateful_sets import StatefulSets


class ToyCluster:
    """Controllers, a scheduler and kubelets. The same seed and the same writes of others give the same run.

    A step lets every controller act once, in an order of chance; with `lag` each one misses a step with that probability.
    `step` and the other methods may be called from any thread, but one at a time does the work.
    """

    def __init__(
        self,
        store: Store,
        seed: int = 0,
        *,
        nodes: int = 0,
        pace: Pace | None = None,
        lag: float = 0.0,
        is_daemon: Callable[[Json], bool] = is_cache_pod,
        is_socket: Callable[[str], bool] = is_socket_folder,
    ) -> None:
        self.store = store
        self.world = World(store, seed)
        self.observer = Observer(self.world, is_daemon, is_socket)
        self.kubelets = Kubelets(self.world, self.observer.look, pace or Pace())
        self.lag = lag
        self._lock = threading.RLock()
        scheduler = Scheduler(self.world)
        self._work: list[Callable[[], None]] = [
            Deployments(self.world).sync,
            ReplicaSets(self.world).sync,
            StatefulSets(self.world).sync,
            DaemonSets(self.world, scheduler).sync,
            Budgets(self.world).sync,
            scheduler.sync,
            self.kubelets.sync,
        ]
        for number in range(nodes):
            self.add_node(f"node-{number}")

    @property
    def pace(self) -> Pace:
        return self.kubelets.pace

    def step(self, steps: int = 1) -> None:
        for _ in range(steps):
            with self._lock:
                self.world.step += 1
                self.kubelets.keep_nodes()
                work = list(self._work)
                self.world.random.shuffle(work)
                for sync in work:
                    if self.world.random.random() >= self.lag:
                        sync()
                self.observer.look()

    def settle(self, steps: int = 200) -> int:
        """Step until nothing changes any more, for as long as any wait may take. Returns how many steps that took."""
        pace = self.pace
        quiet = max(pace.start_steps, pace.ready_steps, pace.stop_steps, pace.lost_steps) + pace.jitter + 2
        idle = 0
        for number in range(steps):
            before = self.store.objects.revision
            self.step()
            idle = idle + 1 if self.store.objects.revision == before else 0
            if idle > quiet:
                return number + 1 - idle
        raise AssertionError(f"the cluster still changes after {steps} steps")

    @contextmanager
    def running(self, interval_s: float = 0.02) -> Iterator[None]:
        """Step in a thread until the context is left. Raises there what a controller raised."""
        stop, errors = threading.Event(), list[BaseException]()

        def loop() -> None:
            try:
                while not stop.wait(interval_s):
                    self.step()
            except BaseException as error:
                errors.append(error)
                raise

        thread = threading.Thread(target=loop, name="toy-cluster", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(30)
        if errors:
            raise errors[0]

    # Nodes

    def add_node(
        self, name: str, *, cpu: str = "64", memory: str = "256Gi", labels: Json | None = None, **more: Any
    ) -> Json:
        """Make a node. `more` is allocatable too, as `**{"nvidia.com/gpu": "8"}`; `taints` go into the spec."""
        taints = more.pop("taints", None)
        amounts = {"cpu": cpu, "memory": memory, "pods": "110", **more}
        node: Json = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, **(labels or {})}},
            "spec": {"taints": taints} if taints else {},
            "status": {"allocatable": amounts, "capacity": dict(amounts)},
        }
        node["status"]["conditions"] = [{"type": "Ready", "status": "True", "lastTransitionTime": self.store.now()}]
        return self.store.create(node)

    def lose_node(self, name: str) -> None:
        """Cut a node off. Its containers go on."""
        with self._lock:
            self.kubelets.lost.add(name)

    def recover_node(self, name: str) -> None:
        with self._lock:
            self.kubelets.lost.discard(name)

    def remove_node(self, name: str) -> None:
        """Delete a node. Its pods go in the next step, and its containers with them."""
        with self._lock:
            self.store.delete("nodes", name)
            self.kubelets.lost.discard(name)

    def drain(self, name: str) -> list[str]:
        """Cordon a node and evict its pods, but those of DaemonSets. Returns those whose budget does not allow it now."""
        with self._lock:
            self.store.patch("nodes", name, {"spec": {"unschedulable": True}})
            refused = []
            for pod in self.pods_on(name):
                kinds = {owner["kind"] for owner in pod["metadata"].get("ownerReferences") or []}
                if "DaemonSet" not in kinds and not terminating(pod):
                    meta = pod["metadata"]
                    if not self.world.evict(meta["namespace"], meta["name"]):
                        refused.append(meta["name"])
            return refused

    def uncordon(self, name: str) -> None:
        self.store.patch("nodes", name, {"spec": {"unschedulable": None}})

    # Pods

    def evict(self, namespace: str, name: str) -> bool:
        """Evict a pod. Returns whether its budget allowed that."""
        with self._lock:
            return self.world.evict(namespace, name)

    def pods_on(self, node: str) -> list[Json]:
        """Return the pods of a node. They must not be changed."""
        return [pod for pod in self.store.view("pods") if pod["spec"].get("nodeName") == node]

    def ready_pods(self, namespace: str = "", labels: str = "") -> list[Json]:
        return [pod for pod in self.store.list("pods", namespace, labels) if ready(pod) and not terminating(pod)]

    def daemons_by_socket(self) -> dict[Place, list[str]]:
        """Return (node, folder) -> pods of daemons whose containers run there, also while they terminate."""
        return self.observer.daemons_by_socket()

    @property
    def most_daemons(self) -> dict[Place, int]:
        """The most daemons that ever ran at once on a socket."""
        return self.observer.most
