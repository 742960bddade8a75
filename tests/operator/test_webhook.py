"""The webhook over HTTPS: an operator's process with the rights that its files give it, pods through the API server double."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from kvkern.operator.api import Api, ApiError
from kvkern.operator.crds import crd
from kvkern.operator.names import OWN_GROUP, PUBLISHED_GROUP
from kvkern.operator.webhook.certificates import Keys, Lifetimes, Pair, issue
from kvkern.operator.webhook.keeper import Keeper
from kvkern.operator.webhook.registration import Place, bundle_of
from tests.operator.api_server import ApiServer, ConnectionLost, running_api_server
from tests.operator.conftest import own
from tests.operator.operator_process import start_operator
from tests.operator.test_install_files import kustomized
from tests.operator.test_webhook_inject import pod

SYSTEM, SERVICE = "kvkern-system", "kvkern-operator-webhook"
PLACE = Place(SERVICE, SYSTEM)
HOOKS = "mutatingwebhookconfigurations.admissionregistration.k8s.io"
SKIPPED, INJECTED = "kvkern.io/skipped", "kvkern.io/injected"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_for(holds: Callable[[], Any], what: str, limit_s: float = 60.0) -> Any:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if found := holds():
            return found
        time.sleep(0.1)
    raise AssertionError(f"{what}: not within {limit_s} s")


@pytest.fixture
def installed() -> Iterator[ApiServer]:
    """An API server on which the overlay is installed, but for what the operator runs in."""
    with running_api_server() as server:
        for each in kustomized("overlays/webhook"):
            if each["kind"] not in ("Deployment", "CustomResourceDefinition"):
                server.store.create(each)
        for group in (OWN_GROUP, PUBLISHED_GROUP):
            server.store.create(crd(group))
        yield server


class Operator:
    """A process. Its port answers once there is a certificate."""

    def __init__(self, server: ApiServer, folder: Path) -> None:
        self.server, self.port, self.log = server, free_port(), folder / f"operator-{time.monotonic_ns()}.log"
        variables = {
            "POD_NAMESPACE": SYSTEM,
            "KVKERN_OPERATOR_WEBHOOK": f"127.0.0.1:{self.port}",
            "KVKERN_OPERATOR_ENGINE_IMAGE": "kvkern-engine:1",
        }
        self.process = start_operator(server.kubeconfig_of(SYSTEM, "kvkern-operator"), self.log, **variables)

    def ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.ask("GET", "/readyz")[0] == 200
        except OSError:
            return False

    def ask(self, method: str, path: str, body: bytes | None = None, bundle: bytes | None = None) -> tuple[int, bytes]:
        """Make a call as the API server does. `bundle`: CAs to trust; left out: those of the registration."""
        bundle = bundle_of(self.server.store.find(HOOKS, PLACE.registration)) if bundle is None else bundle
        trusting = ssl.create_default_context(cadata=bundle.decode() or None)
        with (
            socket.create_connection(("127.0.0.1", self.port), timeout=10) as plain,
            trusting.wrap_socket(plain, server_hostname=PLACE.dns_names[0]) as secure,
        ):
            connection = http.client.HTTPConnection("localhost")
            connection.sock = secure
            connection.request(method, path, body)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def times(self, body: bytes, count: int) -> list[float]:
        """Return how long each of many calls over one connection takes."""
        bundle = bundle_of(self.server.store.find(HOOKS, PLACE.registration))
        context = ssl.create_default_context(cadata=bundle.decode())
        context.check_hostname = False
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, context=context)
        found = []
        for _ in range(count):
            began_s = time.perf_counter()
            connection.request("POST", "/inject", body)
            assert b"patch" in connection.getresponse().read()
            found.append(time.perf_counter() - began_s)
        connection.close()
        return found

    def end(self) -> None:
        """End it as a kubelet does. It takes kopf five seconds."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(20) == 0, self.log.read_text()


@contextlib.contextmanager
def operating(server: ApiServer, folder: Path, gently: bool = False) -> Iterator[Operator]:
    operator = Operator(server, folder)
    server.route_service(SYSTEM, SERVICE, ("127.0.0.1", operator.port))
    try:
        wait_for(operator.ready, "the webhook is ready")
        yield operator
        assert "Traceback" not in operator.log.read_text(), operator.log.read_text()
        if gently:
            operator.end()
    finally:
        operator.process.kill()
        operator.process.wait()


