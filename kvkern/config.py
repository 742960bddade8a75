"""The one configuration object. It is frozen, is parsed from the user's options, and refuses unknown keys.

Only this module and the code that starts engines read environment variables.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .option_values import checked_path
from .policy import checked_policy
from .policy.persist_modes import checked_persist

_UNITS = {"": 1, "B": 1}
# 8G and 8GB are decimal, 8Gi and 8GiB binary. Kubernetes writes 8G and 8Gi.
for _power, _prefix in enumerate("KMGT", start=1):
    _UNITS |= {_prefix: 10 ** (3 * _power), f"{_prefix}B": 10 ** (3 * _power)}
    _UNITS |= {f"{_prefix}I": 1 << (10 * _power), f"{_prefix}IB": 1 << (10 * _power)}
MAX_CAPACITY_NBYTES = 1 << 46  # 64 TiB
MAX_THREADS = 64
DEFAULT_POLICY = "grit"
_MAX_DIGITS = 100
_MAX_CONNECT_S = 3600
# name of a user's option -> name of the field
_SIZE_OPTIONS = {"capacity": "capacity_nbytes", "remote_queue": "remote_queue_nbytes", "hbm": "hbm_nbytes"}
# a field's type -> the types that a user may give, and the function that converts them
_FIELD_TYPES: dict[str, tuple[tuple[type, ...], Callable[[Any], Any]]] = {
    "int": ((int,), int), "bool": ((bool,), bool), "str": ((str,), str), "float": ((int, float), float),
    "Path": ((str, Path), Path),
}  # fmt: skip
_SECRET_OPTIONS = ("salt", "remote")  # no message shows them; a remote's URL may hold a password
_REMOTE_OPTIONS = ("persist", "remote_queue", "remote_timeout")  # options that have no effect without `remote`


def parse_nbytes(value: int | str, name: str = "capacity") -> int:
    """Convert `8GiB`, `8Gi`, `500 MB`, `8G` or a plain integer to bytes. Raises ConfigError for all else, 0 and below too."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ConfigError(f"{name} is {value!r}; expected a size such as '8GiB' or a number of bytes")
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)\s*", str(value).upper())
    if match is None or match[2] not in _UNITS:
        raise ConfigError(f"{name} is {value!r}; expected a size such as '8GiB', '500MB' or a number of bytes")
    if len(match[1]) > _MAX_DIGITS:
        raise ConfigError(f"{name} is {str(value)[:_MAX_DIGITS]}...; it must lie in 1..{MAX_CAPACITY_NBYTES} (64 TiB)")
    nbytes = int(float(match[1]) * _UNITS[match[2]]) if "." in match[1] else int(match[1]) * _UNITS[match[2]]
    if not 0 < nbytes <= MAX_CAPACITY_NBYTES:
        raise ConfigError(f"{name} is {value!r} = {nbytes} bytes; it must lie in 1..{MAX_CAPACITY_NBYTES} (64 TiB)")
    return nbytes


def format_nbytes(nbytes: int) -> str:
    """Format a size for messages, such as `1.5 GiB`. The result is rounded."""
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.4g} {unit}"
    return f"{nbytes} B"


def reject_unknown(given: Mapping[str, Any], known: set[str], where: str) -> None:
    """Raise ConfigError for the first unknown key. The message suggests the nearest known name."""
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"unknown key {key!r} in {where}; {hint}known keys: {', '.join(sorted(known))}")


def user_cache_dir() -> Path:
    """Return $XDG_CACHE_HOME/kvkern, or ~/.cache/kvkern: the folder for files that kvkern can make again.

    A user without a home gets a folder that cannot be made: /nonexistent, as in Debian's passwd. Callers go on without it.
    """
    home = os.path.expanduser("~")  # without HOME and an entry in passwd it stays "~"
    base = os.environ.get("XDG_CACHE_HOME") or Path(home if os.path.isabs(home) else "/nonexistent", ".cache")
    return Path(base, "kvkern")


