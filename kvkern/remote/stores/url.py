"""The URL of a remote store and its options. Its text never shows the password. Knows no store."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, unquote, urlsplit

from ...config import parse_nbytes, reject_unknown, variable
from ...errors import ConfigError
from ...regular_files import read_regular

# Other programs read passwords from options of such names. Those that end in _file or _env say where the password stands.
_SECRET_OPTION = re.compile(
    r"([?&][^=&]*(?:pass|pwd|secret|token|key|credential|sig)[^=&]*(?<!_file)(?<!_env)=)[^&]*", re.I
)
_PASSWORD_NBYTES = 64 << 10  # the largest password_file
EXAMPLES = "redis://host:6379, mooncake://host:50051, file:///path or s3://bucket"


@dataclass(frozen=True, slots=True)
class RemoteUrl:
    """`scheme://user:password@host:port/path?option=value`. Its repr and str hide the password."""

    scheme: str
    host: str = ""
    port: int | None = None
    user: str = ""
    password: str = field(default="", repr=False)
    path: str = ""  # with the leading slash, unquoted
    options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> RemoteUrl:
        """Parse a URL. Raises ConfigError.

        `?password_file=PATH` reads the password from a file, `?password_env=NAME` from an environment variable, once.
        """
        try:
            parts = urlsplit(text)
            port = parts.port
            pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        except ValueError:  # its text may show the password
            raise ConfigError(
                f"The remote URL is malformed. Expected {EXAMPLES}. In user and password write / as %2F and @ as %40"
            ) from None
        if not parts.scheme or "://" not in text:
            raise ConfigError(f"The remote URL has no scheme. Expected {EXAMPLES}")
        if "@" in parts.path or "@" in parts.fragment:
            raise ConfigError(
                f"The remote URL of {parts.scheme}:// has an @ behind its host. "
                "Write / in a password as %2F and @ in a path as %40"
            )
        options = dict(pairs)
        if len(options) < len(pairs):
            raise ConfigError(f"The remote URL of {parts.scheme}:// gives an option twice. Give each option once")
        if "\0" in unquote(text):
            raise ConfigError(f"The remote URL of {parts.scheme}:// has a NUL (%00). Leave it out")
        password = unquote(parts.password or "")
        given = [name for name in ("password_file", "password_env") if name in options]
        if len(given) + bool(password) > 1:
            raise ConfigError(
                f"The remote URL of {parts.scheme}:// gives the password more than once. Give it in the URL, in password_file "
                f"or in password_env"
            )
        if given:
            read = _password_of_file if given[0] == "password_file" else _password_of_variable
            password = read(options.pop(given[0]))
        return cls(
            parts.scheme.lower(), _host(parts.netloc), port, unquote(parts.username or ""), password,
            unquote(parts.path), options,
        )  # fmt: skip

    def __str__(self) -> str:
        address = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port is None else f":{self.port}"
        return f"{self.scheme}://{address}{port}{self.path}"

    def check_options(self, *known: str) -> None:
        """Raises ConfigError for an option that the store does not know."""
        reject_unknown(self.options, set(known), f"the options of {self}")

    def text(self, name: str, default: str = "") -> str:
        """Return an option, or `default`."""
        return self.options.get(name, default)

    def integer(self, name: str, default: int, least: int, most: int) -> int:
        """Return an option as an integer. Raises ConfigError if it is not one in `least`..`most`."""
        given = self.options.get(name)
        if given is None:
            return default
        try:
            value = int(given)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise ConfigError(f"{name} of {self} is {given!r}. Give an integer in {least}..{most}")
        return value

    def nbytes(self, name: str, default: int) -> int:
        """Return an option such as 8GiB in bytes. Raises ConfigError."""
        given = self.options.get(name)
        return default if given is None else parse_nbytes(given, f"{name} of {self}")

    def flag(self, name: str, default: bool) -> bool:
        """Return an option that is yes or no. Raises ConfigError."""
        given = self.options.get(name)
        if given is None:
            return default
        if given not in ("yes", "no"):
            raise ConfigError(f"{name} of {self} is {given!r}. Give yes or no")
        return given == "yes"


def format_address(host: str, port: int) -> str:
    """Return `host:port`, with an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _host(netloc: str) -> str:
    """Return the host as it was written: names of containers and nodes may be case-sensitive, urllib's `hostname` is not."""
    address = netloc.rpartition("@")[2]
    return address[1:].partition("]")[0] if address.startswith("[") else address.partition(":")[0]


def hide_password(text: str) -> str:
    """Return the URL with `***` for its password. The URL may be malformed, or name a password where none is read."""
    without = re.sub(r"(://[^:@]*:).*@", r"\1***@", text, flags=re.DOTALL)
    return _SECRET_OPTION.sub(r"\1***", without)


def _password_of_variable(name: str) -> str:
    value = variable(name)
    if not value:
        raise ConfigError(
            f"password_env of the remote URL is {name}, but this process has no environment variable {name}. Set it where the "
            f"process starts"
        )
    return value.strip()


def _password_of_file(path: str) -> str:
    try:
        return read_regular(path, _PASSWORD_NBYTES, follow_links=True).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"The password_file {path} of the remote URL cannot be read: {error}. Give a readable file"
        ) from error
