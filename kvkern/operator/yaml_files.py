"""Reads and writes manifests as YAML. Needs PyYAML, of the extra `operator`."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError, UnsupportedError
from ..option_values import checked_input_file
from ..regular_files import read_regular

MAX_FILE_NBYTES = 8 << 20
# What every reader of YAML takes for a text without quotes, if it needs none for its signs. Some readers, such as kubectl's,
# know more numbers and more words than others.
_PLAIN = re.compile(r"[A-Za-z/].*|[0-9]+([KMGTPE]i|m)", re.DOTALL)
_WORDS = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")


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
        documents = list(yaml.load_all(text, Loader=_loader(yaml)))
        json.dumps(documents, default=str)  # raises if something holds itself
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        place = f" at line {where.line + 1}, column {where.column + 1}" if where is not None else ""
        problem = getattr(error, "problem", None) or (str(error) if where is None else "")
        raise ConfigError(f"{name} is no YAML{place}{f': {problem[:200]}' if problem else ''}; correct it") from error
    return list(_objects(documents, name))


def _loader(yaml: Any) -> Any:
    """Return a loader that refuses a key that is there twice, as kubectl does, and reads no dates."""

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            counts = Counter(
                key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"
            )
            if twice := next((key for key, count in counts.items() if count > 1), None):
                raise yaml.constructor.ConstructorError(None, None, f"{twice[:60]!r} is there twice", node.start_mark)
            return super().construct_mapping(node, deep)

    Loader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)
    return Loader


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
        style = "|" if "\n" in value else None if _PLAIN.fullmatch(value) and value.lower() not in _WORDS else "'"
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    return "".join(
        "---\n" + yaml.dump(each, Dumper=Dumper, sort_keys=False, default_flow_style=False, width=120)
        for each in manifests
    )
