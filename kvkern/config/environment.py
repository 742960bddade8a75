"""The environment: every variable that kvkern reads, and the errors for names that it does not know.

Only this module and the code that starts engines read environment variables.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from ..errors import ConfigError
from .names import nearest

PREFIX = "KVKERN_"
FILE_VARIABLE = "KVKERN_CONFIG"
OTHER_VARIABLES = {  # that are no options -> what reads them
    FILE_VARIABLE: "path of the configuration file, for engines and for `kvkern serve` without `--config`",
    "KVKERN_NVTX": "1: name kvkern's work in a profile of Nsight Systems; see gpu.md",
    "KVKERN_BUILD_CUDA": "1: an installation from source compiles CUDA sources, if there are any",
    "KVKERN_CUDA_ARCH": "for which GPUs it compiles them",
    "KVKERN_REQUIRE": "tests: the stores whose tests must not be skipped, such as `redis,mooncake`",
}
OTHER_PREFIXES = {"KVKERN_SOAK_": "tests: how long the long ones run; `make soak` sets them"}
# Kubernetes gives every container such variables for each Service of its namespace: one named `kvkern` gives KVKERN_PORT.
_OF_A_SERVICE = re.compile(
    r"KVKERN_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_ADDRESS_OF_A_SERVICE = re.compile(r"(tcp|udp|sctp)://")


def environment() -> Mapping[str, str]:
    """Return this process's environment."""
    return os.environ


def own_variables(environ: Mapping[str, str], options: Collection[str]) -> dict[str, str]:
    """Return the variables of kvkern's options that have a value, by name. An empty one counts as not set.

    `options` are the variables' names. Raises ConfigError for an unknown variable whose name begins with KVKERN_.
    """
    found: dict[str, str] = {}
    for name, value in environ.items():
        if not name.startswith(PREFIX) or is_of_a_service(name, value, name in options):
            continue
        if name in options:
            if value:
                found[name] = value
        elif name not in OTHER_VARIABLES and not name.startswith(tuple(OTHER_PREFIXES)):
            hint = nearest(name, {*options, *OTHER_VARIABLES})
            raise ConfigError(
                f"unknown variable {name}; {hint}`kvkern config --show` lists all variables. Unset {name} or correct its name"
            )
    return found


def is_of_a_service(name: str, value: str, is_option: bool) -> bool:
    """Return True for a variable that Kubernetes sets for a Service. A Service `kvkern-metrics` sets KVKERN_METRICS_PORT."""
    return bool(_OF_A_SERVICE.fullmatch(name)) and (not is_option or bool(_ADDRESS_OF_A_SERVICE.match(value)))


def user_cache_dir() -> Path:
    """Return $XDG_CACHE_HOME/kvkern, or ~/.cache/kvkern: the folder for files that kvkern can make again.

    A user without a home gets a folder that cannot be made: /nonexistent, as in Debian's passwd. Callers go on without it.
    """
    home = os.path.expanduser("~")  # without HOME and an entry in passwd it stays "~"
    base = os.environ.get("XDG_CACHE_HOME") or Path(home if os.path.isabs(home) else "/nonexistent", ".cache")
    return Path(base, "kvkern")


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
