"""What a KVCache asks for, whichever of its three forms it was written in. Plain data."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from .findings import Finding, Level
from .names import IMAGE, RPC_PORT, WORKLOAD_LABEL


class Form(enum.StrEnum):
    """How it was written."""

    PUBLISHED = "published"  # orchestration.aibrix.ai as in 0.2: replicas, cacheSpec, service.port
    RUNTIME = "runtime"  # orchestration.aibrix.ai as in 0.3 and later: cache, service.ports, metadata.*.runtime
    OWN = "own"  # kvkern.io


class ArenaPlace(enum.StrEnum):
    """Where a cache pod keeps its chunks."""

    HOST = "Host"  # the node's own shared memory: the next pod on the node serves them again
    POD = "Pod"  # the pod's: they end with it


@dataclass(frozen=True, slots=True)
class Port:
    """A port of the service of the cache."""

    name: str
    port: int
    target: int
    node_port: int = 0  # 0: none asked for
    protocol: str = "TCP"


@dataclass(frozen=True, slots=True)
class Store:
    """An etcd or a Redis that runs beside the cache."""

    replicas: int
    image: str
    pull_policy: str
    resources: dict[str, Any]
    storage: str = ""  # quantity; empty: none, what it holds ends with its pods
    env: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class External:
    """A store that runs elsewhere."""

    address: str  # host:port
    secret_name: str = ""
    secret_key: str = "password"  # of the secret


@dataclass(frozen=True, slots=True)
class PodExtras:
    """What users add to cache pods."""

    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: tuple[dict[str, Any], ...] = ()
    pull_secrets: tuple[str, ...] = ()
    priority_class: str = ""


@dataclass(frozen=True, slots=True)
class KVCache:
    """One KVCache."""

    name: str
    namespace: str
    api: str  # group/version
    form: Form
    uid: str = ""  # empty: it is in no cluster
    generation: int = 0
    image: str = IMAGE
    pull_policy: str = "IfNotPresent"
    cpu: str = "1"
    memory: str = "2Gi"  # of a cache pod
    shared_memory: str = "64Mi"  # of its /dev/shm
    capacity_nbytes: int = 0  # of the cache, a part of `memory`
    arena: ArenaPlace = ArenaPlace.HOST
    env: tuple[dict[str, Any], ...] = ()
    workload: str = ""  # whose pods the cache follows
    workload_label: str = WORKLOAD_LABEL
    node_labels: tuple[tuple[str, str], ...] = ()  # that a node must have
    min_pods: int = 1  # before the workload has pods
    max_unavailable: int = 1  # nodes whose cache is being replaced at one time
    service_type: str = "ClusterIP"
    ports: tuple[Port, ...] = (Port("vineyard-rpc", RPC_PORT, RPC_PORT),)
    etcd: Store | None = None
    redis: Store | None = None
    external_redis: External | None = None
    remote: str = ""  # URL of a remote store; of a secret if `remote_secret`
    remote_secret: tuple[str, str] = ("", "")  # name and key
    options: dict[str, str] = field(default_factory=dict)  # of kvkern serve: variable -> value
    extras: PodExtras = field(default_factory=PodExtras)
    findings: tuple[Finding, ...] = ()

    @property
    def has_remote_elsewhere(self) -> bool:
        """Return True if the daemons connect to a store that the operator does not run."""
        named = any(each["name"] == "KVKERN_REMOTE" for each in self.env)
        return named or bool(self.remote or self.remote_secret[0] or self.external_redis)

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What the user has to correct before anything is made of it."""
        return tuple(each for each in self.findings if each.level is Level.ERROR)

    @property
    def notes(self) -> tuple[Finding, ...]:
        """What has no effect, or another one than it says."""
        return tuple(each for each in self.findings if each.level is not Level.ERROR)
