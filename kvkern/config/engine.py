"""The configuration of an engine's cache: a frozen object, parsed from what the user has set. It refuses what contradicts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..observability.logs import FORMATS, LogFormat
from ..option_values import MAX_PORT, checked_path, split_address, without_brackets
from ..policy import checked_policy
from ..policy.persist_modes import checked_persist
from .options import BY_NAME, DEFAULT_POLICY, Reader
from .sources import Setting, Settings, converted, explicit, gather, sources_named

MAX_THREADS = 64
MAX_CHUNK_TOKENS = 1 << 20
_MAX_CONNECT_S = 3600
# name of a user's option -> name of the field
_FIELDS = {"capacity": "capacity_nbytes", "remote_queue": "remote_queue_nbytes", "hbm": "hbm_nbytes"}
_REMOTE_OPTIONS = ("persist", "remote_queue", "remote_timeout")  # options that have no effect without `remote`
_OF_THE_DAEMON = ("policy", "remote", *_REMOTE_OPTIONS)  # with `socket`


def _default_threads() -> int:
    return max(1, min(4, len(os.sched_getaffinity(0))))


@dataclass(frozen=True, slots=True)
class RemoteConfig:
    """Configuration of the remote tier. remote.stores.url.RemoteUrl documents the URLs."""

    url: str = field(repr=False)  # may contain a password
    persist: str = (
        ""  # which chunks to write, a mode of policy.persist_modes; empty: predicted if the policy can, else evicted
    )
    queue_nbytes: int = 256 << 20  # most bytes of chunks that may wait to be written
    timeout_s: float = 10.0  # seconds that one call to the store may take

    def __post_init__(self) -> None:
        if self.persist:
            checked_persist(self.persist)
        checked_remote_timeout(self.timeout_s)


def checked_remote_timeout(seconds: float) -> float:
    """Return the seconds of `remote_timeout`. Raises ConfigError if they are out of range."""
    if not 0.1 <= seconds <= 300:
        raise ConfigError(f"remote_timeout is {seconds}; it must lie in 0.1..300 seconds")
    return seconds


@dataclass(frozen=True, slots=True)
class Config:
    """Configuration of a cache, besides the engine's layout. options.py says what each option does."""

    capacity_nbytes: int = 0  # size of the arena, slots and headers together; 0 with `socket`
    arena_dir: Path = Path("/dev/shm")  # a tmpfs (or hugetlbfs) mount: its files are memory
    threads: int = 0  # copy threads per process; 0: min(4, CPUs this process may use)
    prefault: bool = True  # touch all pages at start instead of on first use
    store_replies: bool = True  # store the KV of generated tokens too (vLLM's own default stores prompts only)
    weights: str = ""  # overrides the fingerprint of the weights in the namespace
    salt: str = field(
        default="", repr=False
    )  # folded into every key: caches with different salts never share; a secret
    socket: str = ""  # of the node's daemon, which then owns arena and capacity; empty: this engine has its own cache
    policy: str = DEFAULT_POLICY  # eviction policy, see policy/; with `socket` the daemon's policy counts
    remote: str = field(
        default="", repr=False
    )  # URL of a store that nodes share; with `socket` the daemon's remote counts
    persist: str = ""  # which chunks go to the remote store, see RemoteConfig
    remote_queue_nbytes: int = 256 << 20  # most bytes of chunks that may wait to be written to the remote store
    remote_timeout: float = 10.0  # seconds that one call to the remote store may take
    daemon_uid: int = -1  # with `socket`: a user that may serve there, beside root and this process's own; -1: none
    connect_s: int = 300  # seconds that an engine waits at start for its daemon, and for the arena if it is the first
    hbm_nbytes: int = 0  # size of a tier above DRAM on the tensors' device, payload only; 0: no such tier
    dump_arena: bool = False  # core dumps of this process hold the arena, with everybody's prompts
    chunk_tokens: int = 0  # vLLM: tokens of a chunk, a multiple of the block size; 0: blocks_per_chunk decides
    rpc_endpoint: str = ""  # HOST:PORT of the daemon's RPC, which must be that of `socket`; empty: not compared
    metrics_port: int = 0  # vLLM: port on which /metrics is served a second time; 0: none
    published_metrics: bool = False  # vLLM: export the names vllm:cache_service_* too
    log_format: LogFormat = "text"  # of kvkern's lines in the engine's log
    tracing: bool = False  # OpenTelemetry spans of lookups, loads and stores, see observability.tracing

    def __post_init__(self) -> None:
        for name, value, low, high, what in (
            ("connect_s", self.connect_s, 0, _MAX_CONNECT_S, " seconds"),
            ("threads", self.threads, 0, MAX_THREADS, " (0: kvkern chooses at start)"),
            ("chunk_tokens", self.chunk_tokens, 0, MAX_CHUNK_TOKENS, " tokens (0: blocks_per_chunk decides)"),
            ("metrics_port", self.metrics_port, 0, MAX_PORT, " (0: none)"),
        ):
            if not low <= value <= high:
                raise ConfigError(f"{name} is {value}; it must lie in {low}..{high}{what}")
        if not -1 <= self.daemon_uid < 1 << 32:
            raise ConfigError(f"daemon_uid is {self.daemon_uid}; expected the number of a user, from 0 on")
        if self.daemon_uid >= 0 and not self.socket:
            raise ConfigError(
                f"daemon_uid is {self.daemon_uid}, but there is no daemon; set `socket`, or leave `daemon_uid` out"
            )
        if self.rpc_endpoint:
            host_and_port(self.rpc_endpoint, "rpc_endpoint")
        checked_log_format(self.log_format)
        checked_policy(self.policy)
        if self.remote_config is None and self.persist:
            raise ConfigError(
                f"persist is {self.persist!r}, but there is no remote to write to; set `remote`, or leave `persist` out"
            )
        if not checked_path(self.arena_dir, "arena_dir").is_dir():
            raise ConfigError(
                f"arena_dir is {str(self.arena_dir)!r}, which is no directory; mount a tmpfs there, or name another folder"
            )

    @property
    def remote_config(self) -> RemoteConfig | None:
        """Configuration of the remote tier, or None if there is no remote store."""
        if not self.remote:
            return None
        return RemoteConfig(self.remote, self.persist, self.remote_queue_nbytes, self.remote_timeout)

    @property
    def copy_threads(self) -> int:
        """Number of copy threads of a process."""
        return self.threads or _default_threads()

    @classmethod
    def parse(cls, options: Mapping[str, Any], where: str = "the kvkern options") -> Config:
        """Parse the options of a user's code alone: `capacity` ('8GiB') or `socket`, and others. Raises ConfigError."""
        return cls.from_settings(explicit(options, where), where)

    @classmethod
    def resolve(
        cls,
        options: Mapping[str, Any],
        where: str,  # what holds the options, for messages
        environ: Mapping[str, str] | None = None,  # None: this process's
    ) -> Config:
        """Parse options, KVKERN_* variables and the file of KVKERN_CONFIG; the first of them that has a value counts.

        Raises ConfigError, which names the option, the variable or the line of the file.
        """
        return cls.from_settings(gather(Reader.ENGINE, options, where, environ=environ), where)

    @classmethod
    def from_settings(
        cls,
        settings: Settings,
        where: str,  # what should have said how large the cache is
    ) -> Config:
        """Make the object. Raises ConfigError for settings that contradict each other, and names their sources."""
        used = used_by_engine(settings, where)
        values = {_FIELDS.get(name, name): value for name, value in converted(used).items()}
        with sources_named(used):
            return cls(**values)