def _default_threads() -> int:
    return max(1, min(4, len(os.sched_getaffinity(0))))


def variable(name: str) -> str:
    """Return an environment variable that an option names, or an empty string if there is none."""
    return os.environ.get(name, "")


def launched_processes() -> int:
    """Return how many processes torchrun or mpirun says that it has started together. 1 if there is no launcher."""
    told = (os.environ.get(name, "") for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
    return max((int(text) for text in told if text.isascii() and text.isdecimal()), default=1)


def nvtx_requested() -> bool:
    """Return True if KVKERN_NVTX asks for named ranges in profiles. See transfer/nvtx.py."""
    return os.environ.get("KVKERN_NVTX", "") not in ("", "0")


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
        if not 0.1 <= self.timeout_s <= 300:
            raise ConfigError(f"remote_timeout is {self.timeout_s}; it must lie in 0.1..300 seconds")


@dataclass(frozen=True, slots=True)
class Config:
    """Configuration of a cache, besides the engine's layout."""

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

    def __post_init__(self) -> None:
        if not 0 <= self.connect_s <= _MAX_CONNECT_S:
            raise ConfigError(f"connect_s is {self.connect_s}; it must lie in 0..{_MAX_CONNECT_S} seconds")
        if not -1 <= self.daemon_uid < 1 << 32:
            raise ConfigError(f"daemon_uid is {self.daemon_uid}; expected the number of a user, from 0 on")
        if self.daemon_uid >= 0 and not self.socket:
            raise ConfigError(
                f"daemon_uid is {self.daemon_uid}, but there is no daemon; set `socket`, or leave `daemon_uid` out"
            )
        if not 0 <= self.threads <= MAX_THREADS:
            raise ConfigError(
                f"threads is {self.threads}; it must lie in 0..{MAX_THREADS} (0: kvkern chooses at start)"
            )
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
        """Parse user options: `capacity` ('8GiB') or `socket`, and any other field by name. Raises ConfigError."""
        known = {found.name for found in fields(cls)} - set(_SIZE_OPTIONS.values()) | set(_SIZE_OPTIONS)
        reject_unknown(options, known, where)
        values: dict[str, Any] = {
            field: parse_nbytes(options[name], name) for name, field in _SIZE_OPTIONS.items() if name in options
        }
        if options.get("socket"):
            if "capacity" in options:
                raise ConfigError(
                    f"capacity and socket in {where} exclude each other: the daemon has its own capacity; leave capacity out"
                )
            if "hbm" in options:
                raise ConfigError(
                    f"hbm and socket in {where} exclude each other: the node's other engines cannot read this engine's HBM; "
                    f"leave one out"
                )
            for name in ("policy", "remote", *_REMOTE_OPTIONS):
                if name in options:
                    raise ConfigError(
                        f"{name} and socket in {where} exclude each other: the daemon has its own {name}; leave it out "
                        f"here, and set it with `kvkern serve --{name.replace('_', '-')}`"
                    )
        elif "capacity" not in options:
            raise ConfigError(
                f"no capacity in {where}; set how much memory to use, for example 'capacity': '8GiB', "
                f"or name the node's daemon, for example 'socket': '/run/kvkern.sock'"
            )
        for name in _REMOTE_OPTIONS:
            if name in options and not options.get("remote"):
                raise ConfigError(
                    f"{name} is {options[name]!r}, but there is no remote to write to; set `remote`, or leave `{name}` out"
                )
        for known_field in fields(cls):
            if known_field.name in options:
                values[known_field.name] = _convert_option(
                    known_field.name, str(known_field.type), options[known_field.name], where
                )
        return cls(**values)


def _convert_option(name: str, kind: str, value: Any, where: str) -> Any:
    accepted, make = _FIELD_TYPES[kind]
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind != "bool"):
        given = (
            f"of the type {type(value).__name__}" if name in _SECRET_OPTIONS else f"{value!r} ({type(value).__name__})"
        )
        raise ConfigError(f"{name} in {where} is {given}; expected {kind}")
    return make(value)
