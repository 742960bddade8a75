"""What the remote tier asks of a store, and how a URL becomes one. Knows no store.

    put(keys, values)     every value, as far as there is room
    get(keys, buffers)    into the caller's memory, as far as they are there
    exists, delete        of many at once

A value is a header and a payload, two pieces of memory one behind the other (value.py): a store moves them without
joining them. All sizes are the caller's: a value of another size is no value. Stores know keys and bytes; what is in
them, the tier verifies.

A call over many servers, of which some have failed, says so key by key: UNKNOWN, or None. Such a key is neither there nor
absent, and the tier draws no conclusion from it. A call that has no answer for any key raises.

A store is used from one event loop. Whatever blocks runs in threads of its own. Memory that was passed in belongs to
the call until it returns or raises, whatever becomes of the caller's patience: so the tier never cancels a call, and a
call ends by itself soon after `timeout_s`. Runtime failures are `RemoteError`; what a user can mend is ConfigError.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from ..config import parse_nbytes, reject_unknown
from ..errors import ConfigError

VALUE_VERSION = 1
ENTRY_POINTS = "kvkern.remotes"  # name: a URL scheme; object: a function of a RemoteUrl that makes a RemoteStore

Parts = tuple[memoryview, memoryview]  # header, payload; each contiguous bytes

T = TypeVar("T")


class RemoteError(Exception):
    """A store did not do what it was asked: gone, slow, full, or it says no. The tier makes a miss of it."""


class Got(enum.IntEnum):
    """What became of one key of a `get`. Buffers of all but HIT hold anything."""

    HIT = 0
    MISS = 1  # not there; behind the first one nothing needs to be read
    WRONG_SIZE = 2  # there, but of another size: no value of this version and geometry
    UNKNOWN = 3  # not answered: its server has failed; it may be there


class RemoteStore(Protocol):
    """One store. Calls may overlap."""

    async def open(self) -> None:
        """Connect; `close` follows, also if it raises.

        Raises ConfigError for what cannot work: no such bucket, wrong credentials, missing rights.

        RemoteError if nobody answers now; later calls connect by themselves.
        """

    async def close(self) -> None:
        """Give connections and threads back. Nothing is called afterwards."""

    async def register(self, memory: memoryview) -> None:
        """All buffers will lie in it, or be small: for stores that move data by themselves. Before the first transfer."""

    async def exists(self, keys: Sequence[bytes], timeout_s: float) -> Sequence[bool | None]:
        """Which of them are there, in one round trip if the store can. None: not answered. Raises RemoteError."""

    async def get(self, keys: Sequence[bytes], into: Sequence[Parts], timeout_s: float) -> Sequence[Got]:
        """Read values into memory, in the order of the keys. Raises RemoteError: then the buffers hold anything."""

    async def put(self, keys: Sequence[bytes], values: Sequence[Parts], timeout_s: float) -> Sequence[bool | None]:
        """Write values; which of them are there now. One that was there stays or is replaced. False: no room.

        None: not answered, and perhaps written.

        A reader sees a whole value or none. Raises RemoteError: then some may have been written.
        """

    async def delete(self, keys: Sequence[bytes], timeout_s: float) -> None:
        """Forget values; those that are not there are no error. Raises RemoteError."""


def answered(answers: list[T | None], errors: Sequence[RemoteError]) -> list[T | None]:
    """These, of which None are the keys that were not answered. Raises the first error if it left no answer."""
    if errors and all(answer is None for answer in answers):
        raise errors[0]
    return answers


def answered_get(answers: list[Got | None], errors: Sequence[RemoteError]) -> list[Got]:
    """Likewise of a `get` that does not read what is behind the first miss."""
    end = next((row for row, got in enumerate(answers) if got is Got.MISS), len(answers))
    rest = [Got.UNKNOWN if row < end else Got.MISS for row in range(len(answers))]
    return [rest[row] if got is None else got for row, got in enumerate(answered(answers, errors))]


def value_name(key: bytes) -> str:
    """What a chunk's value is called in stores that have names: another version's values have other names."""
    return f"kvkern{VALUE_VERSION}/{key.hex()}"


# -- URLs --------------------------------------------------------------------------------------------------------------


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
        """Raises ConfigError. `?password_file=PATH` takes the password from a file, now and not again."""
        try:
            parts = urlsplit(text)
            port = parts.port
            pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
        except ValueError:  # whose words may be the password's
            raise ConfigError(
                f"remote URL is malformed; expected {_EXAMPLES}, in user and password %2F for / and %40 for @"
            ) from None
        if not parts.scheme or "://" not in text:
            raise ConfigError(f"remote URL has no scheme; expected {_EXAMPLES}")
        if "@" in parts.path or "@" in parts.fragment:
            raise ConfigError(
                f"remote URL of {parts.scheme}:// has an @ behind its host; write / in a password as %2F, @ in a path as %40"
            )
        options = dict(pairs)
        if len(options) < len(pairs):
            raise ConfigError(f"remote URL of {parts.scheme}:// gives an option twice; give each once")
        password = unquote(parts.password or "")
        if "password_file" in options:
            password = _secret(options.pop("password_file"))
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
        """An option."""
        return self.options.get(name, default)

    def integer(self, name: str, default: int, least: int, most: int) -> int:
        """An option. Raises ConfigError if it is no integer within the limits."""
        given = self.options.get(name)
        if given is None:
            return default
        try:
            value = int(given)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise ConfigError(f"{name} of {self} is {given!r}; expected an integer in {least}..{most}")
        return value

    def nbytes(self, name: str, default: int) -> int:
        """An option such as 8GiB. Raises ConfigError."""
        given = self.options.get(name)
        return default if given is None else parse_nbytes(given, f"{name} of {self}")

    def flag(self, name: str, default: bool) -> bool:
        """An option that is yes or no. Raises ConfigError."""
        given = self.options.get(name)
        if given is None:
            return default
        if given not in ("yes", "no"):
            raise ConfigError(f"{name} of {self} is {given!r}; expected yes or no")
        return given == "yes"


def _host(netloc: str) -> str:
    """As it was given: names of containers and of nodes may tell cases apart, which `hostname` of urllib does not."""
    address = netloc.rpartition("@")[2]
    return address[1:].partition("]")[0] if address.startswith("[") else address.partition(":")[0]


def _secret(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"password_file {path} of the remote URL cannot be read: {error}") from error


# -- registry ----------------------------------------------------------------------------------------------------------

Maker = Callable[[RemoteUrl], RemoteStore]

_BUILT_IN: dict[str, str] = {  # scheme -> module, of this package, with a function `make(url)`
    "file": "file",
    "redis": "redis", "rediss": "redis", "valkey": "redis", "valkeys": "redis",
    "redis+cluster": "redis", "rediss+cluster": "redis", "valkey+cluster": "redis", "valkeys+cluster": "redis",
    "mooncake": "mooncake",
    "s3": "objects", "gs": "objects", "az": "objects",
}  # fmt: skip
_EXTRA = {"redis": "redis", "mooncake": "mooncake", "objects": "objects"}  # module -> extra of the package
_EXAMPLES = "redis://host:6379, mooncake://host:50051, file:///path or s3://bucket"


def make_store(url: RemoteUrl) -> RemoteStore:
    """The store of a URL, not yet connected. Raises ConfigError for an unknown scheme, option, or a missing package."""
    return _maker_of(url.scheme)(url)


@asynccontextmanager
async def opened(url: RemoteUrl, timeout_s: float) -> AsyncIterator[RemoteStore]:
    """The store of a URL, open in the block. Raises what `open` does, and TimeoutError; it is closed in any case."""
    store = make_store(url)
    try:
        async with asyncio.timeout(timeout_s):
            await store.open()
        yield store
    finally:
        await store.close()


def _maker_of(scheme: str) -> Maker:
    module = _BUILT_IN.get(scheme)
    if module is not None:
        try:
            maker: Maker = import_module(f"{__package__}.{module}").make
        except ImportError as error:
            extra = _EXTRA.get(module, module)
            raise ConfigError(
                f"{scheme}:// needs a package that is not installed ({error}); pip install 'kvkern[{extra}]'"
            ) from error
        return maker
    others = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if scheme not in others:
        known = ", ".join(sorted({*_BUILT_IN, *others}))
        raise ConfigError(f"no remote store has the scheme {scheme!r}; known: {known}")
    try:
        other: Maker = others[scheme].load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{scheme}:// is registered, but cannot be loaded ({error}); mend or remove its package"
        ) from error
    return other
