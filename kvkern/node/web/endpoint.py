"""Where the daemon listens for HTTP, and who may ask what there. Opens nothing but the file of a token."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import ConfigError
from ...option_values import checked_path, split_address, without_brackets
from ...regular_files import open_with_status

MAX_CONNECTIONS = 64  # of one port at a time
MIN_TOKEN, MAX_TOKEN = 16, 1024  # characters
_VISIBLE = re.compile(rb"[!-~]+")
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One port. Without a token its private paths are for this machine alone."""

    option: str  # "--metrics" or "--rpc", for messages
    host: str  # an IP address; empty: all interfaces
    port: int  # 0: the system chooses one
    token: bytes = field(default=b"", repr=False)  # empty: there is none
    names: frozenset[str] = frozenset()  # other host names under which browsers may ask, in small letters

    @property
    def loopback(self) -> bool:
        """True if only this machine can connect."""
        return bool(self.host) and ipaddress.ip_address(self.host).is_loopback

    @property
    def url(self) -> str:
        """Return where people find it."""
        host = self.host or "0.0.0.0"
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/"

    @classmethod
    def parse(
        cls,
        text: str,  # HOST:PORT, or :PORT for all interfaces
        option: str,
        token_file: Path | None = None,
        names: tuple[str, ...] = (),
    ) -> Endpoint:
        """Return the endpoint that an option names. Reads the token's file. Raises ConfigError, which begins with a name."""
        shown = option.removeprefix("--")
        host, port = split_address(text) or ("", None)
        bare = without_brackets(host)
        if bare == "localhost":
            bare = "127.0.0.1"
        if port is None or not _is_address(bare, host):
            raise ConfigError(
                f"{shown} is {text[:100]!r}; expected an IP address and a port, such as 127.0.0.1:8080 or [::1]:8080, or "
                f":8080 for all interfaces"
            )
        for name in names:
            if not _NAME.fullmatch(name):
                raise ConfigError(f"http_host is {name[:100]!r}; expected a host's name without port")
        token = b"" if token_file is None else read_token(token_file, f"{shown}_token_file")
        return cls(option, bare, port, token, frozenset(name.lower() for name in names))


def _is_address(bare: str, host: str) -> bool:
    """Return True for nothing, an IPv4 address, or an IPv6 address in brackets."""
    if not bare:
        return not host
    try:
        version = ipaddress.ip_address(bare).version
    except ValueError:
        return False
    return (version == 6) == host.startswith("[") and "%" not in bare


def read_token(path: Path, option: str) -> bytes:
    """Return the token in a file: one line of visible characters. Raises ConfigError, which never shows the token.

    The file must belong to root or to this user, and nobody else may read or write it; a group may read it.
    """
    try:
        fd, status = open_with_status(checked_path(path, option), os.O_RDONLY, follow_links=True)
    except OSError as error:
        raise ConfigError(f"{option} is {str(path)!r}, which cannot be read: {error.strerror}") from error
    with os.fdopen(fd, "rb") as file:
        if status.st_uid not in (0, os.getuid()):
            raise ConfigError(
                f"{option} {str(path)!r} belongs to uid {status.st_uid}, who could change the token; it must belong to root or "
                f"to uid {os.getuid()}"
            )
        if status.st_mode & (stat.S_IWGRP | stat.S_IRWXO):
            raise ConfigError(
                f"{option} {str(path)!r} has the mode {stat.S_IMODE(status.st_mode):04o}, so others could read or change the "
                f"token; run chmod 600, or set defaultMode: 0440 in Kubernetes"
            )
        try:
            token = file.read(MAX_TOKEN + 2).removesuffix(b"\n").removesuffix(b"\r")
        except OSError as error:
            reason = os.strerror(error.errno or errno.EIO)
            raise ConfigError(f"{option} is {str(path)!r}, which cannot be read: {reason}") from error
    if not MIN_TOKEN <= len(token) <= MAX_TOKEN or not _VISIBLE.fullmatch(token):
        raise ConfigError(
            f"{option} {str(path)!r} holds no token: one line of {MIN_TOKEN} to {MAX_TOKEN} visible ASCII characters, for "
            f"example from `openssl rand -hex 24`"
        )
    return token
