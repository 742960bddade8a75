"""The published deployment's pods, as rendered, run as processes: daemon, etcd, engine, gateway, and the page's curl."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvkern.operator.forms import read_kvcache
from kvkern.operator.objects import render
from tests.integrations.vllm.server import build_served_model
from tests.kubernetes.pod_processes import BIN, Node
from tests.operator.manifests import EXAMPLES, ROOT, kvcache
from tests.remote.required_servers import need

MODEL = "deepseek-coder-7b-instruct"
CACHE = "deepseek-coder-7b-kvcache"
NEEDS = (
    "ip",
    "unshare",
    "setpriv",
    "etcd",
    "etcdctl",
    "curl",
)  # requirements/system_packages.sh installs what Debian has
pytestmark = [
    pytest.mark.vllm, pytest.mark.slow, pytest.mark.first, pytest.mark.timeout(900),
    pytest.mark.skipif(os.getuid() != 0, reason="needs root, for namespaces"),
]  # fmt: skip
# What a machine without a GPU needs of vLLM; none of it concerns kvkern. Its blocks are multiples of 32 tokens there.
MACHINE = {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
CHUNK = {"name": "AIBRIX_LLM_KV_CACHE_CHUNK_SIZE", "value": "32"}
BODY = {
    "model": MODEL, "messages": [{"role": "user", "content": " ".join(f"t{i}" for i in range(10, 260))}], "temperature": 0.7,
    "max_tokens": 8,
}  # fmt: skip
CURL = [
    "curl", "-sS", "--fail-with-body", "http://10.77.0.4:8888/v1/chat/completions", "-H", "Content-Type: application/json",
    "-H", "Authorization: XXXXXXXXXXXXXXXXXXXXXXXX", "-d", json.dumps(BODY),
]  # fmt: skip


def eventually(check: Callable[[], Any], what: str, seconds: float = 300.0) -> Any:
    deadline, said = time.monotonic() + seconds, ""
    while time.monotonic() < deadline:
        try:
            if found := check():
                return found
        except OSError as error:
            said = str(error)
        time.sleep(0.5)
    raise AssertionError(f"{what} did not come: {said}")


def pods_of(name: str) -> dict[str, dict[str, Any]]:
    """Return the pods' specs of a KVCache, by the kind of what makes them."""
    manifest = kvcache(name)
    manifest["spec"]["cacheSpec"]["memory"] = "1Gi"  # of which this machine can spare more
    objects = render(read_kvcache(manifest))
    return {
        each["kind"]: each["spec"]["template"]["spec"]
        for each in objects
        if each["kind"] in ("Deployment", "StatefulSet")
    }


def engine_pod(model: str) -> dict[str, Any]:
    """Return the published engine's pod, with a model that is here."""
    deployment = next(yaml.safe_load_all((EXAMPLES / "published_engine.yaml").read_text()))
    pod: dict[str, Any] = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    command = container["command"]
    command[command.index("--model") + 1] = model
    command[command.index("--max-model-len") + 1] = "1024"
    container["env"] = [each for each in container["env"] if each["name"] != CHUNK["name"]] + [CHUNK]
    return pod


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_served_model(tmp_path_factory.mktemp("pods") / "model")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    for program in NEEDS:
        need("pods", program)
    with Node(tmp_path) as made:
        yield made


def start_cache(node: Node) -> dict[str, dict[str, Any]]:
    pods = pods_of("published")
    fields = {"metadata.namespace": "default", "metadata.uid": "1"}
    node.start(
        f"{CACHE}-etcd-0",
        pods["StatefulSet"],
        2,
        (f"{CACHE}-etcd-0.{CACHE}-etcd.default", f"{CACHE}-etcd-service"),
        fields,
    )
    node.start("cache-1", pods["Deployment"], 3, (f"{CACHE}-rpc",), fields)
    return pods


def gateway_pod(folder: Path) -> dict[str, Any]:
    """Return a pod of Envoy with the example's configuration."""
    configuration = (ROOT / "deploy/kubernetes/gateway/envoy.yaml").read_text()
    file = folder / "envoy.yaml"
    file.write_text(configuration)
    command = [
        str(BIN / "envoy"),
        "-c",
        str(file),
        "--concurrency",
        "1",
        "--disable-hot-restart",
        "--log-level",
        "warning",
    ]
    return {"containers": [{"name": "envoy", "image": "envoy", "command": command}]}


def counter(text: str, name: str) -> float:
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


class Load(threading.Thread):
    """Sends the page's request again and again."""

    def __init__(self, node: Node) -> None:
        super().__init__(daemon=True)
        self.node, self.ended = node, threading.Event()
        self.answers, self.failures = 0, list[str]()

    def run(self) -> None:
        while not self.ended.is_set():
            try:
                self.node.ask(*CURL)
                self.answers += 1
            except OSError as error:
                self.failures.append(str(error))


