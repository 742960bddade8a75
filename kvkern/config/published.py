"""The variables of the published deployment and of its samples: what each means for an engine here, or why it has no effect.

Two families switch a cache on:

    VINEYARD      VLLM_USE_VINEYARD_CACHE and AIBRIX_LLM_KV_CACHE, both on. No option of vLLM is needed
    OFFLOADING    --kv-transfer-config names an AIBrixOffloadingConnector; AIBRIX_KV_CACHE_OL_* configure it

"0", "false", "no" and "off" mean off, which they did not in that deployment. Settings of KVKERN_* variables are preferred.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..observability.logs import one_line
from ..policy import POLICIES
from .options import parse_bool
from .sizes import MAX_CAPACITY_NBYTES
from .sources import Origin, Rank, Setting, Settings

SCRAPED_PORT = 8080  # of the published Service's annotation
LLM, OL = "AIBRIX_LLM_KV_CACHE", "AIBRIX_KV_CACHE_OL_"
SWITCH, SECOND_SWITCH = "VLLM_USE_VINEYARD_CACHE", LLM
L1_ENABLED = OL + "L1_CACHE_ENABLED"
_MAX_DIGITS = 9  # of a number of tokens
_MAX_SHOWN = 100  # characters of a value in a message
_DEFAULT_L1_NBYTES = 10 << 30


class Family(enum.StrEnum):
    """What switched the cache on."""

    VINEYARD = "VLLM_USE_VINEYARD_CACHE"
    OFFLOADING = "AIBrixOffloadingConnector"


Read = Callable[[str, str], dict[str, Any]]  # (text, name of the variable) -> options of kvkern; raises ConfigError


@dataclass(frozen=True, slots=True)
class Variable:
    """A published variable. Without `read` it has no effect."""

    name: str
    does: str  # what kvkern does with it
    why: str
    read: Read | None = None


@dataclass(frozen=True, slots=True)
class Deployment:
    """What the published variables of this process say."""

    settings: Settings
    notes: tuple[str, ...]  # one line for each variable that has no effect, for the log


def is_on(text: str | None) -> bool:
    """Return what a switch's text means. Any text but 0, false, no and off switches on, as in the published deployment."""
    try:
        return bool(text) and parse_bool(text or "")
    except ValueError:
        return True


def _number(text: str, name: str, what: str) -> float:
    try:
        number = float(text) if text.isascii() else math.nan
    except ValueError:
        number = math.nan
    if not 0 < number < MAX_CAPACITY_NBYTES:  # in GiB too: then it is a size without infinity
        raise ConfigError(f"{name} is {text[:_MAX_SHOWN]!r}; expected {what} above 0, such as 10")
    return number


def _tokens(text: str, name: str) -> dict[str, Any]:
    digits = text.lstrip("0")
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= _MAX_DIGITS):
        raise ConfigError(
            f"{name} is {text[:_MAX_SHOWN]!r}; expected a number of tokens, a multiple of vLLM's block size, such as 16"
        )
    return {"chunk_tokens": int(digits)}


def _gigabytes(text: str, name: str) -> dict[str, Any]:
    return {"capacity": int(_number(text, name, "a number of GiB") * (1 << 30))}


def _checked_gigabytes(text: str, name: str) -> dict[str, Any]:
    _number(text, name, "a number of GiB")
    return {}


def _policy(text: str, name: str) -> dict[str, Any]:
    if (policy := text.lower()) not in POLICIES:
        raise ConfigError(
            f"{name} is {text[:_MAX_SHOWN]!r}; kvkern has {', '.join(POLICIES)}. Unset {name}, or name one of these in it"
        )
    return {"policy": policy}


def _metrics(text: str, name: str) -> dict[str, Any]:
    return {"metrics_port": SCRAPED_PORT, "published_metrics": True} if is_on(text) else {}


def _as(option: str) -> Read:
    return lambda text, name: {option: text}