def used_by_engine(settings: Settings, where: str) -> Settings:
    """Return the settings that count for an engine: with `socket` the daemon decides some, and `capacity` excludes `socket`.

    What comes from a better source displaces what contradicts it: an explicit `capacity` the variable KVKERN_SOCKET.
    Raises ConfigError if equally good sources contradict each other, or none says how large the cache is.
    """
    used = dict(settings)
    socket = used["socket"] if used.get("socket") and used["socket"].value else None
    capacity = used.get("capacity")
    if socket and capacity and capacity.origin.rank > socket.origin.rank:
        del used["socket"]
        socket = None
    if socket:
        for name in ("capacity", "hbm", *_OF_THE_DAEMON):
            if name not in used:
                continue
            if used[name].origin.rank >= socket.origin.rank:
                raise ConfigError(_exclusion(name, used[name], socket, where))
            del used[name]
    elif capacity is None:
        raise ConfigError(
            f"no capacity in {where}; set how much memory to use, for example 'capacity': '8GiB', "
            f"or name the node's daemon, for example 'socket': '/run/kvkern.sock'"
        )
    _require_remote(used, "socket" in used and bool(used["socket"].value))
    return used


def _require_remote(used: Settings, daemon: bool) -> None:
    """Raise ConfigError for options of a remote store if there is none."""
    if daemon or (used.get("remote") and used["remote"].value):
        return
    for name in _REMOTE_OPTIONS:
        if name in used:
            raise ConfigError(
                f"{name} is {used[name].value!r}, but there is no remote to write to; set `remote`, or leave `{name}` out"
            )


def _exclusion(name: str, setting: Setting, socket: Setting, where: str) -> str:
    if setting.origin.where == socket.origin.where:
        begin = f"{name} and socket in {where} exclude each other"
    else:
        begin = f"{name} in {setting.origin.where} and socket in {socket.origin.where} exclude each other"
    if name == "capacity":
        return f"{begin}: the daemon has its own capacity; leave capacity out"
    if name == "hbm":
        return f"{begin}: the node's other engines cannot read this engine's HBM; leave one out"
    return f"{begin}: the daemon has its own {name}; leave it out here, and set it with `kvkern serve {BY_NAME[name].flag}`"


def checked_log_format(text: str) -> LogFormat:
    """Return the format of that name. Raises ConfigError if there is none."""
    for known in FORMATS:
        if text == known:
            return known
    raise ConfigError(f"log_format is {text!r}; expected one of {', '.join(FORMATS)}")


def host_and_port(text: str, name: str) -> tuple[str, int]:
    """Parse HOST:PORT or [HOST]:PORT. Raises ConfigError."""
    host, port = split_address(text) or ("", 0)
    host = without_brackets(host)
    if "@" in text:  # what stands before it may be a password
        raise ConfigError(f"{name} has a user before its host; expected HOST:PORT, such as 'kvcache-rpc:9600'")
    if not host or not port:
        raise ConfigError(f"{name} is {text[:100]!r}; expected HOST:PORT, such as 'kvcache-rpc:9600'")
    return host, port
