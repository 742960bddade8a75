"""What an engine's pod lacks to use a KVCache, as a JSON patch. Pure.

    the KVCache     the one that an annotation names, else the only one whose workload the pod is
    the container   the one that an annotation names, else the only one, else the first that looks like vLLM's API server
    folder          the node's folder with the socket, mounted at /run/kvkern, unless it is mounted already
    variables       the socket, and the two that switch the connector on; none that is there is changed
    image           one that an annotation names, or the operator's in the place of the published one

Either everything that is needed is added, or nothing but an annotation with the reason. What has been added is found again, so
a second call changes nothing.
"""

from __future__ import annotations

import itertools
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ...config.published import LLM, SECOND_SWITCH, SWITCH, is_on
from ..kvcache import KVCache
from ..names import HOST_SOCKETS, SOCKET_DIR, SOCKET_NAME, host_socket_dir
from .pods import Container, Mount, Pod, Variable

LABEL = "kvkern.io/inject"  # "true" asks for the webhook
KVCACHE, GROUP, CONTAINER, IMAGE = (f"kvkern.io/{name}" for name in ("kvcache", "group", "container", "image"))
INJECTED, SKIPPED = "kvkern.io/injected", "kvkern.io/skipped"  # what the webhook has done, and why nothing
VOLUME = "kvkern-socket"
PUBLISHED_IMAGE = re.compile(r"(^|/)aibrix/vllm-openai[^/]*$")
SOCKET, DAEMON_UID, PUBLISHED_SOCKET = "KVKERN_SOCKET", "KVKERN_DAEMON_UID", f"{LLM}_SOCKET"
_ENGINE_WORDS = re.compile(r"vllm\.entrypoints|(^|[ /])vllm serve\b|\bapi_server\b")
_OTHER_CONNECTOR = re.compile(r"--kv[-_](transfer[-_]config|offloading[-_]size)\b")

Operation = dict[str, Any]  # of a JSON patch


@dataclass(frozen=True, slots=True)
class InjectSettings:
    """What the operator was started with."""

    engine_image: str = ""  # takes the place of the published one; empty: there is none


@dataclass(frozen=True, slots=True)
class Injection:
    """What to change. `skipped` is a reason for programs, `text` for people; empty: nothing was left out."""

    patch: list[Operation] = field(default_factory=list)
    skipped: str = ""
    text: str = ""


class _Skip(Exception):
    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason, self.text = reason, text


def inject(
    pod: Mapping[str, Any],  # as the API has it
    caches: Sequence[KVCache],  # of the pod's namespace
    settings: InjectSettings,
) -> Injection:
    """Return what to change in a pod. Raises msgspec.ValidationError if it is none."""
    read = msgspec.convert(pod, Pod)
    if read.labels.get(LABEL) != "true":
        return Injection()
    try:
        cache = _cache(read, caches)
        folder = host_socket_dir(cache.namespace, cache.name)
        number = _engine(read, settings)
        patch = _changes(read, number, folder, settings)
    except _Skip as skip:
        return Injection(_annotated(read, {SKIPPED: skip.reason, INJECTED: None}), skip.reason, skip.text)
    # The container is noted, because a second call may see others, or another image.
    said = {INJECTED: cache.name, CONTAINER: read.containers[number].name, SKIPPED: None}
    return Injection([*patch, *_annotated(read, said)])


def _cache(pod: Pod, caches: Sequence[KVCache]) -> KVCache:
    name, group = pod.annotations.get(KVCACHE, ""), pod.annotations.get(GROUP, "")
    found = [each for each in caches if not group or each.api.partition("/")[0] == group]
    if name:
        found = [each for each in found if each.name == name]
        wanted = f"with the name {name[:80]!r}"
    else:
        found = [each for each in found if each.workload and pod.labels.get(each.workload_label) == each.workload]
        wanted = "whose workload has this pod's labels"
    if not found:
        raise _Skip("no-kvcache", f"the namespace has no KVCache {wanted}; annotate the pod with {KVCACHE}: NAME")
    if len(found) > 1:
        shown = ", ".join(sorted(f"{each.name} of {each.api.partition('/')[0]}" for each in found)[:5])
        raise _Skip("several-kvcaches", f"choose one by {KVCACHE} and {GROUP}: {shown}")
    if found[0].errors:
        raise _Skip("invalid-kvcache", f"correct KVCache {found[0].name} first: {found[0].errors[0]}")
    return found[0]


def _engine(pod: Pod, settings: InjectSettings) -> int:
    """Return the place of the engine's container."""
    containers = pod.containers
    if wanted := pod.annotations.get(CONTAINER, ""):
        found = [number for number, each in enumerate(containers) if each.name == wanted]
        if not found:
            raise _Skip("no-engine-container", f"{CONTAINER} is {wanted[:80]!r}, and the pod has no such container")
        return found[0]
    if len(containers) == 1:
        return 0
    found = [number for number, each in enumerate(containers) if _looks_like_engine(each, settings)]
    if not found:
        raise _Skip("no-engine-container", f"none of the containers looks like vLLM's server; name it by {CONTAINER}")
    return found[0]


def _looks_like_engine(container: Container, settings: InjectSettings) -> bool:
    image = container.image or ""
    return bool(
        _ENGINE_WORDS.search(" ".join(container.words))
        or "vllm" in image.rpartition("/")[2]
        or (image and image == settings.engine_image)
    )


