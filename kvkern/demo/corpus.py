"""Text that every Python installation has: the language reference, then the standard library's sources.

Knows files and characters; knows nothing of tokens. The order is fixed, so the same Python gives the same text.
"""

import importlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

MODULE_MAX_CHARS = 60_000  # some generated modules are megabytes of tables


def text(
    max_chars: int,  # the text is shorter only where the installation has less
) -> str:
    """Return the first `max_chars` characters of this Python's own documentation and sources."""
    parts: list[str] = []
    num_chars = 0
    for part in _parts():
        parts.append(part)
        num_chars += len(part)
        if num_chars >= max_chars:
            break
    return "".join(parts)[:max_chars]


def _parts() -> Iterator[str]:
    yield from _reference()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        yield path.read_text(encoding="utf-8", errors="ignore")[:MODULE_MAX_CHARS] + "\n\n"


def _reference() -> list[str]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError:  # trimmed Python images lack it
        return []
    return [topics[name] + "\n\n" for name in sorted(topics)]
