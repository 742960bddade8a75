"""The fields of a Pod that `inject` reads. msgspec checks their types; all others pass unseen."""

from __future__ import annotations

from typing import Any

import msgspec


class _Part(msgspec.Struct, rename="camel"):
    pass


class Variable(_Part):
    """A variable of a container. `value_from` wins over an empty value."""

    name: str = ""
    value: str | None = None
    value_from: dict[str, Any] | None = None


class Mount(_Part):
    """Where a container sees a volume."""

    name: str = ""
    mount_path: str = ""
    sub_path: str | None = None
    sub_path_expr: str | None = None


class Container(_Part):
    """A container."""

    name: str = ""
    image: str | None = None
    command: list[str] | None = None
    args: list[str] | None = None
    env: list[Variable] | None = None
    volume_mounts: list[Mount] | None = None

    @property
    def words(self) -> list[str]:
        """Its command line. Words of an image's own entry point are not known."""
        return [*(self.command or ()), *(self.args or ())]

    @property
    def variables(self) -> dict[str, Variable]:
        """Its variables. Of several with one name the last counts."""
        return {each.name: each for each in self.env or ()}

    @property
    def mounts(self) -> list[Mount]:
        """Its mounts."""
        return list(self.volume_mounts or ())


class HostPath(_Part):
    """A folder of the node."""

    path: str = ""


class Volume(_Part):
    """A volume; only a `hostPath` is looked into."""

    name: str = ""
    host_path: HostPath | None = None


class Spec(_Part):
    """What a pod runs."""

    containers: list[Container] | None = None
    volumes: list[Volume] | None = None


class Metadata(_Part):
    """What a pod is called."""

    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class Pod(_Part):
    """A pod."""

    metadata: Metadata = msgspec.field(default_factory=Metadata)
    spec: Spec = msgspec.field(default_factory=Spec)

    @property
    def labels(self) -> dict[str, str]:
        """Its labels."""
        return self.metadata.labels or {}

    @property
    def annotations(self) -> dict[str, str]:
        """Its annotations."""
        return self.metadata.annotations or {}

    @property
    def containers(self) -> list[Container]:
        """Its containers, without those that only begin it."""
        return self.spec.containers or []

    @property
    def volumes(self) -> list[Volume]:
        """Its volumes."""
        return self.spec.volumes or []
