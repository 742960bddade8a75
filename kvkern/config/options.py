"""Every option: its name, kind, unit, default, who reads it and what it does. One table for code, commands and docs.

name        in kv_connector_extra_config["kvkern"], in open_cache and in the configuration file
variable    KVKERN_ and the name in capitals
option      -- and the name with dashes, of `kvkern serve`
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..observability.logs import FORMATS
from ..policy import POLICIES
from ..policy.persist_modes import Persist
from .environment import PREFIX
from .sizes import parse_nbytes

DEFAULT_POLICY = "grit"
_MAX_BITS = 1000  # of an integer
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


class Reader(enum.StrEnum):
    """Who reads an option."""

    ENGINE = "engine"
    DAEMON = "daemon"


class Kind(enum.StrEnum):
    """What values an option has. The text is that of messages and docs."""

    SIZE = "size"
    INT = "int"
    FLOAT = "float"
    BOOL = "bool"
    TEXT = "str"
    PATH = "Path"
    INTS = "list of int"
    TEXTS = "list of str"


# kind -> the types that a user may give, and the function that converts them
_ACCEPTED: dict[Kind, tuple[tuple[type, ...], Callable[[Any], Any]]] = {
    Kind.INT: ((int,), int), Kind.FLOAT: ((int, float), float), Kind.BOOL: ((bool,), bool), Kind.TEXT: ((str,), str),
    Kind.PATH: ((str, Path), Path),
}  # fmt: skip
_ELEMENTS = {Kind.INTS: Kind.INT, Kind.TEXTS: Kind.TEXT}


@dataclass(frozen=True, slots=True)
class Option:
    """One option. `default` is what counts if nobody sets it, in the words of a user: a size is '256MiB'."""

    name: str
    kind: Kind
    help: str
    engine: bool = False  # an engine reads it: vLLM's connector or open_cache
    daemon: bool = False  # `kvkern serve` reads it
    default: Any = None  # None: not set
    daemon_default: Any = None  # where a daemon's differs
    unit: str = ""
    secret: bool = False  # no message and no command shows it

    @property
    def variable(self) -> str:
        """Name of its environment variable."""
        return PREFIX + self.name.upper()

    @property
    def flag(self) -> str:
        """Name of its option of `kvkern serve`."""
        return "--" + self.name.replace("_", "-")

    @property
    def readers(self) -> tuple[Reader, ...]:
        """Who reads it."""
        return (Reader.ENGINE,) * self.engine + (Reader.DAEMON,) * self.daemon

    def default_of(self, reader: Reader) -> Any:
        """Return the default of an engine or of a daemon."""
        return self.daemon_default if reader is Reader.DAEMON and self.daemon_default is not None else self.default

    def convert(
        self,
        value: Any,  # of the kind's type
        where: str,  # what gave it, for messages
        shown: str | None = None,  # the option's name in messages
    ) -> Any:
        """Return the value that the frozen object takes. Raises ConfigError, which names value and place, but no secret."""
        name = shown or self.name
        if self.kind is Kind.SIZE:
            return parse_nbytes(value, name)
        if self.kind in _ELEMENTS:
            if not isinstance(value, list | tuple):
                raise ConfigError(f"{self.name} in {where} is {value!r} ({type(value).__name__}); expected {self.kind}")
            return tuple(self._convert_one(_ELEMENTS[self.kind], each, where) for each in value)
        return self._convert_one(self.kind, value, where)

    def _convert_one(self, kind: Kind, value: Any, where: str) -> Any:
        accepted, make = _ACCEPTED[kind]
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not Kind.BOOL):
            given = f"of the type {type(value).__name__}" if self.secret else f"{value!r} ({type(value).__name__})"
            raise ConfigError(f"{self.name} in {where} is {given}; expected {kind}")
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:  # Python cannot always show such a number
            raise ConfigError(f"{self.name} in {where} is a number of {value.bit_length()} bits, more than {_MAX_BITS}")
        return make(value)

    def parse(self, text: str, where: str) -> Any:
        """Return the value that a variable's text means, for `convert`. Raises ConfigError."""
        if self.kind in _ELEMENTS:
            return [self._parse_one(_ELEMENTS[self.kind], part, where) for part in re.split(r"[,\s]+", text) if part]
        return self._parse_one(self.kind, text, where)

    def _parse_one(self, kind: Kind, text: str, where: str) -> Any:
        try:
            if kind is Kind.BOOL:
                return parse_bool(text)
            if kind is Kind.INT and text.isascii():
                return int(text)
            if kind is Kind.FLOAT and text.isascii() and not math.isnan(number := float(text)):
                return number
        except ValueError:
            pass  # the message below
        else:
            if kind not in (Kind.INT, Kind.FLOAT):
                return text
        expected = f"one of {', '.join((*_TRUE, *_FALSE))}" if kind is Kind.BOOL else str(kind)
        raise ConfigError(f"{self.name} in {where} is {text!r}; expected {expected}")


