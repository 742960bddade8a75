"""The double of the Kubernetes API server over its socket: discovery, verbs, watches and faults."""

from __future__ import annotations

import http.client
import threading
import time
from typing import Any, Literal

import pytest

from . import ApiServer, ConnectionLost
from .client import (
    DEFINITIONS,
    DEPLOYMENTS,
    MAPS,
    SERVICES,
    WIDGETS,
    Client,
    config_map,
    definition,
    deployment,
    exists,
    pod,
    widget,
)

# Discovery


def test_discovery_lists_resources_with_their_subresources(call: Client) -> None:
    assert call.ok("GET", "/version")["gitVersion"] == "v1.30.0"
    assert call.ok("GET", "/api")["versions"] == ["v1"]
    core = {r["name"]: r for r in call.ok("GET", "/api/v1")["resources"]}
    assert {"pods", "pods/status", "pods/eviction", "nodes/status", "secrets"} <= core.keys()
    assert (core["nodes"]["namespaced"], core["pods"]["shortNames"]) == (False, ["po"])
    groups = {g["name"] for g in call.ok("GET", "/apis")["groups"]}
    assert {"apps", "policy", "networking.k8s.io", "coordination.k8s.io", "apiextensions.k8s.io"} <= groups
    assert call("GET", "/apis/example.com/v1")[0] == 404


def test_a_definition_serves_its_group_at_once(call: Client) -> None:
    made = call.ok("POST", DEFINITIONS, definition())
    assert {c["type"]: c["status"] for c in made["status"]["conditions"]} == {
        "NamesAccepted": "True",
        "Established": "True",
    }
    names = [r["name"] for r in call.ok("GET", "/apis/example.com/v1")["resources"]]
    assert names == ["widgets", "widgets/status"]
    call.ok("POST", WIDGETS, widget())
    call.ok("DELETE", f"{DEFINITIONS}/widgets.example.com")
    assert call("GET", WIDGETS)[0] == 404
    assert call("GET", "/apis/example.com/v1")[0] == 404


# Metadata and verbs


def test_create_sets_metadata_and_refuses_a_second(call: Client) -> None:
    made = call.ok("POST", DEPLOYMENTS, deployment())
    meta = made["metadata"]
    assert (meta["generation"], meta["namespace"], len(meta["uid"])) == (1, "default", 36)
    code, status = call("POST", DEPLOYMENTS, deployment())
    assert (code, status["reason"], status["details"]["kind"]) == (409, "AlreadyExists", "deployments")
    assert status["message"] == 'deployments.apps "d" already exists'
    assert call("POST", DEPLOYMENTS, {**deployment("e"), "kind": "Pod"})[0] == 400
    assert call("POST", "/api/v1/namespaces/none/pods", pod())[1]["message"] == 'namespaces "none" not found'


def test_generate_name_makes_distinct_names_of(call: Client) -> None:
    body = {"metadata": {"generateName": "a-"}}
    names = {call.ok("POST", MAPS, body)["metadata"]["name"] for _ in range(5)}
    assert len(names) == 5
    assert all(len(name) == 7 for name in names)


def test_a_stale_revision_is_a_conflict(call: Client) -> None:
    old = call.ok("POST", MAPS, config_map())
    new = call.ok("PUT", f"{MAPS}/a", {**old, "data": {"a": "c"}})
    assert int(new["metadata"]["resourceVersion"]) > int(old["metadata"]["resourceVersion"])
    code, status = call("PUT", f"{MAPS}/a", {**old, "data": {"a": "d"}})
    assert (code, status["reason"]) == (409, "Conflict")
    assert call.ok("PUT", f"{MAPS}/a", config_map())["data"] == {"a": "b"}  # without a revision
    stale = {"metadata": {"resourceVersion": old["metadata"]["resourceVersion"]}, "data": {"a": "e"}}
    assert call("PATCH", f"{MAPS}/a", stale, "application/merge-patch+json")[0] == 409