def test_the_published_page(node: Node, model: str, tmp_path: Path) -> None:
    """The page's curl gets an answer, and the second a hit. Cache pod and engine pod are replaced; their successors go on."""
    pods = start_cache(node)
    eventually(lambda: json.loads(node.ask("curl", "-sSf", "http://10.77.0.3:9600/livez")), "the daemon")
    assert json.loads(node.ask("curl", "-sSf", "http://10.77.0.2:2379/health"))["health"] in ("true", True)
    node.start("engine", engine_pod(model), 5, (f"{MODEL}.default.svc",), extra=MACHINE)
    node.start("gateway", gateway_pod(tmp_path), 4)

    def answered() -> Any:
        return json.loads(node.ask(*CURL))

    def figures(address: int) -> str:
        return node.ask("curl", "-sSf", f"http://10.77.0.{address}:8080/metrics")

    def grown(address: int, name: str) -> float:
        answered()  # what a step counts is told in a later one
        return counter(figures(address), name)

    first = eventually(answered, "an answer", 600)
    assert first["usage"]["prompt_tokens"] >= 250
    assert first["choices"][0]["message"]["role"] == "assistant"
    assert eventually(lambda: grown(5, "kvkern:hit_tokens_total"), "a hit, in the engine's own blocks", 120)
    assert "vllm:cache_service_total_tokens" in figures(5)
    stored = eventually(lambda: grown(3, "kvkern_stored_chunks_total"), "stored chunks", 120)

    # The cache pod is replaced under load: no request fails, and the next one on the node serves the same chunks.
    load = Load(node)
    load.start()
    eventually(lambda: load.answers > 2, "load")
    assert node.stop("cache-1") == 0
    during = load.answers
    eventually(lambda: load.answers > during + 2, "answers without a daemon")
    node.start("cache-2", pods["Deployment"], 6, (), {"metadata.namespace": "default", "metadata.uid": "2"})
    eventually(lambda: node.ask("curl", "-sSf", "http://10.77.0.6:9600/readyz"), "the next daemon")
    after = load.answers
    eventually(lambda: load.answers > after + 2, "answers")
    load.ended.set()
    load.join(60)
    assert not load.failures
    assert counter(figures(6), 'kvkern_arena_slots{state="ready"}') >= stored > 0

    # The engine pod is replaced: its successor loads what it has never computed.
    assert node.stop("engine") == 0
    node.start("engine-2", engine_pod(model), 5, (), extra=MACHINE)
    eventually(answered, "an answer of the next engine", 600)
    assert eventually(
        lambda: grown(5, 'kvkern:hit_tokens_total{engine="0",model_name="' + MODEL + '",tier="dram"}'), "a load", 120
    )


def test_an_etcd_of_three_members_takes_a_lost_one_back(node: Node) -> None:
    """A member whose data is gone joins again under its name, and what was written is there."""
    manifest = kvcache("published")
    manifest["spec"]["etcdReplicas"] = 3
    (pod,) = (
        each["spec"]["template"]["spec"] for each in render(read_kvcache(manifest)) if each["kind"] == "StatefulSet"
    )

    def start(number: int, address: int) -> None:
        node.start(f"{CACHE}-etcd-{number}", pod, address, (f"{CACHE}-etcd-{number}.{CACHE}-etcd.default",))

    def etcdctl(address: int, *command: str) -> str:
        endpoint = f"--endpoints=http://10.77.0.{address}:2379"
        return node.ask("env", "ETCDCTL_API=3", "etcdctl", endpoint, "--command-timeout=5s", *command)

    for number in range(3):
        start(number, 10 + number)
    eventually(lambda: etcdctl(10, "put", "key", "value"), "a cluster", 60)
    name = f"{CACHE}-etcd-2"
    node.stop(name, signal.SIGKILL)
    shutil.rmtree(node.folder / "empty" / name)
    start(2, 12)
    try:
        eventually(lambda: "value" in etcdctl(12, "get", "key"), "the member's own copy", 180)
    except AssertionError as error:
        raise AssertionError(f"{error}\nIts log ends:\n{node.pods[name].output[-3000:]}") from None
    members = etcdctl(10, "member", "list").splitlines()
    assert len(members) == 3
    assert all(", started, " in member for member in members)


def test_an_etcd_shrinks_from_three_members_to_one(node: Node) -> None:
    """The one that is left has its data, and needs the others no more."""

    def pod_of(members: int) -> dict[str, Any]:
        manifest = kvcache("published")
        manifest["spec"]["etcdReplicas"] = members
        objects = render(read_kvcache(manifest))
        (pod,) = (each["spec"]["template"]["spec"] for each in objects if each["kind"] == "StatefulSet")
        return pod

    def start(number: int, pod: dict[str, Any]) -> None:
        node.start(f"{CACHE}-etcd-{number}", pod, 10 + number, (f"{CACHE}-etcd-{number}.{CACHE}-etcd.default",))

    etcdctl = ("etcdctl", "--endpoints=http://10.77.0.10:2379", "--command-timeout=5s")
    three = pod_of(3)
    for number in range(3):
        start(number, three)
    eventually(lambda: node.ask(*etcdctl, "put", "key", "value"), "a cluster", 60)
    eventually(lambda: "value" in node.ask(*etcdctl, "get", "key", "--consistency=s"), "the first member's copy", 60)
    for number in (2, 1, 0):
        node.stop(f"{CACHE}-etcd-{number}")
    start(0, pod_of(1))
    eventually(lambda: "value" in node.ask(*etcdctl, "get", "key"), "the value", 60)
    assert len(node.ask(*etcdctl, "member", "list").splitlines()) == 1


def test_an_etcd_grows_from_one_member_to_three(node: Node) -> None:
    """The first goes on with its data, and the others join it."""
    for number, members in enumerate((1, 3, 3)):
        manifest = kvcache("published")
        manifest["spec"]["etcdReplicas"] = members
        objects = render(read_kvcache(manifest))
        (pod,) = (each["spec"]["template"]["spec"] for each in objects if each["kind"] == "StatefulSet")
        names = (f"{CACHE}-etcd-{number}.{CACHE}-etcd.default",)
        node.start(f"{CACHE}-etcd-{number}", pod, 10 + number, names)
        endpoint = f"--endpoints=http://10.77.0.{10 + number}:2379"
        if number == 0:
            eventually(
                lambda endpoint=endpoint: node.ask("etcdctl", endpoint, "--command-timeout=5s", "put", "key", "value"),
                "a write",
                60,
            )
        eventually(lambda endpoint=endpoint: "value" in node.ask("etcdctl", endpoint, "get", "key"), "the value", 120)
