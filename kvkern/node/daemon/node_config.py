"""The settings of a daemon, checked when they are made. Knows no command line and opens nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...config import DEFAULT_POLICY, RemoteConfig, checked_log_format, checked_remote_timeout, parse_nbytes
from ...config.options import Reader
from ...config.sources import Settings, converted, in_force, sources_named
from ...errors import ConfigError
from ...observability.logs import LogFormat
from ...option_values import checked_number, checked_output_file, checked_path, path_text
from ...policy import checked_policy
from ...policy.persist_modes import persist_mode
from ...remote.stores.url import RemoteUrl
from .. import framing
from ..web.endpoint import Endpoint
from .quotas import Quotas

MAX_UID = 2**32 - 2


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """The settings of a daemon. Raises ConfigError if one of them is wrong."""

    socket: Path
    capacity_nbytes: int
    name: str = "default"  # of the trust domain; part of the arena's file name
    arena_dir: Path = Path("/dev/shm")
    prefault: bool = True
    dump_arena: bool = False  # core dumps of the daemon hold the arena
    uids: frozenset[int] = frozenset()  # users that may connect, beside root and the daemon's own
    gids: frozenset[int] = frozenset()  # groups whose members may connect
    operator_uids: frozenset[int] = frozenset()  # users that may clear, evict and record, beside the same two
    operator_gids: frozenset[int] = frozenset()  # groups whose members may
    quotas: Quotas = field(default_factory=Quotas)
    policy: str = DEFAULT_POLICY  # eviction policy
    policy_state: Path | None = None  # file with the policy's statistics; None: the policy starts without any
    remote: RemoteConfig | None = None  # a store that nodes share
    resize_arena: bool = False  # an earlier arena of another size is replaced
    drain_s: float = 5.0  # time after SIGTERM for transfers under way and for writes that wait for the store
    metrics: Endpoint | None = None  # HTTP: metrics and the page; None: not served
    rpc: Endpoint | None = None  # HTTP: health and figures; None: not served
    verbose: bool = False  # log clients that connect and disconnect
    log_format: LogFormat = "text"

    def __post_init__(self) -> None:
        if not self.name.replace("-", "").replace("_", "").isalnum() or len(self.name) > 64:
            raise ConfigError(f"name is {self.name!r}; use up to 64 letters, digits, '-' and '_'")
        framing.checked_socket_path(self.socket)
        checked_policy(self.policy)
        if self.remote is not None:
            RemoteUrl.parse(self.remote.url)
            persist_mode(self.remote.persist, self.policy)
        if self.policy_state is not None:
            checked_output_file(self.policy_state, "policy_state")
        for name, numbers in (
            ("allow_uid", self.uids), ("allow_gid", self.gids),
            ("operator_uid", self.operator_uids), ("operator_gid", self.operator_gids),
        ):  # fmt: skip
            for number in numbers:
                checked_number(number, name, 0, MAX_UID)
        if not checked_path(self.arena_dir, "arena_dir").is_dir():
            raise ConfigError(
                f"arena_dir is {str(self.arena_dir)!r}, which is no directory; mount a tmpfs there, or give another folder"
            )
        if path_text(self.arena_dir) != str(self.arena_dir):
            raise ConfigError(
                f"arena_dir is {str(self.arena_dir)!r}, which is no UTF-8, so no engine can be told of it; give another folder"
            )
        if not 0 <= self.drain_s <= 3600:
            raise ConfigError(f"drain_s is {self.drain_s}; it must lie in 0..3600 seconds")

    @classmethod
    def from_settings(cls, settings: Settings) -> NodeConfig:
        """Make the object of what the user has set, see kvkern.config.sources. Raises ConfigError, which names the source."""
        if "capacity" not in settings:
            raise ConfigError(
                "no capacity: give --capacity, the variable KVKERN_CAPACITY or `capacity` in the file, for example 8GiB"
            )
        values = converted(in_force(settings, Reader.DAEMON))
        quotas = Quotas(
            models=dict(_parse_quota(text) for text in values["quota"] or ()),
            tenant=values["tenant_quota"],
            fair=values["fair"],
        )
        with sources_named(settings):
            if values["http_host"] and not values["metrics"] and not values["rpc"]:
                raise ConfigError(
                    f"http_host is {', '.join(values['http_host'])[:100]!r}, but no port is served; give --metrics "
                    "or --rpc, or leave it out"
                )
            return cls(
                socket=checked_path(values["socket"], "socket").absolute(),
                capacity_nbytes=values["capacity"],
                name=values["name"],
                arena_dir=values["arena_dir"],
                prefault=values["prefault"],
                dump_arena=values["dump_arena"],
                uids=frozenset(values["allow_uid"] or ()),
                gids=frozenset(values["allow_gid"] or ()),
                operator_uids=frozenset(values["operator_uid"] or ()),
                operator_gids=frozenset(values["operator_gid"] or ()),
                quotas=quotas,
                policy=values["policy"],
                policy_state=None if values["policy_state"] is None else values["policy_state"].absolute(),
                remote=_remote_config(values),
                resize_arena=values["resize_arena"],
                drain_s=values["drain"],
                metrics=_endpoint(values, "metrics"),
                rpc=_endpoint(values, "rpc"),
                verbose=values["verbose"],
                log_format=checked_log_format(values["log_format"]),
            )

    @property
    def arena_name(self) -> str:
        """The arena's file: one per uid and trust domain. Embedded engines do not sweep files of this name."""
        return f"kvkern-node-{os.getuid()}-{self.name}"


def _endpoint(values: Mapping[str, Any], name: str) -> Endpoint | None:
    token_file = values[f"{name}_token_file"]
    if not values[name]:
        if token_file is not None:
            raise ConfigError(
                f"{name}_token_file is {str(token_file)!r}, but there is no --{name} that asks for the token; give --{name}, "
                f"or leave it out"
            )
        return None
    return Endpoint.parse(values[name], f"--{name}", token_file, tuple(values["http_host"] or ()))


def _remote_config(values: Mapping[str, Any]) -> RemoteConfig | None:
    if not values["remote"]:
        checked_remote_timeout(values["remote_timeout"])
        if values["persist"]:
            raise ConfigError(
                f"persist is {values['persist']!r}, but there is no --remote to write to; give --remote, or leave --persist out"
            )
        return None
    return RemoteConfig(values["remote"], values["persist"] or "", values["remote_queue"], values["remote_timeout"])


def _parse_quota(text: str) -> tuple[str, int]:
    model, equals, size = text.rpartition("=")
    if not model or not equals:
        raise ConfigError(f"quota is {text!r}; expected MODEL=SIZE, for example 'llama-*=8GiB'")
    return model, parse_nbytes(size, f"quota of {model}")
