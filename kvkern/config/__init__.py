"""The one configuration: frozen objects, parsed at the edge from options, environment variables and a file. Unknown names fail.

options.py       every option: name, kind, unit, default, who reads it, what it does
sources.py       explicit option, variable, file, default: the first that has a value wins; where each value came from
engine.py        the object of an engine's cache; a daemon has kvkern.node.daemon.node_config
published.py     the variables of the published deployment, and what each means here
environment.py   the environment; only it and the code that starts engines read variables
sizes.py         8GiB and 8GB
"""

from .engine import (
    MAX_THREADS,
    Config,
    RemoteConfig,
    checked_log_format,
    checked_remote_timeout,
    host_and_port,
)
from .environment import launched_processes, nvtx_requested, user_cache_dir, variable
from .names import reject_unknown
from .options import DEFAULT_POLICY
from .sizes import MAX_CAPACITY_NBYTES, format_nbytes, parse_nbytes

__all__ = [
    "DEFAULT_POLICY",
    "MAX_CAPACITY_NBYTES",
    "MAX_THREADS",
    "Config",
    "RemoteConfig",
    "checked_log_format",
    "checked_remote_timeout",
    "format_nbytes",
    "host_and_port",
    "launched_processes",
    "nvtx_requested",
    "parse_nbytes",
    "reject_unknown",
    "user_cache_dir",
    "variable",
]