def test_an_update_without_a_change_makes_no_revision(call: Client, server: ApiServer) -> None:
    old = call.ok("POST", DEPLOYMENTS, deployment())
    revision = server.store.objects.revision
    assert call.ok("PUT", f"{DEPLOYMENTS}/d", old)["metadata"]["resourceVersion"] == old["metadata"]["resourceVersion"]
    assert call.ok("PUT", f"{DEPLOYMENTS}/d", deployment())["metadata"]["generation"] == 1
    assert server.store.objects.revision == revision


def test_dry_run_writes_nothing(call: Client) -> None:
    assert call.ok("POST", SERVICES, {"metadata": {"name": "s"}, "spec": {"ports": [{"port": 80}]}}, dryRun="All")[
        "spec"
    ]["clusterIP"]
    assert call("GET", f"{SERVICES}/s")[0] == 404
    call.ok("POST", MAPS, config_map())
    assert call.merge(f"{MAPS}/a", {"data": {"a": "c"}}, dryRun="All")["data"] == {"a": "c"}
    call.ok("DELETE", f"{MAPS}/a", dryRun="All")
    assert call.ok("GET", f"{MAPS}/a")["data"] == {"a": "b"}


def names_of(found: Any) -> list[str]:
    return [obj["metadata"]["name"] for obj in found["items"]]


def test_lists_select_and_page(call: Client) -> None:
    for i in range(5):
        call.ok("POST", MAPS, config_map(f"m{i}", labels={"n": str(i), "odd": str(i % 2)}))
    assert names_of(call.ok("GET", MAPS, labelSelector="odd=1")) == ["m1", "m3"]
    assert names_of(call.ok("GET", MAPS, labelSelector="n in (0,4),odd!=1")) == ["m0", "m4"]
    assert names_of(call.ok("GET", MAPS, labelSelector="!n")) == []
    assert names_of(call.ok("GET", "/api/v1/configmaps", fieldSelector="metadata.name=m2")) == ["m2"]
    assert call("GET", MAPS, fieldSelector="spec.size=1")[0] == 400
    first = call.ok("GET", MAPS, limit=2)
    call.ok("DELETE", f"{MAPS}/m4")
    second = call.ok("GET", MAPS, limit=2, **{"continue": first["metadata"]["continue"]})
    third = call.ok("GET", MAPS, limit=2, **{"continue": second["metadata"]["continue"]})
    assert names_of(first) + names_of(second) + names_of(third) == ["m0", "m1", "m2", "m3", "m4"]  # of one moment
    assert "continue" not in third["metadata"]
    assert "kind" not in first["items"][0]
    call.server.compact()
    again = call.ok("GET", MAPS, limit=2)
    call.server.compact()
    assert call("GET", MAPS, **{"continue": again["metadata"]["continue"]})[0] == 410


# Watches


def test_a_watch_replays_from_a_revision_and_knows_what_left_the_selector(call: Client) -> None:
    call.ok("POST", MAPS, config_map("a", labels={"x": "1"}))
    revision = call.ok("GET", MAPS)["metadata"]["resourceVersion"]
    call.merge(f"{MAPS}/a", {"data": {"a": "c"}})
    call.merge(f"{MAPS}/a", {"metadata": {"labels": {"x": "2"}}})
    call.merge(f"{MAPS}/a", {"metadata": {"labels": {"x": "1"}}})
    call.ok("DELETE", f"{MAPS}/a")
    events = call.watch(MAPS, 4, resourceVersion=revision, labelSelector="x=1")
    assert [e["type"] for e in events] == ["MODIFIED", "DELETED", "ADDED", "DELETED"]
    revisions = [int(e["object"]["metadata"]["resourceVersion"]) for e in events]
    assert revisions == sorted(revisions)
    assert revisions[0] > int(revision)


