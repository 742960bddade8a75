"""What a KVCache becomes: golden files, and every object against the schemas of Kubernetes 1.27 to 1.37."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from kvkern.operator.crds import crd
from kvkern.operator.forms import read_kvcache
from kvkern.operator.names import OWN_GROUP, PUBLISHED_GROUP
from kvkern.operator.objects import Cluster, render
from tests.operator.manifests import EXAMPLES, FILES, GOLDEN, kvcache
from tests.operator.write_golden import golden_text

VERSIONS = [f"1.{minor}" for minor in range(27, 38)]
MAX_APPLY_NBYTES = 262_144  # of the annotation in which client-side apply keeps an object
STRANGERS = ("monitoring.coreos.com/v1",)  # kinds that Kubernetes itself does not have


def objects(name: str) -> list[dict[str, Any]]:
    return render(read_kvcache(kvcache(name)), Cluster(monitors=True))


@pytest.mark.parametrize("name", FILES)
def test_golden(name: str) -> None:
    assert golden_text(name) == (GOLDEN / f"{name}.yaml").read_text(), "python -m tests.operator.write_golden"


@pytest.mark.parametrize("name", FILES)
def test_objects_fit_the_schemas_of_kubernetes(name: str) -> None:
    for manifest in objects(name):
        if manifest["apiVersion"] in STRANGERS:
            continue
        for version in VERSIONS:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_a_wrong_object_does_not_fit() -> None:
    (wrong,) = (each for each in objects("own") if each["kind"] == "Deployment")
    wrong["spec"]["template"]["spec"]["hostPid"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.30", strict=True)


@pytest.mark.parametrize("group", [OWN_GROUP, PUBLISHED_GROUP])
def test_definitions_fit_and_are_small(group: str) -> None:
    for version in VERSIONS:
        kubernetes_validate.validate(crd(group), version, strict=True)
    assert len(json.dumps(crd(group))) < MAX_APPLY_NBYTES / 4


@pytest.mark.parametrize("name", FILES)
def test_everything_belongs_to_the_kvcache(name: str) -> None:
    """Same namespace, an owner where the KVCache is in a cluster, names that are not too long, and no token of the API."""
    cache = read_kvcache(kvcache(name))
    for manifest in render(cache, Cluster(monitors=True)):
        metadata = manifest["metadata"]
        assert metadata["namespace"] == cache.namespace
        assert metadata["name"].startswith(cache.name)
        assert len(metadata["name"]) <= 63
        owners = [each["uid"] for each in metadata.get("ownerReferences", ())]
        assert owners == ([cache.uid] if cache.uid else [])
        if manifest["kind"] in ("Deployment", "StatefulSet"):
            pod = manifest["spec"]["template"]["spec"]
            assert pod["automountServiceAccountToken"] is False
            for container in pod["containers"]:
                context = container["securityContext"]
                assert context["capabilities"] == {"drop": ["ALL"]}
                assert context["readOnlyRootFilesystem"]
                assert not context["allowPrivilegeEscalation"]
                assert container["resources"]["limits"]["memory"]


def test_daemons_may_reach_a_store_that_only_a_variable_names() -> None:
    """And a mode of writing to it is no error then."""
    manifest = kvcache("published")
    variables = [
        {"name": "KVKERN_REMOTE", "value": "redis://elsewhere:6379"},
        {"name": "KVKERN_PERSIST", "value": "all"},
    ]
    for env, kinds in (([], ["Ingress", "Egress"]), (variables, ["Ingress"])):
        manifest["spec"]["cacheSpec"]["env"] = env
        cache = read_kvcache(manifest)
        assert not cache.errors
        policy = next(each for each in render(cache) if each["kind"] == "NetworkPolicy")
        assert policy["spec"]["policyTypes"] == kinds


def test_two_cache_pods_never_share_a_node() -> None:
    for name in FILES:
        (found,) = (each for each in objects(name) if each["kind"] == "Deployment")
        spec = found["spec"]
        assert spec["strategy"]["rollingUpdate"]["maxSurge"] == 0
        (term,) = spec["template"]["spec"]["affinity"]["podAntiAffinity"][
            "requiredDuringSchedulingIgnoredDuringExecution"
        ]
        assert term["topologyKey"] == "kubernetes.io/hostname"
        assert term["labelSelector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()


def kvkern(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvkern", "operator", *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=120, check=False)


def test_the_command_prints_what_the_golden_file_has() -> None:
    done = kvkern("render", "-f", str(EXAMPLES / "published.yaml"))
    assert done.returncode == 0, done.stderr
    assert done.stdout == (GOLDEN / "published.yaml").read_text()


def test_the_command_prints_definitions() -> None:
    done = kvkern("crds")
    assert [each["metadata"]["name"] for each in yaml.safe_load_all(done.stdout)] == [
        f"kvcaches.{OWN_GROUP}", f"kvcaches.{PUBLISHED_GROUP}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "no YAML at line"),
        ("- 1", "no kind"),
        ("kind: Pod", "holds no KVCache"),
        ("kind: KVCache\napiVersion: v1", "is no KVCache"),
        ("kind: KVCache\napiVersion: kvkern.io/v9\nmetadata: {name: a}", "this operator knows kvkern.io/v1alpha1"),
        ("kind: KVCache\napiVersion: kvkern.io/v1alpha1\nmetadata: {name: A_b}", "metadata.name: is 'A_b'"),
    ],
)
def test_the_command_refuses(text: str, message: str) -> None:
    done = kvkern("render", "-f", "-", text=text)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_the_image_of_another_program_is_refused_or_replaced(tmp_path: Path) -> None:
    """The published file as it is names an image without kvkern."""
    file = tmp_path / "kvcache.yaml"
    file.write_text((EXAMPLES / "published.yaml").read_text().replace("kvkern:0.1.0", "aibrix/vineyardd:20241120"))
    done = kvkern("render", "-f", str(file))
    assert done.returncode == 2
    assert "aibrix/vineyardd:20241120, which has another program in it" in done.stderr
    done = kvkern("render", "-f", str(file), "--replace-images", "kvkern:0.1.0")
    assert done.stdout == (GOLDEN / "published.yaml").read_text()
