"""Objects without what older versions of Kubernetes do not know, and what kubectl then refuses to send."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ...errors import ConfigError
from ..kinds import OLD_BUDGET
from .metadata import Manifest

OLDEST = (1, 20)
LATER_FIELDS = {  # kind -> field of its spec -> the version that has it without being asked
    "Service": {"internalTrafficPolicy": (1, 22)},
    "StatefulSet": {"persistentVolumeClaimRetentionPolicy": (1, 27)},
}


def for_version(objects: Iterable[Manifest], version: str) -> list[Manifest]:
    """Return objects for a cluster of this version, such as 1.20. Raises ConfigError if it is no version, or too old."""
    if not version:
        return list(objects)
    match = re.fullmatch(r"v?(\d{1,3})\.(\d{1,3})(\.\d+)?", version, re.ASCII)
    known = (int(match[1]), int(match[2])) if match else (0, 0)
    if known < OLDEST:
        raise ConfigError(f"kubernetes is {version[:40]!r}; expected 1.20 or later")
    found = []
    for each in objects:
        later = LATER_FIELDS.get(each["kind"], {})
        changed = dict(each)
        if later:
            changed["spec"] = {name: value for name, value in each["spec"].items() if known >= later.get(name, OLDEST)}
        if each["kind"] == OLD_BUDGET.kind and known < (1, 21):
            changed["apiVersion"] = OLD_BUDGET.api
        found.append(changed)
    return found