def test_a_watch_shows_what_happens_meanwhile(call: Client) -> None:
    call.ok("POST", MAPS, config_map("a"))
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.extend(call.watch(MAPS, 2)))
    thread.start()
    deadline = time.monotonic() + 5
    while not call.server.store.objects.listeners and time.monotonic() < deadline:
        time.sleep(0.01)
    call.ok("POST", MAPS, config_map("b"))
    thread.join(10)
    assert [(e["type"], e["object"]["metadata"]["name"]) for e in seen] == [("ADDED", "a"), ("ADDED", "b")]


def test_bookmarks_timeouts_and_lost_revisions(call: Client) -> None:
    call.server.watch_interval_s = 0.05
    call.ok("POST", MAPS, config_map("a"))
    revision = call.ok("GET", MAPS)["metadata"]["resourceVersion"]
    bookmark = call.watch(MAPS, 1, resourceVersion=revision, allowWatchBookmarks="true")[0]
    assert (bookmark["type"], bookmark["object"]["metadata"]["resourceVersion"]) == ("BOOKMARK", revision)
    assert call.watch(MAPS, 1, resourceVersion=revision, timeoutSeconds=0.1) == []
    call.server.compact()
    lost = call.watch(MAPS, 2, resourceVersion=revision)
    assert [(e["type"], e["object"]["code"], e["object"]["reason"]) for e in lost] == [("ERROR", 410, "Expired")]


# Faults


@pytest.mark.parametrize(
    ("status", "reason"),
    [(409, "Conflict"), (429, "TooManyRequests"), (500, "InternalError"), (503, "ServiceUnavailable")],
)
def test_faults_answer_instead(call: Client, status: int, reason: str) -> None:
    call.server.fail_next("create", "configmaps", status, times=2, retry_after_s=3)
    for _ in range(2):
        code, body = call("POST", MAPS, config_map())
        assert (code, body["reason"]) == (status, reason)
        assert call.headers.get("Retry-After") == ("3" if status in (429, 503) else None)
    call.ok("POST", MAPS, config_map())
    assert call.server.requests["create", "configmaps"] == 3
    assert [(w.verb, w.resource, w.name) for w in call.server.writes] == [("create", "configmaps", "a")]


def test_connections_close_before_and_after_the_write(call: Client) -> None:
    cases: list[tuple[Literal["close before", "close after"], bool]] = [("close before", False), ("close after", True)]
    for when, written in cases:
        call.server.fail_next("create", "configmaps", when)
        with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
            call("POST", MAPS, config_map())
        assert exists(call, "a") is written


def test_callbacks_at_writes(call: Client) -> None:
    seen: list[tuple[str, int, str, str]] = []
    call.server.on_write(
        lambda n, verb, obj: seen.append(("before", n, verb, obj["metadata"]["name"])), "before", "tester"
    )
    call.server.on_write(
        lambda n, verb, obj: seen.append(("after", n, verb, obj["metadata"]["name"])), "after", "tester"
    )
    call.ok("POST", MAPS, config_map())
    assert call("POST", MAPS, config_map())[0] == 409  # no write, so no callback
    Client(call.server, "other/1").ok("POST", MAPS, config_map("b"))
    assert seen == [("before", 0, "create", "a"), ("after", 0, "create", "a")]
    assert [w.user_agent for w in call.server.writes] == ["tester/1", "other/1"]

    def prevent(number: int, verb: str, obj: Any) -> None:
        raise ConnectionLost

    remove = call.server.on_write(prevent, "before")
    with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
        call("POST", MAPS, config_map("c"))
    remove()
    assert not exists(call, "c")


def test_watches_break(call: Client) -> None:
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(_events_or_error(call)))
    thread.start()
    deadline = time.monotonic() + 5
    while not call.server.break_watches() and time.monotonic() < deadline:
        time.sleep(0.01)
    thread.join(10)
    assert time.monotonic() < deadline - 1  # the watch itself would have taken five seconds
    assert len(seen) == 1
    assert seen[0] in ([], "broken")


def _events_or_error(call: Client) -> Any:
    try:
        return call.watch(MAPS, 1)
    except (http.client.HTTPException, OSError):
        return "broken"
