"""Runs the pods of rendered objects as processes, as a kubelet would, in namespaces of their own. Needs root, ip and unshare.

A node is a network namespace with a bridge, and folders for hostPath. A pod gets a network namespace with an address on the
bridge, its volumes by bind mounts, the machine's pid namespace if it asks for hostPID and else one of its own, its user, no
capability, and a read-only root if it asks for one. There are no images: commands come from this environment. Names of Services
are in /etc/hosts.
Knows nothing of kvkern.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

NETWORK = "10.77.0"
BIN = Path(sys.executable).parent
END_S = 60.0


@dataclass
class Pod:
    """A running pod of one container."""

    name: str
    ip: str
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(errors="replace")


class Node:
    """A node. Leaving the context ends its pods and removes all that was made."""

    def __init__(self, folder: Path) -> None:
        self.tag = f"kvk{secrets.token_hex(3)}"
        self.folder = folder
        self.memory = Path(tempfile.mkdtemp(prefix=f"{self.tag}-", dir="/dev/shm"))  # the node's /dev/shm
        self.hosts = folder / "hosts"
        self.hosts.write_text("127.0.0.1 localhost\n")
        self.pods: dict[str, Pod] = {}
        self._made: list[str] = []  # network namespaces

    def __enter__(self) -> Node:
        self._ip("netns", "add", self.tag)
        self._made.append(self.tag)
        self._ip("-n", self.tag, "link", "set", "lo", "up")
        self._ip("-n", self.tag, "link", "add", "bridge0", "type", "bridge")
        self._ip("-n", self.tag, "address", "add", f"{NETWORK}.1/24", "dev", "bridge0")
        self._ip("-n", self.tag, "link", "set", "bridge0", "up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self.pods):
            self.stop(name)
        for namespace in self._made:
            subprocess.run(["ip", "netns", "delete", namespace], check=False)
        shutil.rmtree(self.memory)

    def start(
        self,
        name: str,
        pod: Mapping[str, Any],  # a pod's spec with one container
        address: int,  # the last byte of its IP
        services: tuple[str, ...] = (),  # names that lead to it
        fields: Mapping[str, str] | None = None,  # of the downward API, beside the IP and the name
        extra: Mapping[str, str] | None = None,  # variables of this machine
    ) -> Pod:
        """Start a pod."""
        (container,) = pod["containers"]
        ip, network = f"{NETWORK}.{address}", f"{self.tag}-{address}"
        self._connect(network, ip, address)
        with self.hosts.open("a") as hosts:
            hosts.write(f"{ip} {' '.join((name, *services))}\n")
        known = {"metadata.name": name, "status.podIP": ip, "spec.nodeName": self.tag, **(fields or {})}
        variables = {"PATH": f"{BIN}:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/tmp", **(extra or {})}
        variables |= {each["name"]: _value(each, known) for each in container.get("env", ())}
        command = [*container.get("command", ()), *container.get("args", ())]
        script = "\n".join(["set -e", *self._mounts(name, pod, container), f"exec {shlex.join(self._as_user(pod, container))} "
                            f"env -i {shlex.join([*map('='.join, variables.items()), *command])}"])  # fmt: skip
        processes = [] if pod.get("hostPID") else ["--pid", "--fork", "--mount-proc", "--kill-child=KILL"]
        log = self.folder / f"{name}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                ["ip", "netns", "exec", network, "unshare", "--mount", "--propagation=private", *processes, "sh", "-c", script],
                stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip
        self.pods[name] = Pod(name, ip, log, process)
        return self.pods[name]

    def stop(self, name: str, number: int = signal.SIGTERM) -> int:
        """End a pod as a kubelet does. Returns the status of its process."""
        pod = self.pods.pop(name)
        os.killpg(pod.process.pid, number)
        try:
            status = pod.process.wait(END_S)
        except subprocess.TimeoutExpired:
            os.killpg(pod.process.pid, signal.SIGKILL)
            status = pod.process.wait()
        address = pod.ip.rsplit(".", 1)[1]
        network = f"{self.tag}-{address}"
        subprocess.run(["ip", "-n", self.tag, "link", "delete", f"pod{address}"], check=False)
        subprocess.run(["ip", "netns", "delete", network], check=False)
        if network in self._made:
            self._made.remove(network)
        return status

    def ask(self, *command: str) -> str:
        """Run a command on the node, outside of all pods, and return what it prints."""
        done = subprocess.run(
            ["ip", "netns", "exec", self.tag, *command], capture_output=True, text=True, timeout=120, check=False
        )
        if done.returncode:
            raise OSError(done.stderr.strip() or f"status {done.returncode}")
        return done.stdout

    def host_path(self, path: str) -> Path:
        """Return the folder of this machine that is a folder of the node."""
        if path.startswith("/dev/shm/"):
            return self.memory / path.removeprefix("/dev/shm/")
        return self.folder / "host" / path.lstrip("/")

    def _connect(self, network: str, ip: str, address: int) -> None:
        self._ip("netns", "add", network)
        self._made.append(network)
        self._ip(
            "-n", self.tag, "link", "add", f"pod{address}", "type", "veth", "peer", "name", "eth0", "netns", network
        )
        self._ip("-n", self.tag, "link", "set", f"pod{address}", "master", "bridge0", "up")
        self._ip("-n", network, "address", "add", f"{ip}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            self._ip("-n", network, "link", "set", device, "up")

    def _mounts(self, name: str, pod: Mapping[str, Any], container: Mapping[str, Any]) -> list[str]:
        volumes = {each["name"]: each for each in pod.get("volumes", ())}
        lines = [f"mount --bind {self.hosts} /etc/hosts"]
        fresh = {"/var/lib"}  # folders that only containers have are made below it
        lines.append("mount -t tmpfs tmpfs /var/lib")
        for mount in container.get("volumeMounts", ()):
            target, volume = mount["mountPath"], volumes[mount["name"]]
            if not target.startswith(tuple(fresh)) and not Path(target).exists():
                parent = str(Path(target).parent)
                lines.append(f"mount -t tmpfs tmpfs {parent}")
                fresh.add(parent)
            lines.append(f"mkdir -p {target}")
            if "hostPath" in volume:
                source = self.host_path(volume["hostPath"]["path"])
                source.mkdir(parents=True, exist_ok=True)
                lines.append(f"mount --bind {source} {target}")
            elif volume["emptyDir"].get("medium") == "Memory":
                size = volume["emptyDir"].get("sizeLimit", "64Mi").removesuffix("i")
                lines.append(f"mount -t tmpfs -o size={size} tmpfs {target}")
            else:
                source = self.folder / "empty" / name / mount["name"]
                source.mkdir(parents=True, exist_ok=True)
                os.chmod(source, 0o777)  # fsGroup
                lines.append(f"mount --bind {source} {target}")
        if all(mount["mountPath"] != "/dev/shm" for mount in container.get("volumeMounts", ())):
            lines.append("mount -t tmpfs -o size=1g tmpfs /dev/shm")  # a pod has 64m; vLLM on CPUs needs more
        if container.get("securityContext", {}).get("readOnlyRootFilesystem"):
            lines.append("mount -o remount,bind,ro /")
        return lines

    def _as_user(self, pod: Mapping[str, Any], container: Mapping[str, Any]) -> list[str]:
        context = {**pod.get("securityContext", {}), **container.get("securityContext", {})}
        user, group = context.get("runAsUser", 0), context.get("runAsGroup", 0)
        keep = "+dac_read_search" if user else ""  # this environment may lie in root's home
        rights = f"-all,{keep}" if keep else "-all"
        command = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", f"--inh-caps={rights}"]
        if context.get("capabilities", {}).get("drop") == ["ALL"]:
            command += [f"--bounding-set={rights}", *([f"--ambient-caps={rights}"] if keep else [])]
        if context.get("allowPrivilegeEscalation") is False:
            command.append("--no-new-privs")
        return command

    @staticmethod
    def _ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)


def _value(variable: Mapping[str, Any], known: Mapping[str, str]) -> str:
    if "valueFrom" not in variable:
        return str(variable.get("value", ""))
    path = variable["valueFrom"]["fieldRef"]["fieldPath"]
    return known.get(path, "")