def _changes(pod: Pod, number: int, folder: str, settings: InjectSettings) -> list[Operation]:
    engine = pod.containers[number]
    if any(_OTHER_CONNECTOR.search(word) for word in engine.words):
        raise _Skip(
            "connector-configured", "the engine's command says where its KV goes, which counts more than variables"
        )
    mount = _mount_of(pod, engine, folder)
    variables = _variables(engine, mount)
    image = _image(pod, engine, settings)
    at = f"/spec/containers/{number}"
    patch = [] if mount else _mounting(pod, engine, at, folder)
    patch += _appended(f"{at}/env", engine.env, [{"name": name, "value": value} for name, value in variables.items()])
    if image:
        patch.append({"op": "add", "path": f"{at}/image", "value": image})
    return patch


# -- image -----------------------------------------------------------------------------------------------------------------


def _image(pod: Pod, engine: Container, settings: InjectSettings) -> str:
    """Return the image that takes the place of the engine's; empty: it stays."""
    current, wanted = engine.image or "", pod.annotations.get(IMAGE, "").strip()
    if not wanted and PUBLISHED_IMAGE.search(current):
        wanted = settings.engine_image
        if not wanted:
            raise _Skip(
                "image-without-kvkern",
                f"image {current[:80]} has no kvkern in it; name one that has by {IMAGE}, or start the operator with "
                "--engine-image",
            )
    return "" if wanted == current else wanted


# -- folder ----------------------------------------------------------------------------------------------------------------


def _mount_of(pod: Pod, container: Container, folder: str) -> Mount | None:
    """Return where a container sees the whole folder."""
    names = {each.name for each in pod.volumes if each.host_path and _same(each.host_path.path, folder)}
    for mount in container.mounts:
        if mount.name in names and not mount.sub_path and not mount.sub_path_expr:
            return mount
    return None


def _mounting(pod: Pod, engine: Container, at: str, folder: str) -> list[Operation]:
    """Return what mounts the folder."""
    sockets, mounted = _plain(HOST_SOCKETS), {mount.name for mount in engine.mounts}
    for volume in pod.volumes:
        path = _plain(volume.host_path.path) if volume.host_path else ""
        if volume.name in mounted and f"{path}/".startswith(f"{sockets}/") and path != _plain(folder):
            raise _Skip(
                "other-kvcache-mounted", f"the engine mounts {path[:120]}, and this KVCache's folder is {folder}"
            )
    if any(_same(mount.mount_path, SOCKET_DIR) for mount in engine.mounts):
        raise _Skip("mount-path-taken", f"the engine has something else at {SOCKET_DIR}")
    names = {volume.name for volume in pod.volumes}
    there = [each.name for each in pod.volumes if each.host_path and _same(each.host_path.path, folder)]
    name = there[0] if there else next(each for each in _volume_names() if each not in names)
    volume_value = {"name": name, "hostPath": {"path": folder, "type": "DirectoryOrCreate"}}
    return [
        *_appended("/spec/volumes", pod.spec.volumes, [] if there else [volume_value]),
        *_appended(f"{at}/volumeMounts", engine.volume_mounts, [{"name": name, "mountPath": SOCKET_DIR}]),
    ]


def _volume_names() -> Iterator[str]:
    yield VOLUME
    for number in itertools.count(2):
        yield f"{VOLUME}-{number}"


def _plain(path: str) -> str:
    """Return a path in one spelling: /var/run is /run."""
    path = posixpath.normpath(path) if path else ""
    return path.removeprefix("/var") if f"{path}/".startswith("/var/run/") else path


def _same(one: str, two: str) -> bool:
    return _plain(one) == _plain(two)


# -- variables -------------------------------------------------------------------------------------------------------------


def _variables(engine: Container, mount: Mount | None) -> dict[str, str]:
    """Return the variables that the engine lacks."""
    there = engine.variables
    for switch in (SWITCH, SECOND_SWITCH):
        if switch in there and not there[switch].value_from and not is_on(there[switch].value):
            raise _Skip("switched-off", f"the pod's own variable {switch} switches the cache off")
    socket = f"{posixpath.normpath(mount.mount_path) if mount else SOCKET_DIR}/{SOCKET_NAME}"
    if SOCKET in there and not _names(there[SOCKET], socket):
        raise _Skip(
            "host-path-mounted-elsewhere" if mount else "socket-configured",
            f"the pod's own variable {SOCKET} does not lead to {socket}",
        )
    wanted = {SWITCH: "1", SECOND_SWITCH: "1"}
    if SOCKET in there or not (mount and PUBLISHED_SOCKET in there and _names(there[PUBLISHED_SOCKET], socket)):
        wanted = {SOCKET: socket, DAEMON_UID: "0"} | wanted
    return {name: value for name, value in wanted.items() if name not in there}


def _names(variable: Variable, socket: str) -> bool:
    return not variable.value_from and _same(variable.value or "", socket)


# -- patches ---------------------------------------------------------------------------------------------------------------


def _appended(path: str, there: Sequence[Any] | None, values: list[Any]) -> list[Operation]:
    """Return what adds values to a list that may not exist."""
    if not values:
        return []
    if there is None:
        return [{"op": "add", "path": path, "value": values}]
    return [{"op": "add", "path": f"{path}/-", "value": value} for value in values]


def _annotated(pod: Pod, values: Mapping[str, str | None]) -> list[Operation]:
    """Return what sets annotations; None removes one."""
    there, at = pod.metadata.annotations, "/metadata/annotations"
    if there is None:
        return [
            {"op": "add", "path": at, "value": {name: value for name, value in values.items() if value is not None}}
        ]
    patch: list[Operation] = []
    for name, value in values.items():
        if value is None and name in there:
            patch.append({"op": "remove", "path": f"{at}/{_escaped(name)}"})
        elif value is not None and there.get(name) != value:
            patch.append({"op": "add", "path": f"{at}/{_escaped(name)}", "value": value})
    return patch


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
