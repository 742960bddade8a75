"""Checks of values that users give for options: paths, files, numbers, addresses. Every command and configuration uses them.

A value that passes can be handed to the system without a surprise: a path has no NUL and is not too long, a file to read or
write is no pipe, device or folder, a number is finite. Knows no option. Each function raises ConfigError, which names the
option, the value and the limit.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from .errors import ConfigError
from .regular_files import kind_of

MAX_PORT = 65_535
MAX_PART_NBYTES, MAX_PATH_NBYTES = 255, 4095  # of Linux
_NOTHING = "not there"
_PORT = re.compile("[0-9]{1,5}")
_SHOWN = 100  # characters of a value that a message shows


def checked_path(
    path: Path | str,
    name: str,  # of the option
) -> Path:
    """Return a path that Linux can look up; it may not exist."""
    text = str(path)
    if not text or "\0" in text:
        raise ConfigError(
            f"{name} is {_shown(text)}, which is {'no path' if text else 'empty'}; give a path without NUL"
        )
    if (nbytes := len(os.fsencode(text))) > MAX_PATH_NBYTES:
        raise ConfigError(f"{name} is {_shown(text)}, a path of {nbytes} bytes; at most {MAX_PATH_NBYTES} are allowed")
    for part in Path(text).parts:
        if (nbytes := len(os.fsencode(part))) > MAX_PART_NBYTES:
            raise ConfigError(
                f"{name} is {_shown(text)}; a part of it has {nbytes} bytes, at most {MAX_PART_NBYTES} are allowed"
            )
    return Path(text)


def path_text(path: Path | str) -> str:
    """Return a path for JSON and other texts. Bytes that are no text, which Linux's paths may have, are escaped."""
    return str(path).encode(errors="backslashreplace").decode()


def checked_input_file(path: Path | str, name: str) -> Path:
    """Return the path of a file that exists. Links are followed."""
    checked = checked_path(path, name)
    kind = _kind(checked, name)
    if kind != "a file":
        raise ConfigError(f"{name} is {_shown(str(path))}, which is {kind}; give a file")
    return checked


def checked_output_file(path: Path | str, name: str) -> Path:
    """Return the path of a file that can be written, or made, as far as that is known before it is tried."""
    checked = checked_path(path, name)
    kind = _kind(checked, name)
    if kind not in ("a file", _NOTHING):
        raise ConfigError(f"{name} is {_shown(str(path))}, which is {kind}; give a file to write")
    if not checked.name:
        raise ConfigError(f"{name} is {_shown(str(path))}, which names no file; give a file to write")
    for folder in checked.absolute().parents:
        if (kind := _kind(folder, name)) == "a folder":
            break
        if kind != _NOTHING:
            raise ConfigError(f"{name} is {_shown(str(path))}, but {_shown(str(folder))} is {kind}, no folder")
    return checked


def checked_folder(path: Path | str, name: str, *, make: bool = False) -> Path:
    """Return the path of a folder that exists, or with `make` that exists or can be made."""
    checked = checked_path(path, name)
    kind = _kind(checked, name)
    if kind == _NOTHING and make:
        return checked_output_file(checked, name)
    if kind != "a folder":
        raise ConfigError(f"{name} is {_shown(str(path))}, which is {kind}; give a folder")
    return checked


def checked_number(value: float, name: str, least: float, most: float) -> float:
    """Return a number in [least, most]. NaN lies in no range."""
    if not least <= value <= most:
        raise ConfigError(f"{name} is {_number(value)}; it must lie in {_number(least)}..{_number(most)}")
    return value


def split_address(
    text: str,  # HOST:PORT, [HOST]:PORT or :PORT
) -> tuple[str, int] | None:
    """Return the host as it is written, and the port, 0 to MAX_PORT. None if the text is of another form."""
    host, colon, port = text.rpartition(":")
    if not colon or not _PORT.fullmatch(port) or int(port) > MAX_PORT:
        return None
    return host, int(port)


def without_brackets(host: str) -> str:
    """Return the HOST of [HOST]; any other text as it is."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def _number(value: float) -> str:
    return str(value)[:_SHOWN] if isinstance(value, int) else f"{value:g}"  # a large integer is no float


def _kind(path: Path, name: str) -> str:
    """Return what is at a path: as `kind_of` says, _NOTHING, or a broken link. Links are followed."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "a broken link" if path.is_symlink() else _NOTHING
    except OSError as error:
        raise ConfigError(f"{name} is {_shown(str(path))}, which cannot be used: {error.strerror}") from error
    return kind_of(mode)


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