_DAEMON_ONLY = "it sizes what vineyardd's users held in their own processes; the daemon's --capacity sizes this cache"
_GLOBAL = "the daemon's index is always whole, and its eviction policy alone drops chunks"
_BUFFERS = "kvkern copies straight between the engine's blocks and the arena, without buffers in between"
_NO_STORE = (
    "kvkern has no client for that store; nodes share one by the daemon's --remote, or KVKERN_REMOTE without a daemon"
)
_NAMESPACE = "engines with different namespaces share nothing"
_NO_NODES = "kvkern's nodes need no list of nodes"
VARIABLES: dict[Family, tuple[Variable, ...]] = {
    Family.VINEYARD: (
        Variable("AIBRIX_LLM_KV_CACHE_SOCKET", "is `socket`", "the daemon's Unix socket, which both pods mount", _as("socket")),
        Variable("AIBRIX_LLM_KV_CACHE_CHUNK_SIZE", "is `chunk_tokens`; an error if it is no multiple of vLLM's block size",
                 "a chunk is a whole number of blocks", _tokens),
        Variable("AIBRIX_LLM_KV_CACHE_KV_CACHE_NS", "is `salt`", _NAMESPACE, _as("salt")),
        Variable("AIBRIX_LLM_KV_CACHE_RPC_ENDPOINT", "is `rpc_endpoint`: compared at start, with a warning if it is another "
                 "daemon's", "KV bytes never cross it: a hit is in the node's memory", _as("rpc_endpoint")),
        Variable("VINEYARD_CACHE_METRICS_ENABLED", f"on: `metrics_port` {SCRAPED_PORT} and `published_metrics`",
                 "the published Service is scraped there, where nothing else listens", _metrics),
        Variable("VINEYARD_CACHE_CPU_MEM_LIMIT_GB", "checked, else no effect", _DAEMON_ONLY, _checked_gigabytes),
        Variable("VINEYARD_CACHE_ENABLE_ASYNC_UPDATE", "no effect",
                 "kvkern always stores in threads of its own, and no step waits for them"),
        Variable("VINEYARD_CACHE_ASYNC_UPDATE_CPU_MEM_UTIL", "no effect", _BUFFERS),
        Variable("VINEYARD_CACHE_MIN_INFLIGHT_TASKS", "no effect", _BUFFERS),
        Variable("VINEYARD_CACHE_MAX_INFLIGHT_TASKS", "no effect", _BUFFERS),
        Variable("AIBRIX_LLM_KV_CACHE_RDMA_ENDPOINT", "no effect", "KV is moved in the node's memory, not over a network"),
        Variable("AIBRIX_LLM_KV_CACHE_LOCAL_SYNC_INTERVAL_S", "no effect", _GLOBAL),
        Variable("AIBRIX_LLM_KV_CACHE_ENABLE_GLOBAL_GC", "no effect", _GLOBAL),
        Variable("AIBRIX_LLM_KV_CACHE_GLOBAL_GC_INTERVAL_S", "no effect", _GLOBAL),
        Variable("AIBRIX_LLM_KV_CACHE_GLOBAL_TTL_S", "no effect", _GLOBAL),
    ),
    Family.OFFLOADING: (
        Variable(L1_ENABLED, "on: this engine has a cache of its own, unless KVKERN_SOCKET names a daemon; off: none",
                 "their first level is a cache in the engine's host memory", lambda text, name: {}),
        Variable(OL + "L1_CACHE_CAPACITY_GB", "is `capacity`, in GiB, if the first level is on", "the same thing", _gigabytes),
        Variable(OL + "L1_CACHE_EVICTION_POLICY", "is `policy`, if the first level is on; an error if there is no such policy",
                 "the same thing", _policy),
        Variable(OL + "CHUNK_SIZE", "is `chunk_tokens`; an error if it is no multiple of vLLM's block size",
                 "a chunk is a whole number of blocks", _tokens),
        Variable(OL + "L2_CACHE_NAMESPACE", "is `salt`", _NAMESPACE, _as("salt")),
        Variable(OL + "L2_CACHE_BACKEND", "no effect", _NO_STORE),
        Variable(OL + "INFINISTORE_HOST_ADDR", "no effect", _NO_STORE),
        Variable(OL + "INFINISTORE_SERVICE_PORT", "no effect", _NO_STORE),
        Variable(OL + "INFINISTORE_CONNECTION_TYPE", "no effect", _NO_STORE),
        Variable(OL + "INFINISTORE_IB_PORT", "no effect", _NO_STORE),
        Variable(OL + "INFINISTORE_LINK_TYPE", "no effect", _NO_STORE),
        Variable(OL + "INFINISTORE_VISIBLE_DEV_LIST", "no effect", _NO_STORE),
        Variable(OL + "META_SERVICE_BACKEND", "no effect", _NO_NODES),
        Variable(OL + "META_SERVICE_URL", "no effect", _NO_NODES),
        Variable(OL + "META_SERVICE_CLUSTER_META_KEY", "no effect", _NO_NODES),
    ),
}  # fmt: skip
_PREFIXES = {Family.VINEYARD: (LLM + "_", "VINEYARD_"), Family.OFFLOADING: (OL,)}
_FIRST_LEVEL = {OL + "L1_CACHE_CAPACITY_GB", OL + "L1_CACHE_EVICTION_POLICY"}


