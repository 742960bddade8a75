"""The one configuration object: frozen, parsed at the edge, unknown keys refused. The only reader of the environment."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .policy import checked_policy
from .policy.persist_modes import checked_persist

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
MAX_CAPACITY_NBYTES = 1 << 46  # 64 TiB
MAX_THREADS = 64
DEFAULT_POLICY = "grit"
_MAX_DIGITS = 100
_MAX_CONNECT_S = 3600
# as users call them, and the fields
_SIZE_OPTIONS = {"capacity": "capacity_nbytes", "remote_queue": "remote_queue_nbytes", "hbm": "hbm_nbytes"}
_FIELD_TYPES: dict[str, tuple[tuple[type, ...], Callable[[Any], Any]]] = {  # of fields: what a user may give, and its maker
    "int": ((int,), int), "bool": ((bool,), bool), "str": ((str,), str), "float": ((int, float), float),
    "Path": ((str, Path), Path),
}  # fmt: skip
_REMOTE_OPTIONS = ("persist", "remote_queue", "remote_timeout")  # options that say nothing without `remote`


def parse_nbytes(value: int | str, name: str = "capacity") -> int:
    """Bytes of `8GiB`, `500 MB` or a plain integer. Raises ConfigError for anything else, zero and below included."""
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
    """`1.5 GiB`: for messages, not for parsing."""
    for unit, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size:
            return f"{nbytes / size:.4g} {unit}"
    return f"{nbytes} B"


def reject_unknown(given: Mapping[str, Any], known: set[str], where: str) -> None:
    """Raise ConfigError for the first key that is not known, with the nearest name that is."""
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"unknown key {key!r} in {where}; {hint}known keys: {', '.join(sorted(known))}")


def user_cache_dir() -> Path:
    """Where this user's kvkern keeps what it can find out again: $XDG_CACHE_HOME/kvkern, or ~/.cache/kvkern."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "kvkern"


def _default_threads() -> int:
    return max(1, min(4, len(os.sched_getaffinity(0))))


def nvtx_requested() -> bool:
    """Whether KVKERN_NVTX asks for named ranges in profiles; see nvtx.py."""
    return os.environ.get("KVKERN_NVTX", "") not in ("", "0")


@dataclass(frozen=True, slots=True)
class RemoteConfig:
    """What a remote tier needs to know. See remote.base.RemoteUrl for URLs."""

    url: str = field(repr=False)  # may have a password in it
    persist: str = ""  # what goes there: a mode of policy.persist; empty: predicted if the policy can, else evicted
    queue_nbytes: int = 256 << 20  # of chunks that wait to be written
    timeout_s: float = 10.0  # of a call to the store

    def __post_init__(self) -> None:
        if self.persist:
            checked_persist(self.persist)
        if not 0.1 <= self.timeout_s <= 300:
            raise ConfigError(f"remote_timeout is {self.timeout_s}; it must lie in 0.1..300 seconds")


@dataclass(frozen=True, slots=True)
class Config:
    """What a cache needs to know besides the engine's layout."""

    capacity_nbytes: int = 0  # of the arena: slots and their headers; 0 with `socket`
    arena_dir: Path = Path("/dev/shm")  # a tmpfs (or hugetlbfs) mount; everything in it is memory
    threads: int = 0  # copy threads per process; 0: min(4, CPUs this process may use)
    prefault: bool = True  # touch all pages at start instead of on first use
    store_replies: bool = True  # keep the KV of generated tokens too (vLLM's own default keeps prompts only)
    weights: str = ""  # overrides the fingerprint of the weights in the namespace
    salt: str = ""  # folded into every key: caches with different salts never share
    socket: str = ""  # of the node's daemon, which then owns arena and capacity; empty: a cache of this engine's own
    policy: str = DEFAULT_POLICY  # of eviction, see policy/; with `socket` it is the daemon's
    remote: str = field(
        default="", repr=False
    )  # URL of a store that engines and nodes share; with `socket` it is the daemon's
    persist: str = ""  # what goes there, see RemoteConfig
    remote_queue_nbytes: int = 256 << 20  # of chunks that wait to be written there
    remote_timeout: float = 10.0  # seconds that a call to it may take
    connect_s: int = 300  # how long an engine waits at start for its daemon, and for the arena if it is the first
    hbm_nbytes: int = 0  # of a tier above DRAM, on the tensors' device: parts of slots; 0: none

    def __post_init__(self) -> None:
        if not 0 <= self.connect_s <= _MAX_CONNECT_S:
            raise ConfigError(f"connect_s is {self.connect_s}; it must lie in 0..{_MAX_CONNECT_S} seconds")
        if not 0 <= self.threads <= MAX_THREADS:
            raise ConfigError(f"threads is {self.threads}; it must lie in 0..{MAX_THREADS} (0: chosen at start)")
        checked_policy(self.policy)
        if self.remote_config is None and self.persist:
            raise ConfigError(
                f"persist is {self.persist!r}, but there is no remote to write to; give one, or leave it out"
            )
        if not self.arena_dir.is_dir():
            raise ConfigError(f"arena_dir is {str(self.arena_dir)!r}, which is no directory; mount a tmpfs or name one")

    @property
    def remote_config(self) -> RemoteConfig | None:
        """Of the remote tier; None: there is none."""
        if not self.remote:
            return None
        return RemoteConfig(self.remote, self.persist, self.remote_queue_nbytes, self.remote_timeout)

    @property
    def copy_threads(self) -> int:
        """Threads a process copies with."""
        return self.threads or _default_threads()

    @classmethod
    def parse(cls, options: Mapping[str, Any], where: str = "the kvkern options") -> Config:
        """Config of user options: `capacity` ('8GiB') or `socket`, and any other field by name."""
        known = {found.name for found in fields(cls)} - set(_SIZE_OPTIONS.values()) | set(_SIZE_OPTIONS)
        reject_unknown(options, known, where)
        values: dict[str, Any] = {
            field: parse_nbytes(options[name], name) for name, field in _SIZE_OPTIONS.items() if name in options
        }
        if options.get("socket"):
            if "capacity" in options:
                raise ConfigError(f"capacity and socket in {where}: the daemon's capacity counts, leave capacity out")
            if "hbm" in options:
                raise ConfigError(
                    f"hbm and socket in {where}: what lies in one engine's HBM only, the node's other engines would not "
                    f"find; leave one out"
                )
            for name in ("policy", "remote", *_REMOTE_OPTIONS):
                if name in options:
                    raise ConfigError(
                        f"{name} and socket in {where}: it is the daemon's, `kvkern serve --{name.replace('_', '-')}`; "
                        f"leave it out"
                    )
        elif "capacity" not in options:
            raise ConfigError(
                f"no capacity in {where}; say how much memory to use, for example 'capacity': '8GiB', "
                f"or name the node's daemon, 'socket': '/run/kvkern.sock'"
            )
        for name in _REMOTE_OPTIONS:
            if name in options and not options.get("remote"):
                raise ConfigError(
                    f"{name} is {options[name]!r}, but there is no remote to write to; give one, or leave it out"
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
        raise ConfigError(f"{name} in {where} is {value!r} ({type(value).__name__}), expected {kind}")
    return make(value)
