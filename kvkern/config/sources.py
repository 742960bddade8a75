"""Where values come from, and which of them counts: explicit option, then variable, then file, then default.

capacity = "64GiB"          # a TOML file: what stands above all tables is for engines and daemon
[engine]                    # for engines alone; a key here is preferred to the same key above
connect_s = 30
[daemon]                    # for the daemon alone
fair = true
"""

from __future__ import annotations

import enum
import re
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..option_values import checked_input_file
from ..regular_files import read_regular
from .environment import FILE_VARIABLE, environment, own_variables
from .names import nearest, reject_unknown
from .options import BY_NAME, BY_VARIABLE, Reader, names_of, options_of

MAX_FILE_NBYTES = 1 << 20


class Rank(enum.IntEnum):
    """Kinds of sources. The highest that has a value counts."""

    DEFAULT = 0
    FILE = 1
    PUBLISHED = 2  # a variable of published.py
    VARIABLE = 3
    OPTION = 4


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from."""

    rank: Rank
    name: str = ""  # OPTION: what holds the options; a variable's name; FILE: "PATH line N"

    @property
    def where(self) -> str:
        """For messages: "threads in ... is"."""
        return f"the variable {self.name}" if self.rank in (Rank.PUBLISHED, Rank.VARIABLE) else self.name

    def __str__(self) -> str:
        if self.rank in (Rank.DEFAULT, Rank.OPTION):
            return self.rank.name.lower()
        return f"file {self.name}" if self.rank is Rank.FILE else f"variable {self.name}"


@dataclass(frozen=True, slots=True)
class Setting:
    """A value in a user's words, and where it came from."""

    value: Any
    origin: Origin


Settings = dict[str, Setting]  # by the option's name; without those that nobody has set


def explicit(options: Mapping[str, Any], where: str, reader: Reader = Reader.ENGINE) -> Settings:
    """Return options that a user has written in code or on a command line. Raises ConfigError for an unknown name."""
    reject_unknown(options, names_of(reader), where)
    return {name: Setting(value, Origin(Rank.OPTION, where)) for name, value in options.items()}


def gather(
    reader: Reader,
    options: Mapping[str, Any],
    where: str,  # what holds the options, for messages
    file: Path | None = None,  # None: the one that KVKERN_CONFIG names, if there is one
    environ: Mapping[str, str] | None = None,  # None: this process's
) -> Settings:
    """Return every value that somebody has set for an engine or a daemon.

    Raises ConfigError for an unknown option, variable or key of the file, and for a variable whose text means nothing.
    """
    environ = environment() if environ is None else environ
    given = explicit(options, where, reader)
    variables = own_variables(environ, BY_VARIABLE.keys())
    settings: Settings = {}
    path = file or (Path(environ[FILE_VARIABLE]) if environ.get(FILE_VARIABLE) else None)
    if path is not None:
        settings |= of_file(path, reader, "--config" if file is not None else FILE_VARIABLE)
    known = names_of(reader)
    for name, text in variables.items():
        option = BY_VARIABLE[name]
        if option.name in known:
            origin = Origin(Rank.VARIABLE, name)
            settings[option.name] = Setting(option.parse(text, origin.where), origin)
    return settings | given


def of_file(path: Path, reader: Reader, name: str) -> Settings:
    """Return what a file says to an engine or a daemon. `name` is what names the file, for messages. Raises ConfigError."""
    checked_input_file(path, name)
    try:
        text = read_regular(path, MAX_FILE_NBYTES, follow_links=True).decode()
        tables = tomllib.loads(text)
        repr(tables)  # so that every message can show a value
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{name} is {str(path)!r}, which cannot be read: {error}; give a readable TOML file"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is no TOML: {error}; see docs/configuration.md for an example") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} has a number of thousands of digits, or values nested hundreds of times; see docs/configuration.md for an "
            f"example"
        ) from error
    lines = dict(_lines(text))
    settings: Settings = {}
    for table in ("", *Reader):
        found = tables.get(table, {}) if table else {k: v for k, v in tables.items() if k not in tuple(Reader)}
        if not isinstance(found, dict):
            kind = type(found).__name__  # its value may be a secret
            raise ConfigError(
                f"{table} in {path} is of the type {kind}; expected a table: write [{table}] on its own line"
            )
        known = names_of(Reader(table)) if table else set(BY_NAME)
        for key in found:
            if key not in known:
                place = f"{path} line {lines.get((table, key), '?')}" + (f", in [{table}]" if table else "")
                hint = nearest(key, known)
                raise ConfigError(f"unknown key {key!r} in {place}; {hint}known keys: {', '.join(sorted(known))}")
        if table in ("", reader):
            for key in found.keys() & names_of(reader):
                origin = Origin(Rank.FILE, f"{path} line {lines.get((table, key), '?')}")
                settings[key] = Setting(found[key], origin)
    return settings


def _lines(text: str) -> Iterator[tuple[tuple[str, str], int]]:
    """Yield ((table, key), number of its line), for messages. tomllib does not tell."""
    table = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[\s*([\w-]+)\s*\]", line):
            table = header[1]
        elif key := re.match(r"""\s*["']?([\w-]+)["']?\s*[=.]""", line):
            yield (table, key[1]), number


def in_force(settings: Settings, reader: Reader) -> Settings:
    """Return all options of an engine or a daemon, with the defaults of those that nobody has set."""
    default = Origin(Rank.DEFAULT)
    return {
        option.name: settings.get(option.name, Setting(option.default_of(reader), default))
        for option in options_of(names_of(reader))
    }


def converted(settings: Settings) -> dict[str, Any]:
    """Return the values that the frozen objects take; None for an option that has no default.

    Raises ConfigError, which names the value and its source.
    """
    values: dict[str, Any] = {}
    for name, setting in settings.items():
        origin = setting.origin
        if setting.value is None and origin.rank is Rank.DEFAULT:
            values[name] = None
            continue
        explained = name if origin.rank is Rank.OPTION else f"{name} in {origin.where}"
        values[name] = BY_NAME[name].convert(setting.value, origin.where, explained)
    return values


@contextmanager
def sources_named(settings: Settings) -> Iterator[None]:
    """Let a ConfigError say which variable or line of the file gave the option that its message begins with."""
    try:
        yield
    except ConfigError as error:
        text = str(error)
        first = re.match(r"[\w-]+", text)
        name = first[0].replace("-", "_").removesuffix("_nbytes") if first else ""
        setting = settings.get(name) or settings.get(name.removesuffix("_s"))
        if setting is None or setting.origin.rank is Rank.OPTION or setting.origin.name in text:
            raise
        raise ConfigError(f"{text} ({name} comes from {setting.origin.where})") from error
