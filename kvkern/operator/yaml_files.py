"""Reads and writes manifests as YAML. Needs PyYAML, of the extra `operator`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError, UnsupportedError
from ..option_values import checked_input_file
from ..regular_files import read_regular

MAX_FILE_NBYTES = 8 << 20


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise UnsupportedError("this command needs PyYAML; install kvkern[operator]") from error
    return yaml


def read_manifests(path: str) -> list[dict[str, Any]]:
    """Return the objects of a file; `-` is standard input. Raises ConfigError if it is no YAML of Kubernetes objects."""
    yaml = _yaml()
    if path == "-":
        name, text = "standard input", sys.stdin.buffer.read(MAX_FILE_NBYTES + 1)
    else:
        name = path
        checked_input_file(Path(path), "filename")
        try:
            text = read_regular(Path(path), MAX_FILE_NBYTES, follow_links=True)
        except OSError as error:
            raise ConfigError(f"filename is {path!r}, which cannot be read: {error.strerror}") from error
    if len(text) > MAX_FILE_NBYTES:
        raise ConfigError(f"{name} has more than {MAX_FILE_NBYTES} bytes; split it")
    try:
        documents = list(yaml.safe_load_all(text))
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        place = f" at line {where.line + 1}, column {where.column + 1}" if where is not None else ""
        raise ConfigError(f"{name} is no YAML{place}; correct it") from error
    return list(_objects(documents, name))


def _objects(documents: Iterable[Any], name: str) -> Iterator[dict[str, Any]]:
    for document in documents:
        if document is None:
            continue
        if not isinstance(document, dict) or "kind" not in document:
            raise ConfigError(f"{name} holds something that is no Kubernetes object: it has no kind")
        if str(document["kind"]).endswith("List") and isinstance(document.get("items"), list):
            yield from _objects(document["items"], name)
        else:
            yield document


def to_yaml(manifests: Iterable[dict[str, Any]]) -> str:
    """Return objects as YAML documents, as `kubectl apply` takes them. Texts of several lines stay readable."""
    yaml = _yaml()

    class Dumper(yaml.SafeDumper):  # type: ignore[name-defined,misc]
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: Any, value: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    return "".join(
        "---\n" + yaml.dump(each, Dumper=Dumper, sort_keys=False, default_flow_style=False, width=120)
        for each in manifests
    )