def annotations(server: ApiServer, name: str, **more: str) -> dict[str, str]:
    """Create a pod, and return the annotations that it has then."""
    manifest = pod(**more)
    manifest["metadata"]["name"] = name
    found: dict[str, str] = server.store.create(manifest)["metadata"].get("annotations", {})
    return found


def review(**request: Any) -> bytes:
    request = {
        "uid": "u",
        "kind": {"kind": "Pod"},
        "operation": "CREATE",
        "namespace": "default",
        "object": pod(),
    } | request
    return json.dumps({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}).encode()


def response(answer: tuple[int, bytes]) -> dict[str, Any]:
    assert answer[0] == 200, answer
    found: dict[str, Any] = json.loads(answer[1])["response"]
    assert (found["allowed"], found["uid"]) == (True, "u")
    return found


@pytest.mark.slow
def test_pods_through_an_operator(installed: ApiServer, tmp_path: Path) -> None:
    store = installed.store
    with operating(installed, tmp_path, gently=True) as operator:
        assert annotations(installed, "early") == {SKIPPED: "no-kvcache"}
        store.create(own())
        wait_for(lambda: annotations(installed, f"p{time.monotonic_ns()}").get(INJECTED), "the KVCache is known")
        live = store.get("pods", "early", "default")
        live["metadata"]["labels"]["other"] = "x"
        assert store.update(live)["metadata"]["annotations"] == {SKIPPED: "no-kvcache"}

        manifest = pod()
        manifest["metadata"]["name"] = "engine"
        found = store.create(manifest)
        (engine,) = found["spec"]["containers"]
        assert {each["name"] for each in engine["env"]} >= {"KVKERN_SOCKET", "VLLM_USE_VINEYARD_CACHE"}
        assert any(each["mountPath"] == "/run/kvkern" for each in engine["volumeMounts"])

        manifest = pod()
        manifest["metadata"] |= {"name": "plain", "labels": {"model.aibrix.ai/name": "coder"}}
        assert "annotations" not in store.create(manifest)["metadata"]
        manifest["metadata"] |= {"name": "system", "namespace": SYSTEM, "labels": {"kvkern.io/inject": "true"}}
        assert "annotations" not in store.create(manifest)["metadata"]

        store.delete("kvcaches.kvkern.io", "cache", "default")
        wait_for(lambda: SKIPPED in annotations(installed, f"p{time.monotonic_ns()}"), "the KVCache is forgotten")
        secret = store.get("secrets", SERVICE, SYSTEM)
        assert "kvkern.io/last-written" not in secret["metadata"].get("annotations", {})
        assert b"PRIVATE KEY" not in operator.log.read_bytes()
    assert annotations(installed, "late") == {}
    assert store.admission.calls[-1][2].startswith("failed")


@pytest.mark.slow
def test_what_is_no_review(installed: ApiServer, tmp_path: Path) -> None:
    with operating(installed, tmp_path) as operator:
        for body in (
            b"",
            b"{",
            b"[]",
            b"{}",
            b"\xff",
            b"[" * 100_000,
            review().replace(b"/v1", b"/v2"),
            review(uid=None),
        ):
            assert operator.ask("POST", "/inject", body)[0] == 400
        assert operator.ask("POST", "/inject", b"x" * ((3 << 20) + 1))[0] == 413
        assert operator.ask("POST", "/inject", b"x" * (3 << 20))[0] == 400
        assert operator.ask("GET", "/inject")[0] == 405
        assert operator.ask("POST", "/other")[0] == 404
        for harmless in ({"operation": "UPDATE"}, {"object": None}, {"kind": {"kind": "Service"}}, {"object": {}}):
            assert response(operator.ask("POST", "/inject", review(**harmless))).keys() == {"uid", "allowed"}
        odd = response(operator.ask("POST", "/inject", review(object={"spec": {"containers": "x"}})))
        assert odd["warnings"][0].startswith("kvkern: the pod is not changed")
        asked = response(operator.ask("POST", "/inject", review()))
        assert asked["warnings"][0].startswith("kvkern: no-kvcache: ")
        assert max(map(len, asked["warnings"])) <= 250


@pytest.mark.slow
def test_it_answers_fast_and_without_an_api_server(installed: ApiServer, tmp_path: Path) -> None:
    installed.store.create(own())
    with operating(installed, tmp_path) as operator:
        for verb, resource in (("get", "secrets"), ("list", "kvcaches"), ("get", "leases"), ("update", "leases")):
            installed.fail_next(verb, resource, "close before", times=10_000)
        installed.break_watches()
        took = sorted(operator.times(review(), 200))
        assert (took[0] < 0.03, took[190] < 0.5) == (True, True), took
        print(f"webhook, one connection: p50 {took[100] * 1e3:.1f} ms, p95 {took[190] * 1e3:.1f} ms")
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: operator.ask("POST", "/inject", review()), range(40)))
        assert all("patch" in response(each) for each in answers)


