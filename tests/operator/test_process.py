"""The operator as a process: whose KVCaches it looks after, that it ends, and that it sees what a broken watch has missed."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from kvkern.operator.crds import MANAGED_ANNOTATION
from tests.operator.conftest import Cluster, own
from tests.operator.manifests import kvcache
from tests.operator.operator_process import running_operator

PATIENCE_S = 60.0
PUBLISHED = "deepseek-coder-7b-kvcache"
pytestmark = pytest.mark.slow


def operator(cluster: Cluster, log: Path, *options: str) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """Run `kvkern operator run`."""
    return running_operator(cluster.server.kubeconfig, log, "--lease-namespace", "default", *options)


def eventually(check: Callable[[], Any], log: Path) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if found := check():
            return found
        time.sleep(0.1)
    raise AssertionError(f"it did not come; the operator said: {log.read_text()[-2000:]}")


def test_another_programs_kvcaches_are_left_alone(cluster: Cluster, tmp_path: Path) -> None:
    """Their definition has no annotation of kvkern's. KVCaches of its own kind are looked after; the others only if told."""
    log, store = tmp_path / "log", cluster.server.store
    theirs = store.get("customresourcedefinitions.apiextensions.k8s.io", "kvcaches.orchestration.aibrix.ai")
    del theirs["metadata"]["annotations"][MANAGED_ANNOTATION]
    store.update(theirs)
    cluster.make(kvcache("published"))
    cluster.make(own())
    with operator(cluster, log):
        eventually(lambda: ("Deployment", "cache") in cluster.objects(), log)
        eventually(lambda: "another program's here" in log.read_text(), log)
        assert ("Deployment", PUBLISHED) not in cluster.objects()
        assert "status" not in cluster.kvcache(PUBLISHED, own=False)
    with operator(cluster, log, "--take-over"):
        eventually(lambda: ("Deployment", PUBLISHED) in cluster.objects(), log)


def test_broken_watches_and_forgotten_revisions(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with operator(cluster, log):
        cluster.make(own("first"))
        eventually(lambda: ("Deployment", "first") in cluster.objects(), log)
        for number in range(3):
            cluster.server.break_watches()
            cluster.server.compact()
            cluster.make(own(f"after-{number}"))
            eventually(lambda number=number: ("Deployment", f"after-{number}") in cluster.objects(), log)


def test_a_change_of_state_is_an_event(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with operator(cluster, log):
        cluster.make(own(options={"quota": ["nonsense"]}))
        (event,) = eventually(lambda: cluster.server.store.list("events", "default"), log)
        assert (event["reason"], event["type"]) == ("Invalid", "Warning")
        assert "quota" in event["message"]
        assert event["involvedObject"]["name"] == "cache"
