"""The settings of a daemon, checked when they are made. Knows no command line and opens nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from ...config import DEFAULT_POLICY, RemoteConfig
from ...errors import ConfigError
from ...option_values import checked_number, checked_output_file, checked_path
from ...policy import checked_policy
from ...policy.persist_modes import persist_mode
from ...remote.stores.url import RemoteUrl
from .. import framing
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
    drain_s: float = 5.0  # time after SIGTERM for transfers under way and for writes that wait for the store

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
        for number in self.uids | self.gids | self.operator_uids | self.operator_gids:
            checked_number(number, "the number of a user or group", 0, MAX_UID)
        if not checked_path(self.arena_dir, "arena_dir").is_dir():
            raise ConfigError(
                f"arena_dir is {str(self.arena_dir)!r}, which is no directory; mount a tmpfs there, or give another folder"
            )
        if not 0 <= self.drain_s <= 3600:
            raise ConfigError(f"drain_s is {self.drain_s}; it must lie in 0..3600 seconds")

    @property
    def arena_name(self) -> str:
        """The arena's file: one per uid and trust domain. Embedded engines do not sweep files of this name."""
        return f"kvkern-node-{os.getuid()}-{self.name}"
