"""The KVCaches that the webhook knows."""

from __future__ import annotations

from typing import Any

from kvkern.operator.kinds import OWN, PUBLISHED
from kvkern.operator.webhook.known import KnownCaches
from tests.operator.conftest import own
from tests.operator.manifests import kvcache


def names(known: KnownCaches, namespace: str = "default") -> list[str]:
    return sorted(each.name for each in known.of(namespace))


def ending(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest | {"metadata": manifest["metadata"] | {"deletionTimestamp": "2026-01-01T00:00:00Z"}}


def test_it_follows_what_a_watch_reports() -> None:
    known = KnownCaches()
    assert names(known) == []
    known.changed(OWN, own("a"), gone=False)
    known.changed(PUBLISHED, kvcache("published"), gone=False)
    assert names(known) == ["a", "deepseek-coder-7b-kvcache"]
    assert names(known, "other") == []
    known.changed(OWN, own("a", workload={"name": "new"}), gone=False)
    assert [each.workload for each in known.of("default") if each.name == "a"] == ["new"]
    known.changed(OWN, own("a"), gone=True)
    known.changed(OWN, own("never"), gone=True)
    known.changed(PUBLISHED, ending(kvcache("published")), gone=False)
    assert names(known) == []


def test_a_list_replaces_what_was_known_of_its_kind() -> None:
    known = KnownCaches()
    known.changed(OWN, own("old"), gone=False)
    known.changed(PUBLISHED, kvcache("published"), gone=False)
    known.listed(OWN, [own("b"), ending(own("c")), own("d") | {"apiVersion": "kvkern.io/v9"}])
    assert names(known) == ["b", "deepseek-coder-7b-kvcache"]
    known.listed(OWN, [])
    assert names(known) == ["deepseek-coder-7b-kvcache"]


def test_images_are_judged_as_the_operator_does() -> None:
    manifest = kvcache("published")
    manifest["spec"]["cacheSpec"]["image"] = "aibrix/vineyardd:20241120"
    for replacement, valid in (("", False), ("kvkern:1", True)):
        known = KnownCaches(replacement=replacement)
        known.listed(PUBLISHED, [manifest])
        assert [not each.errors for each in known.of("default")] == [valid]