def switched_on(environ: Mapping[str, str]) -> tuple[bool, str]:
    """Return whether the VINEYARD family switches the cache on, and a line for the log if one switch alone is set."""
    first, second = is_on(environ.get(SWITCH)), is_on(environ.get(SECOND_SWITCH))
    if first and second:
        return True, ""
    if first:
        return (
            False,
            f"{SWITCH} is on, but {SECOND_SWITCH} is not, so there is no cache. Set {SECOND_SWITCH}=1 for a cache",
        )
    if second:
        return False, f"{SECOND_SWITCH} is on, but {SWITCH} is not, so there is no cache. Set {SWITCH}=1 for a cache"
    return False, ""


def read(environ: Mapping[str, str], family: Family) -> Deployment:
    """Return what the variables of a family say. Raises ConfigError for a value that cannot be honoured, with the remedy."""
    settings: Settings = {}
    if family is Family.OFFLOADING and environ.get(L1_ENABLED) and not is_on(environ[L1_ENABLED]):
        environ = {name: value for name, value in environ.items() if name not in _FIRST_LEVEL}
    elif family is Family.OFFLOADING:  # its first level is on unless it is switched off
        settings["capacity"] = Setting(_DEFAULT_L1_NBYTES, Origin(Rank.DEFAULT, "that connector's default"))
    notes = []
    known = {variable.name for variable in VARIABLES[family]}
    for variable in VARIABLES[family]:
        if not (text := environ.get(variable.name, "")):
            continue
        options = variable.read(text, variable.name) if variable.read else {}
        for name, value in options.items():
            settings[name] = Setting(value, Origin(Rank.PUBLISHED, variable.name))
        if not options and variable.name != L1_ENABLED:
            notes.append(f"{variable.name}={_shown(variable.name, text)} has no effect: {_reason(variable)}")
    others = [name for name in environ if name.startswith(_PREFIXES[family]) and name not in known and environ[name]]
    notes += [f"{name} has no effect: kvkern has nothing like it" for name in sorted(others)]
    return Deployment(settings, tuple(notes))


def merged(own: Settings, published: Settings) -> Settings:
    """Return what counts of the user's own settings and the published ones, which are better than the file's."""
    better = {
        name: setting
        for name, setting in published.items()
        if name not in own or own[name].origin.rank < setting.origin.rank
    }
    return own | better


def _reason(variable: Variable) -> str:
    return "it is off" if variable.read is _metrics else variable.why


def _shown(name: str, text: str) -> str:
    if "@" in text or any(word in name for word in ("URL", "PASSWORD", "SECRET", "TOKEN")):
        return "***"
    return one_line(text[:_MAX_SHOWN])