def parse_bool(text: str) -> bool:
    """Return what a variable's text means: 1, true, yes and on, or 0, false, no and off. Raises ValueError for all else."""
    if (word := text.strip().lower()) in (*_TRUE, *_FALSE):
        return word in _TRUE
    raise ValueError(text)


OPTIONS = (
    Option("capacity", Kind.SIZE, "Memory for the cache, slots and their headers together: 8GiB or 8Gi is 8 x 2^30 bytes, 8GB "
           "or 8G is 8 x 10^9. An engine without a daemon needs it, and so does a daemon.",
           engine=True, daemon=True, unit="bytes"),
    Option("socket", Kind.TEXT, "The daemon's Unix socket. An engine that has it uses the node's cache, and the daemon's own "
           "capacity counts.", engine=True, daemon=True, daemon_default="/run/kvkern.sock"),
    Option("name", Kind.TEXT, "Name of the trust domain; each domain has its own arena.", daemon=True, default="default"),
    Option("arena_dir", Kind.PATH, "Folder of the arena, a tmpfs mount: its files are memory.",
           engine=True, daemon=True, default="/dev/shm"),
    Option("prefault", Kind.BOOL, "Touch all pages at start instead of on first use; they are reserved in any case.",
           engine=True, daemon=True, default=True),
    Option("dump_arena", Kind.BOOL, "Keep the arena in core dumps of this process: it holds all prompts.",
           engine=True, daemon=True, default=False),
    Option("threads", Kind.INT, "Copy threads of each worker. 0: the CPUs that it may use, at most 4.", engine=True, default=0),
    Option("chunk_tokens", Kind.INT, "Tokens of a chunk in vLLM, a multiple of vLLM's block size. 0: one block, or what "
           "blocks_per_chunk says.", engine=True, default=0, unit="tokens"),
    Option("store_replies", Kind.BOOL, "Store the KV of generated tokens too, so that the next turn loads it.",
           engine=True, default=True),
    Option("weights", Kind.TEXT, "A name for the weights in vLLM. Left out: a hash over every byte of the weight files.",
           engine=True),
    Option("salt", Kind.TEXT, "Text that goes into every key: engines with different salts never share.",
           engine=True, secret=True),
    Option("daemon_uid", Kind.INT, "With `socket`: a user whose daemon is trusted, beside root and the engine's own user. "
           "-1: none.", engine=True, default=-1),
    Option("connect_s", Kind.INT, "With `socket`: how long an engine waits at start for a daemon that gives no sign. vLLM then "
           "serves without a cache and connects later; open_cache raises an error.", engine=True, default=300, unit="seconds"),
    Option("rpc_endpoint", Kind.TEXT, "HOST:PORT of the daemon's `--rpc`. vLLM asks it at start whether it is the daemon of "
           "`socket`, and warns if it is not.", engine=True),
    Option("metrics_port", Kind.INT, "Port on which a vLLM server serves its /metrics a second time, on all interfaces. "
           "0: no second time.", engine=True, default=0),
    Option("published_metrics", Kind.BOOL, "Export vLLM's metrics of the cache under the names vllm:cache_service_* too, which "
           "the published dashboard reads.", engine=True, default=False),
    Option("hbm", Kind.SIZE, "open_cache: size of a tier above DRAM, in the memory of the tensors' device.",
           engine=True, unit="bytes"),
    Option("allow_uid", Kind.INTS, "Other users whose engines may read the whole cache.", daemon=True),
    Option("allow_gid", Kind.INTS, "Groups whose members' engines may read the whole cache.", daemon=True),
    Option("operator_uid", Kind.INTS, "Other users that may clear, evict and record.", daemon=True),
    Option("operator_gid", Kind.INTS, "Groups whose members may clear, evict and record.", daemon=True),
    Option("quota", Kind.TEXTS, "MODEL=SIZE: the most memory that a model may hold; * and ? match any text.", daemon=True),
    Option("tenant_quota", Kind.SIZE, "The most memory that each cache salt may hold.", daemon=True, unit="bytes"),
    Option("fair", Kind.BOOL, "When the cache is full, evict from the largest namespace first.", daemon=True, default=False),
    Option("policy", Kind.TEXT, f"Eviction policy: {', '.join(POLICIES)}.", engine=True, daemon=True, default=DEFAULT_POLICY),
    Option("policy_state", Kind.PATH, "File for what the policy learns; read at start, written every minute.", daemon=True),
    Option("remote", Kind.TEXT, "URL of a store shared with other nodes: redis, mooncake, file, s3 and more.",
           engine=True, daemon=True, secret=True),
    Option("persist", Kind.TEXT, f"Which chunks to write to the remote store: {', '.join(Persist)}. Left out: predicted if the "
           "policy predicts, else evicted.", engine=True, daemon=True),
    Option("remote_queue", Kind.SIZE, "The most memory of chunks that wait to be written to the remote store.",
           engine=True, daemon=True, default="256MiB", unit="bytes"),
    Option("remote_timeout", Kind.FLOAT, "How long one call to the remote store may take.",
           engine=True, daemon=True, default=10.0, unit="seconds"),
    Option("metrics", Kind.TEXT, "IP:PORT on which the daemon serves /metrics for Prometheus and a page for people, such as "
           "127.0.0.1:8080, or :8080 for all interfaces.", daemon=True),
    Option("metrics_token_file", Kind.PATH, "File with the token that all of `metrics` but health then needs.", daemon=True),
    Option("rpc", Kind.TEXT, "IP:PORT on which the daemon tells its health and figures over HTTP, such as 0.0.0.0:9600.",
           daemon=True),
    Option("rpc_token_file", Kind.PATH, "File with the token that all of `rpc` but health then needs.", daemon=True),
    Option("http_host", Kind.TEXTS, "Another host name under which a browser of this machine may ask `metrics` and `rpc`.",
           daemon=True),
    Option("resize_arena", Kind.BOOL, "Make a new arena at the start if an earlier one has another size than `capacity` "
           "gives: its chunks are lost, and running engines need a restart. Off: it keeps its size.",
           daemon=True, default=False),
    Option("drain", Kind.FLOAT, "Time for open transfers and writes after SIGTERM.", daemon=True, default=5.0, unit="seconds"),
    Option("verbose", Kind.BOOL, "Log clients that connect and disconnect.", daemon=True, default=False),
    Option(
        "log_format",
        Kind.TEXT,
        f"How kvkern's lines of the log are written: {' or '.join(FORMATS)}, one JSON object per line.",
        engine=True,
        daemon=True,
        default="text",
    ),
    Option("tracing", Kind.BOOL, "OpenTelemetry spans of lookups, loads and stores; needs the extra `tracing`.",
           engine=True, default=False),
)  # fmt: skip
BY_NAME = {option.name: option for option in OPTIONS}
BY_VARIABLE = {option.variable: option for option in OPTIONS}


def names_of(reader: Reader) -> set[str]:
    """Return the names of the options that an engine or a daemon reads."""
    return {option.name for option in OPTIONS if reader in option.readers}


def options_of(names: Iterable[str]) -> list[Option]:
    """Return options in the order of the table."""
    wanted = set(names)
    return [option for option in OPTIONS if option.name in wanted]
