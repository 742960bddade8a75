"""The daemon's options inside a KVCache, checked by the daemon's own rules, so that a wrong one never reaches a pod."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..config.environment import PREFIX
from ..config.options import OPTIONS as ALL
from ..config.options import Reader
from ..config.sources import gather
from ..errors import ConfigError
from ..node.daemon.node_config import NodeConfig
from .findings import Fields

# The operator makes these itself, or they name files of a pod that do not exist here.
MADE_BY_OPERATOR = ("socket", "arena_dir", "capacity", "rpc", "metrics", "name", "policy_state", "remote")
FILES = ("metrics_token_file", "rpc_token_file", "http_host")
OPTIONS = tuple(option for option in ALL if option.daemon and option.name not in MADE_BY_OPERATOR + FILES)


def as_text(value: Any) -> str:
    """Return an option's value as its variable has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)


def check_options(
    env: Iterable[Mapping[str, Any]],
    options: Mapping[str, str],
    has_remote: bool,
    fields: Fields,
) -> None:
    """Note as an error what a daemon would refuse at its start. Values that come from secrets are not known here."""
    env = list(env)
    environ = dict(options) | {str(e["name"]): str(e["value"]) for e in env if e.get("value") is not None}
    skipped = {PREFIX + name.upper() for name in (*MADE_BY_OPERATOR, *FILES)}
    environ = {name: value for name, value in environ.items() if name.startswith(PREFIX) and name not in skipped}
    if has_remote or any(entry["name"] == f"{PREFIX}REMOTE" for entry in env):
        environ[f"{PREFIX}REMOTE"] = "redis://localhost:6379"
    known = {"capacity": "1GiB", "arena_dir": "/", "socket": "/run/kvkern.sock"}
    try:
        NodeConfig.from_settings(gather(Reader.DAEMON, known, "the operator", environ=environ))
    except ConfigError as error:
        fields.error(fields.path, str(error))
