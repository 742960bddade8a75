"""Objects for older versions of Kubernetes, without a cluster."""

from __future__ import annotations

import pytest

from kvkern.errors import ConfigError
from kvkern.operator.forms import read_kvcache
from kvkern.operator.objects import render
from kvkern.operator.objects.old_versions import for_version
from tests.operator.manifests import kvcache

MANIFEST = kvcache("published")
MANIFEST["spec"]["metadata"] = {"etcd": {"storage": {"size": "1Gi"}}}
OBJECTS = render(read_kvcache(MANIFEST))


@pytest.mark.parametrize("version", ["", "1.27", "v1.37.2"])
def test_later_versions_get_everything(version: str) -> None:
    assert for_version(OBJECTS, version) == OBJECTS


def test_what_1_20_does_not_know_is_left_out() -> None:
    text = str(for_version(OBJECTS, "1.20"))
    for name in ("internalTrafficPolicy", "persistentVolumeClaimRetentionPolicy", "'policy/v1'"):
        assert name in str(OBJECTS)
        assert name not in text
    assert "policy/v1beta1" in text
    assert len(for_version(OBJECTS, "1.20")) == len(OBJECTS)


@pytest.mark.parametrize("version", ["1.19", "1", "latest", "1.x", "2.", "1.20\n", "1." + "9" * 50])
def test_what_is_no_version(version: str) -> None:
    with pytest.raises(ConfigError, match=r"expected 1\.20 or later"):
        for_version(OBJECTS, version)