@pytest.mark.slow
def test_an_expired_certificate_is_replaced_at_the_start(installed: ApiServer, tmp_path: Path) -> None:
    old = Keys(issue(PLACE.dns_names, datetime.now(UTC) - timedelta(days=100), timedelta(days=90)))
    metadata = {"name": SERVICE, "namespace": SYSTEM}
    installed.store.create({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": old.to_data()})
    with operating(installed, tmp_path):
        data = installed.store.get("secrets", SERVICE, SYSTEM)["data"]
        assert Keys.from_data(data).current != old.current
        assert annotations(installed, "engine") == {SKIPPED: "no-kvcache"}


# -- the keeper, with a clock that the test sets ---------------------------------------------------------------------------


class Replica:
    """The keeper of one replica."""

    def __init__(self, server: ApiServer, api: Api, leads: bool) -> None:
        self.now, self.leads, self.serves = datetime.now(UTC), leads, [Pair(b"", b"", b"")]
        self._keeper = Keeper(
            api, PLACE, lambda: self.leads, self.serves.append, lambda: self.now,
            Lifetimes(timedelta(days=9), timedelta(days=6), timedelta(hours=1)),
        )  # fmt: skip
        self.step = self._keeper.step


def test_two_replicas_turn_certificates_without_a_gap(installed: ApiServer) -> None:
    async def run() -> None:
        path = str(installed.kubeconfig_of(SYSTEM, "kvkern-operator"))
        one, two = [Replica(installed, await Api.connect(path), leads) for leads in (True, False)]
        await two.step()
        assert len(two.serves) == 1  # nothing to serve yet, and it may write nothing
        used: list[Pair] = []
        for hour in range(0, 24 * 20, 2):
            for replica in (one, two):
                replica.now = datetime.now(UTC) + timedelta(hours=hour)
                await replica.step()
                bundle = bundle_of(installed.store.find(HOOKS, PLACE.registration))
                for serving in (one, two):
                    assert serving.serves[-1].authority in bundle or serving.serves[-1].certificate == b""
            if two.serves[-1] not in used:
                used.append(two.serves[-1])
            if hour == 24 * 10:
                one.leads, two.leads = False, True
        assert len(used) == 4
        quiet = len(installed.writes)
        await two.step()
        assert len(installed.writes) == quiet

    asyncio.run(run())


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_step_that_ends_at_a_write_goes_on(installed: ApiServer, when: Any, number: int) -> None:
    async def run() -> None:
        one = Replica(installed, await Api.connect(str(installed.kubeconfig)), True)

        def crash(at: int, _verb: str, _object: Any) -> None:
            if at >= number:
                raise ConnectionLost

        stop = installed.on_write(crash, when)
        with pytest.raises(ApiError):
            await one.step()
        stop()
        await one.step()
        assert one.serves[-1].authority == bundle_of(installed.store.find(HOOKS, PLACE.registration))
        first = one.serves[1].authority
        assert first == one.serves[-1].authority or (when, number) == ("before", 0)

    asyncio.run(run())


def test_a_changed_registration_is_put_right(installed: ApiServer) -> None:
    async def run() -> None:
        one = Replica(installed, await Api.connect(str(installed.kubeconfig_of(SYSTEM, "kvkern-operator"))), True)
        await one.step()
        live = installed.store.get(HOOKS, PLACE.registration)
        (hook,) = live["webhooks"]
        assert (hook["failurePolicy"], hook["timeoutSeconds"], hook["reinvocationPolicy"]) == ("Ignore", 5, "IfNeeded")
        hook |= {"failurePolicy": "Fail", "namespaceSelector": {}}
        installed.store.update(live)
        await one.step()
        assert installed.store.get(HOOKS, PLACE.registration)["webhooks"][0]["failurePolicy"] == "Ignore"
        installed.store.delete(HOOKS, PLACE.registration)
        installed.store.delete("secrets", SERVICE, SYSTEM)
        await one.step()
        assert one.serves[-1].authority == bundle_of(installed.store.find(HOOKS, PLACE.registration))

    asyncio.run(run())
